"""Text to token files, and token files to batches.

    python data.py                                        Python's standard library -> data/stdlib
    python data.py --source installed                     and all installed packages -> data/installed
    python data.py --source my_folder --name mine         .txt, .md, .py, .jsonl, .jsonl.gz (field "text")
    python data.py --chats --source chats.jsonl --tokenizer out/laptop --name chats       conversations

A prepared folder holds train.bin and val.bin (a header, then the tokens of all documents, each preceded by
<|endoftext|>), encoding.json (the tokenizer) and meta.json (what went in, and checksums).
"""

import argparse
import ast
import base64
import bisect
import functools
import gzip
import hashlib
import heapq
import itertools
import json
import os
import re
import signal
import sys
import sysconfig
import tempfile
import zlib
from collections import Counter, defaultdict
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import numpy as np
import regex  # comes with tiktoken, which splits text with the same syntax
import tiktoken
import torch
from tqdm import tqdm

TOKENIZERS = ("bpe", "bytes", "gpt2", "o200k_base")
TEXT_SUFFIXES, CHAT_SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz"), (".jsonl", ".jsonl.gz", ".json")
SPECIAL = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
END_OF_TEXT, SYSTEM, USER, ASSISTANT, END = range(-5, 0)   # their ids, as offsets from the vocabulary's size
BLOCK = 1 << 18                    # characters encoded at a time; tiktoken overflows at 2 ** 19 spaces
BPE_CHARS = 16 << 20               # characters that a tokenizer is trained on
HEADER, MAGIC, VERSION = 1024, 0x414D474953, 1             # "SIGMA"

# GPT-2's split of text into words, and ours, with digits in groups of three
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
PATTERN = GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}{1,3}")


def prepare(out, sources=("stdlib",), tokenizer="bpe", vocab_size=None, chats=False):
    """Prepare a folder unless it is there, and say what it holds -> its meta.json.  vocab_size: of bpe,
    default 2,048, for "installed" 8,192.  InputError if the folder was made from something else."""
    out = Path(out)
    if vocab_size and tokenizer != "bpe":
        raise InputError(f"vocab_size is for the tokenizer bpe; {tokenizer} has its own")
    if tokenizer == "bpe" and vocab_size is None:
        vocab_size = 8192 if "installed" in sources else 2048
    request = {"sources": list(sources), "tokenizer": tokenizer, "chats": chats, "vocab_size": vocab_size}
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as tmp:
            (Path(tmp) / out.name).mkdir()
            write_folder(Path(tmp) / out.name, request)
            if not out.exists():                           # another run may have been faster
                os.rename(Path(tmp) / out.name, out)
    meta = load_meta(out)
    if meta["request"] != request:
        raise InputError(f"{out} was prepared with other settings ({meta['request']}); choose another "
                         "--name, or delete that folder yourself")
    train, val, kind = meta["train"], meta["val"], "conversations" if chats else "documents"
    total, fewer = train["bytes"] + val["bytes"], meta["vocab_size"] < (vocab_size or 0)
    print(f"{out}: {meta['files']:,} files, {train['documents'] + val['documents']:,} {kind}, skipped "
          f"{meta['skipped']}, {total / 1e6:.1f} MB; {tokenizer}, vocabulary {meta['vocab_size']:,}"
          + f" (not {vocab_size or 0:,}: no more pairs repeat)" * fewer +
          f"\n  train {train['tokens']:,} tokens of {train['bytes'] / train['tokens']:.2f} bytes; held out "
          f"{val['tokens']:,} ({val['bytes'] / total:.1%} of the bytes)")
    return meta


def write_folder(folder, request):
    """Write encoding.json, train.bin, val.bin and meta.json."""
    chats, tokenizer = request["chats"], (request["tokenizer"], request["vocab_size"])
    encoding = build_encoding(*tokenizer)                  # fail early
    sources = request["sources"]
    if chats and "functions" in sources:
        write_functions(folder / "functions.jsonl")
        sources = [folder / "functions.jsonl" if source == "functions" else source for source in sources]
    files, problems = find_files(sources, chats), []
    if request["tokenizer"] == "bpe":                      # on every n-th document, some 16M characters
        texts = (text for held_out, _, text, _ in read_documents(files, chats, []) if not held_out)
        stride = max(1, n_bytes(files) // BPE_CHARS)
        encoding = build_encoding(*tokenizer, itertools.islice(texts, 0, None, stride))
    save_encoding(encoding, folder / "encoding.json")
    count = {split: Counter(documents=0, bytes=0, tokens=0) for split in ("train", "val")}
    writers = {split: TokenWriter(folder / f"{split}.bin", encoding.n_vocab, chats) for split in count}
    documents = read_documents(files, chats, problems)
    for held_out, is_new, text, chat in tqdm(documents, "writing", leave=False, disable=None):
        end_of_text = [encoding.n_vocab + END_OF_TEXT]
        tokens = encode_chat(encoding, chat) if chats else end_of_text + encode(encoding, text)
        split = "val" if held_out else "train"
        writers[split].write(tokens)
        count[split].update(documents=int(is_new), bytes=len(text.encode()), tokens=len(tokens))
    n, examples = sum(c["documents"] for c in count.values()) + len(problems), "; ".join(problems[:5])
    if len(problems) > 0.01 * n:
        raise InputError(f"{len(problems):,} of {n:,} documents cannot be read, more than 1 %: {examples}")
    if problems:
        print(f"skipped {len(problems):,} of {n:,} documents: {examples}", file=sys.stderr)
    if not count["train"]["tokens"]:
        raise InputError(f"{files[0]} is empty, or too small: there is no text to train on")
    meta = {"request": request, "files": len(files), "skipped": len(problems), "vocab_size": encoding.n_vocab,
            "encoding_sha256": file_sha256(folder / "encoding.json")}
    for split, writer in writers.items():
        writer.close()
        meta[split] = {**count[split], "sha256": file_sha256(folder / f"{split}.bin")}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def load_meta(folder):
    """meta.json of a prepared folder.  InputError if there is none, or its checksums do not fit."""
    numbers, parts = ("files", "skipped", "vocab_size"), ("documents", "bytes", "tokens")
    meta = read_json(Path(folder) / "meta.json", "that of a prepared folder", lambda meta: {
        name: dict(meta[name]) for name in ("request", "train", "val")} | {
        name: int(meta[name]) for name in numbers} | {"encoding_sha256": meta["encoding_sha256"]} | {
        split: {"sha256": meta[split]["sha256"]} | {name: int(meta[split][name]) for name in parts}
        for split in ("train", "val")})
    for name, checksum in (("encoding.json", meta["encoding_sha256"]), ("train.bin", meta["train"]["sha256"]),
                           ("val.bin", meta["val"]["sha256"])):
        if file_sha256(Path(folder) / name) != checksum:
            raise InputError(f"{folder}/{name} does not fit its meta.json: the sha256 is another")
    return meta


def file_sha256(path):
    return hashlib.sha256(np.memmap(path, np.uint8, "r")).hexdigest()


# --- reading ----------------------------------------------------------------------------------------------

def read_documents(files, chats, problems):
    """Yield (held out?, not the rest of another?, text, chat) of every document, or of every conversation,
    chat = [(role, content)].  `problems` collects what cannot be read.

    One in twenty is held out, by a hash of its text: equal ones fall on one side.  A document with more than
    a 300th of all bytes is parted: its last twentieth is held out."""
    large = n_bytes(files) / 300
    for where, source in read_records(files):
        try:
            chat = read_chat(json.loads(source.decode("utf-8-sig"))) if chats else None
            texts = ["".join(content for _, content in chat)] if chats else read_texts(source)
            raws = [(json.dumps(chat) if chats else text).encode() for text in texts]
        except (TypeError, ValueError, RecursionError) as error:  # RecursionError: [[[[..
            problems.append(f"{where}: {error}")
            continue
        for text, raw in zip(texts, raws):
            if len(raw) > large and not chats:
                n = len(text) - len(text) // 20
                yield False, True, text[:n], None
                if n < len(text):
                    yield True, False, text[n:], None
            elif text and not text.isspace():
                yield hashlib.sha256(raw).digest() < b"\x0d", True, text, chat           # 13 of 256


def read_texts(source):
    """The documents of a file (its path), parted by lines that are <|endoftext|>, or of a line of JSON.
    ValueError if there is no text, or it is not UTF-8."""
    if isinstance(source, Path):
        with open(source, encoding="utf-8-sig", newline="") as file:
            texts = re.split(r"(?m)^<\|endoftext\|>\r?$\n?", file.read())
    else:
        record = json.loads(source.decode("utf-8-sig"))
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise ValueError('no "text" in it (conversations are read with --chats)')
        texts = [record["text"]]
    if "\0" in texts[0][:1000]:
        raise ValueError("it is UTF-16, UTF-32 or no text; convert it to UTF-8")
    return texts


def n_bytes(files):
    """Bytes of all files together; gzip unpacks to about four times as many."""
    return sum(path.stat().st_size * (4 if path.suffix.lower() == ".gz" else 1) for path in files)


def read_records(files):
    """Yield (where, source) of every document: the path of a text file; JSON, in bytes, of a line of a .jsonl
    or .jsonl.gz, or an item of a .json."""
    for path in files:
        try:
            if path.suffix.lower() in (".txt", ".md", ".py"):
                yield path, path
            elif path.suffix.lower() == ".json":
                items = json.loads(path.read_bytes())
                if not isinstance(items, list):
                    raise ValueError("a .json file must be a list")
                for i, item in enumerate(items, 1):
                    yield f"{path}, item {i}", json.dumps(item).encode()
            else:
                with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
                    yield from ((f"{path}, line {i}", line) for i, line in enumerate(file, 1) if line.strip())
        except (gzip.BadGzipFile, EOFError, zlib.error, ValueError, RecursionError) as error:
            raise InputError(f"{path} cannot be read: {error}") from None


def find_files(sources, chats):
    """The files of all sources, none twice.  InputError if a source has none."""
    found, others, suffixes = {}, set(), CHAT_SUFFIXES if chats else TEXT_SUFFIXES
    for source in sources:
        if not chats and source in ("stdlib", "installed"):
            files = python_files(source)
        else:
            there = list(walk(source)) if str(source) else []
            files = [path for path in there if path.name.lower().endswith(suffixes)]
            others |= set(map(os.path.realpath, there)) - set(map(os.path.realpath, files))
        if not files:
            raise InputError(f"source {source} is empty, or missing: no file ends in one of "
                             + ", ".join(suffixes))
        for path in files:
            found.setdefault(os.path.realpath(path), path)
    if others:
        kinds = Counter(Path(path).suffix or "without a suffix" for path in others).most_common(9)
        print("not read: " + ", ".join(f"{n:,} {kind}" for kind, n in kinds))
    return list(found.values())


def walk(source):
    """Yield a file, or those of a folder but hidden ones and devices.  Links are followed, each folder is
    read once."""
    stack, seen = [Path(source)], set()
    while stack:
        path = stack.pop()
        real = os.path.realpath(path)
        if path.is_dir() and real not in seen:
            seen.add(real)
            stack += sorted((child for child in path.iterdir() if child.name[0] != "."), reverse=True)
        elif path.is_file() or path.is_symlink() and not path.exists():       # a broken link is named later
            yield path


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
    hard = "a B\t\r\n  '9\u00e9 \u65e5\u672c\U0001f642_#<|end|>\0\u2028\ufeff"
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
    count, where = Counter(), defaultdict(set)             # pair -> occurrences, pair -> words that have it

    def add_pairs(i, sign):
        pairs = [a + b for a, b in zip(words[i], words[i][1:])]
        for pair in pairs:
            count[pair] += sign * freq[i]
            where[pair].add(i)
        return pairs
    for i in range(len(words)):
        add_pairs(i, 1)
    vocab, heap = [bytes([i]) for i in range(256)], [(-n, pair) for pair, n in count.items()]
    heapq.heapify(heap)
    while len(vocab) < n_ranks and heap and heap[0][0] <= -2:
        n, pair = heapq.heappop(heap)
        if count[pair] == -n:                              # else out of date: every change is pushed
            new, changed = chr(len(vocab)), set()
            vocab.append(vocab[ord(pair[0])] + vocab[ord(pair[1])])
            for i in where.pop(pair):
                changed.update(add_pairs(i, -1))
                words[i] = words[i].replace(pair, new)
                changed.update(add_pairs(i, 1))
            for pair in changed:
                heapq.heappush(heap, (-count[pair], pair))
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

    Tokens keep their numbers; its special tokens give way to ours, which come last.  Text is not brought to
    NFC."""
    model, normalizer = saved["model"], (saved.get("normalizer") or {"type": "NFC"})["type"]
    if (model["type"], normalizer) != ("BPE", "NFC"):
        raise ValueError(f"it is {model['type']} or changes text ({normalizer})")
    match saved["pre_tokenizer"].get("pretokenizers", [saved["pre_tokenizer"]]):
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
    if len(header) < 6 or header[:2] != [MAGIC, VERSION] or header[2] not in (2, 4) or header[3] >= 1 << 31:
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
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n)
    return order.astype(np.int32) if n < 1 << 31 else order


class Sampler:
    """An endless stream of windows of seq_len tokens, in which every window comes once per epoch.

    Window w is tokens[w*T : w*T + T + 1]; the order within an epoch is a permutation drawn from (seed,
    epoch).  Which sequences a step has is therefore a pure function of the seed and of the number consumed
    before: nothing need be saved to resume, on any number of processes."""

    def __init__(self, tokens, seq_len, seed):
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.n_windows = (len(tokens) - 1) // seq_len
        if self.n_windows < 1:
            raise TooShort(f"seq_len ({seq_len}) is too long for {len(tokens)} tokens")

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
            raise TooShort(f"seq_len ({seq_len}) is too short: none of {self.n_left_out:,} conversations "
                             "has an answer that ends within it")
        self.windows = pack_best_fit(self.spans, seq_len)
        self.n_windows = len(self.windows)

    def batch(self, windows):
        """-> tokens, targets (-1: none), doc (which conversation of its row a token is of; -1: padding), all
        [len(windows), T] int64."""
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


def assistant_mask(tokens, vocab_size):
    """Which of some conversations' tokens the assistant says, the <|end|> that closes an answer included:
    [n] bool.  Text never becomes a special token, so the tokens alone tell."""
    kind = np.asarray(tokens).astype(np.int64) - vocab_size
    opens = (kind >= END_OF_TEXT) & (kind != END)
    last = np.maximum.accumulate(np.where(opens, np.arange(len(kind)), 0))
    return (kind[last] == ASSISTANT) & ~opens


def pack_best_fit(spans, capacity):
    """Best-fit decreasing: put conversations (start, end) into few windows -> [those of each window]."""
    windows, rooms = [], []                                # rooms: (places left, window), sorted
    for start, end in sorted(spans, key=lambda span: span[0] - span[1]):
        at = bisect.bisect_left(rooms, (end - start - 1, 0))        # the fullest window that has room
        if at == len(rooms):
            rooms.append((capacity, len(windows)))
            windows.append([])
        room, w = rooms.pop(at)
        windows[w].append((start, end))
        bisect.insort(rooms, (room - (end - start - 1), w))
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
# what would change what is learned: must be absent, empty or 1
UNSUPPORTED = ("tools", "functions", "tool_calls", "function_call", "image", "images", "audio", "audios",
               "video", "videos", "thinking", "reasoning", "reasoning_content", "context", "system_prompt",
               "chosen", "rejected", "rejected_response", "weight", "train", "trainable", "train_on_turn",
               "train_detail", "loss", "loss_mask", "mask", "masked", "label", "kto_tag")


def encode(encoding, text):
    """Text -> tokens, a block at a time.  What looks like a special token stays text."""
    return [token for at in range(0, len(text), BLOCK)
            for token in encoding.encode_ordinary(text[at:at + BLOCK])]


def encode_chat(encoding, chat, answer=False):
    """[(role, content)] -> tokens, as CHAT_TEMPLATE has them, and with answer=True the beginning of one."""
    special = encoding.encode_single_token
    tokens = [special("<|endoftext|>")]
    for role, content in chat:
        tokens += [special(f"<|{role}|>"), *encode(encoding, content), special("<|end|>")]
    return tokens + [special("<|assistant|>")] * answer


FORMS = {"messages": '[{"role", "content"}]', "conversations": '[{"from", "value"}]',
         "instruction": 'with "output", and perhaps "input" and "history": [[question, answer]]'}


def read_chat(record):
    """A record of a chat file, in one of FORMS, perhaps with a "system" -> [(role, content)].  ValueError
    says what is wrong."""
    found = [name for name in FORMS if isinstance(record, dict) and record.get(name)]
    if found == ["instruction"]:
        question = "\n\n".join(filter(None, (record["instruction"], record.get("input"))))
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
    for name in UNSUPPORTED:
        for part in (record, *messages):
            if part.get(name) not in (None, 1, "", [], {}):
                raise ValueError(f"{name} {part[name]} is not supported")
    chat = [(m.get("role", m.get("from")), m.get("content", m.get("value"))) for m in messages]
    for number, (role, content) in enumerate(chat, 1):
        if str(role) not in ROLES:
            raise ValueError(f"message {number}: role {role!r} is unknown")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"message {number} ({role}) is no text, or empty")
        content.encode()                                   # UnicodeEncodeError for half a surrogate pair
    chat = [(ROLES[role], content) for role, content in chat]
    if not re.fullmatch("s?(ua)+u?", "".join(role[0] for role, _ in chat)):
        raise ValueError("no assistant message, or roles out of order: a system message, if any, then user "
                         "and assistant in turn")
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


# --- what all programs share ------------------------------------------------------------------------------

class InputError(ValueError):
    """What the user typed or gave is wrong: it ends a program in one line.  Other errors are tracebacks."""


class TooShort(InputError):
    """Tokens hold no window of that length."""


def read_json(path, what, extract=lambda saved: saved):
    """What extract() makes of the content of a JSON file.  InputError if that is not `what`."""
    try:
        if Path(path).exists() and not Path(path).is_file():      # a pipe would wait for ever
            raise ValueError("it is not a file")
        return extract(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError) as e:
        raise InputError(f"{path} is not {what} ({type(e).__name__}: {e})") from None


class Parser(argparse.ArgumentParser):
    """argparse with exact names only, and one-line errors."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message):
        fail(message)


def fail(message, code=2):
    """End the program with one line; exit code 2 is a wrong setting or an unreadable input."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


class Console:
    """stdout or stderr, without which a program goes on: what a closed or full one does not take is lost."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")
        with suppress(AttributeError):                     # a terminal without Unicode prints what it can
            self.stream.reconfigure(errors="replace")

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
    parser = Parser(prog="data.py", description=__doc__)
    parser.add_argument("--source", nargs="+", action="extend", metavar="PATH", help="files, folders, or a "
                        "word: stdlib (the default), installed, or functions (the default with --chats)")
    parser.add_argument("--chats", action="store_true", help="the sources are conversations: {messages}, "
                        "{conversations} or {instruction, input, output}, in .jsonl, .jsonl.gz or .json")
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
        prepare(Path("data") / name, sources, args.tokenizer or "bpe", args.vocab_size, args.chats)


if __name__ == "__main__":
    main()
