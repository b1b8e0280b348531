"""Tokenizers, token files, sources and the sampler."""

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import regex
import torch
from conftest import write_corpus

import data

NASTY = ["", " ", "\n\n  \t\n", "a\n\n\n  b \n", "naïve café 日本語 🙂👩‍👩‍👧 e\u0301\u0302",
         "x" * 300, "\x00\x01\x7f\r\n\r", "12345678 3.14159", "don't we'll I'VE",
         "<|endoftext|> is only text", "\u2028\u00a0\ufeff", "def f(x):\n    return x\n"]


# --- tokenizers -------------------------------------------------------------------------------------------

def slow_bpe(texts, n_ranks):
    """Counts every pair anew for every merge.  A character is a rank."""
    words = Counter(w[i:i + 64].encode().decode("latin-1") for text in texts
                    for w in regex.findall(data.PATTERN, text) for i in range(0, len(w), 64))
    vocab = [bytes([i]) for i in range(256)]
    while len(vocab) < n_ranks:
        count = Counter()
        for w, n in words.items():
            for pair in zip(w, w[1:]):
                count[pair] += n
        a, b = min(count, key=lambda pair: (-count[pair], pair))
        if count[a, b] < 2:
            break
        words = {w.replace(a + b, chr(len(vocab))): n for w, n in words.items()}
        vocab.append(vocab[ord(a)] + vocab[ord(b)])
    return {token: i for i, token in enumerate(vocab)}


@pytest.mark.parametrize("seed", range(6))
def test_bpe_training_equals_recounting_everything(seed):
    """Also of text without spaces, and whatever the order of documents."""
    rng = random.Random(seed)
    alphabet, most = (("aab bc\nd", 80), ("ab ", 80), ("ACGT", 900))[seed % 3]     # long runs, overlaps, DNA
    texts = ["".join(rng.choices(alphabet, k=rng.randint(1, most))) for _ in range(rng.randint(1, 12))]
    texts += rng.choices(NASTY, k=4)
    want = slow_bpe(texts, 256 + 40)
    assert data.train_bpe(texts, 256 + 40) == data.train_bpe(texts[::-1], 256 + 40) == want


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


# --- reading ----------------------------------------------------------------------------------------------

def prepare(folder, *sources, name="out", tokenizer="bytes", **settings):
    return data.prepare(folder / name, [str(source) for source in sources], tokenizer, **settings)


def both(folder):
    """The documents of both splits as texts."""
    encoding, sides = data.load_encoding(folder), []
    for split in ("train", "val"):
        tokens = np.array(data.load_tokens(folder / f"{split}.bin"))
        starts = np.flatnonzero(tokens == encoding.encode_single_token("<|endoftext|>"))
        assert starts[0] == 0                                     # every document behind its <|endoftext|>
        sides.append([encoding.decode(list(part[1:])) for part in np.split(tokens, starts[1:])])
    return sides


def share(meta):
    return meta["val"]["bytes"] / (meta["train"]["bytes"] + meta["val"]["bytes"])


def lines_of(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def save(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("line", ["word\r\n", "日本語。\n", "x", " "])
def test_long_texts_of_any_lines_are_cut_and_encoded(tmp_path, line):
    """1.2 MB, in blocks of the real size; tiktoken overflows at a million spaces."""
    text = "a" + line * (1_200_000 // len(line.encode())) + "b"
    save(tmp_path / "a.txt", text)
    meta = prepare(tmp_path, tmp_path / "a.txt")
    (train,), (val,) = both(tmp_path / "out")
    assert meta["train"]["documents"] + meta["val"]["documents"] == 1
    assert train + val == text and share(meta) == pytest.approx(0.05, abs=0.002)


def test_lines_that_are_endoftext_part_documents(tmp_path, capsys):
    """As in TinyStories; elsewhere it stays text, which is said."""
    stories = [f"story {i}\n<|endoftext|> is text here\n" for i in range(400)]
    save(tmp_path / "a.txt", "<|endoftext|>\n".join(stories))
    save(tmp_path / "b.txt", "\ufeff<|endoftext|>\none\r\n<|endoftext|> \r\ntwo <|endoftext|>\nis text")
    meta = prepare(tmp_path, tmp_path / "a.txt", tmp_path / "b.txt")
    assert meta["train"]["documents"] + meta["val"]["documents"] == 402
    train, val = both(tmp_path / "out")
    assert Counter(train + val) == Counter([*stories, "one\r\n", "two <|endoftext|>\nis text"])
    assert "401 documents have <|endoftext|> inside a line" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_json_lines(suffix, tmp_path, capsys):
    """Empty ones are left out; what is wrong with others is said, and their number."""
    texts = [f"document {i} é" for i in range(600)]
    bad = ["{broken", '{"other": 1}', '{"text": 5}', '["text"]', r'{"text": "\ud800"}', "[" * 99999]
    empty = ["", "  ", '{"text": ""}', '{"text": " \\n"}']
    lines = lines_of(texts).splitlines()
    raw = ("\ufeff" + "\n".join(lines[:100] + bad + empty + lines[100:])).encode()
    save(tmp_path / f"a{suffix}", gzip.compress(raw) if suffix.endswith("gz") else raw)
    meta = prepare(tmp_path, tmp_path / f"a{suffix}")
    train, val = both(tmp_path / "out")
    assert Counter(train + val) == Counter(texts) and share(meta) == pytest.approx(0.05, abs=0.01)
    out, err = capsys.readouterr()
    assert "line 101: Expecting" in err and 'line 102: no "text" in it that is text, but other' in err
    assert "line 105: 'utf-8'" in err
    assert "skipped 6 of 606" in err and "600 documents, skipped 6," in out and "held out" in out


def test_packed_lines_are_held_out_as_plain_ones(tmp_path):
    """Of 60 equal lines none is large; packed they are smaller than one."""
    raw = lines_of([f"document {i}: " + SENTENCE * 20 for i in range(60)]).encode()
    for name, content in (("a.jsonl", raw), ("b.jsonl.gz", gzip.compress(raw))):
        save(tmp_path / name, content)
        meta = prepare(tmp_path, tmp_path / name, name=name[0])
        assert meta["train"]["documents"] + meta["val"]["documents"] == 60
    assert both(tmp_path / "a") == both(tmp_path / "b")


def test_nothing_is_read_twice_and_what_is_left_out_is_said(tmp_path, capsys):
    folder = write_corpus(tmp_path / "text", files=9)
    save(folder / "blank.txt", " \n\t")
    save(folder / "more/table.json", "[]")
    meta = prepare(tmp_path, folder, folder / "../text", next(folder.glob("*.txt")))
    assert meta["files"] == 10 and meta["train"]["documents"] + meta["val"]["documents"] == 9
    assert "not read: 1 .json" in capsys.readouterr().out


GOOD = lines_of(f"number {i} of many" for i in range(150)).encode()
UNREADABLE = {                                                    # content, and what must be said
    "utf16.jsonl": (("\ufeff" + GOOD.decode()).encode("utf-16-le"), "iconv -f UTF-16"),
    "utf16.txt": ("plain words".encode("utf-16"), "iconv -f UTF-16"),
    "page.txt": (b"\n<!DOCTYPE html><html>", "it is a page of HTML"),
    "unmarked.txt": ("plain words".encode("utf-16-be"), "UTF-16"),
    "latin1.txt": ("naïve café".encode("latin-1"), "'utf-8' codec"),
    "late.txt": (b"good words\n" * 90_000 + b"\xff bad", "'utf-8' codec"),
    "half.jsonl": (GOOD + b'{"text": "caf\xe9"}\n' * 150, "line 151: 'utf-8' codec"),
    "cut.jsonl.gz": (gzip.compress(GOOD)[:-20], "ended before"),
    "no-gzip.jsonl.gz": (b"plain", "gzip"),
    "chat.jsonl": (b'{"messages": []}\n', "--chats"),
    "two-percent.jsonl": (GOOD + b'{"txt": "a"}\n' * 3, 'line 151: no "text"')}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_refused_by_name(name, tmp_path):
    content, words = UNREADABLE[name]
    save(tmp_path / name, content)
    with pytest.raises((ValueError, OSError), match="cannot be read") as error:
        prepare(tmp_path, tmp_path / name)
    assert name in str(error.value) and words in str(error.value)
    assert os.listdir(tmp_path) == [name]


def test_a_file_that_is_no_utf8_is_left_out_as_a_whole_and_named(tmp_path, capsys):
    folder = write_corpus(tmp_path / "text", files=120)
    save(folder / "005-bad.txt", b"good beginning\n" * 90_000 + b"\xff\xfe bad")
    save(folder / "image.png", b"\x89PNG")                        # not a suffix that is read: not counted
    save(folder / ".hidden/x.txt", b"secret")
    save(folder / "empty.txt", b"\xef\xbb\xbf")
    meta = prepare(tmp_path, folder)
    assert meta["skipped"] == 1 and meta["train"]["documents"] + meta["val"]["documents"] == 120
    assert "005-bad.txt: 'utf-8' codec" in capsys.readouterr().err
    assert not {"good", "secret"} & {text[:4] for side in both(tmp_path / "out") for text in side}


def test_linked_folders_are_not_followed_and_broken_links_named(tmp_path, capsys):
    write_corpus(tmp_path / "text", files=3)
    write_corpus(tmp_path / "elsewhere", files=4, seed=1)
    os.symlink(tmp_path / "elsewhere", tmp_path / "text/link")
    assert len(data.find_files([str(tmp_path / "text")], False)) == 3
    assert len(data.find_files([str(tmp_path / "text/link")], False)) == 4
    assert "not read: 1 linked folder" in capsys.readouterr().out
    os.symlink(tmp_path / "gone", tmp_path / "text/dangling.txt")
    with pytest.raises(ValueError, match="1 of 4 files cannot be read.*dangling.txt: .*No such file"):
        prepare(tmp_path, tmp_path / "text")


def test_one_unreadable_file_is_left_out_and_two_of_a_hundred_are_refused(tmp_path, capsys):
    """However many documents the others have."""
    for i in range(99):
        save(tmp_path / f"text/{i}.txt", "<|endoftext|>\n".join(f"{i} {j} of many\n" for j in range(9)))
    os.symlink(tmp_path / "gone", tmp_path / "text/dangling.txt")
    assert prepare(tmp_path, tmp_path / "text")["skipped"] == 1
    assert "skipped 1 of 100 files" in capsys.readouterr().err
    save(tmp_path / "text/cut.jsonl.gz", gzip.compress(GOOD)[:-20])
    with pytest.raises(ValueError, match="2 of 101 files cannot be read"):
        prepare(tmp_path, tmp_path / "text", name="again")


def test_parquet_and_zst_are_what_lines_are(tmp_path):
    """Also another field; of many records without it the first thousand are read, and their names said."""
    pa = pytest.importorskip("pyarrow", reason="needs the extra data")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"document {i} \u00e9" for i in range(2500)]
    save(tmp_path / "a.jsonl", lines_of(texts))
    table = pa.table({"id": list(range(2500)), "story": texts})
    parquet.write_table(table, tmp_path / "b.parquet", row_group_size=300)
    raw = (tmp_path / "a.jsonl").read_bytes()
    halves = [pa.compress(half, "zstd", asbytes=True) for half in (raw[:9000], raw[9000:])]      # two frames
    save(tmp_path / "c.jsonl.zst", b"".join(halves))
    prepare(tmp_path, tmp_path / "a.jsonl", name="a")
    prepare(tmp_path, tmp_path / "b.parquet", name="b", field="story")
    prepare(tmp_path, tmp_path / "c.jsonl.zst", name="c")
    assert both(tmp_path / "a") == both(tmp_path / "b") == both(tmp_path / "c")
    with pytest.raises(ValueError, match=r'1,000 of 1,000 .* row 1: no "text" in it .* id, story; --field'):
        prepare(tmp_path, tmp_path / "b.parquet")
    save(tmp_path / "cut.jsonl.zst", b"".join(halves)[:-9])
    with pytest.raises(ValueError, match="cut.jsonl.zst, line .*: Truncated"):
        prepare(tmp_path, tmp_path / "cut.jsonl.zst")


def test_a_list_is_a_list_whatever_its_suffix_and_other_formats_are_named(tmp_path):
    save(tmp_path / "a.jsonl", json.dumps([{"text": f"number {i}"} for i in range(40)]))
    assert prepare(tmp_path, tmp_path / "a.jsonl")["skipped"] == 0
    save(tmp_path / "a.csv", "a,b")
    with pytest.raises(ValueError, match=r"a.csv: .csv is not a format that data.py reads: .* \.parquet"):
        data.find_files([str(tmp_path / "a.csv")], False)


def other_tokens(ids, header=()):
    """A token file: of nanoGPT, or with a header of 256 int32."""
    front = np.zeros(256 * bool(header), "<i4")
    front[:len(header)] = header
    return front.tobytes() + np.array(ids, "<u2").tobytes()


BYTE_EOT, LLM_C = 256, 20240520                                   # of the tokenizer "bytes"


@pytest.mark.parametrize("header", [False, True])
def test_token_files_of_others_are_copied(tmp_path, header):
    """<|endoftext|> behind documents, as nanoGPT has it, or before."""
    texts = [f"document {i} of many" for i in range(300)]
    ids = [t for text in texts for t in
           [BYTE_EOT] * header + list(text.encode()) + [BYTE_EOT] * (not header)]
    save(tmp_path / "a.bin", other_tokens(ids, [LLM_C, 1, len(ids)] if header else ()))
    meta = prepare(tmp_path, tmp_path / "a.bin")
    train, val = both(tmp_path / "out")
    assert Counter(train + val) == Counter(texts) and 0.02 < share(meta) < 0.09
    assert meta["train"]["bytes"] == sum(map(len, train))
    with pytest.raises(ValueError, match="need the --tokenizer"):
        prepare(tmp_path, tmp_path / "a.bin", name="again", tokenizer="bpe")


def ours(path):
    writer = data.TokenWriter(path, 300)
    writer.write(range(200))
    writer.close()
    return path.read_bytes()


@pytest.mark.parametrize("harm, words", [
    (lambda path: other_tokens([1, 2, 3])[:-1], "was cut"),
    (lambda path: other_tokens([1, 2, 3], [LLM_C, 1, 4]), "was cut"),
    (lambda path: other_tokens([1, 2, 3], [LLM_C, 2, 3]), "was cut"),
    (lambda path: other_tokens([1, BYTE_EOT, 257]), "largest id is 257"),
    (lambda path: other_tokens([1, 0, 2, 0, 3, 0]), "no uint16"), (ours, "data.py made it"),
    (lambda path: b"", "empty")])
def test_token_files_that_do_not_fit_are_refused(tmp_path, harm, words):
    save(tmp_path / "a.bin", harm(tmp_path / "ours.bin"))
    with pytest.raises(ValueError, match=words):
        prepare(tmp_path, tmp_path / "a.bin")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("vocabulary", [range(70_000), [*range(9), *range(12, 300)]], ids=["uint32", "gaps"])
def test_token_files_are_of_a_tokenizer_without_gaps_that_uint16_holds(tmp_path, vocabulary):
    (tmp_path / "a.bin").write_bytes(np.arange(300, dtype="<u4").tobytes())
    encoding = SimpleNamespace(n_vocab=max(vocabulary) + 6, _mergeable_ranks={i: i for i in vocabulary})
    with open(tmp_path / "a.bin", "rb") as file, pytest.raises(ValueError, match="read as uint16"):
        next(data.read_token_file(tmp_path / "a.bin", file, encoding))


def test_a_folder_that_is_there_says_that_its_sources_are_not_read_again(tmp_path, capsys):
    save(tmp_path / "a.txt", "a text\n" * 99)
    prepare(tmp_path, tmp_path / "a.txt")
    assert "is there already" not in capsys.readouterr().out
    prepare(tmp_path, tmp_path / "a.txt")
    assert "out is there already; delete it" in capsys.readouterr().out


# --- the held-out part ------------------------------------------------------------------------------------

SENTENCE = "some words that come again and again, "
MANY = [f"document {i}: " + SENTENCE * (1 + i % 7) for i in range(100)]
HOLDOUTS = {
    "one line": {"a.txt": SENTENCE * 3000 + "\n"}, "one line without an end": {"a.txt": "日" * 50_000},
    "two files": {"a.txt": "a line\n" * 900, "b.md": "other line\n" * 2000},
    "lopsided": {"00.txt": MANY[0] * 6000, **{f"{i:02}.txt": MANY[i] * 3 for i in range(1, 20)}},
    "equal huge files": {f"{i}.txt": "a line\n" * 5000 for i in range(4)},
    "thirty files": {f"{i}.txt": text * 9 for i, text in enumerate(MANY[:30])},
    "equal files": {f"{i}.txt": MANY[i % 40] for i in range(120)},
    "a file and its lines": {"a.txt": MANY[0], "a.jsonl": MANY * 2},
    "few lines": {"a.jsonl": [text * 5 for text in MANY[:3]]}, "hundred lines": {"a.jsonl": MANY},
    "one long line of many": {"a.jsonl": [SENTENCE * 900, *MANY]}}


@pytest.mark.parametrize("name", HOLDOUTS)
def test_about_a_twentieth_of_the_bytes_is_held_out(name, tmp_path):
    """Whatever the files; equal documents are on one side; and another order of the files changes nothing."""
    for file, content in HOLDOUTS[name].items():
        save(tmp_path / "text" / file, content if isinstance(content, str) else lines_of(content))
    meta = prepare(tmp_path, tmp_path / "text")
    assert 0.025 < share(meta) < 0.085
    train, val = both(tmp_path / "out")
    assert not set(train) & set(val)
    assert sum(map(len, train + val)) == sum(len("".join(content)) for content in HOLDOUTS[name].values())
    files = sorted((tmp_path / "text").iterdir(), reverse=True)
    prepare(tmp_path, *files, name="again")
    assert list(map(Counter, both(tmp_path / "again"))) == [Counter(train), Counter(val)]


def test_documents_are_held_out_whole_and_tokens_have_a_checksum(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 300)                       # many blocks, still one document
    folder = write_corpus(tmp_path / "text", files=400)
    meta = prepare(tmp_path, folder, vocab_size=300, tokenizer="bpe")
    train, val = both(tmp_path / "out")
    assert Counter(train + val) == Counter(f.read_text(encoding="utf-8") for f in folder.iterdir())
    assert (meta["files"], meta["val"]["documents"]) == (400, len(val)) and 10 < len(val) < 35
    assert meta["train"]["bytes"] == sum(len(t.encode()) for t in train)
    for name in ("encoding.json", "train.bin", "val.bin"):
        raw = (tmp_path / "out" / name).read_bytes()
        save(tmp_path / "out" / name, raw[:-1] + b"\1")
        with pytest.raises(ValueError, match=f"{name} does not fit"):
            data.load_meta(tmp_path / "out")
        save(tmp_path / "out" / name, raw)
    assert data.load_meta(tmp_path / "out") == meta


def test_too_little_text_and_a_vocabulary_for_no_bpe_are_refused(tmp_path):
    with pytest.raises(ValueError, match="vocab_size is for the tokenizer bpe"):
        data.prepare(tmp_path / "out", [str(tmp_path)], "bytes", 777)
    save(tmp_path / "a.jsonl", "\n")
    with pytest.raises(ValueError, match="a.jsonl is empty, or too small"):
        prepare(tmp_path, tmp_path / "a.jsonl")
    save(tmp_path / "b.txt", "a b c\n" * 100)
    prepare(tmp_path, tmp_path / "b.txt")
    with pytest.raises(ValueError, match=r"seq_len \(99\) is too long for 31 tokens"):
        data.open_sampler(tmp_path / "out/val.bin", 99)


@pytest.mark.parametrize("chats", [False, True])
def test_held_out_text_trains_no_tokenizer(tmp_path, monkeypatch, chats):
    """And of a corpus larger than BPE_CHARS, only a sample does, evenly spread."""
    field = "instruction" if chats else "text"
    records = [{field: f"number {i} of many", "output": "yes"} for i in range(400)]
    save(tmp_path / "a.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    seen, real = [], data.train_bpe

    def train_bpe(texts, n):
        texts = list(texts)
        seen.extend([texts] if texts else [])
        return real(texts, n)
    monkeypatch.setattr(data, "train_bpe", train_bpe)
    settings = dict(tokenizer="bpe", vocab_size=300, chats=chats)
    prepare(tmp_path, tmp_path / "a.jsonl", **settings)
    of_training, held_out = (Counter(regex.findall(r"number \d+ of many", " ".join(texts)))
                             for texts in (seen[0], both(tmp_path / "out")[1]))
    assert not of_training & held_out and len(of_training + held_out) == 400
    monkeypatch.setattr(data, "BPE_CHARS", (tmp_path / "a.jsonl").stat().st_size // 4)
    prepare(tmp_path, tmp_path / "a.jsonl", name="again", **settings)
    assert len(seen[1]) == pytest.approx(380 / 4, abs=5)


def test_a_tokenizer_is_trained_on_parts_of_all_large_files(tmp_path, monkeypatch):
    """Not on the first of a few documents alone."""
    monkeypatch.setattr(data, "BLOCK", 100)
    monkeypatch.setattr(data, "BPE_CHARS", 2000)
    save(tmp_path / "a/README.txt", "words")
    save(tmp_path / "a/book.txt", SENTENCE * 400)
    assert prepare(tmp_path, tmp_path / "a", tokenizer="bpe", vocab_size=280)["vocab_size"] == 280


def test_pythons_own_files_without_tests_and_tables(tmp_path, monkeypatch):
    parts = {part for f in data.python_files("stdlib") for part in f.relative_to(data.LIBRARY).parts[:-1]}
    assert "json" in parts and not parts & {"test", "encodings", "site-packages"}
    for name in ("lib/os.py", "site-packages/one/tests/b.py", "site-packages/one/c.py", "elsewhere/c.py"):
        save(tmp_path / name, f"# {name}\n" * 9)
    monkeypatch.setattr(data, "LIBRARY", tmp_path / "lib")
    monkeypatch.setattr(data.sys, "path", ["", str(tmp_path / "elsewhere"), str(tmp_path / "site-packages")])
    assert [f.name for f in data.python_files("stdlib")] == ["os.py"]
    assert [f.name for f in data.find_files(["installed"], False)] == ["os.py", "c.py"]


@pytest.mark.parametrize("chats", [False, True])
def test_threads_change_no_byte(tmp_path, monkeypatch, chats):
    """Short documents and one of many blocks."""
    monkeypatch.setattr(data, "BLOCK", 100)
    texts = [f"number {i} " + SENTENCE * (40 * (i == 7)) for i in range(300)]
    save(tmp_path / "a.jsonl", "".join(json.dumps({"text": text} if not chats else {
        "instruction": text, "output": "yes"}) + "\n" for text in texts))
    for n in (1, 2, 5):
        monkeypatch.setattr(data.torch, "get_num_threads", lambda n=n: n)
        prepare(tmp_path, tmp_path / "a.jsonl", name=f"with-{n}", chats=chats)
    for file in ("train.bin", "val.bin", "encoding.json"):
        assert len({(tmp_path / f"with-{n}" / file).read_bytes() for n in (1, 2, 5)}) == 1
    if not chats:
        assert Counter("".join(sum(both(tmp_path / "with-5"), []))) == Counter("".join(texts))


# --- preparing twice, and being stopped -------------------------------------------------------------------

def test_preparing_again_changes_nothing_and_other_settings_are_refused(tmp_path, monkeypatch):
    """A folder that another program made meanwhile stays; Ctrl-C leaves nothing behind."""
    folder, real = write_corpus(tmp_path / "text"), data.write_folder
    first = prepare(tmp_path, folder)
    stamp = (tmp_path / "out/train.bin").stat().st_mtime_ns
    assert prepare(tmp_path, folder) == first
    with pytest.raises(ValueError, match="other settings"):
        prepare(tmp_path, folder, tokenizer="bpe", vocab_size=300)

    def overtaken(*args):
        real(*args)
        shutil.copytree(tmp_path / "out", tmp_path / "second")

    def interrupted(*args):
        real(*args)
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "write_folder", overtaken)
    assert prepare(tmp_path, folder, name="second") == first
    assert {(tmp_path / name / "train.bin").stat().st_mtime_ns for name in ("out", "second")} == {stamp}
    monkeypatch.setattr(data, "write_folder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, folder, name="third")
    assert sorted(os.listdir(tmp_path)) == ["out", "second", "text"]


def python(code, folder):
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(Path(data.__file__).parent)})


def test_file_size_limit_leaves_nothing_behind(tmp_path):
    """A disk that is full, by the limit that needs no privileges: the folder is not there, or whole."""
    write_corpus(tmp_path / "text")
    code = ("import resource, signal, data\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
            "data.main(['--source', 'text', '--name', 'x', '--vocab_size', '300'])")
    out = python(code, tmp_path)
    assert out.returncode == 2 and out.stderr.count("\n") == 1 and "File too large" in out.stderr
    assert list((tmp_path / "data").iterdir()) == []


def test_memory_does_not_grow_with_the_source(tmp_path):
    """10 MB in one file of each kind: the resident set grows by less than a copy of both."""
    text = "the quick brown fox jumps over the lazy dog and says nothing of it\n" * 10
    save(tmp_path / "big.txt", "".join(f"{i} {text}" for i in range(15_000)))
    save(tmp_path / "big.jsonl", lines_of(f"{i} {text}" for i in range(15_000)))
    code = ("import resource, data, sys, torch\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
            "before, data.BPE_CHARS = peak(), 1 << 20\n"
            "data.prepare('out', ['big.txt', 'big.jsonl'], vocab_size=400)\n"
            "print(peak() - before, file=sys.stderr)")
    assert int(python(code, tmp_path).stderr) < 24


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
    assert data.read_header(tmp_path / "t.bin")[1] == vocab_size


@pytest.mark.parametrize("harm, message", [
    (lambda raw: raw[:-2], "corrupt"), (lambda raw: raw + b"\0\0", "corrupt"),
    (lambda raw: raw[:500], "corrupt"), (lambda raw: b"", "not a token file"),
    (lambda raw: b"X" + raw[1:], "not a token file"),
    (lambda raw: raw[:32] + np.int64(-100).tobytes() + raw[40:824], "not a token file"),
    (lambda raw: raw[:8] + b"\x02" + raw[9:], "not a token file")])
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
def test_rows_depend_only_on_seed_and_position(world):
    """On the number of processes neither."""
    tokens = np.arange(1000, dtype=np.uint16)
    want = data.Sampler(tokens, 7, seed=1).rows(135, 12)          # across the end of an epoch (142 windows)
    parts = [data.Sampler(tokens, 7, seed=1).rows(135, 12, rank, world) for rank in range(world)]
    assert all(torch.equal(torch.cat(part), each) for part, each in zip(zip(*parts), want))
    used = data.Sampler(tokens, 7, seed=1)
    used.rows(0, 500)
    assert torch.equal(torch.cat([used.rows(135, 5)[0], used.rows(140, 7)[0]]), want[0])
    assert data.Sampler(np.arange(99), 3, 5).rows(30, 5)[0][:, 0].tolist() == [42, 24, 30, 36, 54]
