"""Forks, foreign files, poor file systems, clusters: right, or refused in one line."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENV, ROOT, SIZES, curve, prepared, rows, small, small_run, train_with, write_corpus
from torch.overrides import TorchFunctionMode

import data
import eval as evaluation
import model as model_module
import parallel
import train
from model import Block, Model

# --- forks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("add", [
    lambda block: block.register_parameter("scale", torch.nn.Parameter(torch.zeros(3))),
    lambda block: block.register_buffer("table", torch.arange(3.0))], ids=["parameter", "buffer"])
def test_values_of_a_constructor_are_not_thrown_away_in_silence(monkeypatch, add):
    class Fork(Block):
        def __init__(self, config):
            super().__init__(config)
            add(self)
    monkeypatch.setattr(model_module, "Block", Fork)
    for make in (lambda: Model(small()), lambda: parallel.build_model(
            small(), parallel.SINGLE_PROCESS, "cpu", torch.float32, 0)):
        with pytest.raises(ValueError, match=r"blocks\.0\.(scale|table) has no initial values: add a rule"):
            make()


@pytest.mark.parametrize("error", [ValueError("mine"), OSError("mine"), RuntimeError("no gloo for mine")])
def test_an_error_of_a_fork_is_a_traceback(corpus, tmp_path, monkeypatch, error):
    """.. also under torchrun; what a user typed is a line, which says how to see one."""
    def broken(*args):
        raise error
    monkeypatch.setattr(train, "explain", lambda *args, real=train.explain:
                        monkeypatch.setenv("RANK", "0") or real(*args))
    with pytest.raises(type(error), match="mine"):
        train_with(small_run(corpus, tmp_path / "run", "--steps 2"), broken)


class DropoutBlock(Block):
    """A fork with dropout."""

    def __init__(self, config):
        super().__init__(config)
        self.dropout = torch.nn.Dropout(0.3)

    def forward(self, x, *args, **kwargs):
        y, *statistics = super().forward(x, *args, **kwargs)
        return x + self.dropout(y - x), *statistics


def test_dropout_is_drawn_by_the_step_and_not_at_all_in_validation(corpus, tmp_path, monkeypatch):
    """The same held-out loss twice; resumed bit for bit; recomputed as not recomputed."""
    monkeypatch.setattr(model_module, "Block", DropoutBlock)
    how = "--steps 8 --save_every 4 --keep 9 --eval_every 4 --dtype float32"
    for name, more in (("whole", ""), ("recomputed", "--activation_checkpointing true")):
        train.main(small_run(corpus, tmp_path / name, f"{how} {more}"))
    assert curve(tmp_path / "whole") == curve(tmp_path / "recomputed")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/step-8")
    train.main(["--out", str(tmp_path / "cut")])
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    twice = [evaluation.compare_losses([tmp_path / "whole"])[0][-1][1] for _ in range(2)]
    assert twice[0] == twice[1] == pytest.approx(rows(tmp_path / "whole")[-1]["val_loss"], rel=1e-6)


class ScaleBlock(Block):
    """A fork with a parameter more."""

    def __init__(self, config):
        super().__init__(config)
        self.scale_norm = model_module.RMSNorm(config.d_model)


def test_new_parameters_of_a_fork_start_from_a_run(finished, corpus, tmp_path, monkeypatch, capsys, refused):
    argv = ["--data", corpus, "--init_from", finished, "--steps", "2", "--device", "cpu", "--out"]
    with monkeypatch.context() as patch:
        patch.setattr(model_module, "Block", ScaleBlock)
        train.main(list(map(str, [*argv, tmp_path / "fork"])))
        said = "lacks model.blocks.0.scale_norm.weight, model.blocks.1.scale_norm.weight: they keep their"
        assert said in capsys.readouterr().out
    argv[3] = tmp_path / "fork"
    refused(train.main, [*argv, tmp_path / "back"], "holds model.blocks.0.scale_norm.weight, .., which this")


@pytest.mark.parametrize("part", ["settings", "model"])
def test_a_run_of_newer_code_is_not_gone_on_with_as_another(finished, tmp_path, refused, part):
    out = shutil.copytree(finished, tmp_path / "run")
    saved = json.loads((out / "settings.json").read_text())
    saved[part]["capacity_factor"] = 2
    (out / "settings.json").write_text(json.dumps(saved))
    refused(train.main, ["--out", out, "--steps", "20"], "capacity_factor")
    if part == "model":
        refused(evaluation.main, ["sample", "--ckpt", out], "capacity_factor")


def test_the_readmes_shared_expert_trains_on_one_process_and_on_two(corpus, tmp_path):
    """Its lines as they stand there, with the preset's own optimizer."""
    code = re.search(r"```python\n# MoE.__init__.*?\n(.*?)\n# MoE.forward.*?\n(.*?)```",
                     (ROOT / "README.md").read_text(), re.S)
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    source = (tmp_path / "model.py").read_text().replace("import dataclass, ", "import dataclass, replace, ")
    init, end = "        self.experts = Experts(config)\n", source.index("class Experts(")
    start = source.rindex("        return (out.sum(1)", 0, end)
    source = (source[:start] + "".join(f"        {line}\n" for line in code[2].splitlines())
              + source[source.index("\n", start) + 1:]).replace(init, f"{init}        {code[1]}\n", 1)
    (tmp_path / "model.py").write_text(source)
    env, argv = ENV | {"PYTHONPATH": str(tmp_path)}, small_run(corpus, "one", "--optimizer muon --d_expert 6")
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for launch, more in (([], []), (two, ["--out", "two", "--ep", "2"])):
        command = [sys.executable, *launch, "train.py", *argv, "--steps", "3", "--accumulate", "2", *more]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    losses = [[row["loss"] for row in rows(tmp_path / out)][:3] for out in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 3


def test_the_commit_is_that_of_this_code(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text("x = 1\n")
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))

    def git(*args):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=b", *args], cwd=tmp_path, check=True,
                       capture_output=True)
    assert train.commit() is None
    git("init")
    assert train.commit() is None                                 # a repository of something else
    git("add", "train.py")
    git("commit", "-m", "x")
    assert re.fullmatch(r"[0-9a-f]{40}", train.commit())
    (tmp_path / "train.py").write_text("x = 2\n")
    assert train.commit().endswith(" + changes")


def test_a_resumed_run_says_with_what(finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    train.main(["--out", str(out), "--steps", "14"])
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    again, = [line for line in lines[1:] if "resumed" in line]
    assert again["step"] == 12 and again["resumed"].keys() <= lines[0].keys()
    assert [row["step"] for row in rows(out)] == list(range(1, 15))


# --- file systems -----------------------------------------------------------------------------------------

def test_a_file_system_without_fsync_of_folders_or_locks(corpus, tmp_path, monkeypatch, capsys):
    real = os.fsync

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="cannot be flushed"):
        train.main(small_run(corpus, tmp_path / "run", "--steps 2"))
    assert parallel.checkpoints(tmp_path / "run")[-1] == 2
    assert capsys.readouterr().err.count("no lock protects") == 1


def test_a_second_start_that_waited_changes_nothing(corpus, tmp_path, monkeypatch, refused):
    """It was planned before another process trained the run."""
    argv, real = small_run(corpus, tmp_path / "run", "--steps 2"), parallel.build_model

    def overtaken(*args):
        monkeypatch.setattr(parallel, "build_model", real)
        train.main(argv)
        return real(*args)
    monkeypatch.setattr(parallel, "build_model", overtaken)
    refused(lambda argv: train.main(argv), argv + ["--lr", "0.5"], "another process has changed")
    assert parallel.read_settings(tmp_path / "run")["settings"]["lr"] != 0.5
    assert len(rows(tmp_path / "run")) == 2


def test_a_log_is_never_cut_to_nothing(finished, corpus, tmp_path, refused):
    """Of somebody else, or of a run whose checkpoints are gone."""
    (tmp_path / "log.jsonl").write_text('{"step": 1, "mine": 1}\n')
    refused(train.main, small_run(corpus, tmp_path, "--steps 2"), "is not empty")
    out = shutil.copytree(finished, tmp_path / "run")
    for step in out.glob("step-*"):
        shutil.rmtree(step)
    old = (out / "log.jsonl").read_bytes()
    train.main(["--out", str(out), "--steps", "2"])
    assert [path.read_bytes() for path in out.glob("log-*.jsonl")] == [old] and len(rows(out)) == 2


@pytest.mark.parametrize("harm", [
    lambda raw: raw.replace(b"\n", b"\r\n"), lambda raw: raw[:-7], lambda raw: raw + b'{"step": 13, "lo',
    lambda raw: raw.replace(b"\n", b"\n\n")], ids=["windows", "torn", "torn later", "blank rows"])
def test_a_log_that_was_changed_stays_readable(finished, tmp_path, harm):
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "log.jsonl").write_bytes(harm((out / "log.jsonl").read_bytes()))
    train.main(["--out", str(out), "--steps", "14"])
    steps = [row["step"] for row in rows(out)]
    assert steps[-2:] == [13, 14] and steps[:11] == list(range(1, 12)) and len(set(steps)) == len(steps)


@pytest.mark.parametrize("streams", [">&- 2>&- <&-"])
def test_closed_streams_end_nothing(corpus, tmp_path, streams):
    argv = " ".join(small_run(corpus, tmp_path / "run", "--steps 2"))
    write_corpus(tmp_path / "text", files=3)
    for command in ("data.py --source text --tokenizer bytes", f"train.py {argv}",
                    f"eval.py chat --ckpt {tmp_path / 'run'}"):
        line = f"{sys.executable} {ROOT}/{command} {streams}"
        done = subprocess.run(line, shell=True, cwd=tmp_path, env=ENV, stdin=subprocess.DEVNULL)
        assert done.returncode == 0


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"])
def test_a_clusters_variables_without_a_rank(corpus, tmp_path, monkeypatch, refused, name):
    monkeypatch.setenv(name, "2")
    monkeypatch.delenv("RANK", raising=False)
    refused(train.main, small_run(corpus, tmp_path / "run"), f"{name} is 2, but nothing tells")


class NoFloat64(TorchFunctionMode):
    """MPS: no tensor of the device becomes float64, but those fetched with cpu()."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if function is torch.Tensor.cpu:
            out = out.clone()
            out.fetched = True
        if function is torch.Tensor.double and not hasattr(args[0], "fetched"):
            raise TypeError("Cannot convert a MPS Tensor to float64")
        return out


def test_validation_needs_no_float64_on_the_device():
    tokens = np.random.default_rng(0).integers(0, 64, 200).astype(np.uint16)
    with NoFloat64():
        evaluation.validate(Model(small()), data.Sampler(tokens, 16, 0), 1, rows=3)


HOSTILE = ["[]", "7", "{}", "null", '"x"', '{"settings": 3, "model": [1], "ranks": 5, "name": {}}',
           "[" * 3000, b"\xff\xfe\x00", '{"pattern": "(", "ranks": [null], "name": "n"}']


@pytest.mark.parametrize("content", HOSTILE, ids=range(len(HOSTILE)))
def test_json_of_another_shape_is_one_line(finished, corpus, tmp_path, refused, content):
    raw = content if isinstance(content, bytes) else content.encode()
    for file in ("run/settings.json", "run/encoding.json", "run/step-12/meta.json",
                 "run/step-12/manifest.json", "data/meta.json", "data/encoding.json"):
        for name, source in (("run", finished), ("data", corpus)):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            shutil.copytree(source, tmp_path / name)
        (tmp_path / file).write_bytes(raw)
        argv = ["--data", tmp_path / "data", "--out", tmp_path / "run", "--steps", "20"]
        if "step-12" in file:
            refused(evaluation.main, ["sample", "--ckpt", tmp_path / "run"], Path(file).name)
        else:
            refused(train.main, argv, Path(file).name)


@pytest.mark.parametrize("main, argv, words", [
    (train.main, ["--seed", str(2 ** 70)], "seed must be"),
    (train.main, ["--d_model", str(2 ** 63)], "d_model must be"),
    (train.main, ["--device", "cpu:x"], "device"), (train.main, ["--steps", "1" * 30], "steps must be"),
    (evaluation.main, ["sample", "--tokens", "-100"], "tokens must be above 0"),
    (evaluation.main, ["loss", "--top_k", "1,99"], "top_k must be from 1 to 6"),
    (evaluation.main, ["sample", "--prompt", "word " * 99], "trained on 16 at a time")])
def test_numbers_beyond_all_bounds(finished, corpus, tmp_path, refused, main, argv, words):
    more = small_run(corpus, tmp_path / "run") if main is train.main else []
    refused(main, [*more, *argv] if more else [*argv, "--ckpt", finished], words)
    evaluation.main(["sample", "--ckpt", str(finished), "--temperature", "1e-320", "--tokens", "3"])


def test_weights_that_are_not_finite_are_said(corpus, tmp_path):
    run = prepared(*small_run(corpus, tmp_path / "run", "--steps 2"))
    with torch.no_grad():
        for p in run.masters.named.values():
            p.fill_(float("nan"))
    assert all(np.isnan(rank) for rank in train.stable_ranks(run.masters))
    with pytest.raises(ValueError, match="not finite"):
        evaluation.generate(run.model, torch.zeros(1, 2, dtype=torch.int64), 3)


def test_tokens_beyond_the_vocabulary_and_other_held_out_text(finished, corpus, tmp_path, refused):
    folder = shutil.copytree(corpus, tmp_path / "data")
    (folder / "meta.json").unlink()
    raw = (folder / "val.bin").read_bytes()
    (folder / "val.bin").write_bytes(raw[:-2] + b"\x05\x00")
    argv = ["--data", folder, "--out", shutil.copytree(finished, tmp_path / "run"), "--steps", "20"]
    refused(train.main, argv, "is not what")
    (folder / "val.bin").write_bytes(raw[:-2] + b"\xff\xff")
    refused(train.main, small_run(folder, tmp_path / "new"), "vocab_size (320) is below the 65536")


def test_a_tokenizer_that_leaves_text_out_is_refused(tmp_path, capsys):
    ranks = {bytes([i]): i for i in range(256)}
    with pytest.raises(ValueError, match="leaves text out"):
        data.make_encoding("n", r"\p{L}+|\p{N}+", ranks)
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    evaluation.save_tokenizer(data.build_encoding("bytes"), tmp_path, 64)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    saved["added_tokens"].append({"id": 300, "content": "<think>", "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    assert transformers and data.load_encoding(tmp_path)
    assert "<think>, is read as text here" in capsys.readouterr().err


def test_folders_of_links_pipes_and_a_thousand_levels(tmp_path):
    write_corpus(tmp_path / "text", files=2)
    os.mkfifo(tmp_path / "text/pipe.txt")
    os.symlink("/dev/zero", tmp_path / "text/zero.txt")
    os.symlink("self", tmp_path / "text/self")
    deep, here = tmp_path / "text", os.getcwd()
    try:
        os.chdir(deep)
        for _ in range(900):
            os.mkdir("d")
            os.chdir("d")
    finally:
        os.chdir(here)
    assert len(data.find_files([str(tmp_path / "text")], False)) == 2
    with pytest.raises(ValueError, match="is empty, or missing"):
        data.find_files([str(tmp_path / "text/pipe.txt")], False)


def test_an_export_that_fails_half_way_is_not_in_the_way(finished, tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="needs the extra hf")
    argv = ["export", "--ckpt", str(finished), "--to", str(tmp_path / "hf")]
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "save_tokenizer", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluation.main(argv)
    assert list(tmp_path.iterdir()) == []
    evaluation.main(argv)
    assert json.loads((tmp_path / "hf/config.json").read_text())["max_position_embeddings"] == 16


def test_a_run_that_was_moved_is_not_saved_elsewhere(corpus, tmp_path, capsys):
    def moved(real, run, step, *rest):
        if step == 1:
            (tmp_path / "run").rename(tmp_path / "moved")
        return real(run, step, *rest)
    with pytest.raises(SystemExit) as end:
        train_with(small_run(corpus, tmp_path / "run", "--steps 4 --save_every 2"), moved)
    assert end.value.code == 2 and "was moved or deleted" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_validation_takes_no_more_rows_than_a_micro_batch(corpus, tmp_path, monkeypatch):
    seen, real = [], Model.forward
    monkeypatch.setattr(Model, "forward", lambda self, tokens, *args: seen.append(len(tokens)) or real(
        self, tokens, *args))
    train.main(small_run(corpus, tmp_path / "run", "--steps 1 --accumulate 4 --sample_tokens 0"))
    assert max(seen) == 2


def test_a_continued_model_computes_what_it_computed(corpus, tmp_path, capsys):
    """Before a switch, under quantile balancing, by a run with another balance: the same held-out loss."""
    first = "--steps 8 --save_every 4 --eval_every 4 --initial_top_k 3,2 --switch 0.9 --balance quantile"
    train.main(small_run(corpus, tmp_path / "first", first))
    before = rows(tmp_path / "first")[3]["val_loss"]
    capsys.readouterr()
    train.main(["--init_from", str(tmp_path / "first/step-4"), "--balance", "lbl", "--steps", "1", "--out",
                str(tmp_path / "next"), "--data", str(corpus)])
    start = float(re.search(r"step 0: held out ([\d.]+)", capsys.readouterr().out)[1])
    assert start == pytest.approx(before, abs=1e-4)


def test_conversations_from_the_beginning_and_too_little_to_hold_out(in_folder, capsys):
    """No run to tune: the preset's own steps and rate; a foreign train.bin in the folder is not looked at."""
    Path("train.bin").write_bytes(b"of nanoGPT")
    Path("a.jsonl").write_text("".join(json.dumps(
        {"instruction": f"say {i}", "output": f"{i}"}) + "\n" for i in range(6)))
    data.main(["--chats", "--source", "a.jsonl", "--tokenizer", "bytes", "--name", "a"])
    plan = train.make_plan(["--data", "data/a", *SIZES, "--out", "run"], 1)
    assert (plan.settings.steps, plan.settings.lr) == (800, train.TRAINING["laptop"]["lr"])
    train.main(["--data", "data/a", *SIZES, "--seq_len", "32", "--out", "run", "--steps", "2"])
    assert "nothing is held out" in capsys.readouterr().out and len(rows("run")) == 2


SLOW_PART = """
import os, sys, time
import data, parallel, train
def wait(*args, **kwargs):
    print("waiting", flush=True)
    time.sleep(60)
setattr({"data": data, "parallel": parallel, "train": train}[sys.argv[1]], sys.argv[2], wait)
(data if sys.argv[1] == "data" else train).main(sys.argv[3:])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("part, name", [("data", "save_encoding"), ("parallel", "build_model")])
def test_a_signal_before_the_first_step_leaves_nothing_half_made(corpus, tmp_path, part, name, number):
    (tmp_path / "slow.py").write_text(SLOW_PART)
    write_corpus(tmp_path / "text", files=3)
    argv = (["--source", "text", "--name", "x", "--tokenizer", "bytes"] if part == "data"
            else small_run(corpus, "run", "--steps 2"))
    command = [sys.executable, "slow.py", part, name, *argv]
    with subprocess.Popen(command, cwd=tmp_path, env=ENV, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        while "waiting" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(0.1)
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 1 and err.strip().splitlines()[-1] == "error: interrupted"
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob("data/*"))
    assert not list(tmp_path.glob("data/.*"))


def test_a_signal_in_the_first_validation_saves(corpus, tmp_path, monkeypatch):
    real = train.validation

    def validation(run):
        if run.step == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        return real(run)
    monkeypatch.setattr(train, "validation", validation)
    train.main(small_run(corpus, tmp_path / "run", "--steps 9"))
    assert parallel.checkpoints(tmp_path / "run") == [1]


def test_runs_of_one_name_are_two_at_wandb(corpus, tmp_path):
    ids = []
    for folder in ("a", "b"):
        train.main(small_run(corpus, tmp_path / folder / "run", "--steps 1"))
        train.main(["--out", str(tmp_path / folder / "run"), "--steps", "2"])
        ids.append(json.loads((tmp_path / folder / "run/settings.json").read_text())["wandb_id"])
    assert ids[0] != ids[1] and len(ids[0]) == 32


def test_a_damaged_row_costs_no_other_row(finished, tmp_path):
    """.. in the log's middle or its head; routing reads what is left."""
    out = shutil.copytree(finished, tmp_path / "run")
    lines = (out / "log.jsonl").read_bytes().splitlines(keepends=True)
    lines[3] = lines[3][:50] + b"\0\xff" * 20 + b"\n"
    (out / "log.jsonl").write_bytes(b"".join([b"[1]\n", *lines, b"[" * 5000 + b"\n", b'{"step": "x"}\n']))
    train.main(["--out", str(out), "--steps", "13"])
    assert [row["step"] for row in rows(out)] == [1, 2, *range(4, 14)]
    assert evaluation.read_log(out)[0]["settings"]["steps"] == 12
    evaluation.main(["routing", str(out)])


@pytest.mark.parametrize("name", ["log.jsonl", "settings.tmp", "encoding.json"])
def test_a_run_writes_through_no_link(finished, tmp_path, name):
    out, theirs = shutil.copytree(finished, tmp_path / "run"), tmp_path / "theirs.txt"
    theirs.write_text("all of it\n")
    (out / name).unlink(missing_ok=True)
    os.symlink(theirs, out / name)
    with pytest.raises(SystemExit) if name != "settings.tmp" else pytest.MonkeyPatch.context():
        train.main(["--out", str(out), "--steps", "13"])
    assert theirs.read_text() == "all of it\n"


@pytest.mark.parametrize("field, value", [("batch_size", None), ("seed", 1.5), ("keep", "x"), ("data", None),
                                          ("seq_len", 0), ("beta1", True), ("wandb", 1)])
def test_settings_of_another_type_are_named(finished, tmp_path, refused, field, value):
    out = shutil.copytree(finished, tmp_path / "run")
    saved = json.loads((out / "settings.json").read_text())
    saved["settings"][field] = value
    (out / "settings.json").write_text(json.dumps(saved))
    refused(train.main, ["--out", out, "--steps", "13"], field)


@pytest.mark.parametrize("chunks, size, whole", [
    ([((0,), (4,)), ((4,), (2,))], (6,), True), ([((0,), (4,)), ((2,), (2,))], (6,), False),
    ([((-6,), (12,))], (6,), False), ([((100,), (6,))], (6,), False), ([((0, 0), (2, 3)), ((2, 0), (2, 3))],
                                                                        (4, 3), True),
    ([((0, 0), (2, 3)), ((0, 0), (2, 3))], (4, 3), False), ([((), ())], (), True), ([], (3,), False),
    ([((0,), (3,)), ((3,), (0,))], (3,), True)])
def test_chunks_cover_a_tensor_once(chunks, size, whole):
    class Chunk:
        def __init__(self, offsets, sizes):
            self.offsets, self.sizes = offsets, torch.Size(sizes)
    assert parallel.tiles([Chunk(*chunk) for chunk in chunks], size) == whole


def test_a_frozen_matrix_trains_in_bf16(corpus, tmp_path, monkeypatch):
    class Frozen(Block):
        def __init__(self, config):
            super().__init__(config)
            self.moe.experts.w_in.requires_grad_(False)
    monkeypatch.setattr(model_module, "Block", Frozen)
    train.main(small_run(corpus, tmp_path / "run", "--steps 2 --dtype bfloat16 --d_expert 16"))
    assert len(rows(tmp_path / "run")) == 2


def test_shared_parameters_are_not_parted_in_silence(monkeypatch):
    class Shared(Model):
        def __init__(self, *args):
            super().__init__(*args)
            self.blocks[1].attn.out.weight = self.blocks[0].attn.out.weight
    monkeypatch.setattr(parallel, "Model", Shared)
    with pytest.raises(ValueError, match="share them again in Model.tie"):
        parallel.build_model(small(), parallel.SINGLE_PROCESS, "cpu", torch.float32, 0)
