"""Text to token files, and token files to batches.

    python data.py                                        Python's standard library -> data/stdlib
    python data.py --source installed --vocab_size 8192   and all installed packages -> data/installed
    python data.py --source my_folder --name mine         .txt, .md, .py, .jsonl, .jsonl.gz (field "text")
    python data.py --chats --source chats.jsonl --tokenizer out/laptop --name chats       conversations

A prepared folder holds train.bin and val.bin (a header, then the tokens of all documents, each behind
<|endoftext|>), encoding.json (the whole tokenizer) and meta.json (what went in).
"""

import argparse
import ast
import base64
import functools
import gzip
import hashlib
import heapq
import json
import os
import re
import shutil
import sys
import sysconfig
import time
import unittest.mock
import warnings
import zlib
from array import array
from collections import Counter, defaultdict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import regex  # comes with tiktoken, which splits text with the same syntax
import requests  # as does this
import tiktoken
import torch
from tqdm import tqdm

TOKENIZERS = ("bpe", "bytes", "gpt2", "o200k_base")
SUFFIXES, CHAT_SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz"), (".jsonl", ".jsonl.gz", ".json")
SPECIAL = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
END_OF_TEXT, SYSTEM, USER, ASSISTANT, END = range(-5, 0)   # their ids, less the size of the vocabulary
CHAT_TEMPLATE = ("<|endoftext|>{% for message in messages %}{{ '<|' + message['role'] + '|>' + "
                 "message['content'] + '<|end|>' }}{% endfor %}"
                 "{% if add_generation_prompt %}<|assistant|>{% endif %}")
DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error, RecursionError)         # of a .gz, of a .json
BLOCK = 1 << 18                     # bytes of text in memory at a time; tiktoken overflows at 2 ** 19 spaces
BPE_BYTES = 16 << 20                # bytes of text that a tokenizer is trained on

# GPT-2's split of text into words, and ours, with digits in groups of three
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
PATTERN = GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}{1,3}")


# --- preparing a folder -----------------------------------------------------------------------------------

def prepare(out, sources=("stdlib",), tokenizer="bpe", vocab_size=2048, chats=False):
    """Prepare a folder unless it is there -> what its meta.json says.  tokenizer is a name or an encoding.

    Raises ValueError if the folder was made from something else, OSError if it cannot be written."""
    out, existed = Path(out), Path(out).exists()
    request = {"sources": list(sources), "tokenizer": getattr(tokenizer, "name", tokenizer), "chats": chats,
               "vocab_size": vocab_size if tokenizer == "bpe" else None}
    if not existed:
        if isinstance(tokenizer, str) and tokenizer != "bpe":      # a wrong name is said before text is read
            tokenizer = build_encoding(tokenizer, vocab_size, ())
        aside = out.with_name(f"{out.name}.{os.getpid()}.tmp")
        aside.mkdir(parents=True)
        try:
            write_folder(aside, request, tokenizer)
            if not out.exists():                           # another program may have been faster
                os.rename(aside, out)
        finally:                                           # after Ctrl-C, too: leave nothing half done
            shutil.rmtree(aside, ignore_errors=True)
    meta = load_meta(out)
    if meta["request"] != request:
        raise ValueError(f"{out} was prepared with other settings ({meta['request']}); choose another "
                         "--name, or delete that folder yourself")
    if existed and meta["fingerprint"] != fingerprint(sources, chats):
        print(f"note: the sources of {out} have changed since, and its tokens are the old ones; delete it to "
              "prepare it anew")
    return meta


def write_folder(folder, request, tokenizer):
    """Write encoding.json, train.bin, val.bin and meta.json."""
    began, chats = time.time(), request["chats"]
    before = fingerprint(request["sources"], chats)        # a change from now on is noticed later
    corpus = Corpus(request["sources"], chats, folder / "text.tmp")
    encoding = tokenizer
    if tokenizer == "bpe":
        encoding = build_encoding("bpe", request["vocab_size"], corpus.sample())
    save_encoding(encoding, folder / "encoding.json")
    writers = {split: TokenWriter(folder / f"{split}.bin", encoding.n_vocab, chats) for split in PARTS}
    counts = {split: Counter(documents=0, bytes=0) for split in PARTS}
    for split, first, text in corpus.pieces("writing tokens"):
        if chats:
            chat = json.loads(text)
            tokens, n_bytes = encode_chat(encoding, chat), sum(len(content.encode()) for _, content in chat)
        else:
            tokens = [encoding.n_vocab + END_OF_TEXT] * first + encode(encoding, text)
            n_bytes = len(text.encode())
        writers[split].write(tokens)
        counts[split].update(documents=first, bytes=n_bytes)
    corpus.path.unlink()
    for split, writer in writers.items():
        writer.close()
        if not writer.count:
            raise ValueError(f"the sources are too small: the {PARTS[split]} would have 0 tokens; add some")
        counts[split] = {**counts[split], "tokens": writer.count, "sha256": file_sha256(writer.path)}
    meta = {"request": request, "fingerprint": before, "python": sys.version.split()[0],
            "files": len(corpus.files), "skipped": corpus.skipped, "vocab_size": encoding.n_vocab,
            "documents": counts["train"]["documents"] + counts["val"]["documents"],
            "encoding_sha256": file_sha256(folder / "encoding.json"),
            "seconds": round(time.time() - began, 1), **counts}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


PARTS = {"train": "training part", "val": "held-out part"}


def load_meta(folder):
    """meta.json of a prepared folder.  ValueError if it is none, or its tokenizer is not the tokens' own."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text())
        meta["request"], meta["fingerprint"], meta["train"]["sha256"], meta["val"]["sha256"]
        if file_sha256(folder / "encoding.json") != meta["encoding_sha256"]:
            raise ValueError(f"{folder / 'encoding.json'} does not fit the tokens beside it: its sha256 is "
                             "not the one in meta.json")
        return meta
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} is not a folder prepared by data.py ({error})") from None


def describe(out, meta):
    """What a prepared folder holds, and what is odd about it, in a few lines."""
    train, val, request = meta["train"], meta["val"], meta["request"]
    kind = "conversations" if request["chats"] else "documents"
    n_bytes = train["bytes"] + val["bytes"]
    share = val["bytes"] / n_bytes
    text = (f"{out}: {meta['files']:,} files, {meta['documents']:,} {kind}, {n_bytes / 1e6:.1f} MB, "
            f"{meta['seconds']:.0f} s; tokenizer {request['tokenizer']}, vocabulary {meta['vocab_size']:,}\n"
            f"  train {train['tokens']:,} tokens of {train['bytes'] / train['tokens']:.2f} bytes; held out "
            f"{val['tokens']:,} ({share:.1%} of the bytes); sha256 {train['sha256'][:12]}")
    if meta["skipped"]:
        text += "\n  skipped: " + ", ".join(f"{n:,} {what}" for what, n in meta["skipped"].items())
    if not 0.02 <= share <= 0.1:
        text += f"\n  note: {share:.1%} is held out, not about 5 %; more {kind} would do"
    if meta["vocab_size"] < 0.9 * (request["vocab_size"] or 0):
        text += (f"\n  note: the vocabulary is {meta['vocab_size']:,}, not {request['vocab_size']:,}: too "
                 "little text, or text that hardly repeats")
    return text


# --- the text of all sources, and what of it is held out --------------------------------------------------

class Corpus:
    """The documents (or conversations, as JSON) of all sources, one behind the other in a temporary file.

    ValueError names what cannot be read if it is more than 1 % of the files or lines."""

    def __init__(self, sources, chats, path):
        self.files, self.chats, self.path = find_files(sources, chats), chats, path
        self.n_bytes, self.lengths, self.buckets = 0, array("q"), array("H")     # characters, each document's
        self.sizes, self.whole = np.zeros(1 << 16, np.int64), np.zeros(1 << 16, bool)        # of each bucket
        self.seen, self.skipped, self.problems = Counter(), Counter(), defaultdict(list)
        with open(path, "wb") as self.out:
            for file, package in tqdm(self.files, "reading", leave=False, disable=None):
                self.seen["files"] += 1
                try:
                    self.read(file, package)
                except (ValueError, FileNotFoundError, PermissionError, *DAMAGED) as error:
                    self.skip("files", file, error)
        for what, problems in self.problems.items():
            if self.skipped[what] > 0.01 * self.seen[what]:
                raise ValueError(f"{self.skipped[what]:,} of {self.seen[what]:,} {what} cannot be read, more "
                                 f"than 1 %: {'; '.join(problems)}")
            print("skipped: " + "\nskipped: ".join(problems), file=sys.stderr)
        if not self.buckets:
            raise ValueError(f"{', '.join(sources)} is empty: there is no text in it")
        self.held_out, self.cut = hold_out(self.sizes, self.whole)

    def read(self, path, package):
        """Append the documents of a file.  An error if it cannot be read."""
        if path.suffix.lower() in (".txt", ".md", ".py"):
            with open_text(path) as file:
                self.add(iter(lambda: file.read(BLOCK), ""), package)
            return
        for where, record in read_records(path):
            self.seen["lines"] += 1
            try:
                if isinstance(record, ValueError):
                    raise record
                self.add([json.dumps(read_chat(record)) if self.chats else read_text(record)])
            except ValueError as error:
                self.skip("lines", f"{path}, {where}", error)

    def skip(self, what, where, error):
        """Count a file or line that cannot be read, and remember the first three."""
        self.skipped[what] += 1
        if len(self.problems[what]) < 3:
            why = "not UTF-8" if isinstance(error, UnicodeError) else error
            self.problems[what].append(f"{where}: {why}")

    def add(self, blocks, package=""):
        """Append a document, unless it is white space.  ValueError if it is not UTF-8.

        Its bucket is a hash of its text, or of its package's name; one bucket falls on one side."""
        hashed, n_chars, blank = hashlib.sha256(), 0, True
        self.out.seek(self.n_bytes)                        # the one before may have ended in an error
        for block in blocks:
            raw = block.encode()
            self.out.write(raw)
            hashed.update(raw)
            n_chars, blank = n_chars + len(block), blank and not block.strip()
        if blank:
            self.skipped["empty documents"] += 1
            return
        if package:
            hashed = hashlib.sha256(package.encode())
        bucket = int.from_bytes(hashed.digest()[:2], "big")
        self.sizes[bucket] += self.out.tell() - self.n_bytes
        self.whole[bucket] |= self.chats or bool(package)
        self.n_bytes = self.out.tell()
        self.lengths.append(n_chars)
        self.buckets.append(bucket)

    def pieces(self, description):
        """(split, whether it begins a document, text) of each block; a conversation is one block."""
        bar = tqdm(desc=description, total=int(self.sizes.sum()), unit="B", unit_scale=True, leave=False,
                   disable=None)
        with open(self.path, encoding="utf-8", newline="") as file, bar:
            for n, bucket in zip(self.lengths, self.buckets):
                split, tail = "val" if self.held_out[bucket] else "train", n // 20 * self.cut[bucket]
                for i, text in enumerate([file.read(n)] if self.chats else read_blocks(file, n - tail)):
                    yield split, i == 0, text
                    bar.update(len(text.encode()))
                if tail:
                    line = file.readline(n // 40)          # to the end of the line, if that is near
                    if line.endswith("\n"):
                        yield "train", False, line
                    for i, text in enumerate(read_blocks(file, tail - len(line), line.rpartition("\n")[2])):
                        yield "val", i == 0, text

    def sample(self):
        """About BPE_BYTES of the training text, spread evenly, for training a tokenizer."""
        seen = taken = 0
        share = min(1, BPE_BYTES / self.n_bytes)
        for split, _, piece in self.pieces("training the tokenizer"):
            for text in [content for _, content in json.loads(piece)] if self.chats else [piece]:
                seen += len(text)
                if split == "train" and taken <= share * seen:
                    taken += len(text)
                    yield text


def hold_out(sizes, whole):
    """Choose about a twentieth of all bytes -> which buckets are held out, and which are cut: of each of
    their documents the last twentieth is held out.

    Cut are those of more than a tenth of all bytes, unless they must stay whole.  The others are taken in
    their order, which is random but the same everywhere, each if it brings the sum closer to a twentieth.
    If none does, the smallest is taken."""
    target = sizes.sum() / 20
    cut = (sizes > 2 * target) & ~whole
    total, held_out = sizes[cut].sum() / 20, np.zeros(len(sizes), bool)
    for i in np.flatnonzero((sizes > 0) & ~cut):
        if abs(total + sizes[i] - target) <= abs(total - target):
            held_out[i], total = True, total + sizes[i]
    if not total:
        held_out[np.where(sizes > 0, sizes, sizes.max() + 1).argmin()] = True
    return held_out, cut


def read_blocks(file, n, rest=""):
    """`rest` and the next n characters of a file, in blocks.  They are cut between a letter or digit and a
    line end, where every tokenizer splits too, or in endless lines anywhere."""
    while n > 0:
        rest += file.read(min(BLOCK, n))
        n -= BLOCK
        border = re.match(r"(?s).*[A-Za-z0-9](?=\r?\n)", rest) if n > 0 else None
        end = border.end() if border else len(rest)
        yield rest[:end]
        rest = rest[end:]
    if rest:
        yield rest


def open_text(path):
    """A text file, or what is in a .gz.  Bytes that are not UTF-8 become what cannot be encoded again."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    file = opened(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="")
    head = file.read(1024)
    if "\0" in head or head.startswith(("\udcff\udcfe", "\udcfe\udcff")):
        raise ValueError("it is UTF-16, UTF-32 or no text; convert it to UTF-8")
    file.seek(0)
    return file


def read_records(path):
    """(where, object or ValueError) of each line of a .jsonl or .jsonl.gz, and of each item of a .json."""
    if str(path) == "functions":
        yield from (("", record) for record in documented_functions())
        return
    with open_text(path) as file:
        if path.suffix.lower() == ".json":
            items = json.load(file)
            if not isinstance(items, list):
                raise ValueError("it is no list")
            yield from ((f"item {number}", item) for number, item in enumerate(items, 1))
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    record = ValueError(f"not JSON ({error})")
                yield f"line {number}", record


def read_text(record):
    """The text of a line.  ValueError if it has none."""
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        chat = isinstance(record, dict) and {"messages", "conversations", "instruction"} & set(record)
        raise ValueError('no "text" in it' + ("; conversations are read with --chats" if chat else ""))
    return record["text"]


def find_files(sources, chats):
    """[(path, its package, if packages are held out as a whole)] of all sources."""
    found, suffixes = [], CHAT_SUFFIXES if chats else SUFFIXES
    for source in sources:
        path = Path(source)
        if source == ("functions" if chats else "stdlib"):
            files = [path] if chats else standard_library()[1]
        elif source == "installed" and not chats:
            found += installed_files()
            continue
        elif not path.exists():
            raise ValueError(f"source {source} does not exist")
        else:
            files = [path] if path.is_file() else walk(path)
            files = [file for file in files if file.name.lower().endswith(suffixes)]
        if not files:
            raise ValueError(f"source {source} is empty: no file ends in one of {', '.join(suffixes)}")
        found += [(file, "") for file in files]
    return found


def walk(folder):
    """All files below a folder but hidden ones.  Links are followed; a folder that has two names is read
    once."""
    def refuse(error):
        raise ValueError(f"folder {error.filename} cannot be read ({error.strerror})")
    files, seen = [], set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = sorted(name for name in folders if name[0] != "." and real not in seen)
        files += [Path(place, name) for name in sorted(names) if name[0] != "." and real not in seen]
        seen.add(real)
    return files


def fingerprint(sources, chats):
    """A hash of the names, sizes and times of all files; None if a source is gone."""
    try:
        stats = [(str(path), path.stat()) for path, _ in find_files(sources, chats) if path.exists()]
        state = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        return hashlib.sha256(repr((state, sys.version)).encode()).hexdigest()
    except (ValueError, OSError):
        return None


# parts of a path: tests, packages inside of packages, tables
LEFT_OUT = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "vendor", "vendored",
            "_vendor", "_vendored", "third_party", "encodings", "pydoc_data", "lib2to3"}
GENERATED = re.compile(rb"(?i)auto-?(matically )?generated|generated (by|from|with)|do not (edit|modify)")


def python_files(root):
    return [path for path in sorted(root.rglob("*.py")) if not LEFT_OUT & set(path.relative_to(root).parts)]


def standard_library():
    """The folder of this Python's standard library, and its .py files without tests and tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = python_files(root)
    if not files:
        raise ValueError("this Python came without the .py files of its standard library; give a --source")
    return root, files


@functools.lru_cache(1)
def installed_files():
    """[(path, package)] of the standard library and of the packages in this environment.

    Left out are files that say near their top that they are generated, that are more than a quarter digits,
    and that repeat another one."""
    found, seen = [], set()
    sites = [Path(place) for place in sys.path if Path(place).name in ("site-packages", "dist-packages")]
    for root, files in [standard_library(), *((site, python_files(site)) for site in sites)]:
        for path in files:
            raw = path.read_bytes()
            digits = len(raw) - len(raw.translate(None, b"0123456789"))
            if raw not in seen and digits < len(raw) / 4 and not GENERATED.search(raw[:500]):
                seen.add(raw)
                found.append((path, path.relative_to(root).parts[0].removesuffix(".py")))
    return found


# --- conversations ----------------------------------------------------------------------------------------

ROLES = {role: role for role in ("system", "user", "assistant")} | {"human": "user", "gpt": "assistant"}
# what changes what should be learned, and is not supported; and flags that must be 1 if they are there
UNSUPPORTED = ("tools", "functions", "tool_calls", "function_call", "images", "audio", "thinking",
               "reasoning_content", "rejected")
FLAGS = ("weight", "train", "loss", "label")


def read_chat(record):
    """A record of a chat file as [(role, content)].  ValueError says why it is none.

    {"messages": [{"role", "content"}]}, ShareGPT's {"conversations": [{"from", "value"}]}, or
    {"instruction", "input", "output", "history": [[question, answer]]}; "system" may stand beside them."""
    try:
        messages = record.get("messages", record.get("conversations"))
        if messages is None:
            question = "\n\n".join(part for part in (record["instruction"], record.get("input")) if part)
            turns = (record.get("history") or []) + [[question, record["output"]]]
            if any(not isinstance(turn, list) for turn in turns):
                raise TypeError("a turn is [question, answer]")
            messages = [{"role": role, "content": content} for question, answer in turns
                        for role, content in (("user", question), ("assistant", answer))]
        if record.get("system"):
            messages = [{"role": "system", "content": record["system"]}, *messages]
        chat = [(message.get("role", message.get("from")), message.get("content", message.get("value")))
                for message in messages]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError('neither "messages" (objects with role and content), "conversations" (with from and '
                         'value) nor "instruction" and "output"; text is read without --chats') from None
    for part in (record, *messages):
        for name in UNSUPPORTED:
            if part.get(name):
                raise ValueError(f"{name} is not supported")
        for name in FLAGS:
            if isinstance(part.get(name), (int, float)) and part[name] != 1:
                raise ValueError(f"{name} {part[name]} is not supported: every answer is learned from")
    for number, (role, content) in enumerate(chat, 1):
        if str(role) not in ROLES:
            raise ValueError(f"message {number}: role {role!r} is unknown")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"message {number} ({role}) is no text, or empty")
        content.encode()                                   # UnicodeError if its bytes were not UTF-8
    chat = [(ROLES[role], content) for role, content in chat]
    turns = [role for role, _ in chat]
    turns = turns[turns[:1] == ["system"]:]
    if turns != (["user", "assistant"] * len(turns))[:len(turns)]:
        raise ValueError("roles out of order: a system message, if any, then user and assistant in turn")
    if "assistant" not in turns:
        raise ValueError("no assistant message")
    return chat


def encode_chat(encoding, chat, answer=False):
    """[(role, content)] -> tokens, as CHAT_TEMPLATE has them; with answer=True the beginning of one follows.

    Text that looks like a special token stays text."""
    special = encoding.encode_single_token
    tokens = [special("<|endoftext|>")]
    for role, content in chat:
        tokens += [special(f"<|{role}|>"), *encode(encoding, content), special("<|end|>")]
    return tokens + [special("<|assistant|>")] * answer


def documented_functions():
    """This Python's documented functions as records of a chat: the question is the signature, the answer the
    first paragraph of the docstring.  No answer comes twice."""
    root, files = standard_library()
    seen = set()

    def visit(body, name):
        for node in body:
            if isinstance(node, ast.ClassDef):
                yield from visit(node.body, f"{name}.{node.name}")
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                answer = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if answer and answer not in seen:
                    seen.add(answer)
                    yield f"{name}.{node.name}({ast.unparse(node.args)})", answer
    for path in files:
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                # of old escapes
            tree = ast.parse(path.read_bytes())
        for signature, answer in visit(tree.body, module):
            yield {"messages": [{"role": "user", "content": f"What does {signature} do?"},
                                {"role": "assistant", "content": answer}]}


def is_chat_source(source):
    """Whether a name is that of conversations that are no tokens yet."""
    return source == "functions" or source.lower().endswith(CHAT_SUFFIXES)


def holds_chats(source):
    """Whether a file or folder has conversations, or their tokens."""
    file = Path(source) if Path(source).is_file() else Path(source) / "train.bin"
    return is_chat_source(source) or bool(source) and file.is_file() and has_chats(file)


def chats_folder(source, encoding):
    """Where train.py keeps the tokens of a chat file (or of the word functions): its name says what went in,
    so that a file that has changed is another set.  ValueError if there is no such file."""
    if source != "functions" and not Path(source).is_file():
        raise ValueError(f"data {source} does not exist; it would be a file of conversations")
    content = sys.version if source == "functions" else file_sha256(source)
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    digest = hashlib.sha256(repr((content, encoding._pat_str, ranks)).encode()).hexdigest()
    return Path("data") / f"{Path(source).name.split('.')[0]}-{digest[:8]}"


# --- tokenizers -------------------------------------------------------------------------------------------

def encode(encoding, text):
    """The tokens of a text, in blocks, for tiktoken overflows at a million spaces."""
    blocks = (text[at:at + BLOCK] for at in range(0, len(text), BLOCK))
    return [token for block in blocks for token in encoding.encode_ordinary(block)]


def build_encoding(name, vocab_size, texts):
    """The tokenizer called name, or in a file or folder; texts are only read to train the ranks of bpe."""
    if name == "bpe":
        if not 256 + len(SPECIAL) <= vocab_size <= 1 << 16:
            raise ValueError(f"vocab_size must be from {256 + len(SPECIAL)} to 65536, got {vocab_size}")
        return make_encoding(name, PATTERN, train_bpe(texts, vocab_size - len(SPECIAL)))
    if name == "bytes":
        return make_encoding(name, PATTERN, {bytes([i]): i for i in range(256)})
    return known_encoding(name) if name in TOKENIZERS else read_tokenizer(name)


def make_encoding(name, pattern, ranks):
    """A tiktoken encoding with the special tokens behind the ranks; those come from the start, so that a
    model trained on text needs no new rows for chat."""
    if not {bytes([i]) for i in range(256)} <= set(ranks) or len(set(ranks.values())) != len(ranks):
        raise ValueError("single bytes are missing, or a number is there twice")     # tiktoken would panic
    special = {token: max(ranks.values()) + 1 + i for i, token in enumerate(SPECIAL)}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def train_bpe(texts, n_ranks):
    """Byte-pair ranks {bytes: rank} from an iterable of strings (Sennrich et al., arXiv 1508.07909).

    Starts from the 256 bytes and joins the most frequent pair of neighbours inside words, ties to the
    smallest pair of ranks, until there are n_ranks or no pair repeats.  Works on the table of distinct words,
    so the result does not depend on the order of the texts.  A word is a string with chr(rank) for a token.
    """
    table, pieces = Counter(), Counter()
    for text in texts:
        table.update(regex.findall(PATTERN, text))
    for word, n in table.items():                          # words without end: Chinese, DNA, base64
        for at in range(0, len(word), 64):
            pieces[word[at:at + 64]] += n
    table = sorted(pieces.items(), key=lambda item: (-item[1], item[0]))[:200_000]       # bounds the merging
    words, freq = [word.encode().decode("latin-1") for word, _ in table], [n for _, n in table]
    vocab = [bytes([i]) for i in range(256)]
    count, where = Counter(), defaultdict(set)             # pair -> occurrences, pair -> words that have it
    for i, word in enumerate(words):
        for a, b in zip(word, word[1:]):
            count[a + b] += freq[i]
            where[a + b].add(i)
    heap = [(-n, pair) for pair, n in count.items()]
    heapq.heapify(heap)
    while len(vocab) < n_ranks and heap:
        n, pair = heapq.heappop(heap)
        if count[pair] != -n:                              # out of date: counts fall as neighbours are joined
            if count[pair] > 0:
                heapq.heappush(heap, (-count[pair], pair))
            continue
        if n > -2:
            break
        new, fresh = chr(len(vocab)), set()
        vocab.append(vocab[ord(pair[0])] + vocab[ord(pair[1])])
        for i in where.pop(pair):
            old, words[i] = words[i], words[i].replace(pair, new)
            for word, n in ((old, -freq[i]), (words[i], freq[i])):
                for a, b in zip(word, word[1:]):
                    count[a + b] += n
                    if new in (a, b):
                        where[a + b].add(i)
                        fresh.add(a + b)
        for p in fresh:
            heapq.heappush(heap, (-count[p], p))
    return {token: i for i, token in enumerate(vocab)}


def known_encoding(name):
    """gpt2 or o200k_base from tiktoken's cache or, with a timeout, from the network."""
    get = functools.partial(requests.get, timeout=20)      # tiktoken's own waits for ever
    try:
        with unittest.mock.patch("requests.get", get):
            known = tiktoken.get_encoding(name)
    except OSError as error:
        raise ValueError(f"tokenizer {name} is neither in tiktoken's cache nor on the network ({error}); set "
                         "TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer bpe") from None
    return make_encoding(name, known._pat_str, known._mergeable_ranks)


def read_tokenizer(name):
    """The tokenizer of a run, a prepared folder or one of Hugging Face, or the file of one."""
    for path in (Path(name), Path(name) / "encoding.json", Path(name) / "tokenizer.json"):
        if path.is_file():
            return (load_encoding if path.name == "encoding.json" else read_hf_tokenizer)(path)
    raise ValueError(f"tokenizer {name!r} is none of {', '.join(TOKENIZERS)}, nor a run or folder with one")


def save_encoding(encoding, path):
    """Write a tokenizer; a number without a token is null (Hugging Face's special tokens, say)."""
    tokens = {i: base64.b64encode(token).decode() for token, i in encoding._mergeable_ranks.items()}
    Path(path).write_text(json.dumps({
        "name": encoding.name, "pattern": encoding._pat_str, "special": list(SPECIAL),
        "ranks": [tokens.get(i) for i in range(max(tokens) + 1)]}, indent=0))


def load_encoding(path):
    """The tokenizer of a prepared folder or a run.  ValueError if the file is not one."""
    path = Path(path)
    path = path / "encoding.json" if path.is_dir() else path
    try:
        saved = json.loads(path.read_text())
        ranks = {base64.b64decode(token): i for i, token in enumerate(saved["ranks"]) if token}
        if saved["special"] != list(SPECIAL):
            raise ValueError(f"its special tokens are {saved['special']}")
        return make_encoding(saved["name"], saved["pattern"], ranks)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a tokenizer written by data.py ({error})") from None


# the characters that stand for bytes in tokenizer.json: themselves if visible, else in order from 256 on
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {chr(b): b for b in VISIBLE} | {
    chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in VISIBLE)}


def read_hf_tokenizer(path):
    """A tokenizer.json of Hugging Face as a tiktoken encoding, if it is byte-level BPE in tiktoken's manner.

    Tokens keep their numbers, wherever its special tokens are; those give way to ours, which come last.  Text
    is not brought to NFC.  ValueError for any other."""
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        model, normalizer = saved["model"], saved.get("normalizer") or {"type": "NFC"}
        if model["type"] != "BPE":
            raise ValueError(f"it is {model['type']}")
        if normalizer["type"] != "NFC":
            raise ValueError(f"it changes text ({normalizer['type']})")
        added = {token["content"] for token in saved.get("added_tokens", [])}
        vocab = {token: i for token, i in model["vocab"].items() if token not in added}
        pattern = hf_pattern(saved["pre_tokenizer"])
        ranks = {bytes(BYTES[c] for c in token): i for token, i in vocab.items()}
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        made = [vocab["".join(pair)] for pair in merges]
        if made != sorted(made) or len(set(made)) != len(ranks) - 256:
            raise ValueError("its tokens are not numbered in the order of its merges")
        return make_encoding(Path(path).parent.name, pattern, ranks)
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a byte-level BPE tokenizer ({error})") from None


def hf_pattern(split):
    """The one pattern of a "pre_tokenizer".  ValueError if it does more than to split by it."""
    patterns, parts = [], split.get("pretokenizers", [split])
    for part in parts:
        if part["type"] == "Split" and part["behavior"] == "Isolated" and not part.get("invert"):
            patterns.append(part["pattern"]["Regex"])
        elif part["type"] != "ByteLevel" or part.get("add_prefix_space"):
            raise ValueError(f"it splits text in a way that is not known here ({part})")
        elif part.get("use_regex", True):
            patterns.append(GPT2_PATTERN)
    if len(patterns) != 1 or all(part["type"] != "ByteLevel" for part in parts):
        raise ValueError("it is not byte-level, with one pattern")
    return patterns[0]


# --- token files ------------------------------------------------------------------------------------------

HEADER, MAGIC, VERSION = 1024, 0x414D474953, 1             # "SIGMA"


class TokenWriter:
    """Writes a token file: header of int64 (magic, version, bytes per token, vocabulary, count, 1 for
    conversations), then tokens as uint16 if the vocabulary allows, else uint32.  Little-endian, so that files
    travel."""

    def __init__(self, path, vocab_size, chats=False):
        self.path, self.vocab_size, self.chats, self.count = Path(path), vocab_size, chats, 0
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self.file = open(path, "wb")
        self.file.write(bytes(HEADER))

    def write(self, tokens):
        tokens = np.asarray(tokens, self.dtype)
        self.file.write(tokens.tobytes())
        self.count += len(tokens)

    def close(self):
        header = np.array([MAGIC, VERSION, self.dtype.itemsize, self.vocab_size, self.count, self.chats],
                          "<i8")
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def load_tokens(path):
    """The tokens of a file that data.py wrote (or of train.bin in its folder), mapped, not read: [n] uint16
    or uint32.

    Raises ValueError for a file that is foreign, cut short, or has a token beyond its own vocabulary."""
    path = Path(path)
    path = path / "train.bin" if path.is_dir() else path
    header = np.fromfile(path, "<i8", 5)
    if len(header) < 5 or header[0] != MAGIC or header[1] != VERSION:
        raise ValueError(f"{path} is not a token file written by data.py, which makes one of text")
    itemsize, vocab_size, count = (int(n) for n in header[2:])
    size, expected = path.stat().st_size, HEADER + count * itemsize
    if itemsize not in (2, 4) or count < 1 or size != expected:
        raise ValueError(f"{path} is corrupt: it has {size} bytes, its header says {expected}; prepare it "
                         "anew under another --name")
    tokens = np.memmap(path, f"<u{itemsize}", "r", HEADER, (count,))
    for a in range(0, count, 1 << 24):                     # one pass, about a second for 1 GB
        if (top := int(tokens[a:a + (1 << 24)].max())) >= vocab_size:
            raise ValueError(f"{path} is corrupt: it has token {top}, beyond its vocabulary of {vocab_size}")
    return tokens


def largest_share(tokens, vocab_size, blocks=200, size=100_000):
    """Share of the most frequent token, counted in up to `blocks` evenly spaced blocks of `size` tokens."""
    starts = np.unique(np.linspace(0, max(0, len(tokens) - size), blocks).astype(int))
    if len(tokens) <= blocks * size:
        starts = range(0, len(tokens), size)
    count = sum(np.bincount(tokens[a:a + size], minlength=vocab_size) for a in starts)
    return float(count.max() / count.sum())


def vocabulary(path):
    """Size of the vocabulary that a token file was written with (load_tokens has checked the file)."""
    return int(np.fromfile(path, "<i8", 5)[3])


def has_chats(path):
    """Whether a token file holds conversations; a file that is none does not."""
    header = np.fromfile(path, "<i8", 6).tolist()
    return header[:1] == [MAGIC] and header[5:] == [1]


def file_sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


class Sampler:
    """An endless stream of windows of seq_len tokens, in which every window comes once per epoch.

    Window w is tokens[w*T : w*T + T + 1]; the order within an epoch is a permutation drawn from (seed,
    epoch).  Which sequences a step has is therefore a pure function of the seed and of the number consumed
    before: nothing need be saved to resume, on any number of processes.
    """

    def __init__(self, tokens, seq_len, seed):
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.n_windows = (len(tokens) - 1) // seq_len
        if self.n_windows < 1:
            raise ValueError(f"seq_len ({seq_len}) is too long for the {len(tokens)} tokens")
        self.order = functools.lru_cache(2)(self.order)    # a batch can lie across two epochs

    def order(self, epoch):
        return np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.n_windows)

    def rows(self, first, count, rank=0, world=1):
        """This rank's share of sequences first .. first+count-1, as batch() has them."""
        mine = range(first + count * rank // world, first + count * (rank + 1) // world)
        places = (divmod(i, self.n_windows) for i in mine)
        return self.batch([int(self.order(epoch)[place]) for epoch, place in places])

    def batch(self, windows):
        """-> tokens, targets [len(windows), T] int64."""
        out = np.empty((len(windows), self.seq_len + 1), np.int64)
        for row, w in zip(out, windows):
            row[:] = self.tokens[w * self.seq_len:(w + 1) * self.seq_len + 1]
        out = torch.from_numpy(out)
        return out[:, :-1].contiguous(), out[:, 1:].contiguous()

    def places(self, windows):
        """Where in the file the targets of some windows are, in their order."""
        return np.concatenate([np.arange(w * self.seq_len + 1, (w + 1) * self.seq_len + 1) for w in windows])


class ChatSampler(Sampler):
    """The same for conversations: a window holds whole ones, side by side, and only what the assistant says
    is a target.

    A conversation of n tokens takes n - 1 places (the last token predicts nothing).  One that is too long
    for a window ends with the last answer that fits; one whose first answer does not fit is left out.  With
    pack=False every window holds a single one.
    """

    def __init__(self, tokens, seq_len, seed, vocab_size, pack=True):
        self.tokens, self.seq_len, self.seed, self.vocab_size = tokens, seq_len, seed, vocab_size
        self.spans, self.n_cut, self.n_left_out = find_conversations(tokens, vocab_size, seq_len)
        if not len(self.spans):
            raise ValueError(f"seq_len ({seq_len}) is too short: none of {self.n_left_out:,} conversations "
                             "has an answer that ends within it; a longer --seq_len has room")
        sizes = (self.spans[:, 1] - self.spans[:, 0] - 1).tolist()
        self.windows = pack_best_fit(sizes, seq_len) if pack else [[i] for i in range(len(sizes))]
        self.n_windows = len(self.windows)
        self.order = functools.lru_cache(2)(self.order)

    def batch(self, windows):
        """-> tokens, targets (-1: none), doc (which conversation of its row a token is of; -1: padding), all
        [len(windows), T] int64."""
        tokens = np.zeros((len(windows), self.seq_len), np.int64)
        targets, doc = np.full_like(tokens, -1), np.full_like(tokens, -1)
        for row, w in enumerate(windows):
            at = 0
            for number, i in enumerate(self.windows[w]):
                start, end = self.spans[i]
                whole = np.asarray(self.tokens[start:end]).astype(np.int64)
                places = slice(at, at + len(whole) - 1)
                tokens[row, places], doc[row, places] = whole[:-1], number
                targets[row, places] = np.where(assistant_mask(whole, self.vocab_size), whole, -1)[1:]
                at = places.stop
        return tuple(map(torch.from_numpy, (tokens, targets, doc)))

    def first_question(self):
        """The tokens of the first conversation up to where its first answer begins."""
        tokens = self.tokens[slice(*self.spans[0])].tolist()
        return tokens[:tokens.index(self.vocab_size + ASSISTANT) + 1]

    def places(self, windows):
        spans = [self.spans[i] for w in windows for i in self.windows[w]]
        return np.concatenate([start + np.flatnonzero(assistant_mask(self.tokens[start:end], self.vocab_size))
                               for start, end in spans])


def make_sampler(tokens, path, seq_len, seed=0, pack=True):
    """The sampler for the tokens of a file, which may be conversations."""
    try:
        if has_chats(path):
            return ChatSampler(tokens, seq_len, seed, vocabulary(path), pack)
        return Sampler(tokens, seq_len, seed)
    except ValueError as error:
        raise ValueError(f"{error} in the {PARTS.get(Path(path).stem, 'file')} ({path})") from None


def assistant_mask(tokens, vocab_size):
    """Which of some conversations' tokens the assistant says, the <|end|> that closes an answer included:
    [n] bool.

    Text never becomes a special token, so the tokens alone tell."""
    kind = np.asarray(tokens).astype(np.int64) - vocab_size
    opens = (kind >= END_OF_TEXT) & (kind != END)
    last = np.maximum.accumulate(np.where(opens, np.arange(len(kind)), 0))
    return (kind[last] == ASSISTANT) & ~opens


def find_conversations(tokens, vocab_size, seq_len):
    """-> ([n, 2] start and end of every conversation, or of as much of it as fits into seq_len places and
    ends with an answer; how many were cut to fit; how many are left out, for no answer fits)."""
    blocks = range(0, len(tokens), 1 << 24)
    special = np.concatenate([a + np.flatnonzero(tokens[a:a + (1 << 24)] >= vocab_size + END_OF_TEXT)
                              for a in blocks])
    kind = tokens[special].astype(np.int64) - vocab_size
    starts = special[kind == END_OF_TEXT]
    answers = special[1:][(kind[1:] == END) & (kind[:-1] == ASSISTANT)] + 1            # where answers end
    whole = np.append(starts[1:], len(tokens))

    def last_answer(limit):                                # the last end up to each limit, 0 if there is none
        return np.append(0, answers)[np.searchsorted(answers, limit, side="right")]
    ends = last_answer(np.minimum(whole, starts + seq_len + 1))
    kept = ends > starts
    cut = kept & (ends < last_answer(whole))
    return np.stack([starts[kept], ends[kept]], 1), int(cut.sum()), int((~kept).sum())


def pack_best_fit(sizes, capacity):
    """Put sizes into as few bins of a capacity as best-fit decreasing finds -> [their indices, for each bin].

    Bins are kept by the room that is left in them, and which rooms there are as bits of one number, so that
    the smallest sufficient one is found at once."""
    bins, with_room, rooms = [], defaultdict(list), 0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        enough = rooms >> sizes[i]
        if enough:
            room = sizes[i] + (enough & -enough).bit_length() - 1
            place = with_room[room].pop()
            rooms ^= (not with_room[room]) << room
        else:
            room, place = capacity, len(bins)
            bins.append([])
        bins[place].append(i)
        if room > sizes[i]:
            with_room[room - sizes[i]].append(place)
            rooms |= 1 << (room - sizes[i])
    return bins


# --- errors and command lines, as all programs have them --------------------------------------------------

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
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("NANOSIGMA_TRACEBACK"):
            raise
        fail(who + " ".join(str(error).split()))
    except KeyboardInterrupt:
        print(f"{who}interrupted", file=sys.stderr)
        raise SystemExit(1) from None


def main(argv=None):
    parser = Parser(prog="data.py", description=__doc__)
    parser.add_argument("--source", nargs="+", action="extend", metavar="PATH",
                        help="files, folders (hidden files aside), or a word: stdlib (the default), "
                             "installed, with --chats functions (Python's own documented ones, the default)")
    parser.add_argument("--chats", action="store_true",
                        help="the sources are conversations: .jsonl, .jsonl.gz or .json of {messages}, "
                             "{conversations} or {instruction, input, output}; give a --tokenizer")
    parser.add_argument("--name", metavar="NAME",
                        help="the folder is data/NAME (default: the name of the first source)")
    parser.add_argument("--tokenizer", metavar="NAME",
                        help="bpe (trained on the text, the default), bytes, gpt2, o200k_base, a run or "
                             "folder that has one, or a tokenizer.json of Hugging Face")
    parser.add_argument("--vocab_size", type=int, default=2048, metavar="V",
                        help="vocabulary of bpe, five special tokens included (default 2048, which measured "
                             "best for the laptop preset; take 8192 or more for a larger model)")
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
        print(describe(out, prepare(out, sources, args.tokenizer or "bpe", args.vocab_size, args.chats)))


if __name__ == "__main__":
    main()
