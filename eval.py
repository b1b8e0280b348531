"""Look at what a run has learned.

    python eval.py loss    --ckpt out/laptop out/dense             held-out loss, beside baselines
    python eval.py sample  --ckpt out/laptop --prompt 'def '
    python eval.py chat    --ckpt out/laptop-chat                  a run that was tuned on conversations
    python eval.py routing out/laptop out/other --png pictures     which expert takes which token, how evenly
    python eval.py export  --ckpt out/laptop --to folder           for transformers and what reads its format
    python eval.py average --ckpt out/laptop/step-600 out/laptop/step-800 --to out/mean

A run is a directory that train.py made (its newest checkpoint is taken) or one of the step-N folders in it.
"""

import codecs
import importlib
import json
import math
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

# before torch: OpenMP threads that spin long while they wait make training several times slower on busy cores
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import numpy as np
import torch

import data
import parallel
from data import InputError
from model import ModelConfig
from parallel import newest, read_settings, run_folder
from router import Statistics, load_balancing_loss, noise_floor, zipf_bound

# --- runs -------------------------------------------------------------------------------------------------

def load_run(ckpt, device="cpu", folder=None):
    """-> model, settings.json, K [L].  InputError if corrupt, or not of the tokenizer of a data folder."""
    path, saved = newest(ckpt), read_settings(run_folder(ckpt))
    c, n_bytes = saved["config"], sum(file.stat().st_size for file in path.glob("*.distcp"))
    least = c.vocab_size + c.n_layer * (c.n_expert * c.d_expert + c.n_head * c.head_dim)      # rows of D
    if 4 * c.d_model * least > n_bytes:                           # before memory is taken
        raise InputError(f"checkpoint {path} is corrupt: smaller than the model of its settings.json")
    if folder:
        same_tokenizer(run_folder(ckpt), folder)
        own = saved.get("val_sha256") in (None, data.file_sha256(Path(folder) / "val.bin"))
        if not own or saved["settings"].get("init_from"):
            print(f"note: {ckpt}{', or what it began with,' * own} may have trained on text that {folder} "
                  "holds out", file=sys.stderr)
    top_k = data.read_json(path / "meta.json", "that of a checkpoint of this model",       # as it was trained
                           lambda meta: saved["config"].layer_top_k(list(map(int, meta["top_k"]))))
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32        # as training computes
    model = parallel.build_model(saved["config"], parallel.SINGLE_PROCESS, device, dtype, seed=0)
    masters = parallel.MasterWeights(model, dtype)
    parallel.load_checkpoint(path, parallel.training_state(masters))
    masters.refresh()
    return model.eval().requires_grad_(False), saved, top_k


def read_log(out):
    """log.jsonl of a run: the header, then the logged steps.  A number that was not finite is None."""
    lines = []
    for line in (run_folder(out) / "log.jsonl").read_bytes().splitlines():
        with suppress(ValueError, RecursionError):                # a crash may cut the last one
            lines.append(json.loads(line))
    # not the lines that say where it was resumed
    return [row for row in lines if isinstance(row, dict)
            and ("settings" in row or "load_max" in row and type(row.get("step")) is int)]


def same_tokenizer(out, folder):
    """InputError if a run (or Hugging Face folder) and a data folder have different tokenizers."""
    theirs = Path(out) / ("tokenizer.json" if parallel.is_hf(out) else "encoding.json")
    ours = Path(folder) / "encoding.json"
    if theirs.exists() and ours.exists():
        theirs, ours = data.load_encoding(theirs), data.load_encoding(ours)
        if (theirs._mergeable_ranks, theirs._pat_str) != (ours._mergeable_ranks, ours._pat_str):
            raise InputError(f"the tokenizer of {out} is not that of {folder}")
    elif ours.exists():
        print(f"note: {out} has no tokenizer; its own must be that of {folder}", file=sys.stderr)


def open_data(ckpt, source=None):
    """-> settings of a run, Corpus of its data or of source.  InputError if nothing is held out there."""
    s = read_settings(run_folder(ckpt))["settings"]
    corpus = data.open_corpus(source or s["data"], s["seq_len"])
    folder = corpus.file.parent
    if not corpus.val:
        raise InputError(f"{folder} has no held-out text of {s['seq_len']} tokens (a window); choose --data")
    return s, corpus._replace(encoding=data.load_encoding(folder))


# --- loss -------------------------------------------------------------------------------------------------

@torch.no_grad()
def validate(model, sampler, top_k, device="cpu", limit=None, rows=32, layout=parallel.SINGLE_PROCESS):
    """Cross-entropy over a sampler's windows, evenly spread if there are more than `limit` tokens; `rows` of
    them at a time on all ranks -> nats per target, Statistics of all layers, indices of the windows."""
    n, sums, statistics, was_training = sampler.n_windows, 0, None, model.training
    many = min(n, max(1, (limit or n * sampler.seq_len) // sampler.seq_len))
    if rows < many < n:
        many -= many % rows                                       # full batches: another shape compiles again
    windows = np.unique(np.linspace(0, n - 1, many).astype(int))
    model.eval()                                                  # a fork may have dropout
    for a in range(0, len(windows), rows):
        mine = np.array_split(windows[a:a + rows], layout.world)[layout.rank]
        tokens, targets, *doc = (t.to(device) for t in sampler.batch(mine))
        out = model(tokens, targets, top_k, *doc)
        sums = sums + torch.stack([out.loss, out.counts[0].to(out.loss.dtype)]).cpu().double()
        statistics = Statistics(*map(torch.add, statistics, out.statistics)) if statistics else out.statistics
    model.train(was_training)
    (loss, n_targets), = parallel.all_sum(layout, [sums])         # on the CPU: MPS has no float64
    statistics = parallel.all_sum(layout, statistics)
    return (loss / n_targets.clamp(min=1)).item(), Statistics(*statistics), windows


def compare_losses(ckpts, source=None, device="cpu", top_ks=None):
    """Baselines and runs on the same held-out text (or answers), cut as the first run was trained; a row for
    each K in top_ks -> rows (name, nats, perplexity, bits per byte), number of targets, folder of data."""
    (_, (train, val, _, encoding, file)), losses = open_data(ckpts[0], source), []
    for ckpt in ckpts:
        model, _, top_k = load_run(ckpt, device, file.parent)
        if val.seq_len > model.config.max_seq_len:
            raise InputError(f"{ckpt} has a context of {model.config.max_seq_len} tokens, {ckpts[0]} was "
                             f"trained on {val.seq_len}: name the run with the shortest first")
        for k in top_ks or [top_k]:
            if top_ks and not 1 <= k <= model.config.n_expert:
                raise InputError(f"top_k must be from 1 to {model.config.n_expert}, got {k}")
            loss, _, windows = validate(model, val, k, device, limit=1 << 24)
            losses.append((f"{ckpt}, K {k}" if top_ks else str(ckpt), loss))
    positions = val.target_positions(windows)
    positions = positions[positions > 1]                          # a trigram needs two tokens
    prob = trigram(train.tokens, val.tokens, positions, encoding.n_vocab)
    rows = [("uniform over the vocabulary", math.log(encoding.n_vocab)),
            ("interpolated trigram", float(-np.log(prob).mean())), *losses]
    targets = val.tokens[positions]
    text = targets[targets < encoding.n_vocab - len(data.SPECIAL)]       # special tokens stand for no bytes
    per_byte = len(targets) / len(encoding.decode_bytes(text.tolist())) / math.log(2)
    return [(name, loss, math.exp(loss), loss * per_byte) for name, loss in rows], len(targets), file.parent


def loss_command(args):
    """Cross-entropy on held-out text, beside baselines and other runs."""
    rows, n, folder = compare_losses(args.ckpt, args.data, args.device, args.top_k)
    print(f"{n:,} held-out tokens of {folder}\n{'':32} nats/token perplexity bits/byte")
    for name, loss, perplexity, bits in rows:
        print(f"{name[-32:]:32} {loss:10.4f} {perplexity:10.1f} {bits:9.4f}")


def trigram(train, text, at, V, limit=20_000_000):
    """Probabilities of text[at] under an interpolated Kneser-Ney trigram (Chen and Goodman 1999, eq. 24) of
    the tokens in train: a baseline without a network.

    p(c|ab) = max(n(abc) - d, 0) / n(ab) + d N(ab) / n(ab) * p(c|b), where N counts distinct successors;
    p(c|b) is the same with every count replaced by the number of distinct tokens before it; p(c) likewise,
    and below it the uniform 1/V.  d = n1 / (n1 + 2 n2), from how many n-grams occur once and twice."""
    t, a, b, c = (each.astype(np.int64) for each in (train[:limit], text[at - 2], text[at - 1], text[at]))
    three = np.unique((t[:-2] * V + t[1:-1]) * V + t[2:], return_counts=True)
    two = np.unique(three[0] % (V * V), return_counts=True)       # how many a precede each bc
    one = np.unique(two[0] % V, return_counts=True)
    p, pairs = 1 / V, b * V + c
    for (grams, counts), asked in (one, c), (two, pairs), (three, a * V * V + pairs):
        once, twice = max(1, (counts == 1).sum()), (counts == 2).sum()         # 0 would rule out what is new
        d = once / (once + 2 * twice)
        below, context = np.append(0, counts.cumsum()), asked // V * V         # counts before each gram
        # grams are sorted: those that begin as the asked one does lie between first and last
        first, at, after, last = np.searchsorted(grams, [context, asked, asked + 1, context + V])
        n, n_context, distinct = below[after] - below[at], below[last] - below[first], last - first
        p = np.where(n_context, (np.maximum(n - d, 0) + d * distinct * p) / np.maximum(n_context, 1), p)
    return p


# --- text -------------------------------------------------------------------------------------------------

def generate(model, tokens, max_new_tokens, temperature=1.0, top_p=1.0, *args, **kwargs):
    """Continue tokens [B, T] by sampling -> [B, T + new].  Arguments as in stream()."""
    if "top_k" in kwargs:
        raise TypeError("top_k is the likeliest tokens elsewhere; experts per token are k_per_layer here")
    new = stream(model, tokens, max_new_tokens, temperature, top_p, *args, **kwargs)
    return torch.cat([tokens, *(column[:, None] for column in new)], 1)


@torch.no_grad()
def stream(model, tokens, max_new_tokens, temperature=1.0, top_p=1.0, k_per_layer=None, generator=None):
    """Continue tokens [B, T] by sampling, until the context is full: yields the next tokens [B].  k_per_layer
    is the number of experts activated per token, one for all layers or a list; default the config's."""
    B, T = tokens.shape
    step = partial(decode, model)
    if tokens.is_cuda:
        step = torch.compile(step, mode="reduce-overhead", dynamic=False)         # a CUDA graph
    cache = kv_cache(model, B, T + max_new_tokens)
    x = model.features(tokens, k_per_layer, cache=cache)[0]       # prefill
    logits = model.head(x[:, -1:])[:, 0]
    if not logits.isfinite().all():
        raise InputError("the model's probabilities are not finite: its weights are broken")
    end = min(T + max_new_tokens, model.config.max_seq_len + 1)
    for at in range(T, end):
        new = sample(logits, temperature, top_p, generator)
        yield new
        if at + 1 < end:
            logits = step(new, tokens.new_full((B,), at), cache, k_per_layer)


def decode(model, tokens, pos, cache, k_per_layer=None):
    """tokens [B] at positions pos [B] -> logits of the next ones [B, V]."""
    return model.head(model.features(tokens[:, None], k_per_layer, cache=cache, pos=pos[:, None])[0])[:, 0]


def kv_cache(model, batch, length):
    """Keys and values of each layer for `length` positions, rounded up: every capacity compiles again."""
    capacity = min(model.config.max_seq_len, max(64, 1 << (length - 1).bit_length()))
    shape, like = (batch, capacity, model.config.n_kv_head, model.config.head_dim), model.embed.weight
    cache = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in model.blocks]
    for memory in sum(cache, ()) if like.is_cuda else ():
        torch._dynamo.mark_static_address(memory)                 # lets a CUDA graph write to it
    return cache


def sample(logits, temperature=1.0, top_p=1.0, generator=None):
    """logits [B, V] -> a token for each row [B], among the most probable that together reach top_p."""
    if not (temperature >= 0 and top_p > 0):                      # neither is NaN
        raise InputError(f"temperature must be 0 or more and top_p above 0, got {temperature} and {top_p}")
    if temperature < 1e-6:                                        # whose division would overflow
        return logits.argmax(-1)
    prob, token = (logits / temperature).softmax(-1).sort(-1, descending=True)
    prob = prob * (prob.cumsum(-1) - prob < max(top_p, 1e-6))
    return token.gather(1, torch.multinomial(prob, 1, generator=generator)).squeeze(1)


def generate_text(model, encoding, tokens, max_new_tokens, k_per_layer, temperature=0.8, top_p=0.95):
    """Continue a list of tokens up to <|endoftext|> or <|end|>: yields what the text grows by."""
    stop = [encoding.encode_single_token(token) for token in ("<|endoftext|>", "<|end|>")]
    known = set(encoding._mergeable_ranks.values())               # neither special tokens nor unused ids
    decoder = codecs.getincrementaldecoder("utf-8")("replace")    # of characters cut in two
    tokens = torch.tensor([tokens], device=model.embed.weight.device)
    for new in stream(model, tokens, max_new_tokens, temperature, top_p, k_per_layer):
        if new.item() in stop:
            break
        yield decoder.decode(encoding.decode_single_token_bytes(new.item()) if new.item() in known else b"")
    yield decoder.decode(b"", final=True)


def load_speaker(args):
    """What sample and chat share -> function(tokens, n) that yields text, tokenizer, settings of the run."""
    if args.tokens < 1:
        raise InputError(f"tokens must be above 0, got {args.tokens}")
    model, saved, top_k = load_run(args.ckpt, args.device)
    encoding = data.load_encoding(run_folder(args.ckpt))
    torch.manual_seed(args.seed % 2 ** 63)
    speak = partial(generate_text, model, encoding, k_per_layer=top_k, temperature=args.temperature,
                    top_p=args.top_p)
    return speak, encoding, saved["settings"]


def sample_command(args):
    """Continue a prompt, from the beginning of a document."""
    speak, encoding, settings = load_speaker(args)
    tokens = [encoding.encode_single_token("<|endoftext|>"), *encoding.encode_ordinary(args.prompt)]
    n, window = len(tokens), settings["seq_len"]
    if n > window:
        raise InputError(f"the prompt has {n} tokens; the model was trained on {window} at a time")
    print(args.prompt, *speak(tokens, min(args.tokens, window + 1 - n)), sep="")


def chat_command(args):
    """Talk with a run that was tuned on conversations; in a pipe, one question a line."""
    note = partial(print, file=sys.stderr, flush=True)            # stdout takes the answers alone
    with suppress(AttributeError):
        sys.stdin.reconfigure(errors="replace")
    speak, encoding, settings = load_speaker(args)
    encode, window = partial(data.encode_chat, encoding, answer=True), settings["seq_len"]
    n = min(args.tokens, window // 2)                             # of an answer
    messages = system = [("system", args.system)] if args.system else []
    note("/reset starts over, /quit or Ctrl-D ends, Ctrl-C stops an answer")
    if Path(settings["data"]).exists() and not data.holds_chats(settings["data"]):
        note(f"{args.ckpt} was not tuned on conversations: expect no answers")
    with suppress(EOFError, KeyboardInterrupt):
        while sys.stdin and (line := input("> " if sys.stdin.isatty() else "").strip()) != "/quit":
            if line in ("", "/reset"):
                messages = system if line else messages
                continue
            alone, question, answer = [*system, ("user", line)], [*messages, ("user", line)], ""
            if len(encode(alone)) + n > window:
                note(f"{len(encode(alone))} tokens leave no room in {window} for an answer")
                continue
            if len(encode(question)) + n > window:
                note("the conversation was full: it starts over with this question")
                question = alone
            with suppress(KeyboardInterrupt):
                for piece in speak(encode(question), n):
                    print(piece, end="", flush=True)
                    answer += piece
            print(flush=True)
            messages = [*question, ("assistant", answer)]


# --- routing ----------------------------------------------------------------------------------------------

def route_held_out(ckpt, source=None, device="cpu", limit=1 << 20):
    """Route the held-out tokens (at most `limit`) of a run's own data, or of another folder."""
    s, (_, val, _, encoding, file) = open_data(ckpt, source)
    model, _, top_k = load_run(ckpt, device, file.parent)
    chosen = [[] for _ in model.blocks]
    for block, seen in zip(model.blocks, chosen):
        block.moe.router.register_forward_hook(lambda m, x, out, s=seen: s.append(out.experts[:, 0].cpu()))
    loss, statistics, windows = validate(model, val, top_k, device, limit)
    tokens, _, *doc = val.batch(windows)
    valid = (doc[0] if doc else tokens).flatten() >= 0          # the routers saw padding, too
    tokens, last = tokens.flatten()[valid], parallel.read_meta(newest(ckpt))["step"]
    return SimpleNamespace(
        name="/".join(Path(ckpt).parts[-2:])[-32:], loss=loss, top_k=top_k, encoding=encoding,
        tokens_per_step=s["batch_size"] * s["seq_len"],
        rows=[row for row in read_log(ckpt)[1:] if row["step"] <= last],
        statistics=Statistics(*(t.cpu() for t in statistics)),    # [L, ..]
        tokens=tokens,                                            # [N]
        experts=torch.stack([torch.cat(seen)[valid] for seen in chosen]),      # [L, N]: the best of K
        top_share=tokens.bincount().max().item() / len(tokens))   # of the commonest token


def routing_command(args):
    """Which expert takes which token, and how evenly: text, and with --png pictures."""
    if args.png:                                                  # before minutes of work
        Figure = import_extra("matplotlib.figure", "plot").Figure
        Path(args.png).mkdir(parents=True, exist_ok=True)
    runs = [route_held_out(ckpt, args.data, args.device) for ckpt in args.runs]
    print(*map(describe_routing, runs), sep="\n\n")
    pictures = {"load": draw_curves, "tokens": draw_tokens}
    for name, draw in pictures.items() if args.png else ():
        draw(Figure, runs).savefig(Path(args.png) / f"{name}.png", dpi=120)
        print(f"drawn: {args.png}/{name}.png")


def describe_routing(run):
    """One run as text, at most 80 columns wide."""
    (L, E), sums, n = run.statistics.load.shape, run.statistics, len(run.tokens)
    high, low = noise_floor(n, E, run.top_k[0])
    lines = [f"{run.name}: held-out loss {run.loss:.4f}, load of every expert on {n:,} tokens",
             *draw_load(sums.load).splitlines(),
             f"(experts drawn by lot: max {high:+.0%} min {low:+.0%} in layer 0, by chance alone)"]
    bound = zipf_bound(run.top_share, E, run.top_k[0])
    if 0 < bound <= sums.load[0].max() / sums.load[0].sum() * E - 1:          # attention may do better
        lines.append(f"(a router that sees the token alone: max {bound:+.0%} or more, for the commonest)")
    lines += ["", "layer   K     LBL   top-1 p   entropy   routed by context"]
    lbl, words = load_balancing_loss(sums.load, sums.prob_sum, n), []
    for layer in range(L):
        counts, context = count_ids(run, layer)
        lines.append(f"{layer:>5} {run.top_k[layer]:>3} {lbl[layer]:7.3f} {sums.top_sum[layer] / n:9.3f} "
                     f"{sums.entropy_sum[layer] / n:9.2f} {context:17.0f} %")
        if layer in (0, L - 1):
            words += ["", f"layer {layer}, its three most and two least used experts, and their tokens:"]
            order = counts.sum(0).argsort(descending=True, stable=True).tolist()
            for e in dict.fromkeys(order[:3] + order[-2:]):
                total, (count, token) = counts[:, e].sum(), counts[:, e].topk(min(4, len(counts)))
                words.append(f"  expert {e:<3} {100 * total / n:4.1f} % " + "".join(
                    f" {run.encoding.decode([t])!r} {100 * c / total:.0f} %"
                    for c, t in zip(count.tolist(), token.tolist()) if c))
    lines.append("(routed by context: not to the expert that most tokens of the same id go to)")
    return "\n".join(line[:80] for line in lines + words)


def count_ids(run, layer):
    """-> how often each token id went to each expert [V, E]; the % of tokens that left the expert of most of
    their id (of ids seen more than once)."""
    E = run.statistics.load.shape[1]
    counts = (run.tokens * E + run.experts[layer]).bincount(minlength=(int(run.tokens.max()) + 1) * E)
    often = counts.view(-1, E)[counts.view(-1, E).sum(-1) > 1]
    return counts.view(-1, E), 100 - 100 * often.amax(-1).sum() / often.sum()


BARS = " ▁▂▃▄▅▆▇█"


def draw_load(load, width=48):
    """Text, 80 columns wide: for each layer a bar per expert; half height is the uniform share, full is twice
    it or more, a blank is an expert without a token.  load [L, E] counts."""
    lines = []
    for layer, row in enumerate((load / load.sum(-1, keepdim=True) * load.shape[-1]).tolist()):
        bars = "".join(BARS[0 if x == 0 else min(8, max(1, round(4 * x)))] for x in row)
        lines.append(f"layer {layer:<3}{bars[:width]:{width}} max {100 * max(row) - 100:+5.0f}% "
                     f"min {100 * min(row) - 100:+4.0f}%")
        lines += [f"         {bars[i:i + width]}" for i in range(width, len(bars), width)]
    return "\n".join(lines)


def draw_curves(Figure, runs):
    """Load of the most and the least used expert over the steps; load and mean probability of all at the end
    (arXiv 2512.16248, Figures 2 to 4)."""
    figure, run = Figure(figsize=(11, 9), layout="constrained"), runs[0]
    for layer, (top, bottom) in zip((0, -1), figure.subplots(2, 2, sharey="row").T):
        E = run.statistics.load.shape[1]
        high, low = noise_floor(run.tokens_per_step, E, run.top_k[layer])
        top.axhspan(100 * low, 100 * high, color="0.85", label=f"chance in a step of {run.name}")
        top.axhline(100 * zipf_bound(run.top_share, E, 1), color="k", ls=":", label="Zipf bound, K = 1")
        for color, one in enumerate(runs):
            load, order = one.statistics.load[layer].sort(descending=True)
            for name, side, style in ("most", "load_max", "-"), ("least", "load_min", "--"):
                top.plot([row["step"] for row in one.rows], [100 * row[side][layer] for row in one.rows],
                         style, color=f"C{color}", lw=1, label=f"{one.name}, {name} used expert")
            for name, y, style in ("load", load, "-"), ("p", one.statistics.prob_sum[layer, order], ":"):
                bottom.plot(100 * y / y.mean(dtype=float) - 100, style, color=f"C{color}", lw=1,
                            label=f"{one.name}, {name}")
        top.set(title=f"layer {layer % len(run.top_k)}", xlabel="step", ylabel="load, % from a fair share")
        top.set_yscale("symlog", linthresh=300, linscale=3)
        bottom.set(xlabel="experts, sorted by load on held-out text", ylabel="% from a fair share")
        for axis in (top, bottom):
            axis.legend(loc="best", fontsize=8)
    figure.suptitle("Zipf bound: if routers see the token alone, one expert takes all of the commonest token,"
                    "\nand the most used is above this line.  With attention they can do better.", size=10)
    return figure


def draw_tokens(Figure, runs, n=400, rows=40, columns=64):
    """A page of held-out text, at most n tokens, each in the colour of its expert, the best of K.

    Hue goes by load, from yellow to blue, which the colour-blind tell apart; next in rank is another tint."""
    plasma = import_extra("matplotlib", "plot").colormaps["plasma"]
    figure = Figure(figsize=(13, 8.2 * len(runs) + 0.5), layout="constrained")
    for axes, run in zip(figure.subplots(len(runs), 2, squeeze=False), runs):
        for axis, layer in zip(axes, (0, -1)):
            rank, x, y = run.statistics.load[layer].argsort(descending=True).argsort().numpy(), 0, 0
            tint = np.take([0.6, 0.45, 0.3], rank % 3)[:, None]
            colors = 1 - tint * (1 - plasma(0.9 - 0.8 * rank / len(rank))[:, :3])
            for token, expert in zip(run.tokens[:n].tolist(), run.experts[layer].tolist()):
                text = run.encoding.decode([token]).translate({32: "·", 9: "→", 10: "↵\n"})
                for piece in text.splitlines(keepends=True):
                    if x + len(piece.rstrip()) > columns:
                        x, y = 0, y + 1
                    if y < rows:
                        axis.text(x, y, piece.rstrip(), family="DejaVu Sans Mono", size=11.8, in_layout=False,
                                  bbox={"fc": colors[expert], "lw": 0, "pad": 0.6}, parse_math=False)
                    x, y = (0, y + 1) if piece.endswith("\n") else (x + len(piece), y)
            axis.set(xlim=(0, columns), ylim=(rows, -1))
            axis.set_title(f"{run.name}, layer {layer % len(run.top_k)}: {count_ids(run, layer)[1]:.0f} % "
                           "routed by context")
            axis.set_axis_off()
    figure.supxlabel("Colour: the token's expert; yellow most used, blue least.   · space, ↵ new line."
                     "\nRouted by context: not to the expert that most tokens of the same id go to.", size=10)
    return figure


# --- Hugging Face -----------------------------------------------------------------------------------------

def import_extra(module, extra):
    """Import a module of an optional extra.  InputError says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"no {module.split('.')[0]} ({error}): pip install -e '.[{extra}]'") from None


def export_command(args):
    """Write a folder that transformers' AutoModelForCausalLM and AutoTokenizer load."""
    hub, to = import_extra("huggingface_hub", "hf"), Path(args.to)
    model, saved, top_k = load_run(args.ckpt)
    window = saved["settings"]["seq_len"]                         # what was trained: max_seq_len may be more
    encoding = data.load_encoding(run_folder(args.ckpt))
    config = hf_config(replace(model.config, max_seq_len=window), top_k)
    end, turn = (encoding.encode_single_token(token) for token in ("<|endoftext|>", "<|end|>"))
    special, weights = {"bos_token_id": end, "pad_token_id": end}, to_hf(model)
    if encoding.n_vocab != len(encoding._mergeable_ranks) + len(data.SPECIAL):
        raise InputError("the numbers of this tokenizer have gaps, which its tokenizer.json would not keep")
    with data.new_folder(to) as made:
        hub.save_torch_state_dict(weights, made)
        save_tokenizer(encoding, made, window)
        (made / "config.json").write_text(json.dumps(config | special | {"eos_token_id": end}, indent=2))
        (made / "generation_config.json").write_text(json.dumps(special | {
            "eos_token_id": [end, turn], "do_sample": True, "temperature": 0.8, "top_p": 0.95}, indent=2))
    if model.config.gate == "softmax" and model.config.n_expert > 1:
        print("note: llama.cpp renormalises the gate softmax, a different model; --gate normalized is exact")
    print(f"{to}: {sum(t.numel() for t in weights.values()):,} parameters")


def save_tokenizer(encoding, folder, max_seq_len):
    """tokenizer.json and tokenizer_config.json, with the chat template.  What looks like a special token
    becomes one there; here it stays text (encode_ordinary)."""
    converter = import_extra("transformers.convert_slow_tokenizer", "hf").TikTokenConverter(
        pattern=encoding._pat_str, extra_special_tokens=data.SPECIAL)
    converter.load_tiktoken_bpe = lambda _: encoding._mergeable_ranks
    converter.converted().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "padding_side": "left",                                   # or a batch of prompts goes on wrongly
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>"),
        "model_max_length": max_seq_len, "chat_template": data.CHAT_TEMPLATE}, indent=2))


def load_hf_weights(folder):
    """{name: tensor} of a folder's safetensors files, mapped into memory: read where it is used."""
    load_file, folder = import_extra("safetensors.torch", "hf").load_file, Path(folder)
    index, files = folder / "model.safetensors.index.json", {"model.safetensors"}
    if index.exists():
        files = data.read_json(index, "an index", lambda saved: set(saved["weight_map"].values()))
    try:
        if not all(file == Path(file).name and (folder / file).is_file() for file in files):
            raise ValueError("its index names what is no file in it")
        return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
    except Exception as error:                                    # SafetensorError is an Exception of its own
        raise InputError(f"{folder} has missing or corrupt safetensors ({error!r})") from None


HF_SIZES = {"vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
            "n_kv_head": "num_key_value_heads", "head_dim": "head_dim", "d_model": "hidden_size",
            "n_expert": "num_experts", "d_expert": "moe_intermediate_size", "top_k": "num_experts_per_tok",
            "norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings",
            "max_seq_len": "max_position_embeddings"}
HF_FIXED = {"model_type": "qwen3_moe", "hidden_act": "silu", "attention_bias": False, "mlp_only_layers": [],
            "decoder_sparse_step": 1, "use_sliding_window": False}
HF_NAMES = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
            "head.weight": "lm_head.weight", "attn_norm.weight": "input_layernorm.weight",
            "attn.out.weight": "self_attn.o_proj.weight", "attn.q_norm.weight": "self_attn.q_norm.weight",
            "attn.k_norm.weight": "self_attn.k_norm.weight",
            "moe_norm.weight": "post_attention_layernorm.weight", "moe.router.weight": "mlp.gate.weight"}


def hf_config(config, top_k=None):
    """config.json of transformers' Qwen3MoeForCausalLM.  InputError for what that model does not have."""
    top_k = config.layer_top_k(top_k)
    known = {*HF_SIZES, "gate", "rope_base"}
    for field in (field for field in fields(config) if field.name not in known):
        if getattr(config, field.name) != field.default:
            raise InputError(f"Qwen3-MoE has no place for {field.name} {getattr(config, field.name)}")
    if len(set(top_k)) > 1 or config.gate not in ("softmax", "normalized"):
        raise InputError(f"Qwen3-MoE: gate softmax or normalized, one top_k; not {config.gate} and {top_k}")
    return {theirs: getattr(config, ours) for ours, theirs in HF_SIZES.items()} | HF_FIXED | {
        "architectures": ["Qwen3MoeForCausalLM"], "dtype": "float32", "num_experts_per_tok": top_k[0],
        "intermediate_size": config.d_expert, "max_window_layers": config.n_layer,    # what mlx-lm asks for
        "norm_topk_prob": config.gate == "normalized", "rope_theta": config.rope_base}


def read_hf_config(folder):
    """config.json of a Qwen3-MoE -> ModelConfig.  InputError lists what we do not have."""
    def convert(saved):
        saved = {"num_experts": saved.get("num_local_experts")} | saved        # its name since transformers 5
        rope = saved.get("rope_parameters") or saved.get("rope_scaling") or {}
        plain = HF_FIXED | {"quantization_config": None}
        wrong = [f"{name} {saved[name]!r}" for name, want in plain.items() if saved.get(name, want) != want]
        if wrong or rope.get("rope_type", rope.get("type", "default")) != "default":
            raise InputError(f"only a plain Qwen3-MoE can be read, not one with {', '.join(wrong) or rope}")
        return ModelConfig(**{ours: saved.get(theirs) for ours, theirs in HF_SIZES.items()},
                           gate="normalized" if saved.get("norm_topk_prob") else "softmax",
                           rope_base=float(rope.get("rope_theta", saved.get("rope_theta", 10000.0))))
    return data.read_json(Path(folder) / "config.json", "that of a plain Qwen3-MoE", convert)


def hf_views(config, name, p):
    """Our parameter p of this name -> {name in transformers' files: view of p with that tensor's layout}.
    Their experts are separate tensors that multiply from the left: transposed slices of ours."""
    prefix = ""
    if name.startswith("blocks."):
        _, layer, name = name.split(".", 2)
        prefix = f"model.layers.{layer}."
    if name == "attn.qkv.weight":
        heads = p.split([n * config.head_dim for n in (config.n_head, config.n_kv_head, config.n_kv_head)])
        return {f"{prefix}self_attn.{n}_proj.weight": view for n, view in zip("qkv", heads)}
    if ".experts." in name:
        parts = ("gate", "up") if name.endswith("w_in") else ("down",)
        return {f"{prefix}mlp.experts.{e}.{n}_proj.weight": view for e, expert in enumerate(p.mT)
                for n, view in zip(parts, expert.chunk(len(parts)))}
    if name not in HF_NAMES:
        raise InputError(f"Qwen3-MoE has no place for the parameter {name}")
    return {prefix + HF_NAMES[name]: p}


def to_hf(model):
    """-> state dict with the names of transformers' Qwen3MoeForCausalLM on disk: one tensor per expert, no
    lm_head when tied.  InputError for selection biases, for which there is no place."""
    buffers = {name: b for name, b in model.named_buffers() if not name.endswith("router.bias") or b.any()}
    if buffers:
        raise InputError(f"Qwen3-MoE has no place for {next(iter(buffers))}: it has no selection biases")
    return {theirs: view.clone(memory_format=torch.contiguous_format)
            for name, p in model.named_parameters()
            for theirs, view in hf_views(model.config, name, p.detach()).items()}


@torch.no_grad()
def from_hf(state, model, put=lambda name, p, whole: p.copy_(whole)):
    """Fill a model from a mapping with transformers' names -> model; put(name, p, whole) fills a parameter.
    InputError, before anything is changed, lists what is missing, unknown or of another shape."""
    wanted = {theirs: tuple(view.shape) for name, p in model.named_parameters()
              for theirs, view in hf_views(model.config, name, torch.empty(p.shape, device="meta")).items()}
    given = {theirs: tuple(tensor.shape) for theirs, tensor in state.items()
             if theirs != "lm_head.weight" or not model.config.tie_embeddings}
    if given != wanted:
        missing, unknown = (sorted(a.items() - b.items())[:9] for a, b in ((wanted, given), (given, wanted)))
        raise InputError(f"these weights do not fit the model, which needs {missing}, not {unknown}")
    if len(given) < len(state) and not state["lm_head.weight"].equal(state["model.embed_tokens.weight"]):
        raise InputError("lm_head.weight is not the embedding, though the configuration ties them")
    for name, p in model.named_parameters():
        whole = torch.empty(p.shape)
        for theirs, view in hf_views(model.config, name, whole).items():
            view.copy_(state[theirs])
        put(name, p, whole)
    return model


# --- averages ---------------------------------------------------------------------------------------------

def average_command(args):
    """Average the weights of checkpoints of a run (arXiv 2507.17634), for eval.py and --init_from."""
    paths, sums = sorted({newest(ckpt).resolve() for ckpt in args.ckpt}), {}
    metas = [parallel.read_meta(path) for path in paths]
    if len(paths) < 2 or len({(path.parent, *meta["top_k"]) for path, meta in zip(paths, metas)}) > 1:
        raise InputError("give two or more step-N folders of one run, with the same K")
    if run_folder(args.to) != Path(args.to):
        raise InputError(f"--to makes a run directory, not a step-N in one: {args.to}")
    for path in paths:
        weights = parallel.training_state(parallel.MasterWeights(load_run(path)[0]))
        sums = {name: t / len(paths) + sums.get(name, 0) for name, t in weights.items()}
    meta = max(metas, key=lambda meta: meta["step"])
    with data.new_folder(args.to) as made:
        for file in ("settings.json", "encoding.json", "log.jsonl"):
            if (paths[0].parent / file).exists():                 # a token file alone has no tokenizer
                shutil.copy(paths[0].parent / file, made)
        parallel.save_checkpoint(made, meta["step"], sums, keep=1, meta=meta)
    print(f"{args.to}: the mean of {len(paths)} checkpoints; python eval.py loss --ckpt {args.to}")


# --- command line -----------------------------------------------------------------------------------------

def main(argv=None):
    parser = data.make_parser(prog="eval.py", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=data.make_parser)

    def command(name, function, run="--ckpt", **kwargs):
        sub = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        sub.set_defaults(function=function)
        sub.add_argument(run, metavar="RUN", help="run directory, or a step-N in it", **kwargs)
        sub.add_argument("--device", default="auto", help="cpu, cuda or mps (default: the best there is)")
        return sub.add_argument

    def numbers(text):
        return [int(k) for k in text.split(",")]

    add = command("loss", loss_command, nargs="+", required=True)
    add("--data", help="folder made by data.py (default: the first run's own)")
    add("--top_k", type=numbers, metavar="K,K", help="a row for each")
    for name, function, opening in ("sample", sample_command, "--prompt"), ("chat", chat_command, "--system"):
        add = command(name, function, required=True)
        add(opening, default="", metavar="TEXT", help="what it begins with")
        add("--tokens", type=int, default=200, help="of a text or answer, at most (200)")
        add("--temperature", type=float, default=0.8, help="0 is greedy (0.8)")
        add("--top_p", type=float, default=0.95, help="keep the likeliest tokens up to this (0.95)")
        add("--seed", type=int, default=0, help="of the sampling (0)")
    add = command("routing", routing_command, "runs", nargs="+")
    add("--data", help="folder made by data.py (default: each run's own)")
    add("--png", metavar="FOLDER", help="draw pictures into this folder (extra plot)")
    command("export", export_command, required=True)("--to", required=True, help="folder, which is made")
    add = command("average", average_command, nargs="+", required=True)
    add("--to", required=True, help="run directory, which is made")
    args = parser.parse_args(argv)
    with data.one_line_errors():
        args.device = parallel.pick_device(args.device)
        args.function(args)


if __name__ == "__main__":
    main()
