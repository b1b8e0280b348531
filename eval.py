"""Look at what a run has learned.

    python eval.py loss   --ckpt out/laptop out/dense    held-out loss, beside a uniform model and a trigram
    python eval.py sample --ckpt out/laptop --prompt 'def '

A run is a directory that train.py made (its newest checkpoint is taken) or one of the step-N folders in it.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

import data
import parallel
from model import Model, ModelConfig, pick_device
from router import active_experts

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
    """ValueError unless a run and a data folder have the same tokenizer (or one of them has none)."""
    files = [Path(place) / "encoding.json" for place in (out, folder)]
    if all(f.exists() for f in files) and files[0].read_bytes() != files[1].read_bytes():
        raise ValueError(f"the tokenizer of {out} is not that of {folder}: their tokens mean other things")


def read_settings(out):
    """settings.json of a run directory.  ValueError if it is none."""
    try:
        saved = json.loads((Path(out) / "settings.json").read_text())
        if not (isinstance(saved["settings"], dict) and isinstance(saved["model"], dict)):
            raise ValueError("no settings in it")
        return saved
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{out} is not a directory of train.py ({error})") from None


# --- loss -------------------------------------------------------------------------------------------------

@torch.no_grad()
def validate(model, tokens, seq_len, top_k, device="cpu", limit=None, rows=32):
    """Cross-entropy alone over windows of held-out tokens, evenly spread if there are more than `limit`
    tokens.

    -> (nats per token, load [L, E] int64, indices of the windows)."""
    n = (len(tokens) - 1) // seq_len
    if n < 1:
        raise ValueError(f"seq_len ({seq_len}) is too long for {len(tokens)} held-out tokens")
    windows = np.unique(np.linspace(0, n - 1, min(n, max(1, (limit or n * seq_len) // seq_len))).astype(int))
    loss, n_targets, load = 0.0, 0, 0
    for a in range(0, len(windows), rows):
        batch = np.stack([tokens[w * seq_len:(w + 1) * seq_len + 1] for w in windows[a:a + rows]])
        batch = torch.from_numpy(batch.astype(np.int64)).to(device)
        out = model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous(), top_k)
        loss, n_targets, load = loss + out.loss.item(), n_targets + out.n_targets, load + out.load
    return loss / n_targets, load, windows


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
    """Baselines and runs on the same held-out text, cut as the first run was trained.

    -> (rows (name, nats per token, perplexity, bits per byte), number of targets, folder of the text)."""
    settings = read_settings(run_folder(ckpts[0]))["settings"]
    folder = Path(source or settings["data"])
    folder = folder.parent if folder.is_file() else folder
    encoding = data.load_encoding(folder)
    train, val = (data.load_tokens(folder / f"{split}.bin") for split in ("train", "val"))
    losses = []
    for ckpt in ckpts:
        same_tokenizer(run_folder(ckpt), folder)
        model, _, top_k = load_run(ckpt, device)
        if model.config.vocab_size < encoding.n_vocab:
            raise ValueError(f"vocab_size of {ckpt} ({model.config.vocab_size}) is below that of {folder}")
        loss, _, windows = validate(model, val, settings["seq_len"], top_k, device)
        losses.append((str(ckpt), loss))
    targets = np.arange(2, len(windows) * settings["seq_len"] + 1)       # a trigram needs two tokens
    prob = Trigram(train, encoding.n_vocab).prob(val)[targets - 2]
    rows = [("uniform over the vocabulary", math.log(encoding.n_vocab)),
            ("interpolated trigram", float(-np.log(prob).mean()))] + losses
    per_byte = len(targets) / token_bytes(encoding)[val[targets]].sum() / math.log(2)
    return [(name, loss, math.exp(loss), loss * per_byte) for name, loss in rows], len(targets), folder


def loss_command(args):
    rows, n, folder = compare_losses(args.ckpt, args.data, args.device)
    print(f"{n:,} held-out tokens of {folder}")
    print(f"{'':32} {'nats/token':>10} {'perplexity':>10} {'bits/byte':>9}")
    for name, loss, perplexity, bits in rows:
        print(f"{name[-32:]:32} {loss:10.4f} {perplexity:10.1f} {bits:9.4f}")
    for a, b in zip(args.ckpt, args.ckpt[1:]):
        print(first_below(a, b))


def first_below(a, b):
    """In words: how many of run b's steps run a needed to reach run b's final validation loss."""
    curves = [[(r["step"], r["val_loss"]) for r in read_log(out)[1:] if "val_loss" in r] for out in (a, b)]
    if not all(curves):
        return f"no validation in the logs of {a} and {b}: steps cannot be compared"
    steps, goal = curves[1][-1]
    reached = next((step for step, loss in curves[0] if loss <= goal), None)
    if reached is None:
        return f"{a} did not reach the {goal:.4f} that {b} ended with after {steps} steps"
    return f"{a} was at the {goal:.4f} that {b} ended with after {reached} of its {steps} steps"


def read_log(out):
    """log.jsonl of a run: the header, then the logged steps."""
    out = run_folder(out)
    try:
        return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{out / 'log.jsonl'} cannot be read ({error})") from None


# --- text -------------------------------------------------------------------------------------------------

def write_text(model, encoding, prompt, max_new_tokens, top_k, temperature=0.8, top_p=0.95, seed=0):
    """Let the model continue a prompt (from the beginning of a document) until it ends the document
    itself."""
    device = model.embed.weight.device
    end = encoding.encode_single_token("<|endoftext|>")
    tokens = torch.tensor([[end] + encoding.encode_ordinary(prompt)], device=device)
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


def main(argv=None):
    parser = data.Parser(prog="eval.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="loss | sample")

    def command(name, function, help, nargs=None):
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=function)
        sub.add_argument("--ckpt", nargs=nargs, required=True, metavar="RUN",
                         help="run directory, or a step-N in it")
        sub.add_argument("--device", default="auto", help="cpu, cuda or mps (default: the best there is)")
        return sub

    sub = command("loss", loss_command, "cross-entropy on held-out text, beside baselines and runs", "+")
    sub.add_argument("--data", help="folder made by data.py (default: the first run's own)")
    sub = command("sample", sample_command, "generate text")
    sub.add_argument("--prompt", default="", help="text to continue (default: the beginning of a document)")
    sub.add_argument("--tokens", type=int, default=200, help="at most this many new tokens (default 200)")
    sub.add_argument("--n", type=int, default=1, help="how many texts (default 1)")
    sub.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    sub.add_argument("--top_p", type=float, default=0.95, help="keep the likeliest tokens up to this (0.95)")
    sub.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with data.one_line_errors():
        args.device = pick_device(args.device)
        args.run(args)


if __name__ == "__main__":
    main(sys.argv[1:])
