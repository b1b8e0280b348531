"""Text to token files, and token files to batches.

    python data.py                                        Python's own standard library -> data/stdlib
    python data.py --source my_folder --name mine         .txt, .md, .py, .jsonl, .jsonl.gz (field "text")
    python data.py --source a.txt https://host/b.jsonl.gz --weights 1 0.5 --name mix --tokenizer gpt2
    python data.py --chats --source chats.jsonl --tokenizer out/laptop --name chats       conversations

A prepared folder holds

    train.bin, val.bin   a 1,024-byte header, then the tokens of all documents (or conversations), each behind
                         <|endoftext|>
    encoding.json        the tokenizer, whole: no network and no cache is needed to read it back
    meta.json            what went in: files, documents, bytes, tokens, sha256 of each file

It is written aside and renamed when complete.  Nothing is held in memory but one block of text at a time.
"""

import argparse
import ast
import base64
import codecs
import difflib
import functools
import gzip
import hashlib
import heapq
import http.client
import json
import os
import re
import shutil
import sys
import sysconfig
import time
import unittest.mock
import urllib.request
import warnings
import zlib
from collections import Counter, defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex  # comes with tiktoken, which splits text with the same syntax
import tiktoken
import torch
from tqdm import tqdm

TOKENIZERS = ("bpe", "bytes", "gpt2", "o200k_base")
SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz")
SPECIAL = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = ("<|endoftext|>{% for message in messages %}{{ '<|' + message['role'] + '|>' + "
                 "message['content'] + '<|end|>' }}{% endfor %}"
                 "{% if add_generation_prompt %}<|assistant|>{% endif %}")
CHAT_SUFFIXES = (".jsonl", ".jsonl.gz", ".json")
VAL_FRACTION = 0.05
BAD_CHATS = 0.01                                 # share of conversations that may be unreadable
BLOCK = 1 << 20                                  # bytes of text in memory at a time
BPE_BYTES = 16 << 20                             # bytes of text that ranks are trained on

# GPT-2's split with digits in groups of three: contractions, words, numbers, punctuation, white space
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


# --- errors and command lines, as all three programs have them --------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse, with exact names only, the nearest known name beside an unknown one, and one-line errors."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse_args(self, args=None):
        settings, unknown = self.parse_known_args(args)
        if unknown:
            subs = [a.choices[getattr(settings, a.dest)] for a in self._actions
                    if isinstance(a, argparse._SubParsersAction)]
            actions = [a for p in [self, *subs] for a in p._actions]
            known = [o for a in actions for o in a.option_strings if o.startswith("--")]
            self.error(f"unknown setting {unknown[0]}" + did_you_mean(unknown[0].split("=")[0], known))
        return settings

    def error(self, message):
        fail(message)


def did_you_mean(name, known):
    """The end of an error about an unknown name: the nearest known one, or where they are listed."""
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else "; see --help"


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


# --- tokenizers -------------------------------------------------------------------------------------------

def train_bpe(texts, n_ranks):
    """Byte-pair ranks {bytes: rank} from an iterable of strings (Sennrich et al., arXiv 1508.07909).

    Starts from the 256 bytes and joins the most frequent pair of neighbours inside words, ties to the
    smallest pair of ranks, until there are n_ranks or no pair repeats.  Works on the table of distinct words,
    so the result does not depend on the order of the texts.
    """
    table = Counter()
    for text in texts:
        table.update(word for word in regex.findall(PATTERN, text) if len(word) <= 64)   # no base64
    table = sorted(table.items(), key=lambda item: (-item[1], item[0]))[:200_000]        # bounds the merging
    words, freq = [list(word.encode()) for word, _ in table], [n for _, n in table]
    vocab = [bytes([i]) for i in range(256)]
    count, where = Counter(), defaultdict(set)             # pair -> occurrences, pair -> words that have it
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            count[pair] += freq[i]
            where[pair].add(i)
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
        new, fresh = len(vocab), set()
        vocab.append(vocab[pair[0]] + vocab[pair[1]])
        for i in where.pop(pair):
            old, words[i] = words[i], join(words[i], pair, new)
            for p in zip(old, old[1:]):
                count[p] -= freq[i]
            for p in zip(words[i], words[i][1:]):
                count[p] += freq[i]
                if new in p:
                    where[p].add(i)
                    fresh.add(p)
        for p in fresh:
            heapq.heappush(heap, (-count[p], p))
    return {token: i for i, token in enumerate(vocab)}


def join(word, pair, new):
    """Replace each occurrence of pair in the list word by new, from the left."""
    out, i = [], 0
    while i < len(word):
        if i + 1 < len(word) and word[i] == pair[0] and word[i + 1] == pair[1]:
            out.append(new)
            i += 2
        else:
            out.append(word[i])
            i += 1
    return out


def make_encoding(name, pattern, ranks):
    """A tiktoken encoding with the special tokens behind the ranks; those come from the start, so that a
    model trained on text needs no new rows for chat."""
    special = {token: len(ranks) + i for i, token in enumerate(SPECIAL)}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def known_encoding(name):
    """gpt2 or o200k_base from tiktoken's cache or, with a timeout, from the network."""
    def fetch(url):                                        # tiktoken's own download waits for ever
        with urllib.request.urlopen(url, timeout=20) as response:
            return response.read()
    try:
        with unittest.mock.patch("tiktoken.load.read_file", fetch):
            known = tiktoken.get_encoding(name)
    except OSError as error:
        raise ValueError(f"tokenizer {name} is neither in tiktoken's cache nor on the network ({error}); set "
                         "TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer bpe") from None
    return make_encoding(name, known._pat_str, known._mergeable_ranks)


# the characters that stand for bytes in Hugging Face's tokenizer.json: themselves where they can be seen, the
# others in their order from 256 on
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {chr(b): b for b in VISIBLE} | {
    chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in VISIBLE)}
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def read_hf_tokenizer(path):
    """A tokenizer.json of Hugging Face as a tiktoken encoding, if it is byte-level BPE in tiktoken's manner;
    its special tokens give way to ours, and text is not brought to NFC.  ValueError for any other."""
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        if saved["model"]["type"] != "BPE":
            raise ValueError(f"it is {saved['model']['type']}")
        split, normalizer = saved["pre_tokenizer"], saved.get("normalizer")
        parts, patterns = split.get("pretokenizers", [split]), []
        for part in parts:
            plain = part["type"] == "Split" and part["behavior"] == "Isolated" and not part.get("invert")
            if plain:
                patterns.append(part["pattern"]["Regex"])
            elif part["type"] != "ByteLevel" or part.get("add_prefix_space"):
                raise ValueError(f"it splits text in a way that is not known here ({part})")
            elif part.get("use_regex", True):
                patterns.append(GPT2_PATTERN)
        if len(patterns) != 1 or "ByteLevel" not in (part["type"] for part in parts):
            raise ValueError("it is not byte-level, with one pattern")
        if normalizer and normalizer["type"] != "NFC":
            raise ValueError(f"it changes text ({normalizer['type']})")
        added = {token["content"] for token in saved.get("added_tokens", [])}
        vocab = {token: i for token, i in saved["model"]["vocab"].items() if token not in added}
        ranks = {bytes(BYTES[c] for c in token): i for token, i in vocab.items()}
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in saved["model"]["merges"]]
        made = [vocab["".join(pair)] for pair in merges]
        if sorted(ranks.values()) != list(range(len(ranks))) or made != sorted(made) \
                or len(set(made)) != len(ranks) - 256:
            raise ValueError("its tokens are not numbered in the order of its merges")
        if not all(bytes([i]) in ranks for i in range(256)):
            raise ValueError("it lacks single bytes")
        return make_encoding(Path(path).parent.name, patterns[0], ranks)
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a byte-level BPE tokenizer ({error})") from None


def build_encoding(name, vocab_size, texts):
    """The tokenizer called name; texts are only read to train the ranks of bpe."""
    if is_tokenizer(name):
        return read_tokenizer(name)
    if name in ("gpt2", "o200k_base"):
        return known_encoding(name)
    if name == "bpe":
        return make_encoding(name, PATTERN, train_bpe(texts, vocab_size - len(SPECIAL)))
    return make_encoding(name, PATTERN, {bytes([i]): i for i in range(256)})


def is_tokenizer(name):
    """Whether a name is that of a tokenizer.json of Hugging Face, or of a folder (a run, say) with one or
    ours."""
    return name.endswith(".json") or any((Path(name) / file).exists() for file in TOKENIZER_FILES)


TOKENIZER_FILES = ("encoding.json", "tokenizer.json")


def read_tokenizer(path):
    """The tokenizer of a run, of a prepared folder, of one of Hugging Face, or of a tokenizer.json."""
    path = Path(path)
    if path.suffix != ".json":
        path = next((path / file for file in TOKENIZER_FILES if (path / file).exists()), path)
    return load_encoding(path) if path.name == "encoding.json" else read_hf_tokenizer(path)


def save_encoding(encoding, path):
    ranks = sorted(encoding._mergeable_ranks, key=encoding._mergeable_ranks.get)
    Path(path).write_text(json.dumps({
        "name": encoding.name, "pattern": encoding._pat_str, "special": list(SPECIAL),
        "ranks": [base64.b64encode(token).decode() for token in ranks]}, indent=0))


def load_encoding(path):
    """The tokenizer of a prepared folder or a run.  ValueError if the file is not one."""
    path = Path(path)
    path = path / "encoding.json" if path.is_dir() else path
    try:
        saved = json.loads(path.read_text())
        ranks = {base64.b64decode(token): i for i, token in enumerate(saved["ranks"])}
        if len(ranks) != len(saved["ranks"]) or not all(bytes([i]) in ranks for i in range(256)):
            raise ValueError("tokens are missing or there twice")     # tiktoken itself would panic
        if saved["special"] != list(SPECIAL):
            raise ValueError(f"its special tokens are {saved['special']}")
        return make_encoding(saved["name"], saved["pattern"], ranks)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a tokenizer written by data.py ({error})") from None


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
            raise ValueError(f"seq_len ({seq_len}) is too long for a corpus of {len(tokens)} tokens")
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
                targets[row, places] = np.where(said(whole, self.vocab_size), whole, -1)[1:]
                at = places.stop
        return tuple(map(torch.from_numpy, (tokens, targets, doc)))

    def first_question(self):
        """The tokens of the first conversation up to where its first answer begins."""
        tokens = self.tokens[slice(*self.spans[0])].tolist()
        return tokens[:tokens.index(self.vocab_size + ASSISTANT) + 1]

    def places(self, windows):
        spans = [self.spans[i] for w in windows for i in self.windows[w]]
        return np.concatenate([start + np.flatnonzero(said(self.tokens[start:end], self.vocab_size))
                               for start, end in spans])


def make_sampler(tokens, path, seq_len, seed=0, pack=True):
    """The sampler for the tokens of a file, which may be conversations."""
    if has_chats(path):
        return ChatSampler(tokens, seq_len, seed, vocabulary(path), pack)
    return Sampler(tokens, seq_len, seed)


# ids of the special tokens, which are a vocabulary's last ones
END_OF_TEXT, SYSTEM, USER, ASSISTANT, END = range(-5, 0)


def said(tokens, vocab_size):
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


# --- sources ----------------------------------------------------------------------------------------------

class Piece(NamedTuple):
    """Up to a block of one document."""

    text: str
    first: bool         # of its document
    held_out: bool


def unit(key):
    """A number in [0, 1) that depends on the string alone: the same choice on every machine."""
    raw = key.encode(errors="surrogateescape")             # file names can be any bytes
    return int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") / 2**64


def standard_library():
    """This Python's own .py files, without tests, installed packages and generated tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "encodings",
            "pydoc_data"}
    files = [f for f in sorted(root.rglob("*.py")) if not skip & set(f.relative_to(root).parts)]
    if not files:
        raise ValueError("this Python came without the .py files of its standard library; give a --source")
    return root, files


def find_files(source, downloads, suffixes=SUFFIXES):
    """-> (folder that names are relative to, files) of one --source.  ValueError if there is nothing to
    read."""
    if source == "stdlib":
        root, files = standard_library()
    elif re.match(r"https?://", source):
        root, files = downloads, [download(source, downloads)]
    elif not Path(source).exists():
        raise ValueError(f"source {source} does not exist")
    elif Path(source).is_dir():
        root = Path(source)
        files = sorted(f for f in root.rglob("*") if f.is_file() and f.name.lower().endswith(suffixes)
                       and not any(part.startswith(".") for part in f.relative_to(root).parts))
    else:
        root, files = Path(source).parent, [Path(source)]
        if not source.lower().endswith(suffixes):
            raise ValueError(f"source {source} is none of {', '.join(suffixes)}")
    if not any(f.stat().st_size for f in files):
        raise ValueError(f"source {source} is empty: no text in files that end in {', '.join(suffixes)}")
    return root, files


def download(url, folder, tries=3, timeout=30):
    """Fetch url into folder -> path.  A partial file never bears the final name."""
    name = re.sub(r"[^\w.-]", "_", url.split("?")[0].rsplit("/", 1)[-1]) or "download"
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    for attempt in range(tries):
        try:
            with urllib.request.urlopen(url, timeout=timeout) as response, open(part, "wb") as file:
                size = int(response.headers.get("Content-Length") or 0)
                with progress(size or None, name) as bar:
                    while block := response.read(1 << 16):
                        bar.update(file.write(block))
                if size and file.tell() != size:
                    raise OSError(f"{file.tell()} of {size} bytes arrived")
            os.replace(part, path)
            return path
        except (OSError, ValueError, http.client.HTTPException) as error:      # the last two: a malformed URL
            reason = error
            if attempt + 1 < tries and not 400 <= getattr(error, "code", 0) < 500:
                time.sleep(2 ** attempt)
            else:
                break
    part.unlink(missing_ok=True)
    raise ValueError(f"could not download {url} ({reason})")


def progress(total, description):
    """A bar of bytes, on a terminal only."""
    return tqdm(total=total, desc=description, unit="B", unit_scale=True, leave=False, disable=None)


def text_blocks(path, start, end):
    """Bytes start..end of a text file as strings of about a block, cut where no tokenizer joins what is cut:
    between a letter or digit and the end of its line.  A byte-order mark is no text."""
    with open(path, "rb") as file:
        if start == 0 and file.read(3) == codecs.BOM_UTF8:
            start = min(3, end)
        file.seek(start)
        rest, left = b"", end - start
        while left > 0:
            block = file.read(min(BLOCK, left))
            if not block:
                break
            left, rest = left - len(block), rest + block
            cut = line_border(rest) if left > 0 else 0
            if left > 0 and (cut or len(rest) > 8 * BLOCK):
                cut = cut or whole_character(rest, len(rest) - 4)
                yield rest[:cut].decode()
                rest = rest[cut:]
        if rest:
            yield rest.decode()


def line_border(raw):
    """The last place behind a letter or digit and before the end of its line, 0 if there is none."""
    for start in (max(0, len(raw) - (1 << 16)), 0):        # nearly always near the end
        borders = [match.end() for match in re.finditer(rb"[A-Za-z0-9](?=\r?\n)", raw[start:])]
        if borders:
            return start + borders[-1]
    return 0


def whole_character(raw, at):
    """The first position from `at` on where a UTF-8 character begins."""
    while at < len(raw) and raw[at] & 0xC0 == 0x80:
        at += 1
    return at


def is_utf8(path):
    """Whether the whole file decodes; so that a file is taken as a whole or not at all."""
    try:
        for _ in text_blocks(path, 0, path.stat().st_size):
            pass
        return True
    except UnicodeDecodeError:
        return False


def line_end(path, position):
    """The end of the line (or, in endless ones, of the character) that a position in a file falls into."""
    with open(path, "rb") as file:
        file.seek(position)
        line = file.readline(BLOCK)
    return position + (len(line) if line.endswith(b"\n") else whole_character(line, 0))


def text_pieces(path, name, weight, held_out):
    """A text file as pieces.  held_out says whether the file is; None: its last part is."""
    size = path.stat().st_size
    if held_out is not None:
        parts = [(held_out, 0, size)] * copies(name, weight, held_out)
    else:
        border = line_end(path, int(size * (1 - VAL_FRACTION)))
        parts = [(False, 0, border)] * int(weight) + [(True, border, size)]
        if weight % 1:
            parts.append((False, 0, line_end(path, int(border * (weight % 1)))))
    for held_out, start, end in parts:
        for i, text in enumerate(text_blocks(path, start, end)):
            yield Piece(text, i == 0, held_out)


def json_pieces(path, name, weight, skipped):
    """The "text" of each line of a JSON-lines file; lines without one are counted in skipped."""
    with (gzip.open if path.name.lower().endswith(".gz") else open)(path, "rb") as file:
        for number, line in enumerate(file):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
                text.encode()                              # half of a surrogate pair is valid JSON, not text
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                skipped["lines"] += 1
                continue
            # one of every 20, the first one included, so that few lines have a held-out one too
            group, place = divmod(number, round(1 / VAL_FRACTION))
            held_out = place == int(group and unit(f"{name}:{group}") / VAL_FRACTION)
            for _ in range(copies(f"{name}:{number}", weight, held_out)):
                yield Piece(text, True, held_out)


def copies(key, weight, held_out):
    """How often a document goes in: a weight of 2.5 is twice, and for half of them once more."""
    return 1 if held_out else int(weight) + (unit("copies " + key) < weight % 1)


class Corpus:
    """All sources of one preparation, read as often as asked."""

    def __init__(self, sources, weights, downloads):
        self.skipped, self.files, self.found = Counter(), [], []
        for source, weight in zip(sources, weights):
            root, files = find_files(source, downloads)
            good = [f for f in files if is_json(f) or is_utf8(f)]
            self.skipped["files"] += len(files) - len(good)
            self.found.append({"source": source, "weight": weight, "files": len(good),
                               "bytes": sum(f.stat().st_size for f in good)})
            self.files += [(f, f.relative_to(root).as_posix(), weight) for f in good]
        self.bytes = sum(s["bytes"] for s in self.found)
        # text files are held out whole, by their names, when there are enough of them
        texts = {unit(name): name for f, name, _ in self.files if not is_json(f)}
        self.whole = len(texts) * VAL_FRACTION >= 1
        self.held = {name for key, name in texts.items() if key < VAL_FRACTION or key == min(texts)}
        if not self.bytes:
            raise ValueError(f"no UTF-8 text in {', '.join(sources)} ({self.skipped['files']} files skipped)")

    def pieces(self, description):
        self.skipped["lines"] = 0
        with progress(self.bytes, description) as bar:
            for path, name, weight in self.files:
                if is_json(path):
                    pieces = json_pieces(path, name, weight, self.skipped)
                else:
                    pieces = text_pieces(path, name, weight, name in self.held if self.whole else None)
                try:
                    for piece in pieces:
                        yield piece
                        bar.update(len(piece.text.encode()))
                except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                    raise ValueError(f"{path} is not a whole gzip file ({error})") from None

    def sample(self):
        """About BPE_BYTES of the training text, spread evenly."""
        seen = taken = 0
        share = min(1.0, BPE_BYTES / self.bytes)
        for piece in self.pieces("training the tokenizer"):
            if not piece.held_out:
                seen += len(piece.text)
                if taken <= share * seen:
                    taken += len(piece.text)
                    yield piece.text


def is_json(path):
    return path.name.lower().endswith((".jsonl", ".jsonl.gz"))


# --- chats ------------------------------------------------------------------------------------------------

def read_chat(record):
    """A record of a chat file, {"messages": [{"role", "content"}, ..]} or {"instruction", "input", "output"},
    as [(role, content)].  ValueError says why it is none."""
    if not isinstance(record, dict) or not ("messages" in record or {"instruction", "output"} <= set(record)):
        raise ValueError('neither "messages" nor "instruction" and "output" in it (plain text is for data.py '
                         "without --chats)")
    if "messages" in record:
        try:
            chat = [(message["role"], message["content"]) for message in record["messages"]]
        except (TypeError, KeyError):
            raise ValueError("its messages are no list of objects with role and content") from None
    else:
        question = [record["instruction"], record.get("input")]
        if not all(isinstance(part, str) for part in filter(None, question)):
            raise ValueError("instruction and input are no texts")
        chat = [("user", "\n\n".join(filter(None, question))), ("assistant", record["output"])]
    for number, (role, content) in enumerate(chat, 1):
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"message {number}: role {role!r} is unknown")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"message {number} ({role}) is no text, or empty")
        content.encode()                                   # half of a surrogate pair is valid JSON, not text
    turns = [role for role, _ in chat]
    turns = turns[turns[:1] == ["system"]:]
    if not turns:
        raise ValueError("no messages")
    if turns != (["user", "assistant"] * len(turns))[:len(turns)]:
        raise ValueError("roles out of order: a system message, if any, then user and assistant in turn")
    if "assistant" not in turns:
        raise ValueError("no assistant message")
    return chat


def encode_chat(encoding, chat, answer=False):
    """[(role, content)] -> tokens, as CHAT_TEMPLATE has them; with answer=True the beginning of one follows.

    Text that looks like a special token stays text."""
    tokens = [encoding.encode_single_token("<|endoftext|>")]
    for role, content in chat:
        tokens += [encoding.encode_single_token(f"<|{role}|>"), *encode(encoding, content),
                   encoding.encode_single_token("<|end|>")]
    return tokens + [encoding.encode_single_token("<|assistant|>")] * answer


def chat_records(path):
    """(where, record) of each conversation of a chat file, or (where, ValueError) if it is not JSON."""
    try:
        with (gzip.open if path.name.lower().endswith(".gz") else open)(path, "rb") as file:
            if path.suffix.lower() == ".json":
                records = json.load(file)
                if not isinstance(records, list):
                    raise ValueError("it is no list")
                yield from ((f"item {number}", record) for number, record in enumerate(records, 1))
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield f"line {number}", json.loads(line)
                    except (ValueError, RecursionError) as error:
                        yield f"line {number}", ValueError(f"not JSON ({error})")
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from None


def documented_functions():
    """This Python's own documented functions as records of a chat: the question is the signature, the answer
    the first paragraph of the docstring.  No answer comes twice."""
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


def chats_folder(source, encoding):
    """Where train.py keeps the tokens of a chat file (or of the word functions): the folder's name says what
    went in, so that a file that has changed is another set.  ValueError if there is no such file."""
    if source != "functions" and not Path(source).is_file():
        raise ValueError(f"data {source} does not exist; it would be a file of conversations")
    content = sys.version if source == "functions" else file_sha256(source)
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    digest = hashlib.sha256(repr((content, encoding._pat_str, ranks)).encode()).hexdigest()
    return Path("data") / f"{Path(source).name.split('.')[0]}-{digest[:8]}"


def is_chat_source(source):
    """Whether a name is that of conversations that are no tokens yet."""
    return source == "functions" or source.lower().endswith(CHAT_SUFFIXES)


def holds_chats(source):
    """Whether a file or folder has conversations, or their tokens."""
    file = Path(source) if Path(source).is_file() else Path(source) / "train.bin"
    return is_chat_source(source) or bool(source) and file.is_file() and has_chats(file)


class Chats:
    """All sources of a set of conversations, checked.  ValueError if more than 1 % of them are unreadable."""

    def __init__(self, sources, downloads):
        self.skipped, self.files, self.found, problems, n = Counter(), [], [], [], 0
        for source in sources:
            root, files = (None, [None]) if source == "functions" else find_files(source, downloads,
                                                                                  CHAT_SUFFIXES)
            self.files += files
            self.found.append({"source": source, "files": len(files)})
        self.held = (1.0, None)                            # one is held out of few conversations, too
        for where, chat in self.read():
            n += 1
            if isinstance(chat, ValueError):
                problems.append(f"{where}: {chat}")
            else:
                self.held = min(self.held, (unit(chat_key(chat)), chat_key(chat)))
        self.skipped["conversations"] = len(problems)
        if problems and len(problems) == n:
            raise ValueError(f"{', '.join(sources)} is no set of chats: {problems[0]}")
        if len(problems) > BAD_CHATS * n:
            raise ValueError(f"{len(problems):,} of {n:,} conversations cannot be read, more than 1 %: "
                             f"{'; '.join(problems[:5])}" + "; .." * (len(problems) > 5))
        for problem in problems[:5]:
            print(f"skipped: {problem}", file=sys.stderr)
        if not n:
            raise ValueError(f"no conversations in {', '.join(sources)}")

    def read(self):
        """(where, [(role, content)] or ValueError) of every conversation."""
        for path in self.files:
            records = chat_records(path) if path else (("", record) for record in documented_functions())
            for where, record in tqdm(records, f"reading {path.name if path else 'functions'}", leave=False,
                                      disable=None, unit=" conversations"):
                try:
                    if isinstance(record, ValueError):
                        raise record
                    yield where, read_chat(record)
                except ValueError as error:
                    yield f"{path}, {where}", error

    def conversations(self):
        """([(role, content)], whether it is held out) of every good one.  Those with the same question are on
        the same side."""
        for _, chat in self.read():
            if not isinstance(chat, ValueError):
                key = unit(chat_key(chat)), chat_key(chat)
                yield chat, key[0] < VAL_FRACTION or key == self.held

    def sample(self):
        """About BPE_BYTES of what is said, for training a tokenizer."""
        taken = 0
        for chat, held_out in self.conversations():
            for _, content in () if held_out or taken > BPE_BYTES else chat:
                taken += len(content)
                yield content


def chat_key(chat):
    """The first question of a conversation."""
    return next(content for role, content in chat if role == "user")


# --- preparing a folder -----------------------------------------------------------------------------------

def encode(encoding, text):
    """encode_ordinary, also of what makes tiktoken's splitter give up: a million spaces, say."""
    try:
        return encoding.encode_ordinary(text)
    except BaseException as error:
        if type(error).__name__ != "PanicException" or len(text) < 2:       # cannot be imported
            raise
        return encode(encoding, text[:len(text) // 2]) + encode(encoding, text[len(text) // 2:])


def tokenize(corpus, encoding, folder):
    """Write train.bin and val.bin -> {"train": counts, "val": counts}."""
    chats = isinstance(corpus, Chats)
    writers = {split: TokenWriter(folder / f"{split}.bin", encoding.n_vocab, chats)
               for split in ("train", "val")}
    counts = {split: Counter(documents=0, bytes=0) for split in writers}
    for tokens, held_out, first, n_bytes in (chat_tokens if chats else text_tokens)(corpus, encoding):
        split = "val" if held_out else "train"
        writers[split].write(tokens)
        counts[split].update(documents=first, bytes=n_bytes)
    for split, writer in writers.items():
        writer.close()
        counts[split].update(tokens=writer.count)
        if not writer.count:
            raise ValueError(f"the sources are too small: nothing fell to {split}.bin, add some" + (
                f" ({corpus.skipped['lines']} lines without a \"text\" were skipped)" * (not chats)))
        counts[split]["sha256"] = file_sha256(folder / f"{split}.bin")
    return {split: dict(count) for split, count in counts.items()}


def text_tokens(corpus, encoding):
    """(tokens, whether held out, 1 for the first piece of a document, bytes) of each piece."""
    end_of_text = encoding.encode_single_token("<|endoftext|>")
    for piece in corpus.pieces("writing tokens"):
        tokens = [end_of_text] * piece.first + encode(encoding, piece.text)
        yield tokens, piece.held_out, int(piece.first), len(piece.text.encode())


def chat_tokens(chats, encoding):
    """The same of each conversation."""
    for chat, held_out in chats.conversations():
        yield encode_chat(encoding, chat), held_out, 1, sum(len(content.encode()) for _, content in chat)


def prepare(out, sources=("stdlib",), weights=None, tokenizer="bpe", vocab_size=2048, chats=False):
    """Prepare a folder unless it is there, and return what its meta.json says.  tokenizer is a name or an
    encoding.

    Raises ValueError if the folder was made from something else, OSError if it cannot be written."""
    out, weights = Path(out), list(weights or [1.0] * len(sources))
    given = isinstance(tokenizer, tiktoken.Encoding)
    request = {"sources": list(sources), "weights": weights,
               "tokenizer": tokenizer.name if given else tokenizer}
    if tokenizer == "bpe":
        request["vocab_size"] = vocab_size
    if chats:
        request["chats"] = True
        if set(weights) != {1.0}:
            raise ValueError("weights are for text: conversations all go in once")
    if out.exists():
        meta = load_meta(out)
        if meta["request"] != request:
            raise ValueError(f"{out} was prepared with other settings ({meta['request']}); "
                             "choose another --name, or delete that folder yourself")
        return meta
    if len(weights) != len(sources) or not all(0 < w < 1000 for w in weights):
        raise ValueError(f"weights must be one number above 0 for each source, got {weights}")
    if tokenizer == "bpe" and not 256 + len(SPECIAL) <= vocab_size <= 1 << 16:
        raise ValueError(f"vocab_size must be from {256 + len(SPECIAL)} to 65536 for bpe, got {vocab_size}")
    aside = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    aside.mkdir(parents=True)
    try:
        downloads = out.parent / "downloads"
        corpus = Chats(sources, downloads) if chats else Corpus(sources, weights, downloads)
        encoding = tokenizer if given else build_encoding(tokenizer, vocab_size, corpus.sample())
        save_encoding(encoding, aside / "encoding.json")
        splits = tokenize(corpus, encoding, aside)
        meta = {"request": request, "vocab_size": encoding.n_vocab, "sources": corpus.found,
                "files": len(corpus.files), "documents": sum(s["documents"] for s in splits.values()),
                "skipped": dict(corpus.skipped), "python": sys.version.split()[0],
                "encoding_sha256": file_sha256(aside / "encoding.json"), **splits}
        (aside / "meta.json").write_text(json.dumps(meta, indent=1))
        try:
            os.rename(aside, out)
        except OSError:
            if not out.exists():                           # else another program was faster
                raise
    finally:                                               # after Ctrl-C, too: leave nothing half done
        shutil.rmtree(aside, ignore_errors=True)
    return prepare(out, sources, weights, tokenizer, vocab_size, chats)       # what is there now


def load_meta(folder):
    """meta.json of a prepared folder.  ValueError if it is none, or its tokenizer is not the one of the
    tokens."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text())
        meta["request"], meta["train"]["sha256"], meta["val"]["sha256"]
        if file_sha256(folder / "encoding.json") != meta["encoding_sha256"]:
            raise ValueError(f"{folder / 'encoding.json'} does not fit the tokens beside it: its sha256 is "
                             "not the one in meta.json")
        return meta
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} is not a folder prepared by data.py ({error})") from None


def describe(out, meta):
    """What a prepared folder holds, in two lines."""
    train, val, skipped = meta["train"], meta["val"], {what: n for what, n in meta["skipped"].items() if n}
    kind = "conversations" if meta["request"].get("chats") else "documents"
    text = (f"{out}: {meta['files']} files, {meta['documents']} {kind}; tokenizer "
            f"{meta['request']['tokenizer']}, vocabulary {meta['vocab_size']:,}\n"
            f"  train {train['tokens']:,} tokens of {train['bytes'] / train['tokens']:.2f} bytes; held out "
            f"{val['tokens']:,}; sha256 {train['sha256'][:12]}")
    if skipped:
        text += "\n  skipped: " if kind == "conversations" else "\n  skipped (not UTF-8, or no \"text\"): "
        text += ", ".join(f"{n} {what}" for what, n in skipped.items())
    return text


def main(argv=None):
    parser = Parser(prog="data.py", description=__doc__)
    parser.add_argument("--source", nargs="+", action="extend", metavar="PATH|URL",
                        help="files, folders, URLs, or the word stdlib (the default; with --chats the "
                             "default is the word functions, Python's own documented ones)")
    parser.add_argument("--chats", action="store_true",
                        help="the sources are conversations: .jsonl, .jsonl.gz or .json of {messages: [{role,"
                             " content}, ..]} or {instruction, input, output}; give a --tokenizer")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W",
                        help="how often each source goes in; 0.5 is half of its documents (default 1)")
    parser.add_argument("--name", help="the folder is data/NAME (default: the name of the first source)")
    parser.add_argument("--tokenizer", metavar="NAME",
                        help="bpe (ranks trained on the corpus, the default for text), bytes, gpt2, "
                             "o200k_base, a run or folder that has one, or a tokenizer.json of Hugging Face")
    parser.add_argument("--vocab_size", type=int, default=2048, metavar="V",
                        help="vocabulary of bpe, five special tokens included (default 2048, which measured "
                             "best for the laptop preset; take 8192 or more for a larger model)")
    args = parser.parse_args(argv)
    with one_line_errors():
        if args.chats and not args.tokenizer:
            raise ValueError("--chats needs a --tokenizer: that of the run whose model is to be tuned, as in "
                             "--tokenizer out/laptop (or bpe, for a model that begins with these chats)")
        args.tokenizer = args.tokenizer or "bpe"
        if args.tokenizer not in TOKENIZERS and not is_tokenizer(args.tokenizer):
            raise ValueError(f"tokenizer {args.tokenizer!r} is unknown, and no run or folder that has one"
                             f"{did_you_mean(args.tokenizer, TOKENIZERS)}")
        sources = args.source or ["functions" if args.chats else "stdlib"]
        name = args.name or Path(sources[0]).name.split(".")[0]
        if not re.fullmatch(r"[\w.-]*\w", name) or (name == "stdlib" and sources != ["stdlib"]):
            raise ValueError(f"data/{name} cannot be the folder's name; give another --name")
        out = Path("data") / name
        if out.exists():
            print(f"{out} is there already; to prepare it anew, delete it or choose another --name")
        print(describe(out, prepare(out, sources, args.weights, args.tokenizer, args.vocab_size, args.chats)))


if __name__ == "__main__":
    main()
