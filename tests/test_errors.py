"""Whatever is wrong with the input: one line that names it, exit code 2, nothing overwritten."""

import dataclasses
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SIZES, write_corpus

import data
import eval as evaluation
import model
import train
from parallel import checkpoints


def T(*args):
    return lambda: train.main(["--data", "small", "--out", "run", "--steps", "2", *SIZES, *args])


def D(*args):
    return lambda: data.main(list(args))


def E(*args):
    return lambda: evaluation.main(list(args))


def vocabulary_of_a_smaller_tokenizer():
    """A tokenizer file that does not belong to the tokens beside it."""
    data.save_encoding(data.build_encoding("bytes", 0, ()), "small/encoding.json")


def other_tokenizer():
    T()()
    shutil.rmtree("small")
    D("--source", "text", "--name", "s", "--vocab_size", "290")()
    shutil.copytree("data/s", "small")


def truncated():
    Path("small/train.bin").write_bytes(Path("small/train.bin").read_bytes()[:-100])


def foreign():
    np.arange(5000, dtype=np.uint16).tofile("small/train.bin")


def data_that_changed():
    T()()
    shutil.rmtree("small")
    data.prepare(Path("small"), [str(write_corpus(Path("more"), seed=1))], tokenizer="run")


def corrupt_checkpoint():
    T()()
    next(Path("run/step-2").glob("*.distcp")).write_bytes(b"broken")


CASES = [
    # (what is prepared, the command, what the line must say)
    ("tokenizer of another run", other_tokenizer, T("--steps", "4"), "the tokenizer of run"),
    ("name outside data", None, D("--source", "text", "--name", "../../x"), "--name"),
    ("folder named stdlib", lambda: write_corpus(Path("stdlib")), D("--source", "./stdlib"), "--name"),
    ("truth value", None, T("--tie_embeddings", "perhaps"), "--tie_embeddings"),
    ("settings of another version", lambda: (T()(), Path("run/settings.json").write_text(
        '{"settings": {"colour": 1}, "model": {}}')), lambda: train.main(["--out", "run"]),
     "settings.json is not of a directory of this train.py"),
    ("settings that are none", lambda: (T()(), Path("run/settings.json").write_text("[]")),
     E("sample", "--ckpt", "run"), "settings.json is not of a directory of this train.py"),
    ("directory that looks like a checkpoint", None, T("--out", "step-1"), "step-1"),
    ("impossible sampling", lambda: T()(), E("sample", "--ckpt", "run", "--top_p", "0"), "top_p"),
    ("missing source", None, D("--source", "nowhere"), "nowhere"),
    ("empty source folder", lambda: os.mkdir("void"), D("--source", "void"), "void is empty"),
    ("empty source file", lambda: Path("void.txt").touch(), D("--source", "void.txt"), "void.txt is empty"),
    ("unknown kind of source", lambda: Path("a.pdf").write_text("x"), D("--source", "a.pdf"),
     "no file ends in one of .txt"),
    ("JSON lines without text", lambda: Path("a.jsonl").write_text('{"x": 1}\n' * 7),
     D("--source", "a.jsonl"), "7 of 7 documents"),
    ("unknown tokenizer", None, D("--tokenizer", "bpf"), "bpf"),
    ("vocabulary too small", None, D("--source", "text", "--vocab_size", "100", "--name", "w"), "vocab_size"),
    ("name already used", D("--source", "text", "--name", "n", "--tokenizer", "bytes"),
     D("--source", "text", "--name", "n", "--vocab_size", "300"), "data/n was prepared with other settings"),
    ("no network for gpt2",
     lambda: os.environ.update(TIKTOKEN_CACHE_DIR="nothing_here", HTTPS_PROXY="http://127.0.0.1:9"),
     D("--source", "text", "--tokenizer", "gpt2", "--name", "w"), "TIKTOKEN_CACHE_DIR"),
    ("data that is nothing", None, T("--data", "nowhere"), "nowhere"),
    ("data that changed", data_that_changed, T("--steps", "4"), "is not what run was made with"),
    ("directory that cannot be written", None, T("--out", "/proc/run"), "/proc/run"),
    ("truncated token file", truncated, T(), "train.bin is corrupt"),
    ("foreign token file", foreign, T(), "train.bin is not a token file"),
    ("token beyond the vocabulary", None, T("--vocab_size", "128"), "vocab_size (128)"),
    ("tokenizer of other tokens", vocabulary_of_a_smaller_tokenizer, T(), "encoding.json does not fit"),
    ("broken tokenizer", lambda: (T()(), Path("run/encoding.json").write_text("{}")),
     E("sample", "--ckpt", "run"), "encoding.json is not a tokenizer"),
    ("impossible size", None, T("--head_dim", "7"), "head_dim"),
    ("zero steps", None, T("--steps", "0"), "steps"),
    ("learning rate that is no number", None, T("--lr", "nan"), "lr"),
    ("steps that are no number", None, T("--steps", "many"), "--steps"),
    ("sequence longer than the context", None, T("--seq_len", "65"), "seq_len (65)"),
    ("sequence longer than the corpus", None, T("--max_seq_len", "9999999", "--seq_len", "9999999"),
     "seq_len"),
    ("batch that does not divide", None, T("--accumulate", "3"), "accumulate (3)"),
    ("unknown gate", None, T("--gate", "softmox"), "gate"),
    ("unknown balance", None, T("--balance", "lbo"), "balance"),
    ("unknown dtype", None, T("--dtype", "float8"), "dtype"),
    ("switch of 0", None, T("--switch", "0"), "switch"),
    ("switch beyond the run", None, T("--switch", "1.5"), "switch_fraction must be at most 1, got 1.5"),
    ("temperature of 0", None, T("--balance", "top1", "--temperature", "0"), "temperature must be above 0"),
    ("negative bias rate", None, T("--balance", "loss-free", "--bias_rate", "-0.1"), "bias_rate"),
    ("choices above the experts", None, T("--top_k_choices", "1,7"), "top_k_choices"),
    ("no choices", None, T("--top_k_choices", ""), "--top_k_choices"),
    ("empty choice", None, T("--top_k_choices", "1,,2"), "--top_k_choices"),
    ("choices and a schedule", None, T("--top_k_choices", "1,2", "--initial_top_k", "2"), "without initial"),
    ("choices and quantiles", None, T("--top_k_choices", "1,2", "--balance", "quantile"), "without initial"),
    ("negative momentum", None, T("--optimizer", "muon", "--momentum", "-1"), "momentum must be"),
    ("a weight for no loss", None, T("--balance", "quantile", "--lbl_coef", "1"), "lbl_coef has no meaning"),
    ("growth to fewer experts", T(), T("--init_from", "run", "--out", "next", "--n_expert", "4"),
     "n_expert (4) must be a multiple of the 6"),
    ("growth to no multiple", T(), T("--init_from", "run", "--out", "next", "--n_layer", "3"),
     "n_layer (3) must be a multiple of the 2"),
    ("growth to another width", T(), T("--init_from", "run", "--out", "next", "--n_layer", "4", "--d_model",
                                       "32"), "d_model (32) must be that of run"),
    ("list entry of 0", None, T("--initial_top_k", "2,0"), "initial_top_k"),
    ("typed list longer than the layers", None, T("--initial_top_k", "4,4,4"), "initial_top_k"),
    ("list entry above the experts", None, T("--initial_top_k", "9"), "initial_top_k"),
    ("list that is no list", None, T("--initial_top_k", "a,b"), "--initial_top_k"),
    ("unknown setting", None, T("--batchsize", "4"), "unrecognized arguments: --batchsize 4"),
    ("unknown preset", None, T("--preset", "labtop"), "preset 'labtop' is unknown; there are laptop"),
    ("unknown device", None, T("--device", "tpu"), "device"),
    ("run made with another seed", lambda: T()(), T("--seed", "5"), "run was made with seed 0, not 5"),
    ("run made with another model", lambda: T()(), T("--n_expert", "4"), "run was made with n_expert"),
    ("directory of something else", lambda: (os.mkdir("run"), Path("run/thesis.txt").write_text("all of it")),
     T(), "run is not empty"),
    ("init_from nothing", None, T("--init_from", "nowhere"), "nowhere"),
    ("corrupt checkpoint", corrupt_checkpoint, E("sample", "--ckpt", "run"), "corrupt"),
    ("evaluation of nothing", None, E("loss", "--ckpt", "nowhere"), "nowhere"),
    ("run without a checkpoint", lambda: (T()(), [shutil.rmtree(p) for p in Path("run").glob("step-*")]),
     E("sample", "--ckpt", "run"), "no checkpoint"),
    ("unknown command", None, E("los"), "los"),
    ("option of another command", None, E("routing", "--ckpt", "run"),
     "unrecognized arguments: --ckpt"),
    ("routing of another vocabulary", lambda: (T()(), data.prepare(Path("big"), ["text"], vocab_size=400),
                                               os.remove("big/encoding.json")),
     E("routing", "run", "--data", "big"), "big/encoding.json"),
    ("routing of nothing", None, E("routing", "nowhere"), "nowhere"),
    ("routing without held-out text", lambda: (T()(), os.remove("small/val.bin")), E("routing", "run"),
     "small has no held-out text"),
    ("held-out text as the data", lambda: T()(), E("routing", "run", "--data", "small/val.bin"),
     "takes a folder"),
    ("routing without matplotlib", lambda: (T()(), sys.modules.update({"matplotlib.figure": None})),
     E("routing", "run", "--png", "p"), "pip install -e '.[plot]'"),
    ("pictures into a file", lambda: (pytest.importorskip("matplotlib", reason="extra plot"), T()()),
     E("routing", "run", "--png", "small/val.bin"), "File exists"),
]


@pytest.fixture
def workshop(corpus, in_folder, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", os.environ.get("TIKTOKEN_CACHE_DIR", ""))
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    monkeypatch.setattr(data.tiktoken.registry, "ENCODINGS", {})  # tiktoken keeps what it loaded once
    shutil.copytree(corpus, "small")
    write_corpus(Path("text"))
    hidden = sys.modules.pop("matplotlib.figure", None)
    yield in_folder
    sys.modules.pop("matplotlib.figure", None)                    # a case has hidden it
    sys.modules.update({"matplotlib.figure": hidden} if hidden else {})


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("prepare, command, words", [case[1:] for case in CASES],
                         ids=[case[0] for case in CASES])
def test_one_line_and_exit_code_2(workshop, refused, prepare, command, words):
    if prepare:
        prepare()
    before = contents(workshop)
    refused(lambda _: command(), [], words)
    assert contents(workshop) == before


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


def test_a_console_without_unicode_shows_what_it_can(finished, monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    evaluation.main(["routing", str(finished)])
    shown.flush()
    assert b"layer 1" in shown.buffer.getvalue()


@pytest.mark.parametrize("full", [True, False])
def test_a_console_that_takes_nothing_ends_nothing(corpus, tmp_path, full):
    """A full one, and a pipe whose reader has gone, as tee has after Ctrl-C."""
    command = [sys.executable, ROOT / "train.py", "--data", corpus, "--out", tmp_path / "run", "--steps", "2"]
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "wb") if full else os.fdopen(writer, "wb") as shown:
        assert not subprocess.run([*command, *SIZES], stdout=shown, stderr=shown).returncode
    assert checkpoints(tmp_path / "run")[-1] == 2
