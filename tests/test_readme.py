"""README and docs: programs take their commands, links lead somewhere, the arithmetic is the code's."""

import importlib
import inspect
import re
import shlex
from dataclasses import replace
from textwrap import indent

import pytest
from conftest import ROOT, rows, small_run
from torch.distributed.run import get_args_parser

import model
import parallel
import train
from model import PRESETS, count_parameters, flops_per_token

PAGES = {path: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
README = PAGES[ROOT / "README.md"]
FENCE = re.compile(r"```\w*\n(.*?)```", re.S)
CODE, TEXT = FENCE.findall("\n".join(PAGES.values())), FENCE.sub("", "\n".join(PAGES.values()))
VARIABLES = dict(re.findall(r'^(\w+)="(.*)"$', "\n".join(CODE), re.M)) | {"seed": "0"}


def find_commands():
    lines = [line for block in CODE for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", TEXT)
              if not re.search(r"\b[A-Z]+\b", code)]              # NAME stands for something
    starts = r".*?((?:python (?:\w+|tests/bench)\.py|torchrun --.* train.py).*)"
    found = {m[1].split(" #")[0].strip() for m in (re.fullmatch(starts, line) for line in lines) if m}
    return sorted(re.sub(r"\$(\w+)", lambda m: VARIABLES[m[1]], command) for command in found
                  if " .." not in command)


@pytest.mark.parametrize("command", find_commands())
def test_commands_are_understood(command, in_folder, monkeypatch):
    """Every command line is parsed by its own program, and train.py's settings are possible ones."""
    launcher, program, *args = shlex.split(command)
    world = 1
    if launcher == "torchrun":
        launched = get_args_parser().parse_args([program, *args])
        program, args = launched.training_script, launched.training_script_args
        world = int(launched.nnodes.split(":")[-1]) * int(launched.nproc_per_node)
    if program == "train.py":
        typed = train.parse(args)
        if not typed.get("init_from"):                            # needs the run that it names
            settings, config, *_ = train.resolve(typed)
            parallel.check_layout(world, settings.ep, settings.replicate, config.n_expert, "cpu")
        return
    if program == "tests/bench.py":
        assert importlib.import_module("bench").parse(args).rounds
        return

    class Parsed(Exception):
        pass
    parser = train.data.argparse.ArgumentParser
    real = parser.parse_known_args

    def parse(self, *rest):
        settings = real(self, *rest)
        if self.prog == program and not settings[1]:              # subcommands have a longer name
            raise Parsed
        return settings
    monkeypatch.setattr(parser, "parse_known_args", parse)
    with pytest.raises(Parsed):
        importlib.import_module(program.removesuffix(".py")).main(args)


def test_the_pages_are_short_and_their_links_lead_somewhere():
    assert len(find_commands()) > 50
    assert len(README.splitlines()) <= 330 and len(README.split()) <= 2500
    for path, page in PAGES.items():
        for target in re.findall(r"\]\((?!http)([^)]+)\)", page):
            file, _, anchor = target.partition("#")
            there = (path.parent / file).resolve() if file else path
            assert there.exists(), target
            titles = re.findall(r"^#+ (.*)$", PAGES.get(there, ""), re.M)
            anchors = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
            assert not anchor or anchor in anchors, target
    for picture in ROOT.glob("docs/*.png"):
        assert any(f"({picture.name})" in page or f"(docs/{picture.name})" in page for page in PAGES.values())


def test_what_is_said_of_files_is_so():
    """Sizes within a tenth; functions and classes of "Fork it" are where it says."""
    for name, lines in re.findall(r"^\| \[(\w+\.py)\]\(\w+\.py\) \| (\d+) \|", README, re.M):
        assert len((ROOT / name).read_text().splitlines()) == pytest.approx(int(lines), rel=0.1), name
    table = README.split("### Fork it")[1].split("\n\n")[1]
    for place in re.findall(r"(\w+)\.py: ((?:`[\w.]+`(?:, )?)+)", table):
        module = importlib.import_module(place[0])
        for name in re.findall(r"`([\w.]+)`", place[1]):
            found = module
            for part in name.split("."):
                found = getattr(found, part)


def train_with_a_shared_expert(argv):
    """train.main, in which MoE has README's lines as they stand there."""
    init, forward = re.search(r"```python\n# MoE.__init__.*?\n(.*?)\n# MoE.forward.*?\n(.*?)```", README,
                              re.S).groups()
    real, source, last = model.MoE, inspect.getsource(model.MoE), "self.experts = Experts(config)\n"
    source = source[:source.rindex("        return ")] + indent(forward, " " * 8)
    source = source.replace(last, last + indent(init, " " * 8) + "\n")
    exec(source, fork := vars(model) | {"replace": replace})
    try:
        model.MoE = fork["MoE"]
        train.main(argv)
    finally:
        model.MoE = real


def test_the_shared_expert_trains_on_one_process_and_on_two(ranks, corpus, tmp_path):
    """With the preset's own optimizer."""
    argv = small_run(corpus, tmp_path / "one", "--optimizer muon --d_expert 6 --steps 3 --accumulate 2")
    train_with_a_shared_expert(argv)
    ranks(2, train_with_a_shared_expert, [*argv, "--out", str(tmp_path / "two"), "--ep", "2"])
    one, two = ([row["loss"] for row in rows(tmp_path / out)] for out in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-4) and len(one) == 3


def number(cell):
    """The last number of a cell, with its unit."""
    digits, unit = re.findall(r"([\d.]+) ?([KMGB]?)", cell.replace(",", ""))[-1]
    return float(digits) * {"": 1, "K": 1024, "M": 1e6, "G": 1e9, "B": 1e9}[unit]


@pytest.mark.parametrize("column, preset", list(enumerate(PRESETS)))
def test_numbers_to_know_are_those_of_the_code(column, preset):
    table = PAGES[ROOT / "docs/scaling.md"].split("## Numbers to know")[1].split("\n* ")[0]
    cells = {row.split("|")[1].strip().split(",")[0]: row.split("|")[2 + column]
             for row in table.splitlines() if row.count("|") == 6}
    config, T = PRESETS[preset], train.TRAINING[preset].get("seq_len", train.Settings.seq_len)
    total, active, core = count_parameters(config)
    muon = ("qkv.weight", "out.weight", "w_in", "w_out") if train.TRAINING[preset].get("optimizer") else ()
    matrices = sum(n for name, n in model.parameter_sizes(config).items() if name.endswith(muon))
    moments = 8 * total - 4 * matrices
    want = {"parameters": total, "one expert": 3 * config.d_model * config.d_expert,
            "tokens in a sequence": T, "a token makes use of": active,
            ".. without embedding and output tables": core,
            "FLOPs per token": flops_per_token(config, T), "a checkpoint": 4 * total + moments,
            "state of training": (8 if preset == "laptop" else 10) * total + moments,
            "to experts on other GPUs and back": 8 * config.d_model}
    for name, value in want.items():
        assert number(cells[name]) == pytest.approx(value, rel=0.035), (name, cells[name], value)
