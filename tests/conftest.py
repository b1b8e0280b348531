"""What the tests share: a small corpus, a small model, a small run."""

import contextlib
import io
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "0")                     # several processes share the cores

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))             # also without an install
import data
import eval as evaluation
import parallel
import train
from model import ModelConfig

# nohup and background jobs ignore these two, and so would the runs that the tests send them to
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(train.__file__).parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}          # of other processes
SMALL = dict(vocab_size=64, n_layer=2, n_head=4, n_kv_head=2, head_dim=8, d_model=16, n_expert=6, d_expert=12,
             max_seq_len=64)
# the same as command-line settings, for runs that take a second
SIZES = ["--n_layer", "2", "--n_head", "2", "--n_kv_head", "1", "--head_dim", "8", "--d_model", "16",
         "--n_expert", "6", "--d_expert", "8", "--max_seq_len", "64", "--seq_len", "16", "--batch_size", "8",
         "--log_every", "1", "--sample_tokens", "8", "--device", "cpu", "--optimizer", "adamw"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the models are small, threads would only wait


def small(**changes):
    return ModelConfig(**SMALL | changes)


def small_run(corpus, out, more=""):
    """train.py's arguments for a run of that size."""
    return ["--data", str(corpus), "--out", str(out), *SIZES, "--save_every", "99", *more.split()]


def write_corpus(folder, files=30, seed=0):
    """Text files of made-up sentences."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(60)]
    words += ["naïve", "日本", "🙂"]
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        lines = [" ".join(rng.choices(words, k=8)) + "." for _ in range(20)]
        (folder / f"{i:03}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A prepared folder: byte-pair ranks, vocabulary 300."""
    root = tmp_path_factory.mktemp("corpus")
    data.prepare(root / "small", [str(write_corpus(root / "text"))], vocab_size=300)
    return root / "small"


@pytest.fixture(scope="session")
def finished(corpus, tmp_path_factory):
    """The directory of a finished run of 12 steps."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    train.main(["--data", str(corpus), "--out", str(out), "--steps", "12", *SIZES])
    return out


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train_with(argv, step):
    """train.main, in which every step is step(real, run, number, ..) instead of the real train_step."""
    real = train.train_step
    train.train_step = lambda *args: step(real, *args)
    try:
        train.main(argv)
    finally:
        train.train_step = real


def train_until(argv, last, number=signal.SIGTERM):
    """train.main, in which rank 1 alone (or the only one) is asked to stop during step `last`."""
    def told(real, run, step, stop):
        if step + 1 == last and run.layout.rank == min(1, run.layout.world - 1):
            os.kill(os.getpid(), number)
            end = time.monotonic() + 60
            while not stop.requested and time.monotonic() < end:  # a thread reads it
                time.sleep(0.01)
        return real(run, step, stop)
    train_with(argv, told)


def prepared(*argv):
    """-> Run: all that train.main makes before the first step."""
    found, real = [], train.introduce
    try:
        train.introduce = lambda run: found.append(run)
        train.main(list(argv))
    finally:
        train.introduce = real
    found[0].log = None                                           # is closed
    return found[0]


def rows(out):
    """A run's log, step by step."""
    return evaluation.read_log(out)[1:]


def curve(out):
    """.. without the speed: what is left is a function of the step."""
    return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "mfu")} for row in rows(out)]


@pytest.fixture
def refused(capsys):
    """refused(main, argv, words): it ends with exit code 2 and one line that has the words."""
    def check(main, argv, words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(list(map(str, argv)))
        err = capsys.readouterr().err.strip()
        assert end.value.code == 2 and "\n" not in err and err.startswith("error: ") and words in err, err
    return check


# --- other processes --------------------------------------------------------------------------------------

WARM = multiprocessing.get_context("forkserver")                  # its processes are forks of one with torch
WARM.set_forkserver_preload(["conftest", "torch._dynamo.backends.debugging"])


class Forked(WARM.Process):
    """function(*args) in a process of its own, in a folder with its files stdout and stderr."""

    def __init__(self, folder, function, *args):
        self.folder = folder
        super().__init__(target=work_in, args=(folder, function, args), daemon=True)
        self.start()

    def out(self):
        return (self.folder / "stdout").read_text() if (self.folder / "stdout").exists() else ""

    def wait_for(self, words, seconds=240):
        end = time.monotonic() + seconds
        alive = True
        while words not in self.out():
            assert alive and time.monotonic() < end, (self.folder / "stderr").read_text()
            alive = self.is_alive()                               # it may write its last words and end
            time.sleep(0.01)

    def end(self, seconds=60):
        """-> exit code (of a signal its negative number, None if it still runs), what it wrote to stderr."""
        self.join(seconds)
        return self.exitcode, (self.folder / "stderr").read_text()


def work_in(folder, function, args):
    os.chdir(folder)
    os.environ.update(ENV)
    torch.set_num_threads(1)
    for number, name in ((1, "stdout"), (2, "stderr")):           # also of its own children
        os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = open(1, "w", 1), open(2, "w", 1)
    function(*args)


class Answer(NamedTuple):
    """What a function did on one rank."""

    value: object
    code: object            # of SystemExit, or None
    out: str
    err: str


class Ranks:
    """Four processes that stay for the session, forked from one that has imported torch."""

    def __init__(self):
        self.workers, self.group = [], None

    def stop(self):
        for process, _ in self.workers:
            process.kill()
            process.join()
        self.workers, self.group = [], None

    def __call__(self, world, function, *args, layout=None, limit=120):
        """function(*args) on `world` processes, with torchrun's variables -> [Answer of each rank].

        layout (ep, replicate): function(grid, *args), with a parallel.Layout on the CPU."""
        for rank in range(0 if self.workers else 4):
            ours, theirs = WARM.Pipe()
            self.workers.append((WARM.Process(target=work, args=(theirs, rank), daemon=True), ours))
            self.workers[-1][0].start()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        meets, self.group = not layout or self.group != (world, layout), (world, layout)
        for _, connection in self.workers[:world]:
            connection.send((world, port, layout, meets, function, args))
        answers, end = [], time.monotonic() + limit
        for rank, (_, connection) in enumerate(self.workers[:world]):
            if not connection.poll(max(0, end - time.monotonic())):
                self.stop()
                pytest.fail(f"rank {rank} hangs")
            answers.append(connection.recv())
        broken = [a.err for a in answers if a.code == "exception"]
        if broken:
            self.stop()                                           # no collective of theirs can be trusted
            pytest.fail("\n".join(broken))
        return answers


def work(connection, rank):
    """The life of one of them."""
    torch.set_num_threads(1)
    grid = None
    while True:
        world, port, layout, meets, function, args = connection.recv()
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                       "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        out, err, value, code = io.StringIO(), io.StringIO(), None, None
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                if meets:
                    if dist.is_initialized():
                        dist.destroy_process_group()
                    if layout:
                        grid = parallel.init_distributed()
                        parallel.make_meshes(grid, *layout, "cpu", 60)
                value = function(*([grid] if layout else []), *args)
            except SystemExit as error:
                code = error.code
            except BaseException:
                code = "exception"
                err.write(f"rank {rank}: {traceback.format_exc()}")
        connection.send(Answer(value, code, out.getvalue(), err.getvalue()))


@pytest.fixture(scope="session")
def ranks():
    pool = Ranks()
    yield pool
    pool.stop()
