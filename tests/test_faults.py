"""What goes wrong, for real: killed, stopped and restarted processes, broken files, bad numbers.

Only NaN is injected; signals, files, limits and file systems are real."""

import errno
import json
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SIZES, train_with
from test_exact import make_run, whole

import data
import eval as evaluation
import parallel
import train
from train import train_step

ROOT = Path(train.__file__).parent
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def rows(out):
    """The log, without the speed."""
    found = evaluation.read_log(out)[1:]
    for row in found:
        del row["tokens_per_s"]
    return found


# --- killed processes -------------------------------------------------------------------------------------

def torchrun(*argv, world=2, program=ROOT / "train.py"):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world),
               "--max-restarts", "3", "--monitor-interval", "0.2", str(program), *argv]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, env=ONE_THREAD, **pipes)
    watch = threading.Timer(240, process.terminate)               # or readline() would wait for ever
    watch.daemon = True
    watch.start()
    return process


def worker(launcher, rank):
    """Process id of a rank that torchrun started."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == launcher.pid and f"\0RANK={rank}\0" in (path / "environ").read_text():
                return int(path.name)
        except (OSError, ValueError):
            continue
    raise AssertionError(f"no rank {rank}")


def wait_for_step(process, out, step, limit=120):
    log, end = out / "log.jsonl", time.monotonic() + limit
    while not (log.exists() and log.read_text().count("\n") > step):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_killed_worker_comes_back_on_the_same_curve(corpus, tmp_path):
    """kill -9 under torchrun --max-restarts, twice: bit by bit the curve of the uninterrupted run."""
    argv = ["--data", str(corpus), *SIZES, "--steps", "60", "--save_every", "7", "--ep", "2", "--eval_every",
            "30", "--balance", "loss-free"]
    with torchrun(*argv, "--out", str(tmp_path / "whole")) as process:
        assert process.wait(200) == 0, process.stderr.read()
    with torchrun(*argv, "--out", str(tmp_path / "killed")) as process:
        wait_for_step(process, tmp_path / "killed", 17)
        os.kill(worker(process, 1), signal.SIGKILL)
        shown = process.stdout.readline()
        while "from step" not in shown:
            assert process.poll() is None, process.stderr.read()
            shown = process.stdout.readline()
        wait_for_step(process, tmp_path / "killed", 40)
        os.kill(worker(process, 0), signal.SIGKILL)
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
    assert int(re.search(r"from step (\d+)", shown)[1]) % 7 == 0 and "from step" in out
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


AT_SECOND_SAVE = """
import os, signal, sys
import torch.distributed.checkpoint as dcp
sys.path.insert(0, {root!r})
real, times = dcp.FileSystemWriter.write_data, []
def write_data(self, *args):
    times.append(1)
    done = real(self, *args)
    first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if len(times) == 2 and os.environ["RANK"] == "1" and first_life:
        os.kill(os.getpid(), signal.SIGKILL)
    return done
dcp.FileSystemWriter.write_data = write_data
import train
train.main()
"""


def test_a_worker_killed_within_a_save(corpus, tmp_path):
    """The second save, at step 6, is never finished: the run goes on from step 3."""
    (tmp_path / "killer.py").write_text(AT_SECOND_SAVE.format(root=str(ROOT)))
    argv = ["--data", str(corpus), *SIZES, "--steps", "12", "--save_every", "3", "--eval_every", "12"]
    with torchrun(*argv, "--out", str(tmp_path / "whole")) as process:
        assert process.wait(200) == 0, process.stderr.read()
    with torchrun(*argv, "--out", str(tmp_path / "cut"), program=tmp_path / "killer.py") as process:
        out, err = process.communicate(timeout=200)
    assert process.returncode == 0 and "from step 3" in out, err
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert sorted(p.name for p in (tmp_path / "cut").glob("step-*")) == ["step-12", "step-9"]


@contextmanager
def two_processes(*argv, program=ROOT / "train.py"):
    """Without torchrun, which would end one when it sees what happens to the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [subprocess.Popen(
        [sys.executable, program, *argv], stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL,
        env=ONE_THREAD | {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                          "MASTER_PORT": str(port)}) for rank in "01"]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_process_that_hangs_is_an_error_with_the_step(corpus, tmp_path):
    with two_processes("--data", str(corpus), "--out", str(tmp_path / "run"), *SIZES, "--steps", "100000",
                       "--timeout", "4", "--save_every", "40") as processes:
        wait_for_step(processes[0], tmp_path / "run", 41)
        os.kill(processes[1].pid, signal.SIGSTOP)
        began = time.monotonic()
        _, err = processes[0].communicate(timeout=60)
    assert processes[0].returncode == 1 and 3 < time.monotonic() - began < 30
    step = int(re.search(r"error: rank 0: after step (\d+) another process did not answer", err)[1])
    assert step == len(rows(tmp_path / "run"))
    assert parallel.checkpoints(tmp_path / "run") == [40]
    assert not parallel.find_corruption(tmp_path / "run/step-40")


def test_a_second_interrupt_ends_a_process_that_waits_for_another(corpus, tmp_path):
    with two_processes("--data", str(corpus), "--out", str(tmp_path / "run"), *SIZES, "--steps", "100000",
                       "--timeout", "100") as processes:
        wait_for_step(processes[0], tmp_path / "run", 5)
        os.kill(processes[1].pid, signal.SIGSTOP)
        for _ in range(2):
            time.sleep(1)
            assert processes[0].poll() is None
            processes[0].send_signal(signal.SIGINT)
        _, err = processes[0].communicate(timeout=10)
    assert processes[0].returncode == 1 and err.endswith("ended at once; what was saved before is whole\n")


def twenty_steps(grid, out, write):
    """From a checkpoint of step 3, which is made first if asked -> (loss, load [L, E]) of steps 3 to 22."""
    run = make_run(grid, torch.float32, steps=100, lr=3e-3)
    if write:
        for step in range(3):
            train_step(run, step)
        parallel.save_checkpoint(out, 3, run.state(), 2, grid)
    parallel.load_checkpoint(out / "step-3", run.state(), grid)
    rows = run.corpus.train.rows
    run.corpus.train.rows = lambda first, *rest: rows(first % 60, *rest)
    steps = (train_step(run, step) for step in range(3, 23))
    return [(float(did.loss), did.statistics.load) for did in steps]


def test_another_grid_goes_on_to_rounding(ranks, tmp_path):
    """20 steps from one checkpoint: losses within 1e-6, no token to another expert."""
    want = ranks(4, twenty_steps, tmp_path, True, layout=(2, 1))[0].value
    assert want[-1][0] < want[0][0] - 0.3
    found = {"one process": twenty_steps(parallel.ALONE, tmp_path, False)}
    for world, layout in ((2, (2, 1)), (2, (1, 2)), (3, (1, 1)), (4, (4, 1))):
        found[world, layout] = ranks(world, twenty_steps, tmp_path, False, layout=layout)[0].value
    for grid, steps in found.items():
        for i, ((loss, load), (expected, its)) in enumerate(zip(steps, want)):
            flips = (load - its).abs().sum() / 2
            assert flips == 0, f"{grid}: {flips:.0f} choices differ first in step {i}"
            assert loss == pytest.approx(expected, rel=1e-6), (grid, i)


# --- broken checkpoints -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def three_checkpoints(corpus, tmp_path_factory):
    """A run of 6 steps with its checkpoints of steps 2, 4 and 6."""
    out = tmp_path_factory.mktemp("faults") / "run"
    train.main(["--data", str(corpus), "--out", str(out), *SIZES, "--steps", "6", "--save_every", "2",
                "--keep", "3"])
    return out


def cut(path, rng):
    path.write_bytes(path.read_bytes()[:rng.randrange(path.stat().st_size)])


def flip(path, rng):
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


def remove(path, rng):
    path.unlink()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("harm", [cut, flip, remove])
@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "manifest.json"])
def test_a_corrupt_checkpoint_is_set_aside(three_checkpoints, tmp_path, capsys, file, harm, seed):
    out, rng = tmp_path / "run", random.Random(seed)
    shutil.copytree(three_checkpoints, out)
    harm(out / "step-6" / file, rng)
    broken = {p.name: p.read_bytes() for p in (out / "step-6").iterdir()}
    train.main(["--out", str(out), "--keep", "2"])
    shown = capsys.readouterr()
    assert "corrupt" in shown.err and "step-6.corrupt" in shown.err and "from step 4" in shown.out
    assert parallel.checkpoints(out) == [4, 6] and rows(out) == rows(three_checkpoints)
    assert {p.name: p.read_bytes() for p in (out / "step-6.corrupt").iterdir()} == broken


def test_if_no_checkpoint_is_whole_all_are_listed(three_checkpoints, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(three_checkpoints, out)
    for step in (2, 4, 6):
        cut(out / f"step-{step}" / "__0_0.distcp", random.Random(step))
    with pytest.raises(SystemExit) as error:
        train.main(["--out", str(out)])
    last = capsys.readouterr().err.splitlines()[-1]
    assert error.value.code == 2 and all(f"step-{step}: __0_0.distcp does not" in last for step in (2, 4, 6))
    assert sorted(p.name for p in out.glob("step-*")) == [f"step-{step}.corrupt" for step in (2, 4, 6)]
    log = (out / "log.jsonl").read_text()
    with pytest.raises(SystemExit) as error:                      # nor does the next start begin at step 0
        train.main(["--out", str(out)])
    assert error.value.code == 2 and "step-4.corrupt" in capsys.readouterr().err
    assert (out / "log.jsonl").read_text() == log


def test_a_manifest_that_lists_other_files_is_corrupt(ranks, corpus, tmp_path):
    """One flipped bit makes a file's name that of another; then nothing would be known of the first."""
    argv = ["--data", str(corpus), "--out", str(tmp_path), *SIZES, "--steps", "4", "--save_every", "2"]
    assert ranks(2, train.main, argv)[0].code is None
    manifest = tmp_path / "step-4/manifest.json"
    manifest.write_text(manifest.read_text().replace('"__0_0', '"__1_0'))
    assert "__0_0.distcp does not match" in parallel.find_corruption(tmp_path / "step-4")
    cut(tmp_path / "step-4/__0_0.distcp", random.Random(0))
    train.main(["--out", str(tmp_path)])
    assert parallel.checkpoints(tmp_path) == [2, 4] and (tmp_path / "step-4.corrupt").exists()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES, errno.EIO])
def test_what_cannot_be_read_now_is_not_set_aside(three_checkpoints, tmp_path, monkeypatch, capsys, code):
    shutil.copytree(three_checkpoints, tmp_path / "run")

    def checksum(path):
        raise OSError(code, os.strerror(code), str(path))
    monkeypatch.setattr(parallel, "checksum", checksum)
    with pytest.raises(SystemExit) as error:
        train.main(["--out", str(tmp_path / "run")])
    assert error.value.code == 2 and os.strerror(code) in capsys.readouterr().err
    assert parallel.checkpoints(tmp_path / "run") == [2, 4, 6]


def test_a_resumed_log_is_bit_by_bit_the_old_one(corpus, tmp_path):
    """Also across the switch, and what a crash left."""
    argv = ["--data", str(corpus), "--out", str(tmp_path), *SIZES, "--steps", "30", "--save_every", "5",
            "--keep", "9", "--log_every", "7", "--initial_top_k", "3", "--switch", "0.5", "--balance",
            "loss-free"]
    train.main(argv)
    before = rows(tmp_path)
    for last in (25, 15, 5):
        for step in parallel.checkpoints(tmp_path):
            if step > last:
                shutil.rmtree(tmp_path / f"step-{step}")
        with open(tmp_path / "log.jsonl", "ab") as log:
            log.write(b"\0" * 200 + b"\n" + b'{"step": 3')
        train.main(argv)
        assert rows(tmp_path) == before


def test_all_ranks_fall_back_together(ranks, corpus, tmp_path):
    out = tmp_path / "run"
    argv = ["--data", str(corpus), "--out", str(out), *SIZES, "--steps", "6", "--save_every", "3", "--ep",
            "2"]
    assert ranks(4, train.main, argv)[0].code is None
    want = rows(out)
    flip(out / "step-6" / "__3_0.distcp", random.Random(0))
    first, *others = ranks(2, train.main, ["--out", str(out)])
    assert first.code is None and "step-6.corrupt" in first.err and [a.err for a in others] == [""]
    assert [r["loss"] for r in rows(out)] == pytest.approx([r["loss"] for r in want], rel=1e-5)


class Malicious:
    """What pickle would call."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_checkpoint_is_unpickled_but_descriptions_of_tensors(three_checkpoints, tmp_path):
    path, planted = tmp_path / "run/step-6", tmp_path / "planted"
    shutil.copytree(three_checkpoints, tmp_path / "run")
    (path / ".metadata").write_bytes(pickle.dumps(Malicious(planted)))
    write_manifest(path)                                          # whoever plants it can do that, too
    with pytest.raises(ValueError, match="asks for posix.mkdir"):
        evaluation.load_run(tmp_path / "run")
    assert not planted.exists()


def write_manifest(path):
    files = [p for p in path.iterdir() if p.name != "manifest.json"]
    (path / "manifest.json").write_text(json.dumps({
        p.name: parallel.checksum(p) for p in files}))


def test_what_is_no_tensor_is_not_read(tmp_path):
    """torch would unpickle a checkpoint's entry that says it is bytes."""
    torch.distributed.checkpoint.save({"model.norm.weight": Malicious(tmp_path / "planted")},
                                      checkpoint_id=str(tmp_path / "step-1"), no_dist=True)
    write_manifest(tmp_path / "step-1")
    with pytest.raises(ValueError, match="BytesStorageMetadata"):
        parallel.load_checkpoint(tmp_path / "step-1", {"model.norm.weight": torch.zeros(4)})
    assert not (tmp_path / "planted").exists()


# --- bad numbers ------------------------------------------------------------------------------------------

def everything(run):
    """All that a skipped step may not change."""
    state = parallel.training_state(run.masters, run.optimizer)
    return {name: whole(t).clone() for name, t in state.items()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in b)


def steps_with_nan(grid, bad):
    """Steps 0 to 3; the loss of rank `bad` is NaN in step 2 -> (skipped, changed) of each, counts, sequences.
    """
    run = make_run(grid, torch.float32, balance="loss-free", bias_rate=0.01, accumulate=3)
    real, found, sequences = run.model.forward, [], []
    rows = run.corpus.train.rows
    run.corpus.train.rows = lambda first, *rest: sequences.append(first) or rows(first, *rest)
    for step in range(4):
        if step == 2 and grid.rank == bad:
            run.model.forward = lambda *args: (out := real(*args))._replace(loss=out.loss * float("nan"))
        before = everything(run)
        did = train_step(run, step)
        run.model.forward = real
        found.append((did.skipped, not equal(everything(run), before)))
    return found, run.counts.tolist(), sequences


def test_a_loss_that_is_not_finite_changes_nothing_on_any_rank(ranks):
    alone, counts, sequences = steps_with_nan(parallel.ALONE, 0)
    assert [changed for _, changed in alone] == [True, True, False, True]
    assert alone[2][0] == "the loss is not finite" and counts == [3, 1, 0]
    assert sequences == list(range(0, 60, 4))                     # the data advances, one batch ahead
    for found, counts, _ in (a.value for a in ranks(3, steps_with_nan, 1, layout=(3, 1))):
        assert [changed for _, changed in found] == [True, True, False, True]
        assert found[2][0] == "the loss of rank 1 is not finite" and counts == [3, 1, 0]


def nan_from(argv, first):
    """train.main, in which the loss of the last rank is NaN from step `first` on."""
    def with_nan(real, run, step, *rest):
        forward = type(run.model).forward
        if step >= first and run.grid.rank == run.grid.world - 1:
            run.model.forward = lambda *args: (out := forward(run.model, *args))._replace(
                loss=out.loss * float("nan"))
        return real(run, step, *rest)
    train_with(argv, with_nan)


@pytest.mark.parametrize("world", [1, 2])
def test_many_losses_that_are_not_finite_end_the_run(ranks, corpus, tmp_path, world, capsys):
    out = tmp_path / "run"
    argv = ["--data", str(corpus), "--out", str(out), *SIZES, "--steps", "40", "--save_every", "4",
            "--bad_steps", "3"]
    if world == 1:
        with pytest.raises(SystemExit) as error:
            nan_from(argv, 9)
        code, err = error.value.code, capsys.readouterr().err
        who = "the loss"
    else:
        answers = ranks(2, nan_from, argv, 9)
        code, err = answers[0].code, answers[0].err
        assert answers[1].code == 1 and answers[1].err == ""
        who = "the loss of rank 1"
    for step in (10, 11, 12):
        assert f"step {step} changed nothing: {who} is not finite" in err
    assert code == 1 and "3 steps in a row changed nothing" in err
    assert parallel.checkpoints(out) == [4, 8] and not parallel.find_corruption(out / "step-8")
    assert [row["skipped"] for row in rows(out)] == [0] * 9 + [1, 2]     # it ends before the last line


def spikes(losses, spike=6.0):
    """Which of a sequence of losses are skipped; norms are noise around 1."""
    run, rng = make_run(parallel.ALONE, torch.float32, spike=spike), np.random.default_rng(0)
    reasons = [train.reason_to_skip(run, loss, rng.normal(1, 0.1), None) for loss in losses]
    assert run.counts.tolist() == [len(losses), len(list(filter(None, reasons))), 0]
    return [i for i, reason in enumerate(reasons) if reason]


def noise(n, mean=3.0, spread=0.05, seed=1):
    return list(np.random.default_rng(seed).normal(mean, spread, n))


def test_spikes_are_skipped_if_asked():
    assert not spikes(noise(1000)) and not spikes(noise(200) + [2.0])
    assert spikes(noise(200) + [3.5] + noise(10, seed=2)) == [200]
    assert not spikes(noise(200) + [3.5], spike=0.0)              # the default
    assert not spikes(noise(127) + [3.5])                         # nothing to compare with yet
    skipped = spikes(noise(200) + noise(300, mean=4.0, seed=2))   # a lasting change of level is accepted
    assert skipped[0] == 200 and skipped[-1] < 206


def test_a_spike_changes_nothing_and_the_guard_is_in_the_checkpoint(corpus, tmp_path, capsys):
    """A quiet past is written into a checkpoint, beside which real steps are spikes."""
    base = ["--data", str(corpus), *SIZES, "--balance", "loss-free", "--steps", "12", "--save_every", "6",
            "--spike", "6", "--warmup", "0", "--decay", "0"]
    train.main([*base, "--out", str(tmp_path / "run")])
    shutil.rmtree(tmp_path / "run/step-12")
    run = train.start(train.plan_run([*base, "--out", str(tmp_path / "run")], 1), parallel.ALONE)
    with run.log:
        assert run.done == 6 and run.counts.tolist() == [6, 0, 0]         # as it was then
        losses = torch.tensor([row["loss"] for row in rows(tmp_path / "run")])
        assert torch.equal(run.recent[:6, 0].float(), losses)
        run.recent.fill_(0.5)
        run.counts[0] = 128
        before = everything(run)
        assert "are a spike" in train_step(run, 6).skipped and equal(everything(run), before)
        assert run.counts.tolist() == [129, 1, 0]


def flipped_bit(argv, at, what):
    """train.main, in which one bit of a weight or a selection bias of rank 1 changes after step `at`."""
    def flipped(real, run, step, *rest):
        did = real(run, step, *rest)
        if step + 1 == at and run.grid.rank == 1:
            tensors = run.masters.buffers if what == "bias" else run.masters.named
            p = parallel.local(next(iter(tensors.values())))
            p.view(torch.int32).view(-1)[3] ^= 1
        return did
    train_with(argv, flipped)


@pytest.mark.parametrize("flips", ["weight", "bias", ""])
def test_a_flipped_bit_in_a_copy_ends_the_run(ranks, corpus, tmp_path, flips):
    """.. before the next save: no checkpoint has the flipped bit."""
    argv = ["--data", str(corpus), "--out", str(tmp_path / "run"), *SIZES, "--steps", "12", "--replicate",
            "2", "--save_every", "4", "--balance", "loss-free"]
    answers = ranks(4, flipped_bit, argv, 7 if flips else 99, flips)
    if flips:
        assert [a.code for a in answers] == [1] * 4 and [a.err for a in answers[1:]] == [""] * 3
        assert "ends at step 8: the weights of rank 3 are not those of the first" in answers[0].err
        assert parallel.checkpoints(tmp_path / "run") == [4]
    else:
        assert [a.code for a in answers] == [None] * 4


# --- disks, memory, data ----------------------------------------------------------------------------------

def test_a_console_that_takes_nothing_does_not_end_a_run(corpus, tmp_path):
    """A full disk under nohup.out: the run has all its steps, and says so by its exit code."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, ROOT / "train.py", "--data", corpus, "--out", tmp_path / "run", *SIZES]
        done = subprocess.run([*command, "--steps", "20", "--eval_every", "5"], stdout=full, stderr=full,
                              env=ONE_THREAD)
    assert done.returncode == 0 and len(rows(tmp_path / "run")) == 20
    assert parallel.checkpoints(tmp_path / "run")[-1] == 20


@pytest.mark.parametrize("left", [["log.jsonl"], ["log.jsonl", "encoding.json", "settings.tmp"]])
def test_a_directory_that_was_begun_is_gone_on_with(corpus, tmp_path, left):
    """A full disk, or a kill, before there are settings."""
    for name in left:
        (tmp_path / name).write_text("")
    train.main(["--data", str(corpus), "--out", str(tmp_path), *SIZES, "--steps", "2"])
    assert len(rows(tmp_path)) == 2
    (tmp_path / "more").mkdir()
    for name in ("notes.txt", "log.jsonl"):
        (tmp_path / "more" / name).write_text("mine")
    with pytest.raises(SystemExit):
        train.main(["--data", str(corpus), "--out", str(tmp_path / "more"), *SIZES])
    assert (tmp_path / "more/log.jsonl").read_text() == "mine"


def test_a_directory_that_cannot_be_written(corpus, capsys):
    with pytest.raises(SystemExit) as error:
        train.main(["--data", str(corpus), "--out", "/proc/run", *SIZES])
    line, = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and line.startswith("error: ") and "/proc/run" in line


OUT_OF_MEMORY = """
import resource, sys
sys.path.insert(0, {root!r})
import torch, train
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 1_500_000_000,) * 2)
train.main()
"""


def test_out_of_memory_is_one_line(corpus, tmp_path):
    (tmp_path / "limited.py").write_text(OUT_OF_MEMORY.format(root=str(ROOT)))
    command = [sys.executable, tmp_path / "limited.py", "--data", str(corpus), "--out", str(tmp_path / "run"),
               *SIZES, "--steps", "4", "--batch_size", "400000"]
    done = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: rank 0: out of memory; --accumulate")


def test_data_that_changed_are_refused(corpus, tmp_path, capsys):
    shutil.copytree(corpus, tmp_path / "data")
    argv = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), *SIZES]
    train.main([*argv, "--steps", "2"])
    tokens = np.array(data.load_tokens(tmp_path / "data"))
    with open(tmp_path / "data/train.bin", "r+b") as changed:
        changed.seek(1024)
        changed.write(tokens[::-1].tobytes())
    with pytest.raises(SystemExit) as error:
        train.main([*argv, "--steps", "4"])
    assert error.value.code == 2 and "its sha256 is another" in capsys.readouterr().err
