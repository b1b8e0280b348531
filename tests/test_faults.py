"""What goes wrong, for real: killed, stopped and restarted processes, broken files, bad numbers.

Signals, files, limits and a full disk are real; NaN, the flipped bit and errors of a file system are
injected."""

import errno
import fcntl
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path, PosixPath
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed.run
from conftest import ENV, Forked, curve, prepared, rows, small_run, train_until, train_with, write_corpus
from test_exact import make_run

import data
import eval as evaluation
import parallel
import train
from train import train_step

# --- killed processes -------------------------------------------------------------------------------------

KILLED_IN_SECOND_SAVE = """
import os, signal
import torch.distributed as dist, torch.distributed.checkpoint as dcp
import parallel, train
real, meet, times = dcp.FileSystemWriter.write_data, parallel.init_distributed, []
def write_data(self, *args):
    times.append(1)
    done = real(self, *args)
    if len(times) == 2 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return done
def counted():
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    before = store.num_keys()
    grid = meet()
    print("new keys in the store:", store.num_keys() - before)
    return grid
dcp.FileSystemWriter.write_data, parallel.init_distributed = write_data, counted
train.main()
"""


def test_killed_workers_come_back_on_the_same_curve_until_ctrl_c(ranks, corpus, tmp_path):
    """kill -9 within a save under torchrun --max-restarts, later Ctrl-C: all ranks save the same step.

    Bit for bit the run that nobody killed."""
    (tmp_path / "killed.py").write_text(KILLED_IN_SECOND_SAVE)
    more = "--steps 100000 --save_every 3 --ep 2 --eval_every 4 --balance loss-free"
    killed, whole_run = (small_run(corpus, tmp_path / name, more) for name in ("run", "whole"))
    launch = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "--monitor-interval", "0.2"]
    torchrun = Forked(tmp_path, torch.distributed.run.main, [*launch, "killed.py", *killed])
    torchrun.wait_for("step 8:")
    os.kill(torchrun.pid, signal.SIGINT)
    _, err = torchrun.end()
    last, step = parallel.checkpoints(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").glob("step-*")} == {f"step-{last}", f"step-{step}"}
    shown = torchrun.out()
    assert "resuming from step 3\n" in shown and f"stopped and saved after step {step}" in shown, err
    _, again = sorted(map(int, re.findall(r"new keys in the store: (\d+)", shown)))
    assert again > 0                                              # else they read the addresses of the dead
    ranks(2, train_until, whole_run, step)
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def wait_in(module, name, argv):
    """main(argv), in which a function of data.py or parallel.py waits."""
    def wait(*args, **kwargs):
        print("waiting")
        time.sleep(60)
    setattr(sys.modules[module], name, wait)
    (data if module == "data" else train).main(argv)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("module, name", [("data", "save_encoding"), ("parallel", "build_model")])
def test_a_signal_before_the_first_step_leaves_nothing_half_made(corpus, tmp_path, module, name, number):
    write_corpus(tmp_path / "text", files=3)
    argv = ("--source text --name x --tokenizer bytes".split() if module == "data"
            else small_run(corpus, "run", "--steps 2"))
    process = Forked(tmp_path, wait_in, module, name, argv)
    process.wait_for("waiting")
    os.kill(process.pid, number)
    code, err = process.end()
    assert code == 1 and err.splitlines()[-1] == "error: interrupted"
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob("data/*"))
    assert not list(tmp_path.glob("data/.*"))


def test_a_signal_in_the_first_validation_saves(corpus, tmp_path, monkeypatch):
    def validation(run, real=train.validation):
        if run.step == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(run)
    monkeypatch.setattr(train, "validation", validation)
    train.main(small_run(corpus, tmp_path / "run", "--steps 9"))
    assert parallel.checkpoints(tmp_path / "run") == [1]


def stopped(argv, pid):
    """train.main, in which rank 1 is stopped after 5 steps, until rank 0 has ended."""
    def hang(real, run, step, *rest):
        if step == 5 and run.layout.rank == 1:
            pid.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        return real(run, step, *rest)
    try:
        train_with(argv, hang)
    finally:
        if os.environ["RANK"] == "0":
            os.kill(int(pid.read_text()), signal.SIGCONT)


def test_a_process_that_hangs_is_an_error_with_the_step(ranks, corpus, tmp_path):
    out = tmp_path / "run"
    first, _ = ranks(2, stopped, small_run(corpus, out, "--timeout 4 --save_every 4"), tmp_path / "pid")
    assert first.code == 1 and len(rows(out)) == 5
    assert "error: rank 0: after step 5 another process did not answer" in first.err
    assert parallel.checkpoints(out) == [4]
    parallel.verify(out / "step-4")
    ranks.stop()                                                  # their connections are broken


# --- broken checkpoints -----------------------------------------------------------------------------------

def cut(path, rng):
    path.write_bytes(path.read_bytes()[:rng.randrange(path.stat().st_size)])


def flip(path, rng):
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


def remove(path, rng):
    path.unlink()


@pytest.mark.parametrize("harm", [cut, flip, remove])
@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "manifest.json"])
def test_a_corrupt_checkpoint_is_set_aside(finished, tmp_path, capsys, file, harm):
    out = shutil.copytree(finished, tmp_path / "run")
    harm(out / "step-12" / file, random.Random(0))
    broken = {p.name: p.read_bytes() for p in (out / "step-12").iterdir()}
    train.main(["--out", str(out)])
    shown = capsys.readouterr()
    assert "corrupt" in shown.err and "step-12.corrupt" in shown.err and "resuming from step 9" in shown.out
    assert parallel.checkpoints(out) == [9, 12] and curve(out) == curve(finished)
    assert {p.name: p.read_bytes() for p in (out / "step-12.corrupt").iterdir()} == broken


def test_if_no_checkpoint_is_whole_nothing_begins_anew(finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    log = (out / "log.jsonl").read_text()
    for step in (9, 12):
        cut(out / f"step-{step}" / "__0_0.distcp", random.Random(step))
    for _ in range(2):
        with pytest.raises(SystemExit) as error:
            train.main(["--out", str(out)])
        last = capsys.readouterr().err.splitlines()[-1]
        assert error.value.code == 2 and "no checkpoint" in last and ".corrupt" in last
        assert sorted(p.name for p in out.glob("step-*")) == [f"step-{step}.corrupt" for step in (12, 9)]
        assert (out / "log.jsonl").read_text() == log


def test_what_cannot_be_read_now_is_not_set_aside(finished, tmp_path, monkeypatch, refused):
    out = shutil.copytree(finished, tmp_path / "run")

    def unreadable(path, *args, real=Path.read_text, **kwargs):
        if Path(path).name == "manifest.json":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return real(path, *args, **kwargs)
    for place in ((parallel, "file_sha256", lambda path: unreadable("manifest.json")),
                  (Path, "read_text", unreadable)):
        with monkeypatch.context() as patch:
            patch.setattr(*place)
            refused(train.main, ["--out", out], "Too many open files")
    assert parallel.checkpoints(out) == [9, 12]


def test_an_interrupt_while_loading_is_no_corruption(finished, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(finished, tmp_path / "run")

    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(torch.distributed.checkpoint.FileSystemReader, "read_data", interrupt)
    with pytest.raises(SystemExit) as end:
        train.main(["--out", str(out), "--steps", "14"])
    assert end.value.code == 1 and capsys.readouterr().err == "error: interrupted\n"
    assert parallel.checkpoints(out) == [9, 12]


def test_all_ranks_fall_back_together(ranks, corpus, tmp_path):
    out = tmp_path / "run"
    argv = small_run(corpus, out, "--steps 6 --save_every 3 --ep 2")
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


def write_manifest(path):
    (path / "manifest.json").write_text(json.dumps(parallel.checksums(
        file for file in path.iterdir() if file.name != "manifest.json")))


def test_what_is_no_tensor_is_not_read(tmp_path):
    """torch would unpickle a checkpoint's entry that says it is bytes."""
    torch.distributed.checkpoint.save({"model.norm.weight": Malicious(tmp_path / "planted")},
                                      checkpoint_id=str(tmp_path / "step-1"), no_dist=True)
    (tmp_path / "step-1/meta.json").write_text("{}")
    write_manifest(tmp_path / "step-1")
    with pytest.raises(ValueError, match="BytesStorageMetadata"):
        parallel.load_checkpoint(tmp_path / "step-1", {"model.norm.weight": torch.zeros(4)})
    assert not (tmp_path / "planted").exists()


class Member:
    """getattr(of, name), as Python 3.11.2 pickles a member of an Enum."""

    def __init__(self, of, name):
        self.of, self.name = of, name

    def __reduce__(self):
        return getattr, (self.of, self.name)


def test_a_member_of_an_enum_is_read_by_name_and_no_other_attribute():
    def read(*args):
        return parallel.TensorDescriptions(io.BytesIO(pickle.dumps(Member(*args)))).load()
    enum = torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING
    assert all(read(enum, member.name) is member for member in enum)
    with pytest.raises(KeyError):
        read(PosixPath, "joinpath")


def plant(raw):
    """Write .metadata, as somebody may who also writes the manifest."""
    def harm(path):
        (path / ".metadata").write_bytes(raw)
        write_manifest(path)
    return harm


def describe(change):
    """.. with another description of the tensors."""
    def harm(path):
        metadata = pickle.loads((path / ".metadata").read_bytes())
        change(metadata)
        plant(pickle.dumps(metadata))(path)
    return harm


def store_in(name):
    return describe(lambda metadata: [setattr(part, "relative_path", name)
                                      for part in metadata.storage_data.values()])


SET = pickle.dumps({"cache": {"x": 1}}, 2)[2:-1]                  # the state that BUILD sets
CLASSES = "torch.distributed.checkpoint.metadata\n"
BUILDS = {
    "function": b"ctorch.serialization\n_get_layout\n" + SET + b"b.",
    "class": f"c{CLASSES}Metadata\n".encode() + SET + b"b.", "path": b"cpathlib\nPosixPath\n" + SET + b"b.",
    "member of an enum": f"c{CLASSES}_MEM_FORMAT_ENCODING\nK\x00\x85R".encode("latin-1") + SET + b"b."}


@pytest.mark.parametrize("harm, words", [
    *((plant(b"\x80\x02" + raw), ".metadata changes") for raw in BUILDS.values()),
    (plant(pickle.dumps(Malicious("planted"))), "asks for posix.mkdir"),
    (store_in("../secret"), "manifest.json does not name ../secret"),
    (store_in("/etc/passwd"), "manifest.json does not name /etc"),
    (describe(lambda metadata: metadata.state_dict_metadata["model.norm.weight"].chunks.clear()),
     "its parts of model.norm.weight do not cover it"),
    (lambda path: (path / "manifest.json").write_text(json.dumps(
        json.loads((path / "manifest.json").read_text()) | {"../../secret": {"bytes": 1, "sha256": ""}})),
     "../../secret does not match manifest.json"),
    (lambda path: (os.remove(path / "meta.json"), os.mkfifo(path / "meta.json")), "meta.json is not that of"),
    (lambda path: (path / "manifest.json").write_text("[" * 9999), "RecursionError"),
    (lambda path: (path / "manifest.json").write_text('{".metadata": 7}'), ".metadata, meta.json does not")],
    ids=lambda value: value if isinstance(value, str) else "")
def test_a_checkpoint_of_somebody_else_is_refused(finished, in_folder, harm, words):
    """Nothing is called or changed, no path leaves the folder, nothing stays without a value."""
    path = shutil.copytree(finished, in_folder / "run") / "step-12"
    harm(path)
    with pytest.raises(ValueError) as error:
        evaluation.load_run(path)
    assert isinstance(error.value, data.InputError) and words in str(error.value)
    assert os.listdir() == ["run"]


@pytest.mark.parametrize("chunks, size, whole", [
    ([((0,), (4,)), ((4,), (2,))], (6,), True), ([((0,), (4,)), ((2,), (2,))], (6,), False),
    ([((-6,), (12,))], (6,), False), ([((100,), (6,))], (6,), False), ([], (3,), False),
    ([((0, 0), (2, 3)), ((2, 0), (2, 3))], (4, 3), True), ([((), ())], (), True),
    ([((0, 0), (2, 2)), ((0, 2), (2, 2)), ((2, 0), (2, 2)), ((2, 0), (2, 2))], (4, 4), False),
    ([((0,), (3,)), ((3,), (0,))], (3,), True)])
def test_chunks_cover_a_tensor_once(chunks, size, whole):
    chunks = [SimpleNamespace(offsets=offsets, sizes=torch.Size(sizes)) for offsets, sizes in chunks]
    assert parallel.tiles(chunks, size) == whole


# --- bad numbers ------------------------------------------------------------------------------------------

def everything(run):
    """All that a skipped step may not change, of this rank."""
    state = parallel.training_state(run.masters, run.optimizer)
    return {name: parallel.local(t).clone() for name, t in state.items()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in b)


def spoil(forward, what):
    """forward, with a loss or a gradient that is NaN."""
    def spoiled(*args):
        out = forward(*args)
        if what == "loss":
            return out._replace(loss=out.loss * float("nan"))
        out.loss.register_hook(lambda grad: grad * float("nan"))
        return out
    return spoiled


def steps_with_nan(grid, bad, what):
    """Steps 0 to 3, of which rank `bad` spoils step 2 -> (skipped, changed) of each, counts, sequences."""
    run = make_run(grid, torch.float32, balance="loss-free", bias_rate=0.01, accumulate=3)
    real, found, sequences = run.model.forward, [], []
    rows = run.corpus.train.rows
    run.corpus.train.rows = lambda first, *rest: sequences.append(first) or rows(first, *rest)
    for step in range(4):
        run.model.forward = spoil(real, what) if step == 2 and grid.rank == bad else real
        before = everything(run)
        did = train_step(run, step)
        found.append((did.skipped, not equal(everything(run), before)))
    return found, run.counts.tolist(), sequences


@pytest.mark.parametrize("what, of", [("loss", " of rank 1"), ("gradient", "")])
def test_what_is_not_finite_changes_nothing_on_any_rank(ranks, what, of):
    alone, counts, sequences = steps_with_nan(parallel.SINGLE_PROCESS, 0, what)
    assert [changed for _, changed in alone] == [True, True, False, True]
    assert alone[2][0] == f"the {what} is not finite" and counts == [3, 1, 0]
    assert sequences == list(range(0, 60, 4))                     # the data advances, one batch ahead
    for found, counts, _ in (a.value for a in ranks(3, steps_with_nan, 1, what, layout=(3, 1))):
        assert [changed for _, changed in found] == [True, True, False, True]
        assert found[2][0] == f"the {what}{of} is not finite" and counts == [3, 1, 0]


def nan_from(argv, first):
    """train.main, in which the loss of the last rank is NaN from step `first` on."""
    def with_nan(real, run, step, *rest):
        if step == first and run.layout.rank == run.layout.world - 1:
            run.model.forward = spoil(run.model.forward, "loss")
        return real(run, step, *rest)
    train_with(argv, with_nan)


def test_many_losses_that_are_not_finite_end_the_run(ranks, corpus, tmp_path):
    out = tmp_path / "run"
    argv = small_run(corpus, out, "--steps 40 --save_every 4 --bad_steps 3")       # the flag's old name
    first, second = ranks(2, nan_from, argv, 9)
    assert first.code == second.code == 1 and second.err == ""
    for step in (10, 11, 12):
        assert f"step {step} skipped: the loss of rank 1 is not finite" in first.err
    assert "3 steps in a row skipped" in first.err
    assert parallel.checkpoints(out) == [4, 8]
    parallel.verify(out / "step-8")
    assert [row["skipped"] for row in rows(out)] == [0] * 9 + [1, 2]     # it ends before the last line


def spikes(losses, spike=6.0, since=0):
    """Which of a sequence of losses are skipped; norms are noise around 1.  since: when it is asked for."""
    run, rng, skipped = make_run(parallel.SINGLE_PROCESS, torch.float32), np.random.default_rng(0), []
    for i, loss in enumerate(losses):
        run.settings.spike = spike if i >= since else 0.0
        skipped += [i] * bool(train.reason_to_skip(run, loss, rng.normal(1, 0.1), None))
    return skipped


def test_spikes_are_skipped_if_asked():
    noise = list(np.random.default_rng(1).normal(3.0, 0.05, 1000))
    assert not spikes(noise) and not spikes(noise[:200] + [2.0])
    assert spikes(noise[:200] + [3.5] + noise[:10]) == [200]
    assert not spikes(noise[:200] + [3.5], spike=0.0)             # the default
    assert not spikes(noise[:127] + [3.5])                        # nothing to compare with yet
    assert not spikes(noise[:300], since=200)                     # asked for when the run is resumed
    skipped = spikes(noise[:200] + [4.0 + x - 3.0 for x in noise[:300]])         # a lasting change of level
    assert skipped[0] == 200 and skipped[-1] < 206


def test_a_spike_changes_nothing_and_the_guard_is_in_the_checkpoint(corpus, tmp_path):
    """A quiet past is written into a checkpoint, beside which real steps are spikes."""
    argv = small_run(corpus, tmp_path, "--steps 6 --spike 6")
    train.main(argv)
    run, losses = prepared(*argv), torch.tensor([row["loss"] for row in rows(tmp_path)])
    assert run.counts.tolist() == [6, 0, 0] and torch.equal(run.recent[:6, 0].float(), losses)
    run.recent.fill_(0.5)
    run.counts[0] = 128
    before = everything(run)
    assert "are a spike" in train_step(run, 6).skipped and equal(everything(run), before)


def flipped_bit(argv, what, bit):
    """train.main, in which one bit of a weight or a selection bias of rank 3 changes after step 7."""
    def flipped(real, run, step, *rest):
        did = real(run, step, *rest)
        if step == 6 and run.layout.rank == 3:
            p = parallel.local(next(iter(getattr(run.masters, what).values())))
            p.view(torch.int32).view(-1)[3] ^= bit
        return did
    train_with(argv, flipped)


@pytest.mark.parametrize("what, bit", [("named", 1), ("buffers", 1 << 30)])     # no update rounds it away
def test_a_flipped_bit_in_a_copy_ends_the_run(ranks, corpus, tmp_path, what, bit):
    """.. before the next save: no checkpoint has the flipped bit."""
    argv = small_run(corpus, tmp_path, "--steps 12 --replicate 2 --save_every 4 --balance loss-free")
    first, *others = ranks(4, flipped_bit, argv, what, bit)
    assert [a.code for a in (first, *others)] == [1] * 4
    assert not any(a.err for a in others) and parallel.checkpoints(tmp_path) == [4]
    assert "step 8: the weights of rank 3 are not those of the first" in first.err


# --- logs, disks, memory ----------------------------------------------------------------------------------

def test_a_directory_that_was_begun_is_gone_on_with(corpus, tmp_path):
    """A kill before there are settings, then one before the first checkpoint."""
    (tmp_path / "log.jsonl").write_text("")

    def killed(*_):
        raise KeyError
    with pytest.raises(KeyError):
        train_with(small_run(corpus, tmp_path, "--steps 2"), killed)
    train.main(["--out", str(tmp_path)])
    assert len(rows(tmp_path)) == 2


def damage(raw):
    """A row that is no UTF-8, and such as are no objects or of no step."""
    lines = raw.splitlines(keepends=True)
    lines[3] = lines[3][:50] + b"\0\xff" * 20 + b"\n"
    return b"".join([b"[1]\n", *lines, b"[" * 5000 + b"\n", b'{"step": "x", "load_max": []}\n'])


@pytest.mark.parametrize("harm, lost", [
    (lambda raw: raw.replace(b"\n", b"\r\n"), 0), (lambda raw: raw[:-7], 12),
    (lambda raw: raw + b'{"step": 13, "lo', 0), (lambda raw: raw.replace(b"\n", b"\n\n"), 0), (damage, 3)],
    ids=["windows", "torn", "torn later", "blank rows", "damaged"])
def test_a_directory_that_others_touch_is_gone_on_with(finished, tmp_path, harm, lost):
    """A damaged row costs no other row, files of the system no checkpoint; nothing goes through a link."""
    out, theirs = shutil.copytree(finished, tmp_path / "run"), tmp_path / "theirs.txt"
    (out / "log.jsonl").write_bytes(harm((out / "log.jsonl").read_bytes()))
    (out / "step-12/.DS_Store").write_bytes(b"x")
    (out / "step-12/.ipynb_checkpoints").mkdir()
    theirs.write_text("all of it\n")
    os.symlink(theirs, out / "settings.tmp")
    train.main(["--out", str(out), "--steps", "14"])
    assert [row["step"] for row in rows(out)] == [step for step in range(1, 15) if step != lost]
    assert re.search(rb'^{"step": 12, "resumed"', (out / "log.jsonl").read_bytes(), re.M)
    assert evaluation.read_log(out)[0]["settings"]["steps"] == 12 and not list(out.glob("*corrupt"))
    evaluation.main(["routing", str(out)])
    assert theirs.read_text() == "all of it\n"


def test_a_log_is_never_cut_to_nothing(finished, tmp_path):
    """Of a run whose checkpoints are gone."""
    out = shutil.copytree(finished, tmp_path / "run")
    for step in out.glob("step-*"):
        shutil.rmtree(step)
    old = (out / "log.jsonl").read_bytes()
    train.main(["--out", str(out), "--steps", "2"])
    assert [path.read_bytes() for path in out.glob("log-*.jsonl")] == [old] and len(rows(out)) == 2


def test_a_second_start_that_waited_changes_nothing(corpus, tmp_path, monkeypatch, refused):
    """It was planned before another process trained the run."""
    argv, real = small_run(corpus, tmp_path / "run", "--steps 2"), parallel.build_model

    def overtaken(*args):
        monkeypatch.setattr(parallel, "build_model", real)
        train.main(argv)
        return real(*args)
    monkeypatch.setattr(parallel, "build_model", overtaken)
    refused(train.main, argv + ["--lr", "0.5"], "another process has changed")
    assert parallel.read_settings(tmp_path / "run")["settings"]["lr"] != 0.5
    assert len(rows(tmp_path / "run")) == 2


def test_a_file_system_without_fsync_of_folders_or_locks(corpus, tmp_path, monkeypatch, capsys):
    def fsync(descriptor, real=os.fsync):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(fcntl, "flock", flock)
    parallel.say_once.cache_clear()
    train.main(small_run(corpus, tmp_path / "run", "--steps 2 --save_every 1"))
    assert parallel.checkpoints(tmp_path / "run")[-1] == 2
    shown = capsys.readouterr().err
    assert shown.count("no lock protects") == shown.count("cannot flush its files") == 1


def test_a_full_disk_ends_in_one_line_and_what_was_saved_stays(corpus, tmp_path):
    """On a real file system of its own, where one can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs privileges")
    try:
        argv = small_run(corpus, disk / "run", "--steps 150 --save_every 1 --keep 99")
        code, err = Forked(tmp_path, train.main, argv).end()
        last = err.splitlines()[-1]
        assert code == 2 and last.startswith("error: could not write") and "MB are free" in last, err
        assert "Traceback" not in err
        kept = parallel.checkpoints(disk / "run")
        assert kept and kept == list(range(1, len(kept) + 1))
        for step in kept:
            parallel.verify(disk / "run" / f"step-{step}")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_run_that_was_moved_is_not_saved_elsewhere(corpus, tmp_path, refused):
    def moved(real, run, step, *rest):
        if step == 1:
            (tmp_path / "run").rename(tmp_path / "moved")
        return real(run, step, *rest)
    argv = small_run(corpus, tmp_path / "run", "--steps 4 --save_every 2")
    refused(lambda argv: train_with(argv, moved), argv, "was moved or deleted")
    assert not (tmp_path / "run").exists()


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


def train_in_little_memory(argv):
    held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 1_500_000_000,) * 2)
    train.main(argv)


def test_out_of_memory_is_one_line(corpus, tmp_path):
    argv = small_run(corpus, tmp_path / "run", "--steps 4 --batch_size 400000")
    code, err = Forked(tmp_path, train_in_little_memory, argv).end()
    assert code == 1 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: rank 0: out of memory; --accumulate")


# --- two nodes --------------------------------------------------------------------------------------------

# of the worker: a layout that fits the processes there are, and the death of node 1 before step 11
ON_TWO_NODES = """
import os, signal, sys, time
import train
real, agent, world = train.train_step, os.getppid(), int(os.environ["WORLD_SIZE"])
def train_step(run, step, *rest):
    if step == 10 and world == 4 and os.environ["GROUP_RANK"] == "1":
        if os.environ["LOCAL_RANK"] == "0":
            os.kill(agent, signal.SIGKILL)
        while os.getppid() == agent:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return real(run, step, *rest)
train.train_step = train_step
train.main([*sys.argv[1:], "--ep", "2", "--replicate", str(world // 2)])
"""


@pytest.fixture
def nodes():
    """[(command prefix, network interface, address)] of two nodes: network namespaces with a link between
    them, where the system lets us make some, else loopback."""
    if sys.platform != "linux":
        pytest.skip("its network interfaces have Linux's names")
    a, b = names = [f"sigma-{os.getpid()}-{i}" for i in range(2)]
    made = [("netns", "add", a), ("netns", "add", b),
            ("-n", a, "link", "add", "link0", "type", "veth", "peer", "name", "link0", "netns", b)]
    for i, name in enumerate(names, 1):
        made += [("-n", name, "address", "add", f"10.77.0.{i}/24", "dev", "link0"),
                 ("-n", name, "link", "set", "link0", "up"), ("-n", name, "link", "set", "lo", "up")]
    try:
        for arguments in made:
            subprocess.run(["ip", *arguments], check=True, capture_output=True)
        yield [(["ip", "netns", "exec", name], "link0", f"10.77.0.{i}") for i, name in enumerate(names, 1)]
    except (OSError, subprocess.CalledProcessError):              # no such command, no such right
        yield [([], "lo", f"127.0.0.{i}") for i in (1, 2)]
    finally:
        for name in names * bool(shutil.which("ip")):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_when_a_node_dies_the_other_goes_on_by_itself(nodes, corpus, tmp_path):
    """Two agents of torchrun, 2 x 2 processes; then one agent, 2.  All of it is the curve of one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "worker.py").write_text(ON_TWO_NODES)
    alone, out = (small_run(corpus, tmp_path / name, "--steps 16 --save_every 4") for name in ("one", "two"))
    agents = []
    try:
        for i, (prefix, interface, address) in enumerate(nodes):
            conf = f"is_host={1 - i},last_call_timeout=3,keep_alive_interval=2"
            launch = [*prefix, sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2",
                      "--nproc-per-node", "2", "--max-restarts", "3", "--monitor-interval", "0.2",
                      "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{nodes[0][2]}:{port}", "--rdzv-id",
                      "two", "--rdzv-conf", conf, "--local-addr", address, str(tmp_path / "worker.py")]
            env = ENV | {"GLOO_SOCKET_IFNAME": interface, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
            with open(tmp_path / f"node-{i}", "w") as shown:
                agents.append(subprocess.Popen([*launch, *out], env=env, stdout=shown, stderr=shown))
        train.main(alone)
        codes = [agent.wait(240) for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()                                     # it ends its workers
            agent.wait(60)
    shown = (tmp_path / "node-0").read_text()
    assert codes == [0, -signal.SIGKILL] and "resuming from step 8\n" in shown, shown
    assert evaluation.read_log(tmp_path / "two")[0]["processes"] == 4
    for name in ("loss", "grad_norm", "lbl"):
        one, two = ([row[name] for row in rows(tmp_path / run)] for run in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-4)
    assert parallel.checkpoints(tmp_path / "two") == [12, 16]
    for path in (tmp_path / "two").glob("step-*"):
        parallel.verify(path)


def on_node(folders, argv):
    """train.main of a rank that is alone on its node, in a folder of its own."""
    rank, here = int(os.environ["RANK"]), os.getcwd()
    os.environ["LOCAL_RANK"] = "0"                                # some launchers set no more
    os.chdir(folders[rank])
    try:
        train.main(argv)
    finally:
        os.chdir(here)


def replace(path, rng):
    """Other tokens, with all that belongs to them."""
    shutil.rmtree(path.parent)
    data.prepare(path.parent, [str(write_corpus(path.parents[1] / "text", seed=1))], vocab_size=300)


@pytest.mark.parametrize("harm, words", [
    (None, "not all nodes see out: --out must lie on a file system that they share"),
    (replace, "small on this node"), (cut, "small/train.bin")])
def test_what_only_one_node_has_ends_all_of_them_at_the_start(ranks, corpus, tmp_path, harm, words):
    """An --out that is not shared, tokens that differ or are cut short: one line, on one rank."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        shutil.copytree(corpus, folder / "small")
    if harm:
        harm(folders[1] / "small/train.bin", random.Random(0))
    answers = ranks(2, on_node, folders, small_run("small", "out", "--steps 4"))
    lines = [answer.err for answer in answers if answer.err]
    assert [answer.code for answer in answers] == [2, 2] and len(lines) == 1 and words in lines[0], answers
    assert lines[0].startswith("error: ") and not list(tmp_path.glob("*/out/*/*"))
