"""Look at what a run has learned.

    python eval.py loss    --ckpt out/laptop out/dense   held-out loss, beside a uniform model and a trigram
    python eval.py sample  --ckpt out/laptop --prompt 'def '
    python eval.py chat    --ckpt out/laptop-chat                  a run that was tuned on conversations
    python eval.py routing out/laptop out/other --png pictures     who gets which token, and how evenly
    python eval.py export  --ckpt out/laptop --to folder           for transformers
    python eval.py bench   --ckpt out/laptop --tasks piqa          lm-evaluation-harness
    python eval.py choices --ckpt out/laptop --file questions.jsonl

A run is a directory that train.py made (its newest checkpoint is taken) or one of the step-N folders in it.
"""

import codecs
import gzip
import importlib.metadata
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

# before torch: OpenMP threads that spin while they wait make training 10 times slower on busy cores
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import torch
from tqdm import tqdm

import data
import parallel
from model import Model, ModelConfig, from_hf_config, hf_config, sample, to_hf
from router import Statistics, active_experts, load_balancing_loss, noise_floor, zipf_bound

# --- runs -------------------------------------------------------------------------------------------------


def load_run(ckpt, device="cpu"):
    """-> (model with the weights of a run's newest checkpoint or of a step-N folder, its settings, K per
    layer)."""
    out = run_folder(ckpt)
    saved, path = read_settings(out), newest(ckpt)
    config = ModelConfig(**saved["model"])
    with torch.device("meta"):
        model = Model(config)
    model = model.to_empty(device=device)
    model.tie()
    parallel.load_checkpoint(path, parallel.training_state(parallel.Masters(model)))
    settings = saved["settings"]
    done = int(path.name.removeprefix("step-"))
    top_k = active_experts(max(0, done - 1), settings["steps"], settings["initial_top_k"], config.top_k,
                           settings["switch"], config.n_layer)
    return model.requires_grad_(False), saved, top_k


def run_folder(ckpt):
    """The run directory of itself, or of a step-N folder in it."""
    return Path(ckpt).parent if Path(ckpt).name.startswith("step-") else Path(ckpt)


def newest(ckpt):
    """The step-N folder that is meant by a run directory (its newest) or by itself."""
    if Path(ckpt) != run_folder(ckpt):
        return Path(ckpt)
    steps = parallel.checkpoints(ckpt)
    if not steps:
        raise ValueError(f"{ckpt} has no checkpoint")
    return Path(ckpt) / f"step-{steps[-1]}"


def same_tokenizer(out, folder):
    """ValueError unless a run (or a folder of Hugging Face) and a data folder have the same tokenizer, or
    one of them has none."""
    theirs, ours = Path(out) / "tokenizer.json", Path(folder) / "encoding.json"
    if is_hf(out):
        if theirs.exists() and ours.exists():
            found, wanted = data.read_hf_tokenizer(theirs), data.load_encoding(folder)
            if (found._mergeable_ranks, found._pat_str) != (wanted._mergeable_ranks, wanted._pat_str):
                raise ValueError(f"the tokenizer of {out} ({found.n_vocab} tokens) is not that of {folder} "
                                 f"({wanted.n_vocab}); data.py --tokenizer {theirs} makes tokens for it")
        return
    files = [Path(place) / "encoding.json" for place in (out, folder)]
    if all(f.exists() for f in files) and files[0].read_bytes() != files[1].read_bytes():
        raise ValueError(f"the tokenizer of {out} is not that of {folder}: their tokens mean other things")


def open_data(source, seq_len):
    """-> (folder, training tokens, sampler of the held-out ones, vocabulary) of a folder or token file of
    data.py."""
    if data.is_chat_source(str(source)):
        raise ValueError(f"{source} has no tokens yet: --data takes the folder that train.py made of it, "
                         "data/NAME-HASH")
    source = Path(source)
    folder = source.parent if source.is_file() else source
    if not (folder / "val.bin").exists():
        raise ValueError(f"{folder} has no held-out text (val.bin); --data FOLDER names one that has")
    file = source if source.is_file() else folder / "train.bin"
    held_out = data.make_sampler(data.load_tokens(folder / "val.bin"), folder / "val.bin", seq_len)
    return folder, data.load_tokens(file), held_out, data.vocabulary(file)


def load_for(ckpt, folder, vocab_size, device):
    """load_run, for the tokens of a data folder.  ValueError if these are none of the run's."""
    same_tokenizer(run_folder(ckpt), folder)
    model, saved, top_k = load_run(ckpt, device)
    if model.config.vocab_size < vocab_size:
        raise ValueError(f"vocab_size of {ckpt} ({model.config.vocab_size}) is below that of {folder}")
    return model, saved, top_k


def read_settings(out):
    """settings.json of a run directory.  ValueError if it is none."""
    try:
        saved = json.loads((Path(out) / "settings.json").read_text())
        if not (isinstance(saved["settings"], dict) and isinstance(saved["model"], dict)):
            raise ValueError("no settings in it")
        return saved
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{out} is not a directory of train.py ({error})") from None


# --- Hugging Face -----------------------------------------------------------------------------------------

SHARD = "5GB"                                                     # of a file of weights, at most


def needed(module, extra):
    """Import a module of an optional extra.  ValueError says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.split(".")[0]
        raise ValueError(f"this needs {name} ({error}): pip install -e '.[{extra}]'") from None


def is_hf(folder):
    """Whether a folder is a model of Hugging Face, and not a run."""
    return (Path(folder) / "config.json").exists() and not (Path(folder) / "settings.json").exists()


def export_command(args):
    """Write a run as a folder that transformers' AutoModelForCausalLM and AutoTokenizer load."""
    hub, to = needed("huggingface_hub", "hf"), Path(args.to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"{to} is there already; --to names a folder that is to be made")
    model, _, top_k = load_run(args.ckpt, "cpu")
    config, encoding = hf_config(model.config, top_k), data.load_encoding(run_folder(args.ckpt))
    weights = to_hf(model)
    end, turn = (encoding.encode_single_token(token) for token in ("<|endoftext|>", "<|end|>"))
    special = dict.fromkeys(("bos_token_id", "pad_token_id"), end)
    aside = to.with_name(f"{to.name}.{os.getpid()}.tmp")
    aside.mkdir(parents=True)
    try:
        hub.save_torch_state_dict(weights, aside, max_shard_size=SHARD)
        save_tokenizer(encoding, aside, model.config.max_seq_len)
        for name, content in (("config.json", config | special | {"eos_token_id": end}),
                              ("generation_config.json", special | {"eos_token_id": [end, turn]})):
            (aside / name).write_text(json.dumps(content, indent=2))
        if to.exists():
            to.rmdir()
        os.rename(aside, to)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"{to}: {sum(t.numel() for t in weights.values()):,} parameters, for AutoModelForCausalLM and "
          "AutoTokenizer")


def save_tokenizer(encoding, folder, max_seq_len):
    """tokenizer.json and tokenizer_config.json, with the chat template.

    Text that looks like a special token becomes one there; here it stays text (encode_ordinary)."""
    if encoding.n_vocab != len(encoding._mergeable_ranks) + len(data.SPECIAL):
        raise ValueError("the numbers of this tokenizer have gaps, which its tokenizer.json would not keep")
    converter = needed("transformers.convert_slow_tokenizer", "hf").TikTokenConverter(
        pattern=encoding._pat_str, extra_special_tokens=data.SPECIAL)
    converter.load_tiktoken_bpe = lambda _: encoding._mergeable_ranks
    converter.converted().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>"),
        "model_max_length": max_seq_len, "chat_template": data.CHAT_TEMPLATE}, indent=2))


def read_hf_config(folder):
    """What config.json of a folder of Hugging Face says: {field of ModelConfig: value}."""
    try:
        found = from_hf_config(json.loads((Path(folder) / "config.json").read_text()))
        ModelConfig(**{"n_expert": 1} | found)                    # are they possible?
        return found
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{folder}/config.json cannot be read: {error}") from None


class Weights(Mapping):
    """The tensors of a folder's safetensors files by name, each read when it is asked for."""

    def __init__(self, folder):
        safe_open, folder = needed("safetensors", "hf").safe_open, Path(folder)
        index, files = folder / "model.safetensors.index.json", [folder / "model.safetensors"]
        if index.exists():
            files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        absent = [path.name for path in files if not path.exists()]
        if absent:
            raise ValueError(f"{folder} has no {', '.join(absent)} (pickled weights are not read)")
        try:
            self.files = {name: file for file in (safe_open(path, "pt") for path in files)
                          for name in file.keys()}
        except Exception as error:                                # SafetensorError is an Exception of its own
            raise ValueError(f"a .safetensors file of {folder} is corrupt ({error})") from None

    def __getitem__(self, name):
        return self.files[name].get_tensor(name)

    def __iter__(self):
        return iter(self.files)

    def __len__(self):
        return len(self.files)


# --- loss -------------------------------------------------------------------------------------------------

@torch.no_grad()
def validate(model, sampler, top_k, device="cpu", limit=None, rows=32, grid=parallel.ALONE):
    """Cross-entropy alone over a sampler's windows of held-out tokens, evenly spread if there are more than
    `limit` tokens; `rows` of them at a time on each rank.

    -> (nats per target, Statistics of all layers, indices of the windows)."""
    n, V = sampler.n_windows, model.config.vocab_size
    many = min(n, max(1, (limit or n * sampler.seq_len) // sampler.seq_len))
    if rows < many < n:
        many -= many % rows                                       # full batches: another shape compiles anew
    windows, sums, statistics = np.unique(np.linspace(0, n - 1, many).astype(int)), 0, None
    for a in range(0, len(windows), rows * grid.world):
        mine = np.array_split(windows[a:a + rows * grid.world], grid.world)[grid.rank]
        tokens, targets, *doc = sampler.batch(mine)
        n_beyond = max((tokens >= V).sum(), (targets >= V).sum())         # a GPU would end without a word
        tokens, targets, *doc = (t.clamp(max=V - 1).to(device) for t in (tokens, targets, *doc))
        out = model(tokens, targets, top_k, *doc)
        sums = sums + torch.stack([out.loss.double(), out.counts[0].double(), n_beyond.to(out.loss).double()])
        statistics = Statistics(*map(torch.add, statistics, out.statistics)) if statistics else out.statistics
    sums, *statistics = parallel.all_sum(grid, [sums, *statistics])
    loss, n_targets, n_beyond = sums.tolist()
    if n_beyond:
        raise ValueError(f"{n_beyond:.0f} held-out tokens are beyond the vocabulary ({V})")
    return loss / max(1, n_targets), Statistics(*statistics), windows


def token_bytes(encoding):
    """Bytes of text that each token stands for [V]; special tokens stand for none."""
    sizes = np.zeros(encoding.n_vocab, np.int64)
    for token, rank in encoding._mergeable_ranks.items():
        sizes[rank] = len(token)
    return sizes


class Trigram:
    """An interpolated Kneser-Ney trigram (Chen and Goodman 1999, eq. 24): the model to beat without a
    network.

    p(c|ab) = max(n(abc) - d, 0) / n(ab) + d N(ab) / n(ab) * p(c|b), where N counts distinct successors;
    p(c|b) is the same with every count replaced by the number of distinct tokens before it; p(c) likewise,
    and below it the uniform 1/V.  The discounts are d = n1 / (n1 + 2 n2), from how many n-grams occur once
    and twice.
    """

    def __init__(self, tokens, vocab_size, limit=20_000_000):
        t = np.asarray(tokens[:limit]).astype(np.int64)
        self.V = V = vocab_size
        self.three = np.unique((t[:-2] * V + t[1:-1]) * V + t[2:], return_counts=True)
        self.two = np.unique(self.three[0] % (V * V), return_counts=True)         # how many a precede each bc
        self.one = np.unique(self.two[0] % V, return_counts=True)

    def prob(self, t):
        """Probabilities of t[2:], each given the two tokens before it."""
        t, V = np.asarray(t).astype(np.int64), self.V
        a, b, c = t[:-2], t[1:-1], t[2:]
        p = self.level(self.one, c, np.zeros_like(c), 1.0 / V)
        p = self.level(self.two, b * V + c, b, p)
        return self.level(self.three, (a * V + b) * V + c, a * V + b, p)

    def level(self, table, key, context, lower):
        """One order: table (n-grams, counts), the n-grams asked for, their contexts, the lower order's
        answer."""
        grams, counts = table
        d = (counts == 1).sum() / max(1, (counts == 1).sum() + 2 * (counts == 2).sum())
        contexts, start = np.unique(grams // self.V, return_index=True)        # 0: the empty one
        total, distinct = np.add.reduceat(counts, start), np.diff(np.append(start, len(grams)))
        n, (m, k) = lookup(grams, counts, key), (lookup(contexts, x, context) for x in (total, distinct))
        return np.where(m > 0, (np.maximum(n - d, 0) + d * k * lower) / np.maximum(m, 1), lower)


def lookup(keys, values, asked):
    """values of the asked keys, 0 where there is none; keys are sorted."""
    at = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[at] == asked, values[at], 0)


def compare_losses(ckpts, source=None, device="cpu"):
    """Baselines and runs on the same held-out text (or answers of conversations), cut as the first run was
    trained.

    -> (rows (name, nats per token, perplexity, bits per byte), number of targets, folder of the text)."""
    settings = read_settings(run_folder(ckpts[0]))["settings"]
    folder, train, val, vocab_size = open_data(source or settings["data"], settings["seq_len"])
    encoding = data.load_encoding(folder)
    losses = []
    for ckpt in ckpts:
        model, _, top_k = load_for(ckpt, folder, vocab_size, device)
        loss, _, windows = validate(model, val, top_k, device)
        losses.append((str(ckpt), loss))
    targets = val.places(windows)
    targets = targets[targets > 1]                                # a trigram needs two tokens
    prob = Trigram(train, encoding.n_vocab).prob(val.tokens)[targets - 2]
    rows = [("uniform over the vocabulary", math.log(encoding.n_vocab)),
            ("interpolated trigram", float(-np.log(prob).mean()))] + losses
    per_byte = len(targets) / token_bytes(encoding)[val.tokens[targets]].sum() / math.log(2)
    return [(name, loss, math.exp(loss), loss * per_byte) for name, loss in rows], len(targets), folder


def loss_command(args):
    rows, n, folder = compare_losses(args.ckpt, args.data, args.device)
    print(f"{n:,} held-out tokens of {folder}")
    print(f"{'':32} {'nats/token':>10} {'perplexity':>10} {'bits/byte':>9}")
    for name, loss, perplexity, bits in rows:
        print(f"{name[-32:]:32} {loss:10.4f} {perplexity:10.1f} {bits:9.4f}")
    for a, b in zip(args.ckpt, args.ckpt[1:]):
        if len({read_settings(run_folder(run))["settings"]["data"] for run in (a, b)}) == 1:
            print(first_below(a, b))


def first_below(a, b):
    """In words: how many of run b's steps run a needed to reach run b's final validation loss."""
    curves = [[(r["step"], r["val_loss"]) for r in read_log(out)[1:] if r.get("val_loss")] for out in (a, b)]
    if not all(curves):
        return f"no validation in the logs of {a} and {b}: steps cannot be compared"
    steps, goal = curves[1][-1]
    reached = next((step for step, loss in curves[0] if loss <= goal), None)
    if reached is None:
        return f"{a} did not reach the {goal:.4f} that {b} ended with after {steps} steps"
    return f"{a} was at the {goal:.4f} that {b} ended with after {reached} of its {steps} steps"


def read_log(out):
    """log.jsonl of a run: the header, then the logged steps.  A number that was not finite is None."""
    out = run_folder(out)
    try:
        lines = (out / "log.jsonl").read_text(errors="replace").splitlines(keepends=True)
        return [json.loads(line) for line in lines[:1] + [line for line in lines[1:] if step_of(line)]]
    except (OSError, ValueError) as error:
        raise ValueError(f"{out / 'log.jsonl'} cannot be read ({error})") from None


def step_of(line):
    """The step of a line of the log; 0 for one that a crash cut short or garbled."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else 0
    except (ValueError, KeyError, TypeError):
        return 0


# --- text -------------------------------------------------------------------------------------------------

def write_text(model, encoding, prompt, max_new_tokens, top_k, temperature=0.8, top_p=0.95, seed=0):
    """Let the model continue a prompt (from the beginning of a document) until it ends the document
    itself."""
    device = model.embed.weight.device
    end = encoding.encode_single_token("<|endoftext|>")
    tokens = torch.tensor([[end] + data.encode(encoding, prompt)], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    out = model.generate(tokens, max_new_tokens, temperature, top_p, top_k, stop=end, generator=generator)
    return encoding.decode([t for t in out[0, 1:].tolist() if t < encoding.n_vocab and t != end])


def sample_command(args):
    if min(args.tokens, args.n) < 1:
        raise ValueError(f"tokens ({args.tokens}) and n ({args.n}) must be at least 1")
    model, _, top_k = load_run(args.ckpt, args.device)
    encoding = data.load_encoding(run_folder(args.ckpt))
    for i in range(args.n):
        if i:
            print("-" * 80)
        print(write_text(model, encoding, args.prompt, args.tokens, top_k, args.temperature, args.top_p,
                         args.seed + i))


def reply(model, encoding, tokens, max_new_tokens, top_k, temperature=0.8, top_p=0.95, generator=None):
    """Let the model continue the tokens of a conversation: yields text as it comes, until a special token
    ends the answer."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")    # a character may take several tokens
    prompt = torch.tensor([tokens], device=model.embed.weight.device)
    for new in model.stream(prompt, max_new_tokens, temperature, top_p, top_k, generator=generator):
        if int(new) >= encoding.n_vocab - len(data.SPECIAL):      # they come last; rows of no token
            break
        yield decoder.decode(encoding.decode_single_token_bytes(int(new)))
    yield decoder.decode(b"", final=True)


CHAT_HELP = """/reset forgets the conversation, /save [FILE] appends it to a file as a line of JSON,
/quit or Ctrl-D ends, Ctrl-C stops an answer"""


class Talk:
    """A conversation with a run, as long as its context has room for: that is the length of the sequences it
    was trained on."""

    def __init__(self, args):
        self.args = args
        self.model, saved, self.top_k = load_run(args.ckpt, args.device)
        self.encoding = data.load_encoding(run_folder(args.ckpt))
        self.window = saved["settings"]["seq_len"]
        self.most = min(args.tokens, self.window // 2)            # tokens of an answer
        self.generator = torch.Generator(args.device).manual_seed(args.seed)
        self.reset()
        self.fitted("")                                           # ValueError for too long a system message
        if not data.holds_chats(saved["settings"]["data"]):
            say(f"{args.ckpt} was not tuned on conversations (or they are gone): expect no answers; "
                f"train.py --init_from {args.ckpt} --data functions tunes it")

    def reset(self):
        """Begin anew."""
        system = readable(self.args.system)
        self.chat, self.forgot = [("system", system)] * bool(system.strip()), False

    def fitted(self, question):
        """-> (the conversation with a question, its tokens).  What does not fit goes, the oldest first, a
        question with its answer.  ValueError if the question alone is too long."""
        first = [message for message in self.chat if message[0] == "system"]
        chat, room = [*self.chat, ("user", question)], self.window - self.most
        least = len(data.encode_chat(self.encoding, [*first, chat[-1]], answer=True))
        if least > room:
            what = "question" if question else "system message"
            raise ValueError(f"that {what} is too long: {least} tokens, with room for {room}")
        while len(tokens := data.encode_chat(self.encoding, chat, answer=True)) > room:
            del chat[len(first):len(first) + 2]
            if not self.forgot:
                say(f"the beginning of the conversation no longer fits into {self.window} tokens and is "
                    "forgotten")
            self.forgot = True
        return chat, tokens

    def ask(self, question):
        """Print the answer as it comes, and remember both.  Ctrl-C ends the answer."""
        (chat, tokens), pieces = self.fitted(question), []
        try:
            for piece in reply(self.model, self.encoding, tokens, self.most, self.top_k,
                               self.args.temperature, self.args.top_p, self.generator):
                pieces.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            say("\nstopped; what was said so far is remembered")
        print(flush=True)
        answer = "".join(pieces)
        if answer.strip():
            self.chat = [*chat, ("assistant", answer)]
        else:                                                     # a question alone is no conversation
            say("no answer")

    def save(self, file):
        """Append the conversation to a file, in the format that data.py reads."""
        path = Path(file) if file else free_name(run_folder(self.args.ckpt), "chat", ".jsonl")
        if not any(role == "assistant" for role, _ in self.chat):
            raise ValueError("there is nothing to save yet")
        messages = [{"role": role, "content": text} for role, text in self.chat]
        try:
            with open(path, "ab+") as out:
                if out.tell() and os.pread(out.fileno(), 1, out.tell() - 1) != b"\n":
                    out.write(b"\n")
                out.write(json.dumps({"messages": messages}).encode() + b"\n")
        except OSError as error:
            raise ValueError(f"{path} cannot be written ({error})") from None
        say(f"saved: {path}")


def readable(text):
    """Text with a mark in place of bytes that are no UTF-8, which a terminal may pass on."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def say(text):
    """To the person, not into what a pipe takes."""
    print(text, file=sys.stderr, flush=True)


def chat_command(args):
    """A conversation: a line is a question, or one of the commands of CHAT_HELP."""
    if args.tokens < 1:
        raise ValueError(f"tokens ({args.tokens}) must be at least 1")
    sample(torch.zeros(1, 1), args.temperature, args.top_p)       # are they possible?
    if sys.stdin is None or sys.stdout is None:
        raise ValueError("chat reads questions from a terminal or a pipe and answers there; one is closed")
    talk, person = Talk(args), sys.stdin.isatty()
    if person:
        with suppress(ImportError):
            importlib.import_module("readline")                   # line editing
        say(CHAT_HELP)
    while True:
        try:
            line = readable(input("> " if person else "")).strip()
            command, _, rest = line.partition(" ")
            if command == "/quit":
                break
            elif command == "/reset":
                talk.reset()
            elif command == "/save":
                talk.save(rest.strip())
            elif re.fullmatch(r"/\w+", line):
                say(CHAT_HELP)
            elif line:
                talk.ask(line)
        except EOFError:
            if person:
                say("")                                           # Ctrl-D leaves the cursor behind the prompt
            break
        except KeyboardInterrupt:
            say("\n/quit or Ctrl-D ends")
        except BrokenPipeError:                                   # nobody reads on
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            break
        except ValueError as error:                               # a full disk, an OSError, ends it
            say(f"error: {error}")


# --- benchmarks -------------------------------------------------------------------------------------------

BATCH_TOKENS = 1 << 14                                            # padding included


@torch.no_grad()
def log_likelihoods(model, pairs, top_k=None, progress="scoring"):
    """Of continuations [(tokens of the context, tokens of the continuation)], none of them empty ->
    [(log-probability in nats, whether every token is the most probable one)].

    lm-evaluation-harness's rules: of what is too long the front is cut.  Sequences of similar length go
    together, filled up behind their end, which causal attention does not see."""
    window, device = model.config.max_seq_len, model.embed.weight.device
    sequences = [(context + continuation)[-window - 1:] for context, continuation in pairs]
    longest = max((len(continuation) for _, continuation in pairs), default=0)
    if longest > window or not all(a and b for a, b in pairs):
        raise ValueError(f"a continuation must have from 1 to {window} tokens (max_seq_len), a context one; "
                         f"the longest has {longest}")
    found = [None] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: -len(sequences[i]))
    with tqdm(total=len(order), desc=progress, disable=progress is None, dynamic_ncols=True) as bar:
        while order:
            width = len(sequences[order[0]]) - 1
            batch, order = order[:max(1, BATCH_TOKENS // width)], order[max(1, BATCH_TOKENS // width):]
            tokens, rows, places, targets = torch.zeros(len(batch), width, dtype=torch.int64), [], [], []
            for row, i in enumerate(batch):
                whole, n = sequences[i], len(pairs[i][1])
                tokens[row, :len(whole) - 1] = torch.tensor(whole[:-1])
                rows += [row] * n
                places += range(len(whole) - 1 - n, len(whole) - 1)
                targets += whole[-n:]
            x = model.features(tokens.to(device), top_k)[0][rows, places]
            targets, parts = torch.tensor(targets, device=device), []
            for a in range(0, len(x), 1024):                      # logits are large
                logits, target = model.head(x[a:a + 1024]), targets[a:a + 1024]
                chosen = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
                parts.append((chosen, logits.argmax(-1) == target))
            log_prob, best = (torch.cat(part).tolist() for part in zip(*parts))
            for i in batch:
                n = len(pairs[i][1])
                found[i] = sum(log_prob[:n]), all(best[:n])
                log_prob, best = log_prob[n:], best[n:]
            bar.update(len(batch))
    return found


def encode_pair(encoding, context, continuation):
    """Text -> the tokens of both, split where the tokens of the context alone end; white space at its end
    belongs to the continuation, and an empty context is the beginning of a document."""
    n = len(context) - len(context.rstrip())
    context, continuation = context[:len(context) - n], context[len(context) - n:] + continuation
    whole, first = (data.encode(encoding, text) for text in (context + continuation, context))
    if not first:
        return [encoding.encode_single_token("<|endoftext|>")], whole
    return first, whole[len(first):]


def read_lines(path, needed):
    """Objects of a .jsonl or .jsonl.gz file, each with the needed fields.  ValueError names the line."""
    rows = []
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            lines = file.read().splitlines()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is cut short or damaged ({error})") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else {}
            missing = [name for name in needed if row and name not in row]
            if missing or not isinstance(row, dict):
                raise ValueError(f"it lacks {', '.join(missing)}" if missing else "it is no object")
            rows += [row] * bool(row)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows


def choices_command(args):
    """Multiple choice without a harness, by its rules."""
    model, _, top_k = load_run(args.ckpt, args.device)
    acc, acc_norm, n = multiple_choice(model, data.load_encoding(run_folder(args.ckpt)), read_lines(
        args.file, ("context", "choices", "answer")), top_k)
    print(f"{n:,} questions of {args.file}\nacc       {acc:.4f}   the likeliest choice is the answer\n"
          f"acc_norm  {acc_norm:.4f}   log-probability divided by the choice's length")


def multiple_choice(model, encoding, questions, top_k=None):
    """Questions {context, choices, answer (a number from 0)} -> acc, acc_norm, how many.

    A choice follows its context after a space.  acc_norm divides its log-probability by its characters."""
    for number, q in enumerate(questions, 1):
        texts = isinstance(q["choices"], list) and all(
            text and isinstance(text, str) for text in q["choices"])
        if not (texts and isinstance(q["context"], str) and q["answer"] in range(len(q["choices"]))):
            raise ValueError(f"question {number}: context must be a text, choices a list of texts that are "
                             f"not empty, and answer ({q['answer']}) the number of one of them, from 0")
    pairs = [encode_pair(encoding, q["context"], f" {choice}") for q in questions
             for choice in q["choices"]]
    found, right, right_norm = iter(log_likelihoods(model, pairs, top_k)), 0, 0
    for q in questions:
        scores = np.array([next(found)[0] for _ in q["choices"]])
        right += scores.argmax() == q["answer"]
        right_norm += (scores / [len(choice) for choice in q["choices"]]).argmax() == q["answer"]
    return right / len(questions), right_norm / len(questions), len(questions)


# tasks of lm-evaluation-harness: shots and score that the paper gives (arXiv 2512.16248).  Its evaluator is
# its own and not published: these are its numbers beside a public yardstick, not the same measurement
PAPER = {"mmlu": (5, 64.81), "mmlu_pro": (5, 38.13), "bbh": (3, 63.23), "piqa": (0, 82.05),
         "arc_challenge": (25, 80.29), "hellaswag": (10, 79.79), "winogrande": (5, 76.09),
         "gsm8k": (8, 71.65), "minerva_math": (4, 36.88), "humaneval": (0, 42.07), "mbpp": (3, 47.00),
         "gpqa_main_n_shot": (5, 27.68)}
# what can be run from local files: the harness's own task, {split: fields}, what differs in our files
LOCAL = {
    "arc_challenge": ("arc/arc_challenge.yaml", {"test": ("question", "choices", "answer"),
                                                 "train": ("question", "choices", "answer")},
                      {"doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"}),
    "piqa": ("piqa/piqa.yaml", {"validation": ("goal", "sol1", "sol2", "label")}, {}),
    "hellaswag": ("hellaswag/hellaswag.yaml", {"validation": ("query", "choices", "gold")},
                  {"process_docs": None, "doc_to_target": "{{gold}}"}),
    "gsm8k": ("gsm8k/gsm8k.yaml", {"test": ("question", "answer"), "train": ("question", "answer")}, {}),
    "mmlu": ("mmlu/default", {"test": ("subject", "question", "choices", "answer"),
                              "dev": ("subject", "question", "choices", "answer")}, {})}


def adapter(model, encoding, top_k=None):
    """The model as lm-evaluation-harness's LM."""
    TemplateLM = needed("lm_eval.api.model", "eval").TemplateLM
    utils = needed("lm_eval.utils", "eval")
    window, end = model.config.max_seq_len, encoding.encode_single_token("<|endoftext|>")

    class Nanosigma(TemplateLM):
        eot_token_id = end

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return data.encode(encoding, string)

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
            return log_likelihoods(model, [pair for _, *pair in requests], top_k)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            return [sum(score for score, _ in log_likelihoods(model, [
                utils.make_disjoint_window(pair) for pair in utils.get_rolling_token_windows(
                    data.encode(encoding, request.args[0]), end, window, 1)], top_k, None))
                    for request in requests]

        def generate_until(self, requests, disable_tqdm=False):
            normalize = needed("lm_eval.models.utils", "eval").normalize_gen_kwargs
            return texts(model, encoding, [(text, normalize(how, 256)) for text, how in (
                request.args for request in requests)], top_k)

    return Nanosigma()


def texts(model, encoding, requests, top_k=None):
    """Continue prompts [(text, {until, max_gen_toks, temperature, ..})] up to the first stop string ->
    [text].  Prompts of similar length go together; the front of one that is too long is cut, and at most
    half of the context is written."""
    window, found = model.config.max_seq_len, [None] * len(requests)
    prompts = [data.encode(encoding, text) for text, _ in requests]
    order = sorted(range(len(requests)), key=lambda i: (repr(requests[i][1]), -len(prompts[i])))
    with tqdm(total=len(order), desc="generating", dynamic_ncols=True) as bar:
        while order:
            how = requests[order[0]][1]
            new = min(how.get("max_gen_toks", 256), window // 2)
            width = min(max(1, len(prompts[order[0]])), window - new)
            n = max(1, BATCH_TOKENS // (width + new))
            batch = list(itertools.takewhile(lambda i, how=how: requests[i][1] == how, order[:n]))
            order = order[len(batch):]
            cold = not how.get("do_sample") or not how.get("temperature")
            temperature = 0.0 if cold else how["temperature"]
            rows = [prompts[i][-width:] or [encoding.encode_single_token("<|endoftext|>")] for i in batch]
            for i, text in zip(batch, continuations(model, encoding, rows, new, how.get("until") or [], top_k,
                                                    temperature, how.get("top_p", 1.0))):
                found[i] = text
            bar.update(len(batch))
    return found


def continuations(model, encoding, rows, new, until, top_k, temperature, top_p):
    """Continue rows of tokens together, by at most `new` of them each -> their texts."""
    device, end = model.embed.weight.device, encoding.encode_single_token("<|endoftext|>")
    until, width = list(filter(None, [until] if isinstance(until, str) else until)), max(map(len, rows))
    lengths = torch.tensor([len(row) for row in rows], device=device)
    tokens = torch.tensor([row + [end] * (width - len(row)) for row in rows], device=device)
    grown = [[] for _ in rows]

    def text(tokens):
        tokens = tokens[:tokens.index(end)] if end in tokens else tokens
        written = encoding.decode([t for t in tokens if t < end])        # special tokens are the last ones
        for stop in until:
            written = written.split(stop)[0]
        return written

    def over(tokens):
        return end in tokens or any(stop in encoding.decode([t for t in tokens if t < end]) for stop in until)
    # eager: every batch has a shape of its own, which would compile anew
    stream = model.stream(tokens, new, temperature, top_p, top_k, end, lengths=lengths, compiled=False)
    for step, column in enumerate(stream, 1):
        for row, token in zip(grown, column.tolist()):
            row.append(token)
        if step % 8 == 0 and all(map(over, grown)):
            break
    return [text(row) for row in grown]


def bench_command(args):
    """Run tasks of lm-evaluation-harness, one after the other; each result is written as soon as it is
    there."""
    if args.local:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    harness, manager = needed("lm_eval", "eval"), needed("lm_eval.tasks", "eval")
    tasks = list(PAPER) if args.tasks == "paper" else [name.strip() for name in args.tasks.split(",")]
    known = list(LOCAL) if args.local else manager.TaskManager().all_tasks
    for name in tasks:
        if name not in known:
            where = f" from local files; there are {', '.join(LOCAL)}" * bool(args.local)
            raise ValueError(f"task {name!r} is unknown{where}")
    if args.limit is not None and args.limit < 1 or args.shots is not None and args.shots < 0:
        raise ValueError(f"limit ({args.limit}) must be at least 1 and shots ({args.shots}) 0 or more")
    out = Path(args.json or free_name(run_folder(args.ckpt), "bench", ".json"))
    try:
        out.open("x").close()                                     # ours from here on
    except FileExistsError:
        raise ValueError(f"{out} is there already; --json names a file that is to be made") from None
    model, saved, top_k = load_run(args.ckpt, args.device)
    lm = adapter(model, data.load_encoding(run_folder(args.ckpt)), top_k)
    settings = {"ckpt": str(newest(args.ckpt)), "top_k": top_k, "model": saved["model"],
                "device": args.device, "tasks": tasks, "limit": args.limit, "shots": args.shots,
                "local": args.local, "confirm_run_unsafe_code": args.confirm_run_unsafe_code,
                "lm_eval": importlib.metadata.version("lm_eval"),
                "torch": torch.__version__}
    results, lines, failed = {"settings": settings, "tasks": {}}, [], []
    try:
        for name in tasks:
            shots = PAPER.get(name, (None,))[0] if args.shots is None else args.shots
            try:
                with local_tasks(name, args.local) as where:
                    found = evaluate_task(harness, lm, name, shots, args, where)
            except ValueError as error:                           # the others need not suffer for it
                failed.append(str(error))
                continue
            results["tasks"][name] = found
            lines += table_lines(name, found)
            aside = out.with_name(f"{out.name}.tmp")
            aside.write_text(json.dumps(results, indent=1, default=str))
            os.replace(aside, out)
    finally:                                                      # also after Ctrl-C
        if lines:
            print(f"{'task':16} {'shots':>5} {'metric':29} {'here':>6} {'questions':>9}  the paper's model")
            print("\n".join(lines))
            print(f"every setting is in {out}")
    if failed:
        raise ValueError("; ".join(failed))


def free_name(folder, name, suffix):
    """The first of FOLDER/NAME-1.json, NAME-2.json .. that is not there."""
    return next(path for i in range(1, 10 ** 6) if not (path := folder / f"{name}-{i}{suffix}").exists())


def evaluate_task(harness, lm, name, shots, args, where):
    """-> what simple_evaluate says of a task or group, without the answers.  ValueError if it cannot."""
    try:
        manager = needed("lm_eval.tasks", "eval").TaskManager(include_path=where, include_defaults=not where)
        found = harness.simple_evaluate(
            lm, tasks=[name], num_fewshot=shots, limit=args.limit, task_manager=manager, bootstrap_iters=0,
            log_samples=False, confirm_run_unsafe_code=args.confirm_run_unsafe_code)
    except Exception as error:                                    # of a question, a package, the network ..
        if os.environ.get("NANOSIGMA_TRACEBACK"):
            raise
        offline = re.search("Connection|Offline|Timeout|HTTP|NotFound", f"{type(error).__name__} {error}")
        hint = "; without a network, --local FOLDER reads files" if offline and not args.local else ""
        raise ValueError(f"task {name} cannot be run ({type(error).__name__}: {error}){hint}") from None
    parts = ("results", "groups", "n-shot", "n-samples", "versions", "configs")
    return {part: found.get(part) for part in (*parts, "config")}


def table_lines(name, found):
    """A line of the table for each metric; of a group only its mean."""
    scores = (found["groups"] or {}).get(name) or found["results"].get(name, {})
    samples = found["n-samples"] or {}
    n = sum(each["effective"] for each in samples.values())
    shots = max((n for n in (found["n-shot"] or {}).values() if isinstance(n, int)), default=0)
    paper = f"{PAPER[name][1]} ({PAPER[name][0]} shots)" if name in PAPER else ""
    scores = {metric.replace(",none", ""): value for metric, value in scores.items()
              if isinstance(value, float) and "stderr" not in metric}
    return [f"{name[:16]:16} {shots:5} {metric[:29]:29} "
            f"{value if re.search('perplexity|byte|likelihood|brier', metric) else 100 * value:6.2f} "
            f"{n:9,}  {paper}" for metric, value in scores.items()]


@contextmanager
def local_tasks(name, folder):
    """A temporary folder with a task as the harness reads it, over local files; None without any."""
    if not folder:
        yield None
        return
    source, splits, changes = LOCAL[name]
    source = Path(needed("lm_eval", "eval").__file__).parent / "tasks" / source
    with tempfile.TemporaryDirectory() as made:
        made, rows = Path(made), {}
        for split, fields in splits.items():
            files = [Path(folder) / name / f"{split}.jsonl{end}" for end in ("", ".gz")]
            file = next((file for file in files if file.exists()), None)
            if file is None:
                raise ValueError(f"{files[0]} (or .gz) is missing: task {name} needs it")
            rows[split] = read_lines(file, fields)
            for number, row in enumerate(rows[split], 1):
                check_question(row, f"{file}, question {number}")
        if name == "mmlu":
            subjects = sorted({row["subject"] for row in rows["test"]})
            for subject in subjects:
                part = {split: [r for r in rows[split] if r["subject"] == subject] for split in rows}
                write_task(made, f"mmlu_{subject}", source / f"mmlu_{subject}.yaml", part, changes)
            group = {"group": "mmlu", "task": [f"mmlu_{subject}" for subject in subjects],
                     "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
            (made / "mmlu.yaml").write_text(json.dumps(group))    # JSON is YAML
        else:
            write_task(made, name, source, rows, changes)
        yield made


def check_question(row, where):
    """ValueError if a question of a local file would be scored against an answer that it does not have."""
    choices = row.get("choices") or [row[name] for name in ("sol1", "sol2") if name in row]
    names = ("question", "goal", "query", "subject")
    if not all(isinstance(row[name], str) for name in names if name in row):
        raise ValueError(f"{where}: the question is no text")
    if "answer" in row and not choices:
        if not isinstance(row["answer"], str):
            raise ValueError(f"{where}: the answer is no text")
        return
    right = next(row[name] for name in ("answer", "label", "gold") if name in row)
    wrong = [text for text in choices if not (text and isinstance(text, str))]
    few = "subject" in row and len(choices) != 4
    if few or wrong or right not in range(len(choices)):
        raise ValueError(f"{where}: there must be choices, texts that are not empty, and {right!r} the "
                         "number of one of them, from 0")


def write_task(made, name, source, rows, changes):
    """A task that includes the harness's own and reads files instead."""
    files = {split: str(made / f"{name}-{split}.jsonl") for split in rows}
    for split, file in files.items():
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows[split]))
    absent = {f"{split}_split": None for split in ("training", "validation", "test")
              if {"training": "train"}.get(split, split) not in rows}
    (made / f"{name}.yaml").write_text(json.dumps({
        "include": str(source), "task": name, "tag": [], "dataset_path": "json", "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(made / "cache")}, **absent, **changes}))


# --- drawing ----------------------------------------------------------------------------------------------

BARS = " ▁▂▃▄▅▆▇█"


def draw_load(load, width=48):
    """Text, 80 columns wide: for each layer a bar per expert; half height is the uniform share, full is twice
    it or more, a blank is an expert without a token.  load [L, E] counts."""
    share = (load / load.sum(-1, keepdim=True) * load.shape[-1]).tolist()
    lines = []
    for layer, row in enumerate(share):
        bars = "".join(BARS[0 if x == 0 else min(8, max(1, round(4 * x)))] for x in row)
        parts = [bars[i:i + width] for i in range(0, len(bars), width)]
        lines.append(f"layer {layer:<3}{parts[0]:{width}} max {100 * max(row) - 100:+5.0f}% "
                     f"min {100 * min(row) - 100:+4.0f}%")
        lines += [f"         {part}" for part in parts[1:]]
    return "\n".join(lines)


# --- routing ----------------------------------------------------------------------------------------------

class Look(NamedTuple):
    """What `routing` knows of a run: its log, and where its newest weights send the held-out tokens."""

    name: str
    rows: list                  # of log.jsonl up to the checkpoint, without the header
    steps: int                  # of the whole run
    switch: int                 # the last step with more experts in some layer; None if there is none
    top_k: list                 # [L] at the checkpoint
    data: str
    loss: float                 # held out, nats per token
    statistics: Statistics      # [L, ..]
    tokens: torch.Tensor        # [N] token ids
    experts: torch.Tensor       # [L, N] expert of each token: the best one, if there are several
    top_share: float            # of the most frequent token in the training text
    encoding: object            # or None


def look(ckpt, source=None, device="cpu", limit=1 << 20):
    """Route the held-out tokens (at most `limit`) of a run's own data, or of another folder -> Look."""
    s = read_settings(run_folder(ckpt))["settings"]
    folder, train, val, vocab_size = open_data(source or s["data"], s["seq_len"])
    model, _, top_k = load_for(ckpt, folder, vocab_size, device)
    chosen = [[] for _ in model.blocks]
    for block, seen in zip(model.blocks, chosen):
        block.moe.router.register_forward_hook(
            lambda m, x, routing, seen=seen: seen.append(routing.experts[:, 0].cpu()))
    done = int(newest(ckpt).name.removeprefix("step-"))
    loss, sums, windows = validate(model, val, top_k, device, limit)
    tokens, _, *doc = val.batch(windows)
    text = (doc[0] if doc else tokens).flatten() >= 0             # the routers saw padding, too
    first = active_experts(0, s["steps"], s["initial_top_k"], model.config.top_k, s["switch"],
                           model.config.n_layer)
    encoding = data.load_encoding(folder) if (folder / "encoding.json").exists() else None
    return Look(str(ckpt), [row for row in read_log(ckpt)[1:] if row["step"] <= done], s["steps"],
                math.ceil(round(s["switch"] * s["steps"], 6)) if first != top_k else None, top_k, str(folder),
                loss, Statistics(*(t.cpu() for t in sums)), tokens.flatten()[text],
                torch.stack([torch.cat(seen)[text] for seen in chosen]),
                data.largest_share(train), encoding)


def token_experts(tokens, experts, n_expert):
    """-> [V, E]: how often each token id went to each expert of a layer."""
    V = int(tokens.max()) + 1
    return torch.bincount(tokens * n_expert + experts, minlength=V * n_expert).view(V, n_expert)


def share_by_context(counts):
    """Share of the tokens that are not sent to the expert which their id is sent to most: 0 is a router by
    token id.  counts [V, E]; ids seen once say nothing and are left out.

    Rare ids keep it below 1 even for a router that throws dice: compare runs on the same text only."""
    counts = counts[counts.sum(-1) > 1]
    return 1 - (counts.amax(-1).sum() / counts.sum()).item() if len(counts) else 0.0


def co_activation(experts, n_expert):
    """How much the expert of one layer says about that of another: [L, L], mutual information over the mean
    of the two entropies; 0 is independent, 1 is one and the same choice.

    Both are taken less what independent choices would show on N tokens, about (E - 1)^2 / 2N nats (adjusted
    mutual information, Vinh et al. 2010)."""
    L, N = experts.shape
    share = torch.eye(L, dtype=torch.float64)
    for a in range(L):
        for b in range(a):
            pair = torch.bincount(experts[a] * n_expert + experts[b], minlength=n_expert ** 2).double()
            pair = pair.view(n_expert, n_expert) / N
            one, two = pair.sum(1), pair.sum(0)
            entropy = [torch.special.entr(p).sum() for p in (one, two, pair)]
            chance = ((one > 0).sum() - 1) * ((two > 0).sum() - 1) / (2 * N)
            told = (entropy[0] + entropy[1] - entropy[2] - chance).clamp(min=0)
            share[a, b] = share[b, a] = told / ((entropy[0] + entropy[1]) / 2 - chance).clamp(min=1e-12)
    return share


def describe_routing(run):
    """The look of one run as text, 80 columns wide."""
    sums, n = run.statistics, len(run.tokens)
    L, E = sums.load.shape
    high, low = noise_floor(n, E, run.top_k[0])
    lbl = load_balancing_loss(sums.load, sums.prob_sum, n)
    zipf = 100 * zipf_bound(run.top_share, E, run.top_k[0])
    lines = [f"{run.name}: held-out loss {run.loss:.4f}",
             f"load of every expert on {n:,} held-out tokens.  In layer 0 a uniform router",
             f"would show {100 * high:+.0f}/{100 * low:+.0f} %, one that sees the token alone at least "
             f"{zipf:+.0f} %:",
             draw_load(sums.load), "",
             f"layer   K   LBL    top-1 p   entropy (flat: {math.log(E):.2f})   expert depends on context"]
    words = []
    for layer in range(L):
        counts = token_experts(run.tokens, run.experts[layer], E)
        lines.append(f"{layer:>5} {run.top_k[layer]:>3} {lbl[layer]:6.3f} {sums.top_sum[layer] / n:9.3f}"
                     f" {sums.entropy_sum[layer] / n:9.2f} {100 * share_by_context(counts):24.0f} %")
        if layer in (0, L - 1):
            words += ["", f"layer {layer}, its three most and two least used experts, and their tokens"
                      + (" (best expert only):" if run.top_k[layer] > 1 else ":")]
            order = counts.sum(0).argsort(descending=True, stable=True).tolist()
            words += [describe_expert(run, counts, e) for e in dict.fromkeys(order[:3] + order[-2:])]
    lines += words + ["", "co-activation: what a layer's expert says of another's (0 nothing, 1 all)"]
    shown = list(range(L)) if L <= 8 else [round(i * (L - 1) / 7) for i in range(8)]
    matrix = co_activation(run.experts[shown], E)
    lines.append("layer  " + "".join(f"{layer:>6}" for layer in shown))
    for layer, row in zip(shown, matrix.tolist()):
        lines.append(f"{layer:>5}  " + "".join(f"{x:6.2f}" for x in row))
    return "\n".join(lines)


def describe_expert(run, counts, e):
    """One expert's share of the tokens, and what most of them are."""
    mine, total = counts[:, e], max(1, int(counts[:, e].sum()))
    text = f"  expert {e:<3} {100 * counts[:, e].sum() / counts.sum():4.1f} % "
    for token in mine.argsort(descending=True, stable=True)[:6].tolist():
        word = repr(run.encoding.decode([token])) if run.encoding else str(token)
        part = f" {word} {100 * int(mine[token]) / total:.0f} %"
        if mine[token] and len(text + part) <= 80:
            text += part
    return text


def between(run, first, last, name):
    """Mean over the rows of the steps from `first` to `last` (fractions of the run) of a figure [L]; None if
    there are no such rows."""
    rows = [row[name] for row in run.rows if first * run.steps < row["step"] <= last * run.steps]
    return np.mean(rows, 0) if rows else None


def compare_routing(runs):
    """Runs beside each other: deviation of the load while the learning rate was constant and at the end."""
    def percent(run, first, last, layer, name):
        pair = [between(run, first, last, f"{name}_{side}") for side in ("max", "min")]
        return f"{'':10}" if pair[0] is None else f"{100 * pair[0][layer]:+5.0f}/{100 * pair[1][layer]:+4.0f}"

    lines = ["most and least loaded expert in a step, % from a fair share (mean of steps)",
             f"{'':17}held-out   ----- layer 0 -----   ---- last layer ----   chance,",
             f"{'% of the steps':17}    loss     50-60     90-100      50-60     90-100   layer 0"]
    for run, name in zip(runs, short_names([run.name for run in runs])):
        parts = [percent(run, *at, layer, "load") for layer in (0, -1) for at in ((0.5, 0.6), (0.9, 1))]
        parts.append(percent(run, 0.9, 1, 0, "noise"))
        lines.append(f"{name[-17:]:17}{run.loss:8.4f} {' '.join(parts)}")
    if len({run.data for run in runs}) > 1:
        lines.append("the held-out losses are of different texts: they do not compare")
    return "\n".join(lines + [text for text in map(around_switch, runs) if text])


def validations(run):
    """Steps and held-out losses of the log."""
    found = [(row["step"], row["val_loss"]) for row in run.rows if "val_loss" in row]
    return [(step, loss) for step, loss in found if math.isfinite(loss)]


def around_switch(run):
    """What the switch to fewer experts cost, in words, or None if there was none or no validation saw it."""
    if run.switch is None:
        return None
    before, after = ([(step, loss) for step, loss in validations(run) if (step > run.switch) == later]
                     for later in (False, True))
    if not before or not after:
        return None
    shown = [f"{loss:.4f} (step {step})" for step, loss in (before[-1], after[0], after[-1])]
    return f"{run.name}: held out {shown[0]} before the switch, {shown[1]} after, {shown[2]} at the end"


def routing_command(args):
    if args.png:
        pyplot = load_pyplot()                                    # before minutes of work
        Path(args.png).mkdir(parents=True, exist_ok=True)
    runs = [look(ckpt, args.data, args.device) for ckpt in args.runs]
    for run in runs:
        print(describe_routing(run), end="\n\n")
    print(compare_routing(runs))
    if args.png:
        for path in draw_pictures(pyplot, runs, Path(args.png)):
            print(f"drawn: {path}")


# --- pictures (extra: plot) -------------------------------------------------------------------------------

def load_pyplot():
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--png needs matplotlib: pip install 'nanosigma[plot]'") from None
    matplotlib.use("Agg")                                         # draw to files, whatever the display
    from matplotlib import pyplot
    pyplot.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False,
                            "axes.grid": True, "grid.alpha": 0.25, "figure.dpi": 100, "legend.frameon": False,
                            "axes.titlesize": 11})
    return pyplot


def draw_pictures(pyplot, runs, folder):
    """Write every picture that these runs have something to show for -> their paths."""
    names = short_names([run.name for run in runs])
    runs = [run._replace(name=name) for run, name in zip(runs, names)]
    pictures = {"load": draw_heat, "deviation": draw_deviation, "gate": draw_gate, "switch": draw_switch,
                "coactivation": draw_co_activation}
    paths = []
    for name, draw in pictures.items():
        figure = draw(pyplot, runs)
        if figure:
            figure.savefig(folder / f"{name}.png")
            pyplot.close(figure)
            paths.append(folder / f"{name}.png")
    return paths


def short_names(names):
    """The names without the folders that all of them share."""
    paths = [os.path.abspath(name) for name in names]
    shared = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, shared) for path in paths]


def last_layer(runs):
    """How to call the last layer of some runs."""
    return " / ".join(f"layer {n - 1}" for n in sorted({len(run.top_k) for run in runs}))


def fractions(run, layer):
    """f and p [E] of a layer: the share of the rows that each expert gets, its mean probability."""
    load, prob_sum = run.statistics.load[layer], run.statistics.prob_sum[layer]
    return (load / load.sum()).numpy(), (prob_sum / len(run.tokens)).numpy()


def draw_heat(pyplot, runs):
    """Layers x experts, one panel for each run: load relative to a fair share."""
    height = sum(0.22 * len(run.top_k) + 0.9 for run in runs) + 0.3
    figure, axes = pyplot.subplots(len(runs), 1, figsize=(9, height), squeeze=False, layout="constrained")
    for axis, run in zip(axes[:, 0], runs):
        load = run.statistics.load
        share = load / load.sum(-1, keepdim=True) * load.shape[1]
        image = axis.imshow(share.numpy(), aspect="auto", cmap="RdBu_r", vmin=0, vmax=2,
                            interpolation="nearest")
        axis.set(title=run.name, ylabel="layer", yticks=range(0, len(share), max(1, len(share) // 8)))
        axis.grid(False)
    axes[-1, 0].set_xlabel("expert")
    figure.colorbar(image, ax=axes, extend="max", label="load / fair share", shrink=min(1, 3 / height))
    return figure


def draw_deviation(pyplot, runs):
    """Largest and smallest deviation of the load over time, first and last layer (the paper's Figures 2a, 3
    and 4).  Noise and Zipf bound are those of the first run."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4.2), sharey=True, layout="constrained")
    first, highest = runs[0], 210
    for axis, layer in zip(axes, (0, -1)):
        for color, run in enumerate(runs):
            steps = [row["step"] for row in run.rows]
            for side in ("max", "min"):
                step, window = ([100 * row[f"{kind}_{side}"][layer] for row in run.rows]
                                for kind in ("load", "window"))
                axis.plot(steps, step, color=f"C{color}", alpha=0.45, lw=0.8)
                axis.plot(steps, window, color=f"C{color}", lw=1.6, label=run.name if side == "max" else None)
                highest = max(highest, *step)
        noise = [[100 * row[f"noise_{side}"][layer] for row in first.rows] for side in ("min", "max")]
        axis.fill_between([row["step"] for row in first.rows], *noise, color="0.85", zorder=0,
                          label=f"chance in a step of {first.name}")
        bound = zipf_bound(first.top_share, first.statistics.load.shape[1], 1)
        axis.axhline(100 * bound, color="k", ls=":", lw=1, label="Zipf bound, K = 1")
        axis.set(title="layer 0" if layer == 0 else last_layer(runs), xlabel="step")
        axis.set_yscale("symlog", linthresh=300, linscale=3)
        ticks = [-100, 0, 100, 200, 300, 1000, 3000, 9500]
        axis.set_yticks(ticks, map(str, ticks))
        axis.set_ylim(-110, 1.1 * highest)
    axes[0].set_ylabel("deviation from a fair share, %\n(logarithmic above 300)")
    figure.suptitle("most and least loaded expert: in one step (thin), since the last line of the log (bold)",
                    fontsize=11)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=10)
    return figure


def draw_gate(pyplot, runs):
    """Share of tokens f and mean probability p of each expert, first and last layer (Figures 2b and 2c)."""
    figure, axes = pyplot.subplots(len(runs), 2, figsize=(9, 2.1 * len(runs) + 0.6), squeeze=False,
                                   sharey="row", layout="constrained")
    for row, run in zip(axes, runs):
        for axis, layer in zip(row, (0, -1)):
            f, p = fractions(run, layer)
            axis.plot(f, color="C0", lw=1, label="f, share of the tokens")
            axis.plot(p, color="C3", lw=1.4, label="p, mean probability")
            axis.axhline(1 / len(f), color="0.5", lw=0.8)
            axis.set_title(f"{run.name}, layer {layer % len(run.top_k)}: LBL {len(f) * (f * p).sum():.2f}")
        row[0].set(ylim=(0, None), ylabel="share")
    for axis in axes[-1]:
        axis.set_xlabel("expert")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def draw_switch(pyplot, runs):
    """Held-out cross-entropy over time; None if no run was validated."""
    curves = [(color, run, validations(run)) for color, run in enumerate(runs) if validations(run)]
    if not curves:
        return None
    figure, axis = pyplot.subplots(figsize=(9, 3.8), layout="constrained")
    for color, run, curve in curves:
        axis.plot(*zip(*curve), color=f"C{color}", marker=".", ms=4, lw=1.4,
                  label=f"{run.name}: {curve[-1][1]:.3f} at the end")
        if run.switch:
            axis.axvline(run.switch, color=f"C{color}", ls="--", lw=1)
    late = [loss for _, _, curve in curves for step, loss in curve if step > 0.25 * curve[-1][0]]
    axis.set(title="held-out cross-entropy; dashed: the switch to fewer experts", xlabel="step",
             ylabel="nats per token", ylim=(min(late) - 0.05, max(late) + 0.05))
    axis.legend(fontsize=10)
    return figure


def draw_co_activation(pyplot, runs):
    """Layers x layers, one panel for each run."""
    columns = min(4, len(runs))
    lines = -(-len(runs) // columns)
    figure, axes = pyplot.subplots(lines, columns, squeeze=False, layout="constrained",
                                   figsize=(max(4.5, 2.4 * columns), 2.6 * lines + 0.4))
    for axis in axes.flat[len(runs):]:
        axis.axis("off")
    for axis, run in zip(axes.flat, runs):
        share = co_activation(run.experts, run.statistics.load.shape[1]).fill_diagonal_(math.nan)
        image = axis.imshow(share.numpy(), cmap="viridis", vmin=0, vmax=0.6, interpolation="nearest")
        ticks = range(0, len(share), max(1, len(share) // 8))
        axis.set(title=run.name, xlabel="layer", ylabel="layer", xticks=ticks, yticks=ticks)
        axis.grid(False)
    figure.colorbar(image, ax=axes, label="co-activation", extend="max")
    return figure


def main(argv=None):
    parser = data.Parser(prog="eval.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True,
                                     metavar="loss | sample | chat | routing | export | bench | choices")

    def command(name, function, help, runs="--ckpt", **options):
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=function)
        sub.add_argument(runs, metavar="RUN", help="run directory, or a step-N in it", **options)
        if name != "export":                                      # which computes nothing
            sub.add_argument("--device", default="auto", help="cpu, cuda or mps (default: the best there is)")
        return sub

    sub = command("loss", loss_command, "cross-entropy on held-out text, beside baselines and runs",
                  nargs="+", required=True)
    sub.add_argument("--data", help="folder made by data.py (default: the first run's own)")
    sub = command("routing", routing_command, "who gets which token, and how evenly: text, and pictures",
                  "runs", nargs="+")
    sub.add_argument("--data", help="folder made by data.py (default: each run's own)")
    sub.add_argument("--png", metavar="FOLDER", help="draw pictures into this folder (needs matplotlib)")
    sub = command("sample", sample_command, "generate text", required=True)
    sub.add_argument("--prompt", default="", help="text to continue (default: the beginning of a document)")
    sub.add_argument("--tokens", type=int, default=200, help="at most this many new tokens (default 200)")
    sub.add_argument("--n", type=int, default=1, help="how many texts (default 1)")
    sub.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    sub.add_argument("--top_p", type=float, default=0.95, help="keep the likeliest tokens up to this (0.95)")
    sub.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    sub = command("chat", chat_command, "talk with a run that was tuned on conversations; in a pipe, one "
                  "question a line", required=True)
    sub.add_argument("--system", default="", metavar="TEXT", help="a message that comes before all others")
    sub.add_argument("--tokens", type=int, default=200, help="of an answer, at most (default 200; "
                     "never more than half of the sequences that the run was tuned on)")
    sub.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    sub.add_argument("--top_p", type=float, default=0.95, help="keep the likeliest tokens up to this (0.95)")
    sub.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    sub = command("export", export_command, "write a folder for transformers", required=True)
    sub.add_argument("--to", required=True, metavar="FOLDER", help="the folder, which is made")
    sub = command("bench", bench_command, "tasks of lm-evaluation-harness (extra eval)", required=True)
    sub.add_argument("--tasks", default="paper", metavar="A,B,..",
                     help=f"names of the harness (default: paper, which is {', '.join(PAPER)})")
    sub.add_argument("--local", metavar="FOLDER", help="read FOLDER/TASK/SPLIT.jsonl(.gz) instead of the "
                     f"network; for {', '.join(LOCAL)}")
    sub.add_argument("--limit", type=int, help="the first questions of each task only")
    sub.add_argument("--shots", type=int,
                     help="examples before each question (default: the paper's, or the task's)")
    sub.add_argument("--json", metavar="FILE",
                     help="results with every setting (default: RUN/bench-1.json, ..)")
    sub.add_argument("--confirm_run_unsafe_code", action="store_true",
                     help="let the harness run code that the model wrote, for humaneval and mbpp: on this "
                          "machine, with your rights")
    sub = command("choices", choices_command, "multiple choice from a file, without the harness",
                  required=True)
    sub.add_argument("--file", required=True, help=".jsonl of {context, choices, answer: number from 0}")
    args = parser.parse_args(argv)
    with data.one_line_errors():
        if "device" in args:
            args.device = parallel.pick_device(args.device)
        args.run(args)


if __name__ == "__main__":
    main(sys.argv[1:])
