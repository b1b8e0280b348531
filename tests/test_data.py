"""Tokenizers, token files, sources and the sampler."""

import gzip
import http.server
import json
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import torch
from conftest import write_corpus

import data

NASTY = ["", " ", "\n\n  \t\n", "a\n\n\n  b \n", "naïve café 日本語 🙂👩‍👩‍👧 e\u0301\u0302",
         "x" * 300, "\x00\x01\x7f\r\n\r", "12345678 3.14159", "don't we'll I'VE",
         "<|endoftext|> is only text", "\u2028\u00a0\ufeff", "def f(x):\n    return x\n"]


def random_text(rng, n=60):
    ranges = [(32, 126), (9, 13), (0x20, 0x24F), (0x300, 0x36F), (0x4E00, 0x4E80), (0x1F600, 0x1F640),
              (0, 31)]
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, n)))


# --- tokenizers -------------------------------------------------------------------------------------------

def slow_bpe(texts, n_ranks):
    """Counts every pair anew for every merge."""
    words = Counter(w for text in texts for w in regex.findall(data.PATTERN, text))
    split = {w: list(w.encode()) for w in words}
    vocab = [bytes([i]) for i in range(256)]
    while len(vocab) < n_ranks:
        count = Counter()
        for w, n in words.items():
            for pair in zip(split[w], split[w][1:]):
                count[pair] += n
        if not count or max(count.values()) < 2:
            break
        pair = min(p for p in count if count[p] == max(count.values()))
        split = {w: data.join(s, pair, len(vocab)) for w, s in split.items()}
        vocab.append(vocab[pair[0]] + vocab[pair[1]])
    return {b: i for i, b in enumerate(vocab)}


@pytest.mark.parametrize("seed", range(20))
def test_bpe_training_equals_recounting_everything(seed):
    rng = random.Random(seed)
    alphabet = ("aab bc\nd", "ab ")[seed % 2]  # two letters: long runs, overlapping pairs
    texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 80))) for _ in range(rng.randint(1, 12))]
    texts += [random_text(rng) for _ in range(3)]
    want = slow_bpe(texts, 256 + 40)
    assert data.train_bpe(texts, 256 + 40) == want
    assert data.train_bpe(texts[::-1], 256 + 40) == want           # the order of documents does not matter


def lowest_rank_first(ranks, word):
    """Byte-pair encoding by its definition."""
    parts = [bytes([b]) for b in word]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]
        if not pairs:
            return [ranks[p] for p in parts]
        _, i = min(pairs)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


def test_encoding_is_lowest_rank_first_and_round_trips():
    rng = random.Random(1)
    texts = [random_text(rng) for _ in range(300)] + NASTY
    encoding = data.build_encoding("bpe", 400, [Path(data.__file__).read_text(), *texts])
    ranks = encoding._mergeable_ranks
    for text in texts:
        words = regex.findall(data.PATTERN, text)
        want = [r for word in words for r in lowest_rank_first(ranks, word.encode())]
        assert encoding.encode_ordinary(text) == want
        assert encoding.decode(want) == text


@pytest.mark.parametrize("name", data.TOKENIZERS)
def test_every_tokenizer_has_the_five_special_tokens_and_reads_back(name, tmp_path):
    try:
        encoding = data.build_encoding(name, 300, NASTY * 3)
    except ValueError as error:
        pytest.skip(str(error))
    special = [encoding.encode_single_token(s) for s in data.SPECIAL]
    assert special == list(range(encoding.n_vocab - 5, encoding.n_vocab))
    data.save_encoding(encoding, tmp_path / "encoding.json")
    back = data.load_encoding(tmp_path)
    for text in NASTY:
        tokens = encoding.encode_ordinary(text)
        assert back.encode_ordinary(text) == tokens and back.decode(tokens) == text
        assert not set(tokens) & set(special)                     # special tokens inside a text stay text
    assert back.n_vocab == encoding.n_vocab


def test_bytes_need_nothing():
    encoding = data.build_encoding("bytes", 0, ())
    assert encoding.n_vocab == 261 and encoding.encode_ordinary("aé") == [97, 0xC3, 0xA9]


# --- reading ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["bpe", "gpt2", "o200k_base"])
def test_blocks_give_the_tokens_of_the_whole_text(name, tmp_path, monkeypatch):
    """A file is read in blocks; where they are cut must not show."""
    monkeypatch.setattr(data, "BLOCK", 500)
    text = Path(data.__file__).read_text() + "\n".join(NASTY[4:]) + "日本語 naïve\n" * 400
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    try:
        encoding = data.build_encoding(name, 400, [text])
    except ValueError as error:
        pytest.skip(str(error))
    blocks = list(data.text_blocks(tmp_path / "a.txt", 0, len(text.encode())))
    assert "".join(blocks) == text and len(blocks) > 20
    assert [t for b in blocks for t in encoding.encode_ordinary(b)] == encoding.encode_ordinary(text)


@pytest.mark.parametrize("line", ["word\r\n", "日本語。\n", "end.\n", "\n", "x"])
def test_long_texts_of_any_lines_take_no_time(tmp_path, line):
    """5 MB, in blocks of the real size: the search for a border must not start over at every letter."""
    text = line * (5_000_000 // len(line.encode()))
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert "".join(data.text_blocks(tmp_path / "a.txt", 0, len(text.encode()))) == text


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfword\nnext\n")
    assert "".join(data.text_blocks(tmp_path / "a.txt", 0, 13)) == "word\nnext\n"


def test_what_makes_the_splitter_give_up_is_still_encoded():
    encoding = data.build_encoding("bytes", 0, ())
    text = "a" + " " * 2_000_000 + "b"
    assert encoding.decode(data.encode(encoding, text)) == text


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize("n", [20, 23, 41])
def test_something_is_always_held_out(tmp_path, n, suffix):
    for seed in range(4):
        folder = tmp_path / f"text{seed}"
        folder.mkdir()
        lines = [json.dumps({"text": f"text {i}"}) for i in range(n)]
        for i, line in enumerate(lines if suffix == ".txt" else ["\n".join(lines)]):
            (folder / f"{seed}-{i}{suffix}").write_text(line)
        meta = data.prepare(tmp_path / f"out{seed}", [str(folder)], tokenizer="bytes")
        assert 1 <= meta["val"]["documents"] <= 7 and meta["documents"] == n


def test_a_text_without_lines_is_still_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 10)
    text = "日" * 300
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    blocks = list(data.text_blocks(tmp_path / "a.txt", 0, 900))
    assert "".join(blocks) == text and len(blocks) > 3


def decode(folder, split, encoding):
    """The documents of a split as texts."""
    tokens = np.array(data.load_tokens(folder / f"{split}.bin"))
    starts = np.flatnonzero(tokens == encoding.encode_single_token("<|endoftext|>"))
    assert starts[0] == 0                                         # every document behind its <|endoftext|>
    return [encoding.decode(list(part[1:])) for part in np.split(tokens, starts[1:])]


def test_files_are_held_out_whole(tmp_path):
    folder = write_corpus(tmp_path / "text", files=60)
    meta = data.prepare(tmp_path / "out", [str(folder)], vocab_size=300)
    encoding = data.load_encoding(tmp_path / "out")
    train, val = (decode(tmp_path / "out", split, encoding) for split in ("train", "val"))
    files = {f.name: f.read_text(encoding="utf-8") for f in folder.iterdir()}
    assert Counter(train + val) == Counter(files.values()) and 1 <= len(val) <= 10
    assert set(val) == {text for name, text in files.items() if data.unit(name) < data.VAL_FRACTION}
    assert meta["documents"] == meta["files"] == 60 and meta["val"]["documents"] == len(val)
    assert meta["train"]["bytes"] == sum(len(t.encode()) for t in train)
    assert meta["train"]["sha256"] == data.file_sha256(tmp_path / "out/train.bin")


def test_of_a_single_file_the_last_part_is_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 3000)                      # many blocks, still one document
    text = "".join(f"line {i} of a text\n" for i in range(2000))
    (tmp_path / "a.md").write_text(text)
    meta = data.prepare(tmp_path / "out", [str(tmp_path / "a.md")], tokenizer="bytes")
    encoding = data.load_encoding(tmp_path / "out")
    (train,), (val,) = (decode(tmp_path / "out", split, encoding) for split in ("train", "val"))
    assert train + val == text and train.endswith("\n")
    assert len(val) / len(text) == pytest.approx(0.05, abs=0.005) and meta["vocab_size"] == 261


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_json_lines(suffix, tmp_path):
    texts = [f"document {i} é" for i in range(200)]
    lines = [json.dumps({"text": t}) for t in texts]
    bad = ["{broken", '{"other": 1}', '{"text": 5}', '["text"]', r'{"text": "\ud800"}']
    raw = "\n".join(lines[:100] + bad + ["", "  "] + lines[100:]).encode()
    (tmp_path / f"a{suffix}").write_bytes(gzip.compress(raw) if suffix.endswith("gz") else raw)
    meta = data.prepare(tmp_path / "out", [str(tmp_path / f"a{suffix}")], tokenizer="bytes")
    encoding = data.load_encoding(tmp_path / "out")
    got = [t for split in ("train", "val") for t in decode(tmp_path / "out", split, encoding)]
    assert Counter(got) == Counter(texts) and meta["skipped"]["lines"] == 5
    assert meta["val"]["documents"] == pytest.approx(10, abs=8)


def test_weights_repeat_and_thin_out(tmp_path):
    for name in "abc":
        lines = [json.dumps({"text": f"{name}{i}"}) for i in range(400)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    data.prepare(tmp_path / "out", [str(tmp_path / f"{n}.jsonl") for n in "abc"], [1, 2.5, 0.5], "bytes")
    encoding = data.load_encoding(tmp_path / "out")
    count = Counter(t[0] for t in decode(tmp_path / "out", "train", encoding))
    held = Counter(t[0] for t in decode(tmp_path / "out", "val", encoding))
    assert count["a"] + held["a"] == 400
    assert count["b"] == pytest.approx(2.5 * 380, rel=0.08)
    assert count["c"] == pytest.approx(0.5 * 380, rel=0.2)
    assert max(Counter(decode(tmp_path / "out", "val", encoding)).values()) == 1         # held out once


def test_the_tokenizer_is_not_trained_on_held_out_text(tmp_path, monkeypatch):
    folder = write_corpus(tmp_path / "text", files=60)
    held = {f.read_text(encoding="utf-8") for f in folder.iterdir() if data.unit(f.name) < data.VAL_FRACTION}
    corpus = data.Corpus([str(folder)], [1.0], tmp_path)
    assert held and not held & set(corpus.sample()) and len(list(corpus.sample())) == 60 - len(held)
    monkeypatch.setattr(data, "BPE_BYTES", corpus.bytes // 4)     # a larger corpus is sampled, evenly
    assert len(list(corpus.sample())) == pytest.approx(15, abs=2)


def test_part_of_a_single_file_by_weight(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(4000)))
    sizes = {}
    for weight in (1.0, 0.5, 2.25):
        meta = data.prepare(tmp_path / f"out{weight}", [str(tmp_path / "a.txt")], [weight], "bytes")
        sizes[weight] = meta["train"]["bytes"]
    assert sizes[0.5] == pytest.approx(0.5 * sizes[1.0], rel=0.01)
    assert sizes[2.25] == pytest.approx(2.25 * sizes[1.0], rel=0.01)


def test_files_that_are_no_utf8_are_skipped_whole_and_counted(tmp_path, capsys):
    folder = write_corpus(tmp_path / "text", files=30)
    (folder / "bad.txt").write_bytes(b"good beginning\n" * 10 + b"\xff\xfe bad")
    (folder / "image.png").write_bytes(b"\x89PNG")  # not a suffix that is read: not even counted
    (folder / ".hidden").mkdir()
    (folder / ".hidden/x.txt").write_text("secret")
    meta = data.prepare(tmp_path / "out", [str(folder)], tokenizer="bytes")
    assert meta["skipped"]["files"] == 1 and meta["files"] == 30
    assert b"good beginning" not in (tmp_path / "out/train.bin").read_bytes()[1024::2]
    assert "skipped" in data.describe("out", meta) and "1 files" in data.describe("out", meta)


def test_standard_library_without_tests_and_tables():
    root, files = data.standard_library()
    parts = {part for f in files for part in f.relative_to(root).parts[:-1]}
    assert len(files) > 300 and "json" in parts
    assert not parts & {"test", "tests", "encodings", "site-packages"}


def test_preparing_again_changes_nothing_and_other_settings_are_refused(tmp_path):
    folder = write_corpus(tmp_path / "text")
    first = data.prepare(tmp_path / "out", [str(folder)], tokenizer="bytes")
    stamp = (tmp_path / "out/train.bin").stat().st_mtime_ns
    assert data.prepare(tmp_path / "out", [str(folder)], tokenizer="bytes") == first
    assert (tmp_path / "out/train.bin").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="other settings"):
        data.prepare(tmp_path / "out", [str(folder)], tokenizer="bpe", vocab_size=300)


def test_an_interrupted_preparation_leaves_nothing(tmp_path, monkeypatch):
    folder = write_corpus(tmp_path / "text")

    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(data.TokenWriter, "close", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.prepare(tmp_path / "out", [str(folder)], tokenizer="bytes")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text"]


def test_memory_does_not_grow_with_the_source(tmp_path):
    """60 MB of text in one file: the resident set grows by far less."""
    line = "the quick brown fox %d jumps over the lazy dog and says nothing of it\n"
    with open(tmp_path / "big.txt", "w") as file:
        for i in range(850_000):
            file.write(line % i)
    code = ("import resource, data, torch\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
            "before = peak()\n"
            "data.prepare('out', ['big.txt'], vocab_size=400)\n"
            "print(peak() - before)")
    env = os.environ | {"PYTHONPATH": str(Path(data.__file__).parent), "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                         check=True, env=env)
    assert (tmp_path / "big.txt").stat().st_size > 60e6 and int(out.stdout) < 120


# --- token files ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("vocab_size, dtype", [(65536, np.uint16), (65537, np.uint32), (200_064, np.uint32)])
def test_token_file_round_trip(tmp_path, vocab_size, dtype):
    writer = data.TokenWriter(tmp_path / "t.bin", vocab_size)
    writer.write([1, 2, vocab_size - 1])
    writer.write(np.array([], np.int64))
    writer.write([7])
    writer.close()
    tokens = data.load_tokens(tmp_path / "t.bin")
    assert tokens.dtype == dtype and tokens.tolist() == [1, 2, vocab_size - 1, 7]
    assert data.vocabulary(tmp_path / "t.bin") == vocab_size


@pytest.mark.parametrize("harm, message", [
    (lambda raw: raw[:-2], "corrupt"), (lambda raw: raw + b"\0\0", "corrupt"),
    (lambda raw: b"", "not a token file"), (lambda raw: b"X" + raw[1:], "not a token file"),
    (lambda raw: raw[:500], "corrupt"),
    (lambda raw: raw[:-2] + b"\xff\xff", "beyond its vocabulary"),
    (lambda raw: raw[:-2] + (300).to_bytes(2, "little"), "beyond its vocabulary"),
    (lambda raw: raw[:8] + b"\x02" + raw[9:], "not a token file"),
    (lambda raw: raw[:32] + bytes(8) + raw[40:1024], "corrupt"),             # no token at all
    (lambda raw: raw[:16] + b"\x01" + raw[17:1324], "corrupt")])
def test_damaged_token_files_are_refused(tmp_path, harm, message):
    writer = data.TokenWriter(tmp_path / "t.bin", 300)
    writer.write(range(300))
    writer.close()
    (tmp_path / "t.bin").write_bytes(harm((tmp_path / "t.bin").read_bytes()))
    with pytest.raises(ValueError, match=message):
        data.load_tokens(tmp_path / "t.bin")


# --- the sampler ------------------------------------------------------------------------------------------

def test_every_window_comes_once_per_epoch():
    tokens = np.arange(1000, 1000 + 50 * 8 + 5, dtype=np.uint16)
    sampler = data.Sampler(tokens, 8, seed=3)
    assert sampler.n_windows == 50
    for epoch in range(3):
        x, y = sampler.rows(epoch * 50, 50)
        assert x.dtype == torch.int64 and torch.equal(y[:, :-1], x[:, 1:])
        assert sorted(x[:, 0].tolist()) == list(range(1000, 1400, 8))
        assert torch.equal(y[:, -1], x[:, -1] + 1)
    first, second = sampler.rows(0, 50)[0], sampler.rows(50, 50)[0]
    assert not torch.equal(first, second)
    assert not torch.equal(first, data.Sampler(tokens, 8, seed=4).rows(0, 50)[0])
    assert not torch.equal(first[:, 0], first[:, 0].sort().values)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_ranks_share_what_one_process_gets(world):
    sampler = data.Sampler(np.arange(1000, dtype=np.uint16), 7, seed=0)
    want = sampler.rows(135, 12)                                  # across the end of an epoch (142 windows)
    parts = [data.Sampler(np.arange(1000, dtype=np.uint16), 7, seed=0).rows(135, 12, r, world)
             for r in range(world)]
    for i in range(2):
        assert torch.equal(torch.cat([p[i] for p in parts]), want[i])


def test_rows_depend_only_on_seed_and_position():
    tokens = np.arange(1000, dtype=np.uint16)
    a = data.Sampler(tokens, 10, seed=1)
    a.rows(0, 500)
    assert torch.equal(a.rows(40, 8)[0], data.Sampler(tokens, 10, seed=1).rows(40, 8)[0])
    assert torch.equal(torch.cat([a.rows(40, 3)[0], a.rows(43, 5)[0]]), a.rows(40, 8)[0])


# --- downloads --------------------------------------------------------------------------------------------

class Server(http.server.BaseHTTPRequestHandler):
    """/good serves a file; /short promises more than it sends, twice; /gone is not there."""

    body = "\n".join(json.dumps({"text": f"text number {i}"}) for i in range(100)).encode()
    asked = Counter()

    def do_GET(self):
        self.asked[self.path] += 1
        short = self.path.startswith("/short") and self.asked[self.path] < 3 or self.path.startswith("/never")
        self.send_response(404 if self.path.startswith("/gone") else 200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body[:100] if short else self.body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(data.time, "sleep", lambda _: None)       # between tries
    Server.asked.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_download_is_complete_or_not_there(server, tmp_path):
    path = data.download(f"{server}/short.jsonl", tmp_path)       # cut off twice, whole the third time
    assert path.read_bytes() == Server.body and Server.asked["/short.jsonl"] == 3
    data.download(f"{server}/short.jsonl", tmp_path)
    assert Server.asked["/short.jsonl"] == 3                      # not fetched again
    for name, tries in (("never.jsonl", 3), ("gone.jsonl", 1)):
        with pytest.raises(ValueError, match="could not download"):
            data.download(f"{server}/{name}", tmp_path)
        assert Server.asked["/" + name] == tries
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_url_is_a_source(server, tmp_path):
    meta = data.prepare(tmp_path / "out", [f"{server}/good.jsonl"], tokenizer="bytes")
    assert meta["documents"] == 100


def test_file_size_limit_leaves_nothing_behind(tmp_path):
    """A disk that is full, by the limit that needs no privileges: the folder is not there, or whole."""
    write_corpus(tmp_path / "text")
    code = ("import resource, signal, data\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
            "data.main(['--source', 'text', '--name', 'x', '--vocab_size', '300'])")
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": str(Path(data.__file__).parent)})
    assert out.returncode == 2 and out.stderr.count("\n") == 1 and "File too large" in out.stderr
    assert list((tmp_path / "data").iterdir()) == []


def test_largest_share():
    tokens = np.array([3] * 6 + [1] * 3 + [0], np.uint16)
    assert data.largest_share(tokens, 5) == 0.6 == data.largest_share(tokens, 5, blocks=3, size=4)
    rng = np.random.default_rng(0)
    tokens = rng.choice(5, 100_000, p=[0.1, 0.5, 0.2, 0.1, 0.1]).astype(np.uint16)
    assert data.largest_share(tokens, 5, blocks=20, size=1000) == pytest.approx(0.5, abs=0.02)  # a sample
