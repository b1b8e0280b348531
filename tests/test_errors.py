"""Whatever is wrong with the input: one line that names it, exit code 2, nothing overwritten."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from conftest import ENV, SIZES, small_run, train_with, write_corpus

import data
import eval as evaluation
import model
import train
from parallel import checkpoints


def call(command):
    """Run a command line; a new run (train.py) is small and its data are in ./small."""
    program, *args = command.split()
    if program == "train.py":
        train.main(["--data", "small", "--out", "run", "--steps", "2", *SIZES, *args])
    elif program == "resume":
        train.main(["--data", "small", "--out", "run", "--steps", "20", *args])
    else:
        (data if program == "data.py" else evaluation).main(args)


def run(change=lambda: None):
    """Prepare the directory of a finished run, with a change."""
    def prepare(finished):
        shutil.copytree(finished, "run")
        change()
    return prepare


def saved(part, name, value):
    """.. whose settings.json has another value."""
    def change():
        content = json.loads(Path("run/settings.json").read_text())
        content[part][name] = value
        Path("run/settings.json").write_text(json.dumps(content))
    return run(change)


def other_data(tokenizer):
    shutil.rmtree("small")
    data.prepare(Path("small"), [str(write_corpus(Path("more"), seed=1))], tokenizer=tokenizer)


def end_held_out_text(last):
    os.remove("small/meta.json")
    raw = Path("small/val.bin").read_bytes()
    Path("small/val.bin").write_bytes(raw[:-2] + last)


def link(name):
    """In place of a run's file, a link to somebody else's."""
    os.rename(name, "theirs")
    os.symlink(Path("theirs").absolute(), name)


TYPED = {                                                         # and what the line must say
    "train.py --steps 0": "steps must be above 0", "train.py --steps many": "--steps",
    "train.py --lr nan": "lr must be", "train.py --batchsize 4": "unrecognized arguments: --batchsize 4",
    "train.py --tie_embeddings perhaps": "--tie_embeddings", "train.py --out step-1": "step-1",
    "train.py --vocab_size 128": "vocab_size (128)", "train.py --head_dim 7": "head_dim",
    f"train.py --d_model {2 ** 63}": "d_model must be", f"train.py --seed {2 ** 70}": "seed must be",
    "train.py --seq_len 65": "seq_len (65)", "train.py --max_seq_len 9999999 --seq_len 9999999": "seq_len",
    "train.py --accumulate 3": "accumulate (3)", "train.py --balance lbo": "balance must be one of",
    "train.py --beta2 1": "beta2 must be below 1", "train.py --switch 0": "switch",
    "train.py --switch 1.5": "switch_fraction must be at most 1, got 1.5",
    "train.py --balance loss-free --bias_rate -0.1": "bias_rate must be 0 or more, got -0.1",
    "train.py --balance quantile --lbl_coef 1": "lbl_coef has no meaning",
    "train.py --top_k_choices 1,7": "top_k_choices", "train.py --top_k_choices 1,,2": "--top_k_choices",
    "train.py --top_k_choices 1,2 --initial_top_k 2": "without initial",
    "train.py --top_k_choices 1,2 --balance quantile": "without initial",
    "train.py --initial_top_k 2,0": "initial_top_k", "train.py --initial_top_k 4,4,4": "initial_top_k",
    "train.py --initial_top_k a,b": "--initial_top_k", "train.py --preset labtop": "'labtop' is unknown",
    "train.py --device tpu": "device", "train.py --device cpu:x": "device",
    "train.py --compile true --dtype float32": "compile (true) needs --dtype bfloat16",
    "train.py --data nowhere": "nowhere", "train.py --init_from nowhere": "nowhere",
    "train.py --out /proc/run": "/proc/run", "data.py --source nowhere": "nowhere",
    "data.py --source text --name ../../x": "--name", "data.py --source ./stdlib": "--name",
    "data.py --source text --vocab_size 100 --name w": "vocab_size", "eval.py loss --ckpt nowhere": "nowhere",
    "eval.py los": "los", "eval.py routing nowhere": "nowhere", "data.py --tokenizer bpf": "bpf",
    "eval.py routing --ckpt run": "unrecognized arguments: --ckpt"}
ON_A_RUN = {
    "train.py --init_from run --out next --n_expert 4": "n_expert (4) must be a multiple of the 6",
    "train.py --init_from run --out next --n_layer 3": "n_layer (3) must be a multiple of the 2",
    "train.py --init_from run --out next --n_layer 4 --d_model 32": "d_model (32) must be that of run",
    "train.py --init_from run/step-9": "run was made with init_from",
    "train.py --seed 5": "run was made with seed 0, not 5", "train.py --n_expert 4": "made with n_expert",
    "eval.py sample --ckpt run --top_p 0": "top_p", "eval.py sample --ckpt run --tokens -100": "above 0",
    "eval.py sample --ckpt run --prompt " + 99 * "word,": "trained on 16 at a time",
    "eval.py loss --ckpt run --top_k 1,99": "top_k must be from 1 to 6",
    "eval.py routing run --data small/val.bin": "takes a folder",
    "eval.py loss --ckpt run/step-7": "run/step-7 has no checkpoint",
    "train.py --data small/val.bin": "small/val.bin is held-out text"}
SAMPLE = "eval.py sample --ckpt run"
CASES = [
    # (what is prepared, the command, what the line must say)
    *((None, *case) for case in TYPED.items()), *((run(), *case) for case in ON_A_RUN.items()),
    (run(lambda: other_data("bytes")), "resume", "the tokenizer of run"),
    (run(lambda: other_data("run")), "resume", "is not what run was made with"),
    (run(lambda: end_held_out_text(b"\5\0")), "resume", "is not what run was made with"),
    (saved("settings", "capacity", 2), "resume", "capacity, which this code lacks"),
    (saved("model", "capacity", 2), SAMPLE, "capacity"),
    (saved("model", "max_seq_len", 8), "eval.py loss --ckpt run", "run has a context of 8 tokens"),
    (saved("model", "d_model", 1 << 20), SAMPLE, "is corrupt: smaller than the model"),
    *((saved("settings", name, value), "resume", name) for name, value in {
        "batch_size": None, "seed": 1.5, "keep": "x", "data": None, "seq_len": 0, "beta1": True,
        "wandb": 1}.items()),
    (saved("settings", "optimizer", "muon"), "resume",            # whose momentum would begin at 0
     ", .., which this code's model and optimizer"),
    (lambda _: os.mkdir("void"), "data.py --source void", "void is empty"),
    (lambda _: Path("void.txt").touch(), "data.py --source void.txt", "void.txt is empty"),
    (lambda _: os.mkfifo("a.txt"), "data.py --source a.txt", "a.txt is empty, or missing"),
    (lambda _: Path("a.pdf").write_text("x"), "data.py --source a.pdf", "no file ends in one of .txt"),
    (lambda _: Path("a.jsonl").write_text('{"x": 1}\n' * 7), "data.py --source a.jsonl", "7 of 7 documents"),
    (lambda _: call("data.py --source text --name n --tokenizer bytes"),
     "data.py --source text --name n --vocab_size 300", "data/n was prepared with other settings"),
    (lambda _: os.environ.update(TIKTOKEN_CACHE_DIR="nothing_here", HTTPS_PROXY="http://127.0.0.1:9"),
     "data.py --source text --tokenizer gpt2 --name w", "TIKTOKEN_CACHE_DIR"),
    (lambda _: os.truncate("small/train.bin", 5000), "train.py", "train.bin is corrupt"),
    (lambda _: np.arange(5000, dtype=np.uint16).tofile("small/train.bin"), "train.py", "is not a token file"),
    (lambda _: end_held_out_text(b"\xff\xff"), "train.py", "vocab_size (320) is below the 65536"),
    (lambda _: data.save_encoding(data.build_encoding("bytes", 0, ()), "small/encoding.json"), "train.py",
     "encoding.json does not fit"),
    *((lambda _, name=name: os.environ.update({name: "2"}), "train.py", f"{name} is 2, but nothing tells")
      for name in ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")),
    (lambda _: os.environ.update(WORLD_SIZE="2", RANK="0"), "train.py", "but nothing tells"),
    (lambda _: (os.mkdir("run"), Path("run/thesis.txt").write_text("all")), "train.py", "run is not empty"),
    (lambda _: (os.mkdir("run"), Path("run/log.jsonl").write_text("{}\n")), "train.py", "run is not empty"),
    (run(lambda: link("run/log.jsonl")), "resume", "log.jsonl is a link"),
    (run(lambda: link("run/encoding.json")), "resume", "encoding.json is a link"),
    (run(lambda: Path("run/step-12/__0_0.distcp").write_bytes(b"broken")), SAMPLE, "corrupt"),
    (run(lambda: [shutil.rmtree(p) for p in Path("run").glob("step-*")]), SAMPLE, "no checkpoint"),
    (run(lambda: (data.prepare(Path("big"), ["text"], vocab_size=400), os.remove("big/encoding.json"))),
     "eval.py routing run --data big", "big/encoding.json"),
    (run(lambda: os.remove("small/val.bin")), "eval.py routing run --data small", "has no held-out text"),
    (run(lambda: sys.modules.update({"matplotlib.figure": None})), "eval.py routing run --png p",
     "pip install -e '.[plot]'"),
    (run(lambda: pytest.importorskip("matplotlib", reason="extra plot")),
     "eval.py routing run --png small/val.bin", "File exists"),
]


@pytest.fixture
def workshop(corpus, in_folder, monkeypatch):
    monkeypatch.setattr(data.tiktoken.registry, "ENCODINGS", {})  # tiktoken keeps what it loaded once
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)   # there again after a case has hidden it
    del sys.modules["matplotlib.figure"]
    shutil.copytree(corpus, "small")
    write_corpus(Path("text"), files=10)
    with mock.patch.dict(os.environ):
        yield in_folder


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("prepare, command, words", CASES, ids=[f"{case[1]:.60}" for case in CASES])
def test_one_line_and_exit_code_2(workshop, finished, refused, prepare, command, words):
    if prepare:
        prepare(finished)
    before = contents(workshop)
    refused(lambda _: call(command), [], words)
    assert contents(workshop) == before


HOSTILE = [b"[]", b"7", b"{}", b"null", b'"x"', b"[" * 3000, b"\xff\xfe\x00",
           b'{"settings": 3, "model": [1], "ranks": 5, "name": {}}', b'{"settings": {"x": 1}, "model": {}}',
           b'{"pattern": "(", "ranks": [null], "name": "n"}']


@pytest.mark.parametrize("file", ["run/settings.json", "run/encoding.json", "run/step-12/meta.json",
                                  "run/step-12/manifest.json", "small/meta.json", "small/encoding.json"])
def test_json_of_another_shape_is_one_line(workshop, finished, refused, file):
    run()(finished)
    command = SAMPLE if "step-12" in file else "resume"
    for content in HOSTILE:
        Path(file).write_bytes(content)
        refused(lambda _: call(command), [], Path(file).name)


@pytest.mark.parametrize("field, value", [
    ("vocab_size", 0), ("n_layer", -1), ("n_layer", 1.5), ("n_head", True), ("head_dim", 7), ("d_expert", 0),
    ("top_k", 97), ("gate", "topk"), ("rope_base", 0.0), ("norm_eps", -1e-6), ("max_seq_len", 0),
    ("n_kv_head", 3)])
def test_impossible_sizes_name_the_field(field, value):
    sizes = dataclasses.asdict(model.PRESETS["laptop"]) | {field: value}
    with pytest.raises(ValueError, match=field):
        model.ModelConfig(**sizes)


@pytest.mark.parametrize("main", [data.main, train.main, evaluation.main])
def test_help_is_readable_at_80_columns(main, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    options = [line for line in lines if line.startswith("  ") and not line.startswith("    python")]
    assert not end.value.code and len(lines) > 8 and max(map(len, options)) <= 110


def test_a_traceback_is_one_variable_away(monkeypatch):
    monkeypatch.setenv("NANOSIGMA_TRACEBACK", "1")
    with pytest.raises(ValueError, match="nowhere"):
        evaluation.main(["loss", "--ckpt", "nowhere"])


@pytest.mark.parametrize("error", [ValueError("mine"), OSError("mine"), RuntimeError("no gloo for mine")])
def test_an_error_of_a_fork_is_a_traceback(corpus, tmp_path, monkeypatch, error):
    """.. also under torchrun."""
    def broken(*args):
        raise error
    monkeypatch.setattr(train, "explain", lambda *args, real=train.explain:
                        monkeypatch.setenv("RANK", "0") or real(*args))
    with pytest.raises(type(error), match="mine"):
        train_with(small_run(corpus, tmp_path / "run", "--steps 2"), broken)


def test_a_tokenizer_that_leaves_text_out_is_refused(tmp_path, capsys):
    for pattern in (r"\p{L}+|\p{N}+", r" ?\p{L}+|\p{Nd}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"):
        with pytest.raises(ValueError, match="leaves text out"):
            data.make_encoding("n", pattern, {bytes([i]): i for i in range(256)})
    pytest.importorskip("transformers", reason="needs the extra hf")
    evaluation.save_tokenizer(data.build_encoding("bytes"), tmp_path, 64)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"].append({"id": 300, "content": "<think>", "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert data.load_encoding(tmp_path) and "<think>, is read as text here" in capsys.readouterr().err


def test_folders_of_links_pipes_and_many_levels(tmp_path):
    text = write_corpus(tmp_path / "text", files=2)
    os.mkfifo(text / "pipe.txt")
    os.symlink("/dev/zero", text / "zero.txt")
    os.symlink("self", text / "self")
    (text / "/".join("d" * 150)).mkdir(parents=True)
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(150)                                # no level takes a call
        assert len(data.find_files([str(text)], False)) == 2
    finally:
        sys.setrecursionlimit(limit)


def test_a_console_without_unicode_shows_what_it_can(finished, monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    evaluation.main(["routing", str(finished)])
    shown.flush()
    assert b"layer 1" in shown.buffer.getvalue()


def test_streams_that_take_nothing_end_nothing(corpus, in_folder):
    """Closed, full, and a pipe whose reader has gone."""
    write_corpus(Path("text"), files=3)
    Path("all.py").write_text(f"""import sys, data, train, eval
name = sys.argv[1]
data.main(["--source", "text", "--tokenizer", "bytes", "--name", name])
train.main({small_run(corpus, "run", "--steps 2")} + ["--out", name])
eval.main(["chat", "--ckpt", name])
""")
    started = {name: subprocess.Popen(f"{sys.executable} all.py {name} {streams}", shell=True, env=ENV,
                                      stdin=subprocess.DEVNULL)
               for name, streams in (("closed", ">&- 2>&- <&-"), ("full", ">/dev/full 2>&1"),
                                     ("gone", "2>&1 | true"))}
    for name, process in started.items():
        assert not process.wait(120) and checkpoints(name)[-1] == 2
