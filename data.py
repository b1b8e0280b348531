"""Text to token files, and token files to batches.

    python data.py                                        Python's standard library -> data/stdlib
    python data.py --source installed                     and all installed packages -> data/installed
    python data.py --source my_folder --name mine         .txt, .md, .py, .jsonl, .jsonl.gz (field "text")
    python data.py --chats --source chats.jsonl --tokenizer out/laptop --name chats       conversations

A prepared folder holds train.bin and val.bin (a header, then the tokens of all documents, each behind
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
import io
import itertools
import json
import os
import re
import shutil
import sys
import sysconfig
import zlib
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import regex  # comes with tiktoken, which splits text with the same syntax
import tiktoken
import torch
from tqdm import tqdm

TOKENIZERS = ("bpe", "bytes", "gpt2", "o200k_base")
SUFFIXES, CHAT_SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz"), (".jsonl", ".jsonl.gz", ".json")
SPECIAL = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
END_OF_TEXT, SYSTEM, USER, ASSISTANT, END = range(-5, 0)   # their ids, less the size of the vocabulary
BLOCK = 1 << 18                    # characters in memory at a time; tiktoken overflows at 2 ** 19 spaces
BPE_CHARS = 16 << 20               # characters that a tokenizer is trained on
HEAD, TAIL = 1 << 16, (1 << 16) + 1          # buckets of the two parts of a large document
HEADER, MAGIC, VERSION = 1024, 0x414D474953, 1         # "SIGMA"

# GPT-2's split of text into words, and ours, with digits in groups of three
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
PATTERN = GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}{1,3}")


def prepare(out, sources=("stdlib",), tokenizer="bpe", vocab_size=None, chats=False):
    """Prepare a folder unless it is there, and say what it holds -> its meta.json.  vocab_size: of bpe,
    default 2,048, for "installed" 8,192.

    Raises ValueError if the folder was made from something else, OSError if it cannot be written."""
    out = Path(out)
    if vocab_size and tokenizer != "bpe":
        raise ValueError(f"vocab_size is for the tokenizer bpe; {tokenizer} has its own")
    if vocab_size is None:
        vocab_size = 8192 if "installed" in sources else 2048
    request = {"sources": list(sources), "tokenizer": tokenizer, "chats": chats,
               "vocab_size": vocab_size if tokenizer == "bpe" else None}
    if not out.exists():
        aside = out.with_name(f"{out.name}.{os.getpid()}.tmp")
        aside.mkdir(parents=True)
        try:
            write_folder(aside, request)
            if not out.exists():                           # another run may have been faster
                os.rename(aside, out)
        finally:                                           # also after Ctrl-C
            shutil.rmtree(aside, ignore_errors=True)
    meta = load_meta(out)
    if meta["request"] != request:
        raise ValueError(f"{out} was prepared with other settings ({meta['request']}); choose another "
                         "--name, or delete that folder yourself")
    if meta["state"] != state_of(request):
        print(f"note: the sources of {out} have changed since, and its tokens are the old ones; delete it to "
              "prepare it anew")
    train, val, kind = meta["train"], meta["val"], "conversations" if chats else "documents"
    n_bytes = train["bytes"] + val["bytes"]
    asked = request["vocab_size"] or 0                     # of bpe
    fewer = f" (not {asked:,}: no more pairs repeat)" if meta["vocab_size"] < asked else ""
    print(f"{out}: {meta['files']:,} files, {train['documents'] + val['documents']:,} {kind}, skipped "
          f"{meta['skipped']}, {n_bytes / 1e6:.1f} MB; {tokenizer}, vocabulary {meta['vocab_size']:,}"
          f"{fewer}\n"
          f"  train {train['tokens']:,} tokens of {train['bytes'] / train['tokens']:.2f} bytes; held out "
          f"{val['tokens']:,} ({val['bytes'] / n_bytes:.1%} of the bytes)")
    return meta


def write_folder(folder, request):
    """Write encoding.json, train.bin, val.bin and meta.json."""
    chats, count = request["chats"], {"train": Counter(), "val": Counter()}
    tokenizer = request["tokenizer"], request["vocab_size"]
    encoding = build_encoding(*tokenizer)                  # a wrong one is told before the text is read
    files, state = find_files(request["sources"], chats), state_of(request)
    read = {path.resolve() for path, _ in files}
    others = Counter(path.suffix or "without a suffix" for source in map(Path, request["sources"])
                     if source.is_dir() for path in walk(source, set()) if path.resolve() not in read)
    if others:
        print("not read: " + ", ".join(f"{n:,} {suffix}" for suffix, n in others.most_common(9)))
    held_out, n_chars, n_skipped = hold_out(files, chats)
    if request["tokenizer"] == "bpe":
        training = (said(text) if chats else text for bucket, _, text in read_documents(files, chats, [])
                    if not held_out[bucket])
        encoding = build_encoding(*tokenizer, itertools.islice(training, 0, None, -(-n_chars // BPE_CHARS)))
    save_encoding(encoding, folder / "encoding.json")
    writers = {split: TokenWriter(folder / f"{split}.bin", encoding.n_vocab, chats) for split in count}
    for bucket, first, text in tqdm(read_documents(files, chats, []), "writing", leave=False, disable=None):
        split = "val" if held_out[bucket] else "train"
        if chats:
            tokens, text = encode_chat(encoding, json.loads(text)), said(text)
        else:
            tokens = [encoding.n_vocab + END_OF_TEXT] * first + encoding.encode_ordinary(text)
        writers[split].write(tokens)
        begins = int(first and bucket != TAIL)
        count[split].update(documents=begins, bytes=len(text.encode()), tokens=len(tokens))
    for split, writer in writers.items():
        writer.close()
        if not count[split]:
            raise ValueError(f"the sources are too small: {split}.bin would have 0 tokens; add some")
        count[split] = {**count[split], "sha256": file_sha256(folder / f"{split}.bin")}
    meta = {"request": request, "state": state, "files": len(files), "skipped": n_skipped,
            "vocab_size": encoding.n_vocab,
            "encoding_sha256": file_sha256(folder / "encoding.json"), **count}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def said(chat):
    """What is said in a conversation (JSON), without roles."""
    return "".join(content for _, content in json.loads(chat))


def state_of(request):
    """[number, bytes, newest time] of the files of a request, by which a change is noticed; None if a source
    is gone."""
    try:
        found = [path.stat() for path, _ in find_files(request["sources"], request["chats"])]
        return [len(found), sum(f.st_size for f in found), max(f.st_mtime_ns for f in found)]
    except (OSError, ValueError):
        return None


def load_meta(folder):
    """meta.json of a prepared folder.  ValueError if there is none, or its checksums do not fit."""
    try:
        meta = json.loads((Path(folder) / "meta.json").read_text())
        checksums = meta["encoding_sha256"], meta["train"]["sha256"], meta["val"]["sha256"]
        for name, checksum in zip(("encoding.json", "train.bin", "val.bin"), checksums):
            if file_sha256(Path(folder) / name) != checksum:
                raise ValueError(f"{name} does not fit it (its sha256 is another)")
        return {name: meta[name] for name in ("request", "state", "files", "skipped", "vocab_size",
                                              "encoding_sha256", "train", "val")}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}/meta.json is not that of a prepared folder: {error}") from None


def file_sha256(path):
    return hashlib.sha256(np.memmap(path, np.uint8, "r")).hexdigest()


def hold_out(files, chats):
    """Choose about a twentieth of all text -> (which buckets are held out [65538] bool, number of characters,
    of documents that cannot be read).  ValueError names those if they are more than 1 %.

    The last twentieths of large documents are; then each bucket, in order, if that brings the sum closer to
    a twentieth.  If none is chosen, the smallest is."""
    sizes, n, problems = np.zeros(TAIL + 1, np.int64), 0, []
    blocks = read_documents(files, chats, problems)
    for bucket, first, text in tqdm(blocks, "reading", leave=False, disable=None):
        sizes[bucket] += len(said(text) if chats else text)
        n += first
    n_bad, examples = len(problems), "; ".join(problems[:5])
    if n_bad > 0.01 * (n + n_bad):
        raise ValueError(f"{n_bad:,} of {n + n_bad:,} documents cannot be read, more than 1 %: {examples}")
    if not n:
        raise ValueError(f"{files[0][0]} is empty: there is no text in it")
    if problems:
        print(f"skipped {n_bad:,} of {n + n_bad:,} documents: {examples}", file=sys.stderr)
    target, total, held_out = sizes.sum() / 20, sizes[TAIL], np.arange(TAIL + 1) == TAIL
    for i in np.flatnonzero(sizes[:HEAD]):
        if abs(total + sizes[i] - target) <= abs(total - target):
            held_out[i], total = True, total + sizes[i]
    if not total:
        held_out[np.where(sizes, sizes, sizes.sum()).argmin()] = True
    return held_out, int(sizes.sum()), n_bad


def read_documents(files, chats, problems):
    """Yield (bucket, whether it begins a document, text) of blocks of text, or of conversations as JSON.
    `problems` collects what cannot be read."""
    large = sys.maxsize if chats else sum(text_size(path) for path, _ in files) / 10
    for path, package in files:
        is_text = path.suffix.lower() in (".txt", ".md", ".py")
        for where, source in [(path, path)] if is_text else read_lines(path):
            try:
                yield from read_document(source, chats, large, package)
            except (ValueError, RecursionError) as error:  # RecursionError: [[[[..
                problems.append(f"{where}: {error}")


def text_size(path):
    """Bytes of a file, unpacked."""
    packed = path.suffix.lower() == ".gz"
    return sum(len(line) for _, line in read_lines(path)) if packed else path.stat().st_size


def read_document(source, chats, large, package):
    """Yield the blocks of a text file (a path) or a line of JSON.  ValueError, before any block, if it is not
    UTF-8, or has no text in it.

    The bucket is a hash of the text, so equal documents fall on one side, or of the package, if there is one.
    A document of more than `large` bytes is cut: its last twentieth is held out."""
    if isinstance(source, Path):
        size, file = source.stat().st_size, open(source, encoding="utf-8-sig", newline="")
    else:
        size, record = len(source), json.loads(source.decode("utf-8-sig"))
        if not chats and not (isinstance(record, dict) and isinstance(record.get("text"), str)):
            raise ValueError('no "text" in it (conversations are read with --chats)')
        text = json.dumps(read_chat(record), ensure_ascii=False) if chats else record["text"]
        file = io.StringIO(text)
    block = sys.maxsize if chats else BLOCK                # a conversation is never cut
    with file:
        hashed, n, blank = hashlib.sha256(), 0, True
        while text := file.read(block):
            if "\0" in text[:1000]:
                raise ValueError("it is UTF-16, UTF-32 or no text; convert it to UTF-8")
            hashed.update(text.encode())
            n, blank = n + len(text), blank and text.isspace()
        file.seek(0)
        hashed = hashlib.sha256(package.encode()) if package else hashed
        whole = int.from_bytes(hashed.digest()[:2], "big")
        parts = [(HEAD, n - n // 20), (TAIL, n // 20)] if size > large else [(whole, n)]
        for bucket, length in parts if not blank else ():
            for start in range(0, length, block):
                yield bucket, start == 0, file.read(min(block, length - start))


def read_lines(path):
    """Yield (where, JSON) of each line of a .jsonl or .jsonl.gz that is not blank, or item of a .json."""
    try:
        if path == Path("functions") or path.suffix.lower() == ".json":
            items = json.loads(path.read_bytes()) if path.suffix else documented_functions()
            if not isinstance(items, list):
                raise ValueError("a .json file must be a list")
            yield from ((f"{path}, item {i}", json.dumps(item).encode()) for i, item in enumerate(items, 1))
        else:
            with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
                yield from ((f"{path}, line {i}", line) for i, line in enumerate(file, 1) if line.strip())
    except (gzip.BadGzipFile, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise OSError(f"{path} cannot be read: {error}") from None


def find_files(sources, chats):
    """[(path, package that is held out as a whole, or "")] of all sources.  ValueError if one has no file."""
    found, suffixes = {}, CHAT_SUFFIXES if chats else SUFFIXES
    for source in sources:
        if source == "functions" and chats:
            files = [(Path(source), "")]
        elif source in ("stdlib", "installed") and not chats:
            files = list(python_files(source))
        else:
            files = [(path, "") for path in walk(Path(source), set()) if path.name.lower().endswith(suffixes)]
        if not files:
            raise ValueError(f"source {source} is empty, or missing: no file ends in one of "
                             + ", ".join(suffixes))
        for path, package in files:                        # none twice
            found.setdefault(path.resolve(), (path, package))
    return list(found.values())


def walk(path, seen):
    """Yield a file, or those of a folder but hidden ones.  Links are followed; each folder is read once."""
    if not path.is_dir():
        yield path
    elif (real := path.resolve()) not in seen:
        seen.add(real)
        for child in sorted(path.iterdir()):
            if child.name[0] != ".":
                yield from walk(child, seen)


# folders that are left out: tests, packages inside of packages, tables
LEFT_OUT = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "vendor", "vendored",
            "_vendor", "_vendored", "third_party", "encodings", "pydoc_data", "lib2to3"}
LIBRARY = Path(sysconfig.get_paths()["stdlib"])
GENERATED = re.compile(rb"(?i)generated (by|from|with)|auto-?(matically )?generated|do not (edit|modify)")


def python_files(word):
    """Yield (path, "") of the .py files of the standard library; for "installed" (path, package) of all
    packages, without what is generated or more than a quarter digits."""
    roots = [LIBRARY]
    if word == "installed":
        roots += [Path(p) for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).parts
            if not LEFT_OUT & set(parts) and (word == "stdlib" or is_written_by_hand(path.read_bytes())):
                yield path, parts[0] if word == "installed" else ""


def is_written_by_hand(raw):
    digits = len(raw) - len(raw.translate(None, b"0123456789"))
    return digits <= len(raw) / 4 and not GENERATED.search(raw[:500])


def build_encoding(name, vocab_size=0, texts=()):
    """The tokenizer called name, or of a folder (load_encoding).  Texts are only read to train bpe."""
    if name not in TOKENIZERS:
        return load_encoding(name)
    if name == "bpe":
        if not 256 + len(SPECIAL) <= vocab_size <= 1 << 16:
            raise ValueError(f"vocab_size must be from {256 + len(SPECIAL)} to 65536, got {vocab_size}")
        return make_encoding(name, PATTERN, train_bpe(texts, vocab_size - len(SPECIAL)))
    if name == "bytes":
        return make_encoding(name, PATTERN, {bytes([i]): i for i in range(256)})
    try:
        known = tiktoken.get_encoding(name)
    except OSError as error:
        raise ValueError(f"tokenizer {name} is neither in tiktoken's cache nor on the network ({error}); set "
                         "TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer bpe") from None
    return make_encoding(name, known._pat_str, known._mergeable_ranks)


def make_encoding(name, pattern, ranks):
    """A tiktoken encoding with the special tokens behind the ranks; they are there from the start, so that a
    model trained on text needs no new rows for chat.  ValueError for ranks at which tiktoken panics."""
    if len(set(ranks.values())) < len(ranks) or any(bytes([i]) not in ranks for i in range(256)):
        raise ValueError("it lacks one of the 256 bytes, or gives two tokens one number")
    special = {token: max(ranks.values()) + 1 + i for i, token in enumerate(SPECIAL)}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


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
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        if "pre_tokenizer" in saved:                       # Hugging Face's
            return make_encoding(file.parent.name, *read_hf_tokenizer(saved))
        ranks = {base64.b64decode(token): i for i, token in enumerate(saved["ranks"]) if token}
        return make_encoding(saved["name"], saved["pattern"], ranks)
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not a tokenizer written by data.py, nor byte-level BPE of Hugging Face "
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
    vocab = {token: i for token, i in model["vocab"].items() if token not in added}
    made = [vocab["".join(pair).replace(" ", "")] for pair in model["merges"]]
    if made != sorted(made) or len(set(made)) != len(vocab) - 256:
        raise ValueError("its tokens are not numbered in the order of its merges")
    return pattern, {bytes(byte_of[c] for c in token): i for token, i in vocab.items()}


class TokenWriter:
    """Writes a token file: header of int64 (magic, version, bytes per token, vocabulary, count, 1 for
    conversations), then tokens as uint16 if the vocabulary allows, else uint32; all little-endian."""

    def __init__(self, path, vocab_size, chats=False):
        self.vocab_size, self.chats, self.count = vocab_size, chats, 0
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self.file = open(path, "wb")
        self.file.write(bytes(HEADER))

    def write(self, tokens):
        self.file.write(np.asarray(tokens, self.dtype).tobytes())
        self.count += len(tokens)

    def close(self):
        self.file.seek(0)
        header = MAGIC, VERSION, self.dtype.itemsize, self.vocab_size, self.count, self.chats
        self.file.write(np.array(header, "<i8").tobytes())
        self.file.close()


def read_header(path):
    """[bytes per token, vocabulary, count, 1 for conversations].  ValueError if it is not a token file."""
    header = np.fromfile(path, "<i8", 6).tolist()
    if len(header) < 6 or header[:2] != [MAGIC, VERSION]:
        raise ValueError(f"{path} is not a token file; data.py makes one of text or conversations")
    return header[2:]


def load_tokens(path):
    """The tokens of a file that data.py wrote (or of train.bin in its folder), mapped: [n] uint16 or uint32.

    Raises ValueError for a file that is foreign or cut short."""
    path = Path(path)
    path = path / "train.bin" if path.is_dir() else path
    itemsize, _, count, _ = read_header(path)
    size, expected = path.stat().st_size, HEADER + count * itemsize
    if itemsize not in (2, 4) or count < 1 or size != expected:
        raise ValueError(f"{path} is corrupt: it has {size} bytes, its header says {expected}")
    return np.memmap(path, f"<u{itemsize}", "r", HEADER, (count,))


@functools.lru_cache(2)                                    # a batch can lie across two epochs
def permutation(n, seed, epoch):
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n)


class Sampler:
    """An endless stream of windows of seq_len tokens, in which every window comes once per epoch.

    Window w is tokens[w*T : w*T + T + 1]; the order within an epoch is a permutation drawn from (seed,
    epoch).  Which sequences a step has is therefore a pure function of the seed and of the number consumed
    before: nothing need be saved to resume, on any number of processes."""

    def __init__(self, tokens, seq_len, seed):
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.n_windows = (len(tokens) - 1) // seq_len
        if self.n_windows < 1:
            raise ValueError(f"seq_len ({seq_len}) is too long for the {len(tokens)} tokens")

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

    def places(self, windows):
        """Where in the file the targets of some windows are, in their order."""
        return (np.asarray(windows)[:, None] * self.seq_len + np.arange(1, self.seq_len + 1)).flatten()


class ChatSampler(Sampler):
    """The same for conversations: a window holds whole ones, side by side, and only what the assistant says
    is a target.

    A conversation of n tokens takes n - 1 places (the last token predicts nothing).  One that is too long
    for a window ends with the last answer that fits; one whose first answer does not fit is left out."""

    def __init__(self, tokens, seq_len, seed, vocab_size):
        self.tokens, self.seq_len, self.seed, self.vocab_size = tokens, seq_len, seed, vocab_size
        self.spans, self.n_cut, self.n_left_out = [], 0, 0
        starts = np.flatnonzero(tokens == vocab_size + END_OF_TEXT).tolist()
        for start, end in zip(starts, [*starts[1:], len(tokens)]):
            said = np.flatnonzero(assistant_mask(tokens[start:end], vocab_size))
            ends = said[tokens[start + said] == vocab_size + END] + 1             # where its answers end
            fitting = ends[ends <= seq_len + 1].tolist()
            if fitting:
                self.spans.append((start, start + fitting[-1]))
            self.n_cut += 0 < len(fitting) < len(ends)
            self.n_left_out += not fitting
        if not self.spans:
            raise ValueError(f"seq_len ({seq_len}) is too short: none of {self.n_left_out:,} conversations "
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
                targets[row, places] = np.where(assistant_mask(chat, self.vocab_size), chat, -1)[1:]
                at = places.stop
        return tuple(map(torch.from_numpy, (tokens, targets, doc)))

    def places(self, windows):
        return np.concatenate([start + np.flatnonzero(assistant_mask(self.tokens[start:end], self.vocab_size))
                               for w in windows for start, end in self.windows[w]])


def make_sampler(tokens, path, seq_len, seed=0):
    """The sampler for the tokens of a file, which may be conversations."""
    _, vocab_size, _, chats = read_header(path)
    try:
        return ChatSampler(tokens, seq_len, seed, vocab_size) if chats else Sampler(tokens, seq_len, seed)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


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


CHAT_TEMPLATE = ("<|endoftext|>{% for message in messages %}{{ '<|' + message['role'] + '|>' + "
                 "message['content'] + '<|end|>' }}{% endfor %}"
                 "{% if add_generation_prompt %}<|assistant|>{% endif %}")
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
# what would change what is learned: must be absent, empty or 1
UNSUPPORTED = ("tools", "functions", "tool_calls", "function_call", "image", "images", "audio", "audios",
               "video", "videos", "thinking", "reasoning", "reasoning_content", "context", "system_prompt",
               "chosen", "rejected", "rejected_response", "weight", "train", "trainable", "train_on_turn",
               "train_detail", "loss", "loss_mask", "mask", "masked", "label", "kto_tag")


def encode_chat(encoding, chat, answer=False):
    """[(role, content)] -> tokens, as CHAT_TEMPLATE has them; with answer=True the beginning of one follows.
    Text that looks like a special token stays text."""
    special = encoding.encode_single_token
    tokens = [special("<|endoftext|>")]
    for role, content in chat:
        tokens.append(special(f"<|{role}|>"))
        for at in range(0, len(content), BLOCK):
            tokens += encoding.encode_ordinary(content[at:at + BLOCK])
        tokens.append(special("<|end|>"))
    return tokens + [special("<|assistant|>")] * answer


def read_chat(record):
    """A record of a chat file as [(role, content)].  ValueError says why it is none.

    {"messages": [{"role", "content"}]}, ShareGPT's {"conversations": [{"from", "value"}]}, or
    {"instruction", "input", "output", "history": [[question, answer]]}; "system" may stand beside them."""
    try:
        messages = record.get("messages") or record.get("conversations")
        if messages is None:
            question = "\n\n".join(filter(None, (record["instruction"], record.get("input"))))
            turns = [*(record.get("history") or []), [question, record["output"]]]
            if not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
                raise ValueError("history is not a list of [question, answer]")
            messages = [{"role": role, "content": turn[i]} for turn in turns
                        for i, role in enumerate(("user", "assistant"))]
        elif record.get("instruction") or record.get("output"):
            raise ValueError("it has messages, and an instruction or output beside them")
        if record.get("system"):
            messages = [{"role": "system", "content": record["system"]}, *messages]
        chat = [(m.get("role", m.get("from")), m.get("content", m.get("value"))) for m in messages]
    except (AttributeError, LookupError, TypeError):
        raise ValueError('neither "messages" (of role and content), "conversations" (of from and value) nor '
                         '"instruction" and "output"; text is read without --chats') from None
    for part in (record, *messages):
        for name in UNSUPPORTED:
            if part.get(name) not in (None, 1, "", [], {}):
                raise ValueError(f"{name} {part[name]} is not supported")
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


@functools.lru_cache(1)
def documented_functions():
    """This Python's documented functions as records of a chat: the question is the signature, the answer the
    first paragraph of the docstring.  No answer comes twice."""
    found = {}

    def visit(body, name):
        for node in body:
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{name}.{node.name}")
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                answer = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                found.setdefault(answer, f"What does {name}.{node.name}({ast.unparse(node.args)}) do?")
    for path, _ in python_files("stdlib"):
        module = ".".join(path.relative_to(LIBRARY).with_suffix("").parts).removesuffix(".__init__")
        visit(ast.parse(path.read_bytes()).body, module)
    return [{"instruction": question, "output": answer} for answer, question in found.items() if answer]


def holds_chats(source):
    """Whether a file or folder has the tokens of conversations."""
    file = Path(source) / "train.bin" if Path(source).is_dir() else Path(source)
    return file.is_file() and read_header(file)[3] == 1


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


@contextmanager
def one_line_errors(who=""):
    """Turn what is wrong with the user's input (ValueError, OSError) into one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):                # a terminal without Unicode prints what it can
        with suppress(AttributeError):
            stream.reconfigure(errors="replace")
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("NANOSIGMA_TRACEBACK"):
            raise
        fail(who + " ".join(str(error).split()))
    except KeyboardInterrupt:
        fail(f"{who}interrupted", 1)


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
            raise ValueError("--chats needs a --tokenizer: that of the run whose model is to be tuned, as in "
                             "--tokenizer out/laptop (or bpe, for a model that begins with these chats)")
        sources = args.source or ["functions" if args.chats else "stdlib"]
        name = args.name or Path(sources[0]).name.split(".")[0]
        if not re.fullmatch(r"[\w.-]*\w", name) or name in ("stdlib", "installed") and sources != [name]:
            raise ValueError(f"data/{name} cannot be the folder's name; give another --name")
        out = Path("data") / name
        if out.exists():
            print(f"{out} is there already; to prepare it anew, delete it or choose another --name")
        prepare(out, sources, args.tokenizer or "bpe", args.vocab_size, args.chats)


if __name__ == "__main__":
    main()
