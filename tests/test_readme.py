"""The README's commands are commands that the programs take, and its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import parallel
import train
from model import PRESETS, count_parameters, flops_per_token, state_bytes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```\w*\n(.*?)```", README, re.S)
VARIABLES = dict(re.findall(r'^(\w+)="(.*)"$', "\n".join(BLOCKS), re.M)) | {"seed": "0"}
COMMANDS = sorted({re.sub(r"\$(\w+)", lambda m: VARIABLES[m[1]], line.split("#")[0].strip())
                   for block in BLOCKS for line in re.sub(r"\\\n\s*", "", block).splitlines()
                   if re.match(r"\s*(python (train|eval|data|model|tests/bench)\.py|torchrun )", line)})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command, in_folder, monkeypatch):
    """Every command line is parsed by its own program, and train.py's settings are possible ones."""
    import data
    import eval as evaluation
    import model
    launcher, program, *args = shlex.split(command)
    world = 1
    if launcher == "torchrun":
        launched = get_args_parser().parse_args([program, *args])
        program, args = launched.training_script, launched.training_script_args
        world = int(launched.nnodes.split(":")[-1]) * int(launched.nproc_per_node)
    if program == "train.py":
        typed = train.parse(args)
        if not typed.get("init_from"):                            # needs the run that it names
            settings, config, _ = train.resolve(typed)
            parallel.check_layout(world, settings.ep, settings.replicate, config.n_expert, "cpu")
        return
    if program == "tests/bench.py":
        import bench
        assert bench.parse(args).rounds
        return
    main = {"data.py": data, "eval.py": evaluation, "model.py": model}[program].main

    class Parsed(Exception):
        pass
    real = data.argparse.ArgumentParser.parse_known_args

    def parse(self, *rest):
        settings = real(self, *rest)
        if self.prog == program and not settings[1]:              # subcommands have a longer name
            raise Parsed
        return settings
    monkeypatch.setattr(data.argparse.ArgumentParser, "parse_known_args", parse)
    with pytest.raises(Parsed):
        main(args)


def test_there_are_commands_and_files():
    assert len(COMMANDS) > 8
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path


def number(cell):
    """The last number of a cell, with its unit."""
    digits, unit = re.findall(r"([\d.]+) ?([KMGB]?)", cell)[-1]
    return float(digits) * {"": 1, "K": 1024, "M": 1e6, "G": 1e9, "B": 1e9}[unit]


@pytest.mark.parametrize("column, preset", list(enumerate(PRESETS)))
def test_numbers_to_know_are_those_of_the_code(column, preset):
    table = README.split("## Numbers to know")[1].split("\n* ")[0]
    cells = {row.split("|")[1].strip().split(":")[0].split(",")[0]: row.split("|")[2 + column] for row in
             table.splitlines() if row.count("|") == 6}
    config, T = PRESETS[preset], train.TRAINING[preset].get("seq_len", train.Settings.seq_len)
    total, active, core = count_parameters(config)
    expert = 3 * config.d_model * config.d_expert
    sent = 4 * config.d_model * 2
    want = {"parameters": total, "one expert": expert, "tokens in a sequence": T,
            "a token makes use of": active, ".. without embedding and output tables": core,
            "FLOPs per token": flops_per_token(config, T),
            "state of training": state_bytes(config) * (16 if preset == "laptop" else 18) // 18,
            "a checkpoint": 12 * total,
            "an exported model": 4 * total, "to experts on other GPUs and back": sent,
            ".. per token in all layers": sent * config.n_layer}
    for name, value in want.items():
        found = cells[name].replace(",", "").split("=")[-1]
        assert number(found) == pytest.approx(value, rel=0.035), (name, found, value)
    share = cells["all experts"].replace(",", "")
    assert int(share.split()[-2]) == round(100 * expert * config.n_expert * config.n_layer / total)
    parts = [config.n_layer * expert,
             config.n_layer * (2 * config.n_head + 2 * config.n_kv_head) * config.head_dim * config.d_model
             + config.n_layer * config.n_head * config.head_dim * T,
             config.vocab_size * config.d_model, config.n_layer * config.n_expert * config.d_model]
    shares = next(cell for name, cell in cells.items() if name.startswith(".. of which experts"))
    assert [int(n) for n in shares.split("/")] == [round(600 * n / want["FLOPs per token"]) for n in parts]
