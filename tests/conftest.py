"""What the tests share: a small corpus, a small model, a small run."""

import os
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))             # also without an install
import data
import train
from model import ModelConfig

SMALL = dict(vocab_size=64, n_layer=2, n_head=4, n_kv_head=2, head_dim=8, d_model=16, n_expert=6, d_expert=12,
             max_seq_len=64)
# the same as command-line settings, for runs that take a second
SIZES = ["--n_layer", "2", "--n_head", "2", "--n_kv_head", "1", "--head_dim", "8", "--d_model", "16",
         "--n_expert", "6", "--d_expert", "8", "--max_seq_len", "64", "--seq_len", "16", "--batch_size", "8",
         "--log_every", "1", "--sample_tokens", "8", "--device", "cpu"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the models are small, threads would only wait


def small(**changes):
    return ModelConfig(**SMALL | changes)


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
def in_folder(tmp_path):
    """Work in an empty folder."""
    before = os.getcwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)
