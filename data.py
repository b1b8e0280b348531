"""Text to token files, and token files to batches.

    python data.py                                        Python's standard library -> data/stdlib
    python data.py --source installed                     and all installed packages -> data/installed
    python data.py --source my_folder --name mine         its text, JSON lines and parquet files
    python data.py --source train.bin --tokenizer gpt2 --name other     tokens of nanoGPT or modded-nanogpt
    python data.py --chats --source chats.jsonl --tokenizer out/laptop --name chats       conversations

A prepared folder holds train.bin and val.bin (a header, then the tokens of all documents, each preceded by
<|endoftext|>), encoding.json (the tokenizer) and meta.json (what went in, and checksums).
"""

import argparse
import ast
import base64
import functools
import gzip
import hashlib
import heapq
import io
import itertools
import json
import os
import re
import signal
import sys
import sysconfig
import tempfile
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex  # comes with tiktoken, which splits text with the same syntax
import tiktoken
import torch
from tqdm import tqdm

TOKENIZERS = ("bpe", "bytes", "gpt2", "o200k_base")
TEXT_SUFFIXES = (".txt", ".md", ".py")
RECORD_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")                  # .json: chats only
NOT_READ = ("turn tables and .json into .jsonl (an object a line), pages into .txt; .json is read with "
            "--chats, text without, a token file (.bin) if it is named itself, with its --tokenizer")
SPECIAL = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
END_OF_TEXT, SYSTEM, USER, ASSISTANT, END = range(-5, 0)   # their ids, as offsets from the vocabulary's size
BLOCK = 1 << 18                    # characters encoded at a time; tiktoken overflows at 2 ** 19 spaces
BPE_CHARS = 16 << 20               # characters that a tokenizer is trained on
HEADER, MAGIC, VERSION = 1024, 0x414D474953, 1             # "SIGMA"
LLM_C_MAGIC = 20240520             # of token files of llm.c and modded-nanogpt

# GPT-2's split of text into words, and ours, with digits in groups of three
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
PATTERN = GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}{1,3}")


def prepare(out, sources=("stdlib",), tokenizer="bpe", vocab_size=None, chats=False, field="text"):
    """Prepare a folder unless it is there, and say what it holds -> its meta.json.  vocab_size: of bpe,
    default 2,048, for "installed" 8,192.  InputError if the folder was made from something else."""
    out = Path(out)
    if vocab_size and tokenizer != "bpe" or chats and field != "text":
        raise InputError("vocab_size is for the tokenizer bpe, others have their own; field is for text")
    if tokenizer == "bpe" and vocab_size is None:
        vocab_size = 8192 if "installed" in sources else 2048
    request = {"sources": list(sources), "tokenizer": tokenizer, "chats": chats, "vocab_size": vocab_size,
               "field": field}
    if not out.exists():
        with new_folder(out) as folder:
            write_folder(folder, request)
    else:
        print(f"{out} is there already; delete it to read its sources again")
    meta = load_meta(out)
    if {"field": "text"} | meta["request"] != request:     # older folders have no field
        raise InputError(f"{out} was prepared with other settings ({meta['request']}); choose another "
                         "--name, or delete that folder yourself")
    train, val, kind = meta["train"], meta["val"], "conversations" if chats else "documents"
    total = train["bytes"] + val["bytes"]
    print(f"{out}: {meta['files']:,} files, {train['documents'] + val['documents']:,} {kind}, skipped "
          f"{meta['skipped']}, {total / 1e6:.1f} MB; {tokenizer}, vocabulary {meta['vocab_size']:,}\n"
          f"  train {train['tokens']:,} tokens of {train['bytes'] / train['tokens']:.2f} bytes; held out "
          f"{val['tokens']:,} ({val['bytes'] / total:.1%} of the bytes)")
    return meta


def write_folder(folder, request):
    """Write encoding.json, train.bin, val.bin and meta.json."""
    chats, name, vocab_size = request["chats"], request["tokenizer"], request["vocab_size"]
    encoding, problems = build_encoding(name, vocab_size), defaultdict(list)      # fail early
    files = find_files(request["sources"], chats, folder)
    if name == "bpe" and any(path.suffix == ".bin" for path in files):
        raise InputError("token files need the --tokenizer that made them, as in --tokenizer gpt2")
    if name == "bpe":                                      # on every n-th block, some 16M characters
        blocks = read_blocks(files, request, "reading", defaultdict(list))
        texts = ("".join(text for _, text in content) if chats else content
                 for held_out, _, _, content in blocks if not held_out)
        stride = max(1, n_bytes(files) // BPE_CHARS)
        encoding = build_encoding(name, vocab_size, itertools.islice(texts, 0, None, stride))
    save_encoding(encoding, folder / "encoding.json")
    count = {split: Counter(documents=0, bytes=0, tokens=0) for split in ("train", "val")}
    writers = {split: TokenWriter(folder / f"{split}.bin", encoding.n_vocab, chats) for split in count}
    blocks = read_blocks(files, request, "writing", problems, encoding)
    for held_out, is_new, tokens, size in encode_blocks(encoding, blocks):
        split = "val" if held_out else "train"
        writers[split].write(tokens)
        count[split].update(documents=int(is_new), bytes=size, tokens=len(tokens))
    if not count["train"]["tokens"]:
        raise InputError(f"{files[0]} is empty, or too small: there is no text to train on")
    meta = {"request": request, "files": len(files), "skipped": sum(map(len, problems.values())),
            "vocab_size": encoding.n_vocab, "encoding_sha256": file_sha256(folder / "encoding.json")}
    for split, writer in writers.items():
        writer.close()
        meta[split] = {**count[split], "sha256": file_sha256(folder / f"{split}.bin")}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def load_meta(folder):
    """meta.json of a prepared folder.  InputError if there is none, or its checksums do not fit."""
    folder = Path(folder)
    meta, checksums = read_json(folder / "meta.json", "that of a prepared folder", lambda meta: (meta, {
        "encoding.json": meta["encoding_sha256"], "train.bin": meta["train"]["sha256"],
        "val.bin": meta["val"]["sha256"]}))
    for name, checksum in checksums.items():
        if file_sha256(folder / name) != checksum:
            raise InputError(f"{folder}/{name} does not fit its meta.json: the sha256 is another")
    return meta


def file_sha256(path):
    return hashlib.sha256(np.memmap(path, np.uint8, "r") if os.path.getsize(path) else b"").hexdigest()


# --- from files to documents ------------------------------------------------------------------------------

def read_blocks(files, request, label, problems, encoding=None):
    """Yield (held out?, a new document?, behind <|endoftext|>?, content) of all documents, long ones in
    blocks.  content is a text, the tokens of a token file, or a conversation [(role, text)].  `problems`
    collects what cannot be read; InputError if that is more than 1 % of the files or of the documents.

    One in twenty is held out, by a hash of its content: equal ones fall on one side.  A document with more
    than a 300th of all bytes is parted: its last twentieth is held out."""
    large, n, n_inside, chats, field = n_bytes(files) / 300, 0, 0, request["chats"], request["field"]
    for where, record in read_records(files, request, label, problems, encoding):
        try:
            if isinstance(record, bytes):
                record = json.loads(record.decode("utf-8-sig"))
            content = read_chat(record) if chats else record
            if isinstance(content, dict):
                content = record.get(field, record)
            if content is None or isinstance(content, str) and not content.strip():
                continue                                   # null, or empty
            if not chats and not isinstance(content, (str, np.ndarray)):
                names = ", ".join(record) if isinstance(record, dict) else "no names"
                raise ValueError(f'no "{field}" in it that is text, but {names}; --field NAME reads another; '
                                 "conversations are read with --chats")
            raw = (content.tobytes() if isinstance(content, np.ndarray)
                   else (json.dumps(content) if chats else content).encode())
        except (TypeError, ValueError, RecursionError) as error:  # RecursionError: [[[[..
            problems["documents"].append(f"{where}: {error}")
            if len(problems["documents"]) > max(999, n):   # not at the end of 50 GB
                break
            continue
        n += 1
        n_inside += b"<|endoftext|>" in raw and not chats
        parts = [(hashlib.sha256(raw).digest() < b"\x0d", True, content)]            # 13 of 256
        if len(raw) > large and not chats:
            cut = len(content) - len(content) // 20
            parts = [(False, True, content[:cut]), (True, False, content[cut:])]
        for held_out, is_new, part in parts:
            for at in range(0, len(part), BLOCK):
                yield held_out, is_new and at == 0, at == 0, part[at:at + BLOCK]
    if n_inside and encoding:
        print(f"note: {n_inside:,} documents have <|endoftext|> inside a line, as text", file=sys.stderr)
    for kind, total in (("files", len(files)), ("documents", n + len(problems["documents"]))):
        bad, examples = len(problems[kind]), "; ".join(problems[kind][:5])
        if bad > 0.01 * total:
            raise InputError(f"{bad:,} of {total:,} {kind} cannot be read, more than 1 %: {examples}")
        if bad and encoding:
            print(f"skipped {bad:,} of {total:,} {kind}, or their rest: {examples}", file=sys.stderr)


def read_records(files, request, label, problems, encoding):
    """Yield (where, record) of all files under a bar of bytes.  A file not read to its end is a problem."""
    sizes, before = [path.stat().st_size if path.exists() else 0 for path in files], 0
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc=label, leave=False, disable=None) as bar:
        for path, size in zip(files, sizes):
            place = str(path)
            try:
                with open(path, "rb") as file:
                    for where, record in read_file(path, file, request, encoding):
                        bar.update(before + file.tell() - bar.n)
                        place = f"{path}, {where}"
                        yield place, record
            except ImportError as error:
                raise InputError(f"{path}: {error}; pip install -e '.[data]'") from None
            except (OSError, EOFError, ValueError, LookupError, NotImplementedError, RecursionError,
                    zlib.error) as error:
                problems["files"].append(f"{place}: {error}")
            before += size


def read_file(path, file, request, encoding):
    """Yield (where, record) of an open file: text, JSON in bytes, what JSON holds, or a document's tokens."""
    name = path.name.lower()
    if name.endswith(".gz"):
        file = gzip.open(file)
    elif name.endswith(".zst"):                            # the package zstandard accepts a file that was cut
        import pyarrow
        file = io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))
    raw = file.peek(1000)[:1000]
    start = raw.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if name.endswith(".bin"):
        yield from read_token_file(path, file, encoding)
    elif name.endswith(".parquet"):
        import pyarrow.parquet
        table = pyarrow.parquet.ParquetFile(file)
        columns = [request["field"]] if request["field"] in table.schema_arrow.names else None
        rows = (row for batch in table.iter_batches(256, columns=None if request["chats"] else columns)
                for row in batch.to_pylist())
        yield from ((f"row {i}", row) for i, row in enumerate(rows, 1))
    elif b"\0" in raw or raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError("it is UTF-16 or no text: iconv -f UTF-16 -t UTF-8 converts it")
    elif name.endswith(".txt") and start.startswith((b"<!doctype html", b"<html")):
        raise ValueError("it is a page of HTML: save its text instead")
    elif name.endswith(TEXT_SUFFIXES):
        parts = itertools.groupby(file, lambda line: line.strip(b" \r\n\xef\xbb\xbf") == b"<|endoftext|>")
        texts = (b"".join(lines).decode("utf-8-sig") for separates, lines in parts if not separates)
        yield from ((f"document {i}", text) for i, text in enumerate(texts, 1))
    elif start.startswith(b"["):                           # whatever its suffix: not lines, but a list
        items = json.loads(file.read().decode("utf-8-sig"))
        yield from ((f"item {i}", item) for i, item in enumerate(items, 1))
    else:
        yield from ((f"line {i}", line) for i, line in enumerate(file, 1) if line.strip())


def read_token_file(path, file, encoding):
    """.. of nanoGPT (uint16), or of llm.c and modded-nanogpt (int32 magic, version 1, count, in 1,024 bytes,
    then uint16): the tokens between two <|endoftext|>.  ValueError if they are not of this tokenizer."""
    header, end_of_text = np.fromfile(path, "<i4", 3).tolist(), encoding.n_vocab + END_OF_TEXT
    size, offset = path.stat().st_size, 1024 * (header[:1] == [LLM_C_MAGIC])
    if size % 2 or offset and header[1:] != [1, (size - offset) // 2]:
        raise ValueError(f"it was cut, or is no such file: {size} bytes, its header says {header[1:]}")
    if header[:2] == [MAGIC % 2**32, MAGIC >> 32]:
        raise ValueError("data.py made it: train.py --data takes it as it is")
    if len(encoding._mergeable_ranks) != end_of_text or end_of_text >= 1 << 16:
        raise ValueError("it is read as uint16: only tokens of less than 65,536 without gaps, as of gpt2")
    tokens = np.memmap(path, "<u2", "r", offset)
    if tokens.max() > end_of_text or not tokens[1:2000:2].any():                    # uint32 has zeros there
        raise ValueError(f"largest id is {tokens.max()}, this tokenizer's {end_of_text}; or it is no uint16")
    ends = np.concatenate([at + np.flatnonzero(tokens[at:at + BLOCK] == end_of_text)
                           for at in range(0, len(tokens), BLOCK)])
    for start, end in itertools.pairwise([-1, *ends.tolist(), len(tokens)]):
        file.seek(offset + 2 * end)                        # moves the bar
        if end > start + 1:
            yield f"token {start + 1}", tokens[start + 1:end]


def n_bytes(files):
    """Bytes of all files together; packed ones hold about four times as many."""
    return sum(path.stat().st_size * (4 if path.suffix.lower() in (".gz", ".zst", ".parquet") else 1)
               for path in files if path.exists())


def find_files(sources, chats, folder=None):
    """The files of all sources, none twice.  InputError if a source has none."""
    suffixes, found, others = (".json",) * chats + TEXT_SUFFIXES * (not chats) + RECORD_SUFFIXES, {}, {}
    for source in map(str, sources):
        if chats and source == "functions":
            there = [write_functions(folder / "functions.jsonl")]
        elif not chats and source in ("stdlib", "installed"):
            there = python_files(source)
        else:
            there = list(walk(Path(source))) if source else []
        ours = [path for path in there if path.name.lower().endswith(suffixes)
                or path.suffix == ".bin" and path == Path(source) and not chats]
        if not there:
            raise InputError(f"source {source} is empty, or missing")
        if not ours:
            what = ", ".join(sorted({path.suffix or path.name for path in there})[:9])
            raise InputError(f"source {source}: {what} is not a format that data.py reads: no file ends in "
                             f"one of {', '.join(suffixes)}; {NOT_READ}")
        found |= {os.path.realpath(path): path for path in ours}
        others |= {os.path.realpath(path): path for path in there}
    kinds = Counter("linked folder" if path.is_dir() else path.suffix or "without a suffix"
                    for real, path in others.items() if real not in found).most_common(9)
    if kinds:
        print("not read: " + ", ".join(f"{n:,} {kind}" for kind, n in kinds) + f"; {NOT_READ}")
    return list(found.values())


def walk(source):
    """Yield a file, or those of a folder but hidden ones and devices.  Links to folders are not followed."""
    stack = [source]
    while stack:
        path = stack.pop()
        if path.is_dir() and (path == source or not path.is_symlink()):
            stack += sorted((child for child in path.iterdir() if child.name[0] != "."), reverse=True)
        elif path.is_file() or path.is_symlink() and (path.is_dir() or not path.exists()):
            yield path                                     # linked folders and broken links are named later


LIBRARY = Path(sysconfig.get_paths()["stdlib"])
# folders that are left out: tests, packages inside of packages, tables
LEFT_OUT = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "vendor", "vendored",
            "_vendor", "_vendored", "third_party", "encodings", "pydoc_data", "lib2to3"}


def python_files(word):
    """The .py files of the standard library, and for "installed" of all packages."""
    roots = [LIBRARY]
    if word == "installed":
        roots += [Path(p) for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    return [path for root in roots for path in sorted(root.rglob("*.py"))
            if not LEFT_OUT & set(path.relative_to(root).parts)]


def encode_blocks(encoding, blocks):
    """Yield (held out?, a new document?, tokens, bytes of text) of all blocks in order.  Threads encode
    (tiktoken releases Python's lock), each eight blocks at a time."""
    end_of_text = np.array([encoding.n_vocab + END_OF_TEXT], np.uint32)

    def encode_block(held_out, is_new, begins, content):
        if isinstance(content, list):                      # a conversation
            return held_out, is_new, encode_chat(encoding, content), sum(len(t.encode()) for _, t in content)
        if isinstance(content, str):
            tokens = encoding.encode_to_numpy(content, allowed_special=set(), disallowed_special=())
            size = len(content.encode())
        else:                                              # tokens already
            tokens, size = content, len(encoding.decode_bytes(content.tolist()))
        return held_out, is_new, np.concatenate([end_of_text[:begins], tokens]), size
    n_threads, ahead = torch.get_num_threads(), deque()
    with ThreadPoolExecutor(n_threads) as pool:
        while batch := list(itertools.islice(blocks, 8)):
            ahead.append(pool.submit(lambda batch: [encode_block(*block) for block in batch], batch))
            if len(ahead) > 2 * n_threads:                 # bounds the memory
                yield from ahead.popleft().result()
        for future in ahead:
            yield from future.result()


# --- tokenizers -------------------------------------------------------------------------------------------

def build_encoding(name, vocab_size=0, texts=()):
    """The tokenizer called name, or of a folder (load_encoding).  Texts are only read to train bpe."""
    if name not in TOKENIZERS:
        return load_encoding(name)
    if name == "bpe":
        if not 256 + len(SPECIAL) <= vocab_size <= 1 << 16:
            raise InputError(f"vocab_size must be from {256 + len(SPECIAL)} to 65536, got {vocab_size}")
        return make_encoding(name, PATTERN, train_bpe(texts, vocab_size - len(SPECIAL)))
    if name == "bytes":
        return make_encoding(name, PATTERN, {bytes([i]): i for i in range(256)})
    try:
        known = tiktoken.get_encoding(name)
    except OSError as error:
        raise InputError(f"tokenizer {name} is neither in tiktoken's cache nor on the network ({error}); set "
                         "TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer bpe") from None
    return make_encoding(name, known._pat_str, known._mergeable_ranks)


def make_encoding(name, pattern, ranks):
    """A tiktoken encoding with the special tokens behind the ranks; they are there from the start, so that a
    model trained on text needs no new rows for chat.  ValueError for ranks at which tiktoken panics."""
    if len(set(ranks.values())) < len(ranks) or any(bytes([i]) not in ranks for i in range(256)):
        raise ValueError("it lacks one of the 256 bytes, or gives two tokens one number")
    special = {token: max(ranks.values()) + 1 + i for i, token in enumerate(SPECIAL)}
    hard = ("a B\t\r\n  '9\u00e9 \u65e5\u672c\U0001f642_#<|end|>\0\u2028\ufeff"       # each Unicode category
            "\u01c5\u02b0\u0301\u0903\u20dd\u2167\u00b2-()\u00ab\u00bb$^\u2029\ue000\u0378")
    try:
        encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        fits = encoding.decode(encoding.encode_ordinary(hard)) == hard
    except BaseException as error:                         # Rust's PanicException is no Exception
        raise ValueError(f"tiktoken cannot use it ({type(error).__name__})") from None
    if not fits:
        raise ValueError("its pattern leaves text out")
    return encoding


def train_bpe(texts, n_ranks):
    """Byte-pair ranks {bytes: rank} from an iterable of strings (Sennrich et al., arXiv 1508.07909).

    Starts from the 256 bytes and joins the most frequent pair of neighbours inside words, ties to the
    smallest pair of ranks, until there are n_ranks or no pair repeats.  Works on the table of distinct words,
    so the order of the texts does not matter.  A word is a string with chr(rank) for a token."""
    table, pieces = Counter(), Counter()
    for text in texts:
        table.update(regex.findall(PATTERN, text))
    for word, n in table.items():                          # words without end: Chinese, DNA, base64
        for at in range(0, len(word), 64):
            pieces[word[at:at + 64]] += n
    table = sorted(pieces.items(), key=lambda item: (-item[1], item[0]))[:200_000]       # bounds the merging
    words, freq = [word.encode().decode("latin-1") for word, _ in table], [n for _, n in table]
    count, where = Counter(), defaultdict(set)             # pair -> occurrences, pair -> words that had it

    def pairs(word):
        return [a + b for a, b in zip(word, word[1:])]
    for i, word in enumerate(words):
        for pair in pairs(word):
            count[pair] += freq[i]
            where[pair].add(i)
    vocab, heap = [bytes([i]) for i in range(256)], [(-n, pair) for pair, n in count.items()]
    heapq.heapify(heap)
    with tqdm(total=n_ranks, initial=256, desc="merging", leave=False, disable=None) as bar:
        while len(vocab) < n_ranks and heap and heap[0][0] <= -2:
            n, pair = heapq.heappop(heap)
            if count[pair] != -n:                          # out of date: every change is pushed
                continue
            new, change = chr(len(vocab)), Counter()
            vocab.append(vocab[ord(pair[0])] + vocab[ord(pair[1])])
            for i in where.pop(pair):
                word, words[i] = words[i], words[i].replace(pair, new)
                if words[i] != word:
                    for old in pairs(word):
                        change[old] -= freq[i]
                    for made in pairs(words[i]):
                        change[made] += freq[i]
                        if new in made:
                            where[made].add(i)
            for pair, n in change.items():
                if n:
                    count[pair] += n
                    heapq.heappush(heap, (-count[pair], pair))
            bar.update()
    return {token: i for i, token in enumerate(vocab)}


def save_encoding(encoding, path):
    """Write a tokenizer; a number without a token is null (Hugging Face's special tokens, say)."""
    tokens = {i: base64.b64encode(token).decode() for token, i in encoding._mergeable_ranks.items()}
    Path(path).write_text(json.dumps({
        "name": encoding.name, "pattern": encoding._pat_str, "special": list(SPECIAL),
        "ranks": [tokens.get(i) for i in range(max(tokens) + 1)]}, indent=0))


def load_encoding(path):
    """The tokenizer of a prepared folder, a run or a folder of Hugging Face, or the file of one.

    ValueError if there is none that tiktoken can be given."""
    files = Path(path), Path(path) / "tokenizer.json", Path(path) / "encoding.json"
    file = next(filter(Path.is_file, files), files[-1])
    saved = read_json(file, "a tokenizer")
    try:
        if "pre_tokenizer" in saved:                       # Hugging Face's
            return make_encoding(file.parent.name, *read_hf_tokenizer(saved))
        ranks = {base64.b64decode(token): i for i, token in enumerate(saved["ranks"]) if token}
        return make_encoding(saved["name"], saved["pattern"], ranks)
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is not a tokenizer written by data.py, nor byte-level BPE of Hugging Face "
                         f"({error})") from None


def read_hf_tokenizer(saved):
    """The content of a tokenizer.json -> pattern, ranks, if it is byte-level BPE as GPT-2's or Qwen's.

    Tokens keep their numbers; ours replace its special tokens and come last."""
    model, normalizer = saved["model"], (saved.get("normalizer") or {"type": ""})["type"]
    if model.get("type", "BPE") != "BPE" or normalizer not in ("", "NFC"):       # old files have no type
        raise ValueError(f"it is {model.get('type')} or changes text ({normalizer})")
    splits = saved["pre_tokenizer"] or {}
    match [{"use_regex": True} | part for part in splits.get("pretokenizers", [splits])]:      # nor this
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            pattern = GPT2_PATTERN
        case [{"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": pattern}},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:
            pass
        case parts:
            raise ValueError(f"it splits text in a way that is not known here ({parts})")
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]        # bytes that stand for themselves
    others = [b for b in range(256) if b not in visible]                   # in order, from character 256 on
    byte_of = {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(others)}
    added = {token["content"] for token in saved.get("added_tokens", [])}
    if not all(map(str.strip, added)) or model.get("end_of_word_suffix") or model.get("dropout"):
        raise ValueError("it adds tokens of spaces, a suffix to words, or dropout")
    words = [token["content"] for token in saved.get("added_tokens", []) if not token.get("special", True)]
    if words:
        print(f"note: what it adds, {' '.join(words[:9])}, is read as text here", file=sys.stderr)
    if normalizer:
        print("note: it brings text to NFC, which is not done here", file=sys.stderr)
    vocab = {token: i for token, i in model["vocab"].items() if token not in added}
    made = [vocab["".join(pair).replace(" ", "")] for pair in model["merges"]]
    if made != sorted(made) or len(set(made)) != len(vocab) - 256:
        raise ValueError("its tokens are not numbered in the order of its merges")
    return pattern, {bytes(byte_of[c] for c in token): i for token, i in vocab.items()}


# --- token files and samplers -----------------------------------------------------------------------------

class TokenWriter:
    """Writes a token file: 1,024 bytes of header, int64 (magic, version, bytes per token, vocabulary, count,
    1 for conversations), then tokens, uint16 if the vocabulary allows, else uint32; all little-endian."""

    def __init__(self, path, vocab_size, chats=False):
        self.header = [MAGIC, VERSION, 2 if vocab_size <= 1 << 16 else 4, vocab_size, 0, chats]
        self.file = open(path, "wb")
        self.file.write(bytes(HEADER))

    def write(self, tokens):
        self.file.write(np.asarray(tokens, f"<u{self.header[2]}").tobytes())
        self.header[4] += len(tokens)

    def close(self):
        self.file.seek(0)
        self.file.write(np.array(self.header, "<i8").tobytes())
        self.file.close()


def read_header(path):
    """-> bytes per token, vocabulary, count, 1 for conversations.  InputError if foreign or cut short."""
    header = np.fromfile(path, "<i8", 6).tolist() if os.path.isfile(path) else []
    if (len(header) < 6 or header[:2] != [MAGIC, VERSION] or header[2] not in (2, 4)
            or not 0 <= header[3] < 1 << 31 or header[4] < 0):
        raise InputError(f"{path} is not a token file; data.py makes one of text or conversations")
    size, expected = os.path.getsize(path), HEADER + header[4] * header[2]
    if size != expected:
        raise InputError(f"{path} is corrupt: it has {size} bytes, its header says {expected}")
    return header[2:]


def load_tokens(path):
    """The tokens of a file that data.py wrote, or of train.bin in its folder: [n] uint16 or uint32."""
    path = Path(path) / "train.bin" if Path(path).is_dir() else path
    itemsize, _, count, _ = read_header(path)
    return np.memmap(path, f"<u{itemsize}", "r", HEADER, (count,)) if count else np.zeros(0, "<u2")


@functools.lru_cache(2)                                    # a batch can lie across two epochs
def permutation(n, seed, epoch):
    order = np.arange(n, dtype=np.int32 if n < 1 << 31 else np.int64)
    np.random.Generator(np.random.PCG64([seed, epoch])).shuffle(order)
    return order


class Sampler:
    """An endless stream of windows of seq_len tokens, in which every window comes once per epoch.

    Window w is tokens[w*T : w*T + T + 1]; the order within an epoch is a permutation drawn from (seed,
    epoch).  Which sequences a step has is therefore a pure function of the seed and of the number consumed
    before: nothing need be saved to resume, on any number of processes."""

    def __init__(self, tokens, seq_len, seed):
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.n_windows = (len(tokens) - 1) // seq_len
        if self.n_windows < 1:
            raise InputError(f"seq_len ({seq_len}) is too long for {len(tokens)} tokens")

    def rows(self, first, count, rank=0, world=1):
        """This rank's share of sequences first .. first+count-1, as batch() has them."""
        mine = range(first + count * rank // world, first + count * (rank + 1) // world)
        places = (divmod(i, self.n_windows) for i in mine)
        return self.batch([int(permutation(self.n_windows, self.seed, epoch)[i]) for epoch, i in places])

    def batch(self, windows):
        """-> tokens, targets [len(windows), T] int64."""
        T = self.seq_len
        rows = np.array([self.tokens[w * T:w * T + T + 1] for w in windows], np.int64).reshape(-1, T + 1)
        rows = torch.from_numpy(rows)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def target_positions(self, windows):
        """Where in the file the targets of some windows are, in their order."""
        return (np.asarray(windows)[:, None] * self.seq_len + np.arange(1, self.seq_len + 1)).flatten()


class ChatSampler(Sampler):
    """The same for conversations: a window holds whole ones, side by side, and only what the assistant says
    is a target.

    A conversation of n tokens takes n - 1 places (the last token predicts nothing).  One that is too long
    for a window ends with the last answer that fits; one whose first answer does not fit is left out."""

    def __init__(self, tokens, seq_len, seed, vocab_size):
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.is_target = assistant_mask(tokens, vocab_size)
        starts = np.flatnonzero(tokens == vocab_size + END_OF_TEXT)
        ends = np.flatnonzero(self.is_target & (tokens == vocab_size + END)) + 1             # of answers
        chat = np.searchsorted(starts, ends - 1, "right") - 1     # whose answers they are
        fits = ends - starts[chat] <= seq_len + 1
        last = np.zeros_like(starts)
        last[chat[fits]] = ends[fits]                             # numpy keeps the last of several
        answers, fitting = (np.bincount(each, minlength=len(starts)) for each in (chat, chat[fits]))
        self.n_cut = int(((0 < fitting) & (fitting < answers)).sum())
        self.n_left_out = int((fitting == 0).sum())
        self.spans = list(zip(starts[fitting > 0].tolist(), last[fitting > 0].tolist()))
        if not self.spans:
            raise InputError(f"seq_len ({seq_len}) is too short: none of {self.n_left_out:,} conversations "
                             "has an answer that ends within it")
        self.windows = pack_best_fit(self.spans, seq_len)
        self.n_windows = len(self.windows)

    def batch(self, windows):
        """-> tokens, targets (-1: none), doc (its conversation; -1: padding), all [len(windows), T] int64."""
        tokens = np.zeros((len(windows), self.seq_len), np.int64)
        targets, doc = np.full_like(tokens, -1), np.full_like(tokens, -1)
        for row, w in enumerate(windows):
            at = 0
            for number, (start, end) in enumerate(self.windows[w]):
                chat, places = self.tokens[start:end].astype(np.int64), slice(at, at + end - start - 1)
                tokens[row, places], doc[row, places] = chat[:-1], number
                targets[row, places] = np.where(self.is_target[start:end], chat, -1)[1:]
                at = places.stop
        return tuple(map(torch.from_numpy, (tokens, targets, doc)))

    def target_positions(self, windows):
        return np.concatenate([start + np.flatnonzero(self.is_target[start:end])
                               for w in windows for start, end in self.windows[w]])


def open_sampler(path, seq_len, seed=0):
    """The sampler for the tokens of a file, which may be conversations."""
    tokens, (_, vocab_size, _, chats) = load_tokens(path), read_header(path)
    return ChatSampler(tokens, seq_len, seed, vocab_size) if chats else Sampler(tokens, seq_len, seed)


class Corpus(NamedTuple):
    """The tokens of a run."""

    train: Sampler
    val: Sampler = None         # of the held-out tokens, if there are any
    vocab_size: int = 0
    encoding: object = None     # the tokenizer, if there is one beside the token file
    file: Path = None           # of the training tokens

    has_chats = property(lambda self: isinstance(self.train, ChatSampler))

    def checksums(self):
        """sha256 of training and held-out tokens (None: there are none).  InputError if they, or the
        tokenizer, are not what meta.json beside them says."""
        if self.file.name == "train.bin" and self.file.with_name("meta.json").exists():
            meta = load_meta(self.file.parent)
            return meta["train"]["sha256"], self.val and meta["val"]["sha256"]
        return file_sha256(self.file), self.val and file_sha256(self.file.with_name("val.bin"))


def open_corpus(source, seq_len, seed=0):
    """A folder made by data.py, or a token file of one -> Corpus."""
    source = Path(source)
    file, folder = (source, source.parent) if source.is_file() else (source / "train.bin", source)
    if not file.exists():
        raise InputError(f"no data in {source}: python data.py --source PATH --name NAME makes data/NAME")
    if file.name == "val.bin":
        raise InputError(f"{file} is held-out text: --data takes a folder made by data.py, or its train.bin")
    train, val = open_sampler(file, seq_len, seed), None
    if (folder / "val.bin").exists():
        read_header(folder / "val.bin")                    # raises what is wrong with the file
        with suppress(InputError):                         # too short for a window: nothing is held out
            val = open_sampler(folder / "val.bin", seq_len)
    encoding = load_encoding(folder) if (folder / "encoding.json").exists() else None
    return Corpus(train, val, read_header(file)[1], encoding, file)


def assistant_mask(tokens, vocab_size):
    """Which of some conversations' tokens the assistant says, the <|end|> that closes an answer included:
    [n] bool.  Text never becomes a special token, so the tokens alone tell."""
    tokens = np.asarray(tokens)
    opens = (tokens >= vocab_size + END_OF_TEXT) & (tokens != vocab_size + END)
    at = np.flatnonzero(opens)
    answers = np.append(False, tokens[at] == vocab_size + ASSISTANT)       # the first: before any opens
    return np.repeat(answers, np.diff(at, prepend=0, append=len(tokens))) & ~opens


def pack_best_fit(spans, capacity):
    """Best-fit decreasing: put conversations (start, end) into few windows -> [those of each window]."""
    windows, with_room, rooms = [], defaultdict(list), 0   # windows with so much room; a bit for each room
    for start, end in sorted(spans, key=lambda span: span[0] - span[1]):
        need = end - start - 1
        fits = rooms >> need
        if fits:                                           # the fullest window that has room: the lowest bit
            room = need + (fits & -fits).bit_length() - 1
            w = heapq.heappop(with_room[room])
            rooms ^= (not with_room[room]) << room
        else:
            room, w = capacity, len(windows)
            windows.append([])
        windows[w].append((start, end))
        heapq.heappush(with_room[room - need], w)
        rooms |= 1 << room - need
    return windows


def holds_chats(source):
    """Whether a file or folder has the tokens of conversations."""
    file = Path(source) / "train.bin" if Path(source).is_dir() else Path(source)
    return file.is_file() and read_header(file)[3] == 1


# --- conversations ----------------------------------------------------------------------------------------

# {% generation %}: what the assistant says, so that trl can train on it alone
CHAT_TEMPLATE = ("<|endoftext|>{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
                 "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|end|>' }}"
                 "{% endgeneration %}{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
                 "{% if add_generation_prompt %}<|assistant|>{% endif %}")
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
# what would change what is learned: must be absent, empty or 0, these first ones absent, empty or 1
LEARNED = ("weight", "train", "trainable", "train_on_turn", "training", "loss", "loss_mask", "calculate_loss",
           "label", "kto_tag")
UNSUPPORTED = (*LEARNED, "mask", "masked", "train_detail", "chosen", "rejected", "rejected_response", "tools",
               "functions", "tool_calls", "function_call", "function_calls", "image", "images", "audio",
               "audios", "video", "videos", "thinking", "reasoning", "reasoning_content", "context",
               "documents", "system_prompt", "system_message", "chat_template_kwargs")


def encode_chat(encoding, chat, answer=False):
    """[(role, text)] -> tokens, as CHAT_TEMPLATE has them, and with answer=True the beginning of one.  What
    looks like a special token in a text stays text."""
    special = encoding.encode_single_token
    tokens = [special("<|endoftext|>")]
    for role, text in chat:
        tokens.append(special(f"<|{role}|>"))
        for at in range(0, len(text), BLOCK):
            tokens += encoding.encode_ordinary(text[at:at + BLOCK])
        tokens.append(special("<|end|>"))
    return tokens + [special("<|assistant|>")] * answer


FORMS = {"messages": '[{"role", "content"}]', "conversations": '[{"from", "value"}]',
         "instruction": 'with "output", and perhaps "input" and "history": [[question, answer]]'}


def read_chat(record):
    """A record in one of FORMS, perhaps with a "system" -> [(role, content)].  ValueError: what is wrong."""
    found = [name for name in FORMS if isinstance(record, dict) and record.get(name)]
    if found == ["instruction"]:
        question = "\n\n".join(part for part in (record["instruction"], record.get("input"))
                               if part not in (None, ""))
        turns = [*(record.get("history") or []), [question, record.get("output")]]
        if not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
            raise ValueError("history is not a list of [question, answer]")
        messages = [{"role": role, "content": content} for turn in turns
                    for role, content in zip(("user", "assistant"), turn)]
    elif len(found) == 1 and "output" not in record and all(isinstance(m, dict) for m in record[found[0]]):
        messages = record[found[0]]
    else:
        forms = "; ".join(f"{name}, {form}" for name, form in FORMS.items())
        raise ValueError(f"it is not one of {forms}; text is read without --chats")
    if record.get("system"):
        messages = [{"role": "system", "content": record["system"]}, *messages]
    for name, part in itertools.product(UNSUPPORTED, (record, *messages)):
        if part.get(name) not in (None, int(name in LEARNED), "", [], {}):
            raise ValueError(f"{name} {str(part[name])[:40]} is not supported")
    chat = [(m.get("role", m.get("from")), m.get("content", m.get("value"))) for m in messages]
    for number, (role, content) in enumerate(chat, 1):
        if str(role) not in ROLES:
            raise ValueError(f"message {number}: role {role!r} is unknown")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"message {number} ({role}) is no text, or empty")
        content.encode()                                   # UnicodeEncodeError for half a surrogate pair
    chat = [(ROLES[role], content) for role, content in chat]
    if not re.fullmatch("s?(ua)+u?", "".join(role[0] for role, _ in chat)):
        raise ValueError("no assistant message, or roles out of order (system, user, assistant, user, ..)")
    return chat


def write_functions(path):
    """Write this Python's documented functions as a chat file: the question is the signature, the answer the
    first paragraph of the docstring.  No answer comes twice."""
    found = {}

    def visit(body, name):
        for node in body:
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{name}.{node.name}")
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                answer = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                found.setdefault(answer, f"What does {name}.{node.name}({ast.unparse(node.args)}) do?")
    for file in python_files("stdlib"):
        module = ".".join(file.relative_to(LIBRARY).with_suffix("").parts).removesuffix(".__init__")
        visit(ast.parse(file.read_bytes()).body, module)
    path.write_text("".join(json.dumps({"instruction": question, "output": answer}) + "\n"
                            for answer, question in found.items() if answer))
    return path


# --- what all programs share ------------------------------------------------------------------------------

class InputError(ValueError):
    """What the user typed or gave is wrong: it ends a program in one line.  Other errors are tracebacks."""


def read_json(path, what, extract=lambda saved: saved):
    """What extract() makes of the content of a JSON file.  InputError if that is not `what`."""
    try:
        if Path(path).exists() and not Path(path).is_file():      # a pipe would wait for ever
            raise ValueError("it is not a file")
        return extract(json.loads(Path(path).read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError, AttributeError, LookupError, OverflowError, RecursionError,
            TypeError, ValueError) as e:                   # what cannot be read just now is an OSError
        raise InputError(f"{path} is not {what} ({type(e).__name__}: {e})") from e


@contextmanager
def new_folder(path):
    """A folder to fill, which has its name once all is in it.  InputError if the name is taken."""
    path = Path(path)
    if path.exists():
        raise InputError(f"{path} is there already: choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as tmp:
        (Path(tmp) / path.name).mkdir()
        yield Path(tmp) / path.name
        if not path.exists():                              # another process may have been faster
            os.rename(Path(tmp) / path.name, path)


def make_parser(**kwargs):
    """argparse with exact names only, and one-line errors."""
    parser = argparse.ArgumentParser(allow_abbrev=False, **kwargs)
    parser.formatter_class, parser.error = argparse.RawDescriptionHelpFormatter, fail
    return parser


def fail(message, code=2):
    """End the program with one line; exit code 2 is a wrong setting or an unreadable input."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


class Console:
    """stdout or stderr that never raises: Ctrl-C also ends the tee that a run writes to."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")
        with suppress(AttributeError):                     # a terminal without Unicode prints what it can
            self.stream.reconfigure(errors="replace", line_buffering=True)

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(OSError, ValueError):
            self.stream.write(text)

    def flush(self):
        with suppress(OSError, ValueError):
            self.stream.flush()


@contextmanager
def one_line_errors(rank=0):
    """Turn what is wrong with the user's input or files (InputError, OSError) into one line, exit code 2.  Of
    many processes rank 0 alone speaks, the others of errors only."""
    out, who, old = (None, f"rank {rank}: ", None) if rank else (sys.stdout, "", None)
    with suppress(ValueError):                             # not the main thread
        old = signal.signal(signal.SIGTERM, signal.default_int_handler)       # it cleans up, as Ctrl-C
    with redirect_stdout(Console(out)), redirect_stderr(Console(sys.stderr)):
        try:
            yield
        except (InputError, OSError) as error:             # OSError: of a file, not one that a fork raises
            theirs = isinstance(error, InputError) or error.errno and not isinstance(error, ConnectionError)
            if os.environ.get("NANOSIGMA_TRACEBACK") or not theirs:
                raise
            fail(f"{who}{' '.join(str(error).split())} (NANOSIGMA_TRACEBACK=1 shows where)")
        except KeyboardInterrupt:
            fail(f"{who}interrupted", 1)
        finally:
            if old is not None:
                signal.signal(signal.SIGTERM, old)


def main(argv=None):
    parser = make_parser(prog="data.py", description=__doc__)
    parser.add_argument("--source", nargs="+", action="extend", metavar="PATH", help="files, folders, or a "
                        "word: stdlib (the default), installed, or functions (the default with --chats)")
    parser.add_argument("--chats", action="store_true", help="the sources are conversations: {messages}, "
                        "{conversations} or {instruction, input, output}, in .json, .jsonl or .parquet")
    parser.add_argument("--field", default="text", metavar="NAME", help="where the text of JSON lines and "
                        "parquet is (text)")
    parser.add_argument("--name", help="the folder is data/NAME (default: the name of the first source)")
    parser.add_argument("--tokenizer", metavar="NAME", help="bpe (the default, trained on the text), "
                        "bytes, gpt2, o200k_base, or a run or Hugging Face folder that has one")
    parser.add_argument("--vocab_size", type=int, metavar="V", help="vocabulary of bpe, special tokens "
                        "included (2048, for installed 8192; more for a model above the gpu preset)")
    args = parser.parse_args(argv)
    with one_line_errors():
        if args.chats and not args.tokenizer:
            raise InputError("--chats needs a --tokenizer: that of the run whose model is to be tuned, as in "
                             "--tokenizer out/laptop (or bpe, for a model that begins with these chats)")
        sources = args.source or ["functions" if args.chats else "stdlib"]
        name = args.name or Path(sources[0]).name.split(".")[0]
        if not re.fullmatch(r"[\w.-]*\w", name) or name in ("stdlib", "installed") and sources != [name]:
            raise InputError(f"data/{name} cannot be the folder's name; give another --name")
        prepare(f"data/{name}", sources, args.tokenizer or "bpe", args.vocab_size, args.chats, args.field)


if __name__ == "__main__":
    main()
