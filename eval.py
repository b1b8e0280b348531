"""Look at what a run has learned.

    python eval.py loss    --ckpt out/laptop out/dense             held-out loss, beside a trigram
    python eval.py sample  --ckpt out/laptop --prompt 'def '
    python eval.py chat    --ckpt out/laptop-chat                  a run that was tuned on conversations
    python eval.py routing out/laptop out/other --png pictures     which expert takes which token, how evenly
    python eval.py export  --ckpt out/laptop --to folder           for transformers
    python eval.py bench   --ckpt out/laptop --tasks piqa          lm-evaluation-harness
    python eval.py choices --ckpt out/laptop --file questions.jsonl

A run is a directory that train.py made (its newest checkpoint is taken) or one of the step-N folders in it.
"""

import codecs
import importlib
import json
import math
import os
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

# before torch: OpenMP threads that spin long while they wait make training several times slower on busy cores
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
import parallel
from model import Model, ModelConfig, from_hf_config, hf_config, to_hf
from router import Statistics, load_balancing_loss, noise_floor, zipf_bound

# --- runs -------------------------------------------------------------------------------------------------

def load_run(ckpt, device="cpu", folder=None):
    """-> model, settings.json, K [L].  ValueError if corrupt, or not of the tokenizer of a data folder."""
    path, saved = newest(ckpt), read_settings(run_folder(ckpt))
    if folder:
        same_tokenizer(run_folder(ckpt), folder)
    with torch.device("meta"):
        model = Model(ModelConfig(**saved["model"]))
    model = model.to_empty(device=device)
    model.tie()
    parallel.load_checkpoint(path, parallel.training_state(parallel.Masters(model)))
    top_k = json.loads((path / "meta.json").read_text())["top_k"]    # as trained: --steps may move the switch
    return model.requires_grad_(False), saved, top_k


def run_folder(ckpt):
    """The run directory of itself, or of a step-N folder in it."""
    return Path(ckpt).parent if Path(ckpt).name.startswith("step-") else Path(ckpt)


def newest(ckpt):
    """The newest step-N folder of a run directory; a step-N folder is itself."""
    steps = parallel.checkpoints(ckpt)
    if not steps and Path(ckpt) == run_folder(ckpt):
        raise ValueError(f"{ckpt} has no checkpoint")
    return Path(ckpt) / f"step-{steps[-1]}" if steps else Path(ckpt)


def read_settings(out):
    """settings.json of a run directory.  ValueError if it is none."""
    try:
        saved = json.loads((Path(out) / "settings.json").read_text())
        return saved | {part: dict(saved[part]) for part in ("settings", "model")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{out} is not a directory of train.py ({error})") from None


def read_log(out):
    """log.jsonl of a run: the header, then the logged steps.  A number that was not finite is None."""
    lines = (run_folder(out) / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]         # a crash may cut the last one


def same_tokenizer(out, folder):
    """ValueError if a run (or Hugging Face folder) and a data folder have different tokenizers."""
    files = Path(out) / ("tokenizer.json" if is_hf(out) else "encoding.json"), Path(folder) / "encoding.json"
    if all(file.exists() for file in files):
        theirs, ours = map(data.build_encoding, files)
        if (theirs._mergeable_ranks, theirs._pat_str) != (ours._mergeable_ranks, ours._pat_str):
            raise ValueError(f"the tokenizer of {out} is not that of {folder}")


def open_data(ckpt, source=None):
    """-> settings of a run; folder, tokenizer, training tokens and held-out sampler of its data or source."""
    s = read_settings(run_folder(ckpt))["settings"]
    source = Path(source or s["data"])
    folder, train = (source.parent, source) if source.is_file() else (source, source / "train.bin")
    if train.name == "val.bin" or not (folder / "val.bin").exists():
        raise ValueError(f"{source} has no held-out text (val.bin); --data takes a folder made by data.py")
    val = data.make_sampler(data.load_tokens(folder / "val.bin"), folder / "val.bin", s["seq_len"])
    return s, folder, data.load_encoding(folder), data.load_tokens(train), val


# --- loss -------------------------------------------------------------------------------------------------

@torch.no_grad()
def validate(model, sampler, top_k, device="cpu", limit=None, rows=32, grid=parallel.ALONE):
    """Cross-entropy over a sampler's windows, evenly spread if there are more than `limit` tokens; `rows` of
    them at a time on each rank -> nats per target, Statistics of all layers, indices of the windows."""
    n, sums, statistics = sampler.n_windows, 0, None
    many = min(n, max(1, (limit or n * sampler.seq_len) // sampler.seq_len))
    if rows < many < n:
        many -= many % rows                                       # full batches: another shape compiles anew
    windows = np.unique(np.linspace(0, n - 1, many).astype(int))
    for a in range(0, len(windows), rows * grid.world):
        mine = np.array_split(windows[a:a + rows * grid.world], grid.world)[grid.rank]
        tokens, targets, *doc = (t.to(device) for t in sampler.batch(mine))
        out = model(tokens, targets, top_k, *doc)
        sums = sums + torch.stack([out.loss.double(), out.counts[0].double()])
        statistics = Statistics(*map(torch.add, statistics, out.statistics)) if statistics else out.statistics
    (loss, n_targets), *statistics = parallel.all_sum(grid, [sums, *statistics])
    return (loss / n_targets.clamp(min=1)).item(), Statistics(*statistics), windows


def compare_losses(ckpts, source=None, device="cpu", top_ks=None):
    """Baselines and runs on the same held-out text (or answers), cut as the first run was trained; a row for
    each K in top_ks -> rows (name, nats, perplexity, bits per byte), number of targets, folder of data."""
    (_, folder, encoding, train, val), losses = open_data(ckpts[0], source), []
    for ckpt in ckpts:
        model, _, top_k = load_run(ckpt, device, folder)
        for k in top_ks or [top_k]:
            loss, _, windows = validate(model, val, k, device)
            losses.append((f"{ckpt}, K {k}" if top_ks else str(ckpt), loss))
    places = val.places(windows)
    places = places[places > 1]                                   # a trigram needs two tokens
    prob = Trigram(train, encoding.n_vocab).prob(val.tokens)[places - 2]
    rows = [("uniform over the vocabulary", math.log(encoding.n_vocab)),
            ("interpolated trigram", float(-np.log(prob).mean())), *losses]
    targets = val.tokens[places]
    text = targets[targets < encoding.n_vocab - len(data.SPECIAL)]       # special tokens stand for no bytes
    per_byte = len(targets) / len(encoding.decode_bytes(text.tolist())) / math.log(2)
    return [(name, loss, math.exp(loss), loss * per_byte) for name, loss in rows], len(targets), folder


def loss_command(args):
    """Cross-entropy on held-out text, beside baselines and other runs."""
    rows, n, folder = compare_losses(args.ckpt, args.data, args.device, args.top_k)
    print(f"{n:,} held-out tokens of {folder}\n{'':32} nats/token perplexity bits/byte")
    for name, loss, perplexity, bits in rows:
        print(f"{name[-32:]:32} {loss:10.4f} {perplexity:10.1f} {bits:9.4f}")


class Trigram:
    """An interpolated Kneser-Ney trigram (Chen and Goodman 1999, eq. 24): to beat without a network.

    p(c|ab) = max(n(abc) - d, 0) / n(ab) + d N(ab) / n(ab) * p(c|b), where N counts distinct successors;
    p(c|b) is the same with every count replaced by the number of distinct tokens before it; p(c) likewise,
    and below it the uniform 1/V.  d = n1 / (n1 + 2 n2), from how many n-grams occur once and twice."""

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

    def level(self, table, asked, context, lower):
        """One order: (n-grams, counts), the n-grams asked for, their contexts, the lower order's answer."""
        grams, counts = table
        d = (counts == 1).sum() / max(1, (counts == 1).sum() + 2 * (counts == 2).sum())
        contexts, start = np.unique(grams // self.V, return_index=True)        # 0: the empty one
        total, distinct = np.add.reduceat(counts, start), np.diff(np.append(start, len(grams)))
        n, (m, k) = lookup(grams, counts, asked), (lookup(contexts, x, context) for x in (total, distinct))
        return np.where(m > 0, (np.maximum(n - d, 0) + d * k * lower) / np.maximum(m, 1), lower)


def lookup(keys, values, asked):
    """values of the asked keys, 0 where there is none; keys are sorted."""
    at = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[at] == asked, values[at], 0)


# --- text -------------------------------------------------------------------------------------------------

def generate_text(model, encoding, rows, max_new_tokens, top_k, temperature=0.8, top_p=0.95, generator=None,
                  compiled=None):
    """Continue rows of tokens, each up to <|endoftext|> or <|end|>: yields what every text grows by."""
    stop = tuple(encoding.encode_single_token(token) for token in ("<|endoftext|>", "<|end|>"))
    known = set(encoding._mergeable_ranks.values())               # neither special tokens nor unused ids
    tokens = pad_sequence(list(map(torch.tensor, rows)), batch_first=True).to(model.embed.weight.device)
    lengths = torch.tensor([len(row) for row in rows], device=tokens.device) if len(rows) > 1 else None
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in rows]   # of characters cut in two
    for column in model.stream(tokens, max_new_tokens, temperature, top_p, top_k, stop, generator, lengths,
                               compiled):
        pieces = [encoding.decode_single_token_bytes(t) if t in known else b"" for t in column.tolist()]
        yield [decoder.decode(piece) for decoder, piece in zip(decoders, pieces)]
    yield [decoder.decode(b"", final=True) for decoder in decoders]


def sample_command(args):
    """Continue a prompt, from the beginning of a document."""
    model, _, top_k = load_run(args.ckpt, args.device)
    encoding = data.load_encoding(run_folder(args.ckpt))
    tokens = [encoding.encode_single_token("<|endoftext|>"), *encoding.encode_ordinary(args.prompt)]
    generator = torch.Generator(args.device).manual_seed(args.seed)
    print(args.prompt, *(piece for piece, in generate_text(
        model, encoding, [tokens], args.tokens, top_k, args.temperature, args.top_p, generator)), sep="")


def chat_command(args):
    """Talk with a run that was tuned on conversations; in a pipe, one question a line."""
    note = partial(print, file=sys.stderr, flush=True)            # stdout takes the answers alone
    model, saved, top_k = load_run(args.ckpt, args.device)
    encoding, window = data.load_encoding(run_folder(args.ckpt)), saved["settings"]["seq_len"]
    max_new_tokens = min(args.tokens, window // 2)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    messages = system = [("system", args.system)] if args.system else []
    note("/reset starts anew, /quit or Ctrl-D ends, Ctrl-C stops an answer")
    if Path(saved["settings"]["data"]).exists() and not data.holds_chats(saved["settings"]["data"]):
        note(f"{args.ckpt} was not tuned on conversations: expect no answers")
    with suppress(EOFError, KeyboardInterrupt):
        while (line := input("> " if sys.stdin.isatty() else "").strip()) != "/quit":
            if line == "/reset":
                messages = system
            if line in ("", "/reset"):
                continue
            for before in (messages, system):                     # when that is full, it begins anew
                question, answer = [*before, ("user", line)], ""
                tokens = data.encode_chat(encoding, question, answer=True)
                if len(tokens) + max_new_tokens <= window:
                    break
            else:
                note(f"{len(tokens)} tokens leave no room in {window} for an answer")
                continue
            if before is not messages:
                note("the conversation was full: it begins anew with this question")
            with suppress(KeyboardInterrupt):
                for piece, in generate_text(model, encoding, [tokens], max_new_tokens, top_k,
                                            args.temperature, args.top_p, generator):
                    print(piece, end="", flush=True)
                    answer += piece
            print(flush=True)
            messages = [*question, ("assistant", answer)]


# --- routing ----------------------------------------------------------------------------------------------

def snapshot(ckpt, source=None, device="cpu", limit=1 << 20):
    """Route the held-out tokens (at most `limit`) of a run's own data, or of another folder."""
    s, folder, encoding, train, val = open_data(ckpt, source)
    (model, _, top_k), chosen = load_run(ckpt, device, folder), []
    for block in model.blocks:
        chosen.append([])
        block.moe.router.register_forward_hook(
            lambda m, x, routing, seen=chosen[-1]: seen.append(routing.experts[:, 0].cpu()))
    loss, statistics, windows = validate(model, val, top_k, device, limit)
    tokens, _, *doc = val.batch(windows)
    is_text = (doc[0] if doc else tokens).flatten() >= 0          # the routers saw padding, too
    return SimpleNamespace(
        name="/".join(Path(ckpt).parts[-2:]), loss=loss, top_k=top_k, encoding=encoding,
        tokens_per_step=s["batch_size"] * s["seq_len"],
        rows=[row for row in read_log(ckpt)[1:] if row["step"] <= int(newest(ckpt).name[len("step-"):])],
        statistics=Statistics(*(t.cpu() for t in statistics)),    # [L, ..]
        tokens=tokens.flatten()[is_text],                           # [N]
        experts=torch.stack([torch.cat(seen)[is_text] for seen in chosen]),      # [L, N]: the best of K
        top_share=float(np.bincount(train[:10 ** 7]).max() / len(train[:10 ** 7])))   # of the commonest token


def routing_command(args):
    """Which expert takes which token, and how evenly: text, and with --png pictures."""
    if args.png:                                                  # before minutes of work
        Figure = import_extra("matplotlib.figure", "plot").Figure
        Path(args.png).mkdir(parents=True, exist_ok=True)
    runs = [snapshot(ckpt, args.data, args.device) for ckpt in args.runs]
    print(*map(describe_routing, runs), sep="\n\n")
    pictures = {"load": draw_load_map, "deviation": draw_deviation, "gate": draw_gate, "switch": draw_switch}
    for name, draw in pictures.items() if args.png else ():
        draw(Figure, runs).savefig(Path(args.png) / f"{name}.png")
        print(f"drawn: {args.png}/{name}.png")


def describe_routing(run):
    """One run as text."""
    sums, n, V = run.statistics, len(run.tokens), int(run.tokens.max()) + 1
    L, E = sums.load.shape
    chance = " and ".join(f"{100 * x:+.0f}" for x in noise_floor(n, E, run.top_k[0]))
    lbl, words = load_balancing_loss(sums.load, sums.prob_sum, n), []
    lines = [f"{run.name}: held-out loss {run.loss:.4f}, load of every expert on {n:,} tokens.  In layer 0",
             f"{chance} % are chance, and a router by token id has at least "
             f"{100 * zipf_bound(run.top_share, E, run.top_k[0]):+.0f} %:",
             draw_load(sums.load), "", "layer   K     LBL   top-1 p   entropy   routed by context"]
    for layer in range(L):
        # [V, E]: how often each token id went to each expert; an id seen once says nothing of context
        counts = torch.bincount(run.tokens * E + run.experts[layer], minlength=V * E).view(V, E)
        often = counts[counts.sum(-1) > 1]
        context = 100 - 100 * often.amax(-1).sum() / often.sum()  # go elsewhere than most of their id
        lines.append(f"{layer:>5} {run.top_k[layer]:>3} {lbl[layer]:7.3f} {sums.top_sum[layer] / n:9.3f} "
                     f"{sums.entropy_sum[layer] / n:9.2f} {context:17.0f} %")
        if layer in (0, L - 1):
            words += ["", f"layer {layer}, its three most and two least used experts, and their tokens:"]
            order = counts.sum(0).argsort(descending=True, stable=True).tolist()
            for e in dict.fromkeys(order[:3] + order[-2:]):
                total, (count, token) = counts[:, e].sum(), counts[:, e].topk(min(4, V))
                words.append(f"  expert {e:<3} {100 * total / n:4.1f} % " + "".join(
                    f" {run.encoding.decode([t])!r} {100 * c / total:.0f} %"
                    for c, t in zip(count.tolist(), token.tolist()) if c))
    return "\n".join(lines + words)


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


# --- pictures (extra: plot) -------------------------------------------------------------------------------

def draw_load_map(Figure, runs):
    """Layers x experts, one panel for each run: load relative to a fair share."""
    figure = Figure(figsize=(9, 3 * len(runs)), layout="constrained")
    for axis, run in zip(figure.subplots(len(runs), squeeze=False)[:, 0], runs):
        share = run.statistics.load / run.statistics.load.sum(-1, keepdim=True)
        image = axis.imshow((share * share.shape[1]).numpy(), aspect="auto", cmap="RdBu_r", vmin=0, vmax=2)
        axis.set(title=run.name, ylabel="layer", xlabel="expert")
    figure.colorbar(image, ax=figure.axes, extend="max", label="load / fair share")
    return figure


def draw_deviation(Figure, runs):
    """Largest and smallest deviation of the load over time (arXiv 2512.16248, Figures 2a, 3 and 4)."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for axis, layer in zip(figure.subplots(1, 2, sharey=True), (0, -1)):
        for color, run in enumerate(runs):
            for side, label in (("load_max", run.name), ("load_min", None)):
                axis.plot([row["step"] for row in run.rows], [100 * row[side][layer] for row in run.rows],
                          color=f"C{color}", lw=1, label=label)
        run, E = runs[0], runs[0].statistics.load.shape[1]
        high, low = noise_floor(run.tokens_per_step, E, run.top_k[layer])
        axis.axhspan(100 * low, 100 * high, color="0.85", label=f"chance in a step of {run.name}")
        axis.axhline(100 * zipf_bound(run.top_share, E, 1), color="k", ls=":", label="Zipf bound, K = 1")
        axis.set(title="last layer" if layer else "layer 0", xlabel="step", ylabel="% from a fair share")
        axis.set_yscale("symlog", linthresh=300, linscale=3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def draw_gate(Figure, runs):
    """Share of tokens f and mean probability p of each expert (Figures 2b and 2c)."""
    figure = Figure(figsize=(9, 3 * len(runs)), layout="constrained")
    for row, run in zip(figure.subplots(len(runs), 2, squeeze=False), runs):
        for axis, layer in zip(row, (0, -1)):
            f = run.statistics.load[layer] / run.statistics.load[layer].sum()
            p = run.statistics.prob_sum[layer] / len(run.tokens)
            axis.plot(f.numpy(), color="C0", lw=1, label="f, share of the tokens")
            axis.plot(p.numpy(), color="C3", lw=1.4, label="p, mean probability")
            axis.set(title=f"{run.name}, layer {layer % len(run.top_k)}: LBL {len(f) * (f * p).sum():.2f}",
                     xlabel="expert", ylim=(0, None))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def draw_switch(Figure, runs):
    """Held-out loss over time; dashed where a run switched to fewer experts."""
    axis = Figure(figsize=(9, 3.8), layout="constrained").subplots()
    for color, run in enumerate(runs):
        val = [(row["step"], row["val_loss"]) for row in run.rows if row.get("val_loss")]
        axis.plot([step for step, _ in val], [loss for _, loss in val], f"C{color}.-", label=run.name)
        changes = [a["step"] for a, b in zip(run.rows, run.rows[1:]) if a["top_k"] != b["top_k"]]
        axis.vlines(changes, 0, 1, f"C{color}", "--", transform=axis.get_xaxis_transform())
    axis.set(title="dashed: the switch to fewer experts", xlabel="step", ylabel="held-out nats per token")
    axis.legend()
    return axis.figure


# --- Hugging Face -----------------------------------------------------------------------------------------

def import_extra(module, extra):
    """Import a module of an optional extra.  ValueError says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"no {module.split('.')[0]} ({error}): pip install -e '.[{extra}]'") from None


def export_command(args):
    """Write a folder that transformers' AutoModelForCausalLM and AutoTokenizer load."""
    hub, to = import_extra("huggingface_hub", "hf"), Path(args.to)
    model, _, top_k = load_run(args.ckpt)
    encoding, config = data.load_encoding(run_folder(args.ckpt)), hf_config(model.config, top_k)
    end, turn = (encoding.encode_single_token(token) for token in ("<|endoftext|>", "<|end|>"))
    special, weights = {"bos_token_id": end, "pad_token_id": end}, to_hf(model)
    if encoding.n_vocab != len(encoding._mergeable_ranks) + len(data.SPECIAL):
        raise ValueError("the numbers of this tokenizer have gaps, which its tokenizer.json would not keep")
    to.mkdir(parents=True)                                        # FileExistsError: nothing is overwritten
    hub.save_torch_state_dict(weights, to)
    save_tokenizer(encoding, to, model.config.max_seq_len)
    (to / "config.json").write_text(json.dumps(config | special | {"eos_token_id": end}, indent=2))
    (to / "generation_config.json").write_text(json.dumps(special | {"eos_token_id": [end, turn]}, indent=2))
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
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>"),
        "model_max_length": max_seq_len, "chat_template": data.CHAT_TEMPLATE}, indent=2))


def is_hf(folder):
    """Whether a folder is a model of Hugging Face, and not a run."""
    return (Path(folder) / "config.json").exists() and not (Path(folder) / "settings.json").exists()


def read_hf_config(folder):
    """config.json of a Hugging Face folder -> ModelConfig.  ValueError if impossible."""
    try:
        return ModelConfig(**from_hf_config(json.loads((Path(folder) / "config.json").read_text())))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{folder}/config.json cannot be read: {error}") from None


def load_hf_weights(folder):
    """{name: tensor} of a folder's safetensors files, mapped into memory: read where it is used."""
    load_file, folder = import_extra("safetensors.torch", "hf").load_file, Path(folder)
    path, weights, files = folder / "model.safetensors.index.json", {}, ["model.safetensors"]
    try:
        files = json.loads(path.read_text())["weight_map"].values() if path.exists() else files
        for path in (folder / file for file in sorted(set(files))):
            weights |= load_file(path)
    except Exception as error:                                    # SafetensorError is an Exception of its own
        raise ValueError(f"{path} is missing or corrupt ({error!r}); pickles are not read") from None
    return weights


# --- benchmarks -------------------------------------------------------------------------------------------

@torch.no_grad()
def log_likelihoods(model, pairs, top_k=None, rows=32):
    """[(context, continuation)] in tokens -> [(log-probability in nats, whether it is the greedy one)].  As
    in lm-evaluation-harness the front of what is too long is cut; padding is on the right."""
    window, device, found = model.config.max_seq_len, model.embed.weight.device, [None] * len(pairs)
    if any(len(continuation) > window for _, continuation in pairs):
        raise ValueError(f"a continuation is longer than max_seq_len ({window})")
    sequences = [(context + continuation)[-window - 1:] for context, continuation in pairs]
    order = sorted(range(len(pairs)), key=lambda i: -len(sequences[i]))
    for a in tqdm(range(0, len(order), rows), "scoring", disable=len(order) <= rows):
        batch = order[a:a + rows]
        tokens = pad_sequence([torch.tensor(sequences[i][:-1]) for i in batch], batch_first=True)
        for x, i in zip(model.features(tokens.to(device), top_k)[0], batch):
            end, target = len(sequences[i]) - 1, torch.tensor(pairs[i][1], device=device)
            log_prob = model.head(x[None, end - len(target):end])[0].log_softmax(-1)
            chosen = log_prob.gather(1, target[:, None])[:, 0].tolist()
            found[i] = sum(chosen), bool((log_prob.argmax(-1) == target).all())
    return found


def choices_command(args):
    """Multiple choice without the harness: lines of {context, choices, answer: number from 0}."""
    model, _, top_k = load_run(args.ckpt, args.device)
    encoding, questions, pairs, right = data.load_encoding(run_folder(args.ckpt)), [], [], []
    for where, line in data.read_lines(Path(args.file)):
        question = None
        with suppress(ValueError, RecursionError):
            question = json.loads(line.decode("utf-8-sig"))
        match question:
            case {"context": str(context), "choices": [*choices], "answer": int(answer)} if (
                    all(isinstance(c, str) and c for c in choices) and answer in range(len(choices))):
                questions.append((choices, answer))
            case _:
                raise ValueError(f"{where} needs a context, choices, and as answer the number of one")
        for choice in choices:                   # as in the harness: a context's last spaces are the choice's
            tokens = encoding.encode_ordinary(f"{context} {choice}")
            n = len(encoding.encode_ordinary(context.rstrip()))
            pairs.append((tokens[:n] or [encoding.encode_single_token("<|endoftext|>")], tokens[n:]))
    if not questions:
        raise ValueError(f"{args.file} has no question")
    scores = iter(log_likelihoods(model, pairs, top_k))
    for choices, answer in questions:
        score, sizes = np.array([next(scores)[0] for _ in choices]), list(map(len, choices))
        right.append([score.argmax() == answer, (score / sizes).argmax() == answer])
    acc, acc_norm = np.mean(right, 0)
    print(f"{len(right):,} questions: acc {acc:.4f}, acc_norm {acc_norm:.4f} (log-probability / characters)")


def adapter(model, encoding, top_k=None):
    """The model as lm-evaluation-harness's LM."""
    utils, models = (import_extra(name, "eval") for name in ("lm_eval.utils", "lm_eval.models.utils"))
    window, end = model.config.max_seq_len, encoding.encode_single_token("<|endoftext|>")

    class Nanosigma(import_extra("lm_eval.api.model", "eval").TemplateLM):
        eot_token_id = end

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return encoding.encode_ordinary(string)

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
            return log_likelihoods(model, [pair for _, *pair in requests], top_k)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            texts = [encoding.encode_ordinary(request.args[0]) for request in requests]
            return [sum(score for score, _ in log_likelihoods(model, list(map(
                utils.make_disjoint_window, utils.get_rolling_token_windows(text, end, window, 1))), top_k))
                for text in texts]

        def generate_until(self, requests, disable_tqdm=False, rows=64):
            """The front of a prompt that is too long is cut; at most half of the context is written."""
            groups = models.Collator([request.args for request in requests], lambda args: -len(args[0]),
                                     lambda args: args[1], group_by="gen_kwargs")
            found = []
            for batch in groups.get_batched(n=rows):
                how = models.normalize_gen_kwargs(batch[0][1])
                if unknown := how.keys() - {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}:
                    raise ValueError(f"{', '.join(unknown)} is not supported")
                until, new = list(filter(None, how["until"])), min(how["max_gen_toks"], window // 2)
                prompts = [encoding.encode_ordinary(text)[new - window:] or [end] for text, _ in batch]
                temperature, texts = how.get("temperature", 0) * how["do_sample"], [""] * len(batch)
                # eager: every batch has a shape of its own, which would compile anew
                for pieces in generate_text(model, encoding, prompts, new, top_k, temperature,
                                            how.get("top_p", 1.0), compiled=False):
                    texts = [text + piece for text, piece in zip(texts, pieces)]
                    if all(any(stop in text for stop in until) for text in texts):
                        break
                found += [min((text.split(s)[0] for s in until), key=len, default=text) for text in texts]
            return groups.get_original(found)

    return Nanosigma()


def bench_command(args):
    """Tasks of lm-evaluation-harness (extra eval)."""
    harness, tasks, utils = (import_extra(f"lm_eval{name}", "eval") for name in ("", ".tasks", ".utils"))
    manager = tasks.TaskManager(include_path=args.include_path)
    model, saved, top_k = load_run(args.ckpt, args.device)
    lm = adapter(model, data.load_encoding(run_folder(args.ckpt)), top_k)
    results = {"arguments": vars(args), "ckpt": newest(args.ckpt), "top_k": top_k, "model": saved["model"],
               "versions": [torch.__version__, harness.__version__]}
    out = run_folder(args.ckpt) / time.strftime("bench-%Y%m%d-%H%M%S.json")
    for name in args.tasks.split(","):
        try:
            results[name] = harness.simple_evaluate(
                lm, tasks=[name], num_fewshot=args.shots, limit=args.limit, task_manager=manager,
                log_samples=False, confirm_run_unsafe_code=args.confirm_run_unsafe_code)
        except Exception as error:                                # of a question, a package, the network ..
            raise ValueError(f"task {name} cannot be run ({type(error).__name__}: {error})") from None
        out.write_text(json.dumps(results, indent=1, default=str))
        print(utils.make_table(results[name]))
    print(f"every setting and result is in {out}")


# --- command line -----------------------------------------------------------------------------------------

def main(argv=None):
    parser = data.Parser(prog="eval.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, function, run="--ckpt", **kwargs):
        sub = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        sub.set_defaults(function=function)
        sub.add_argument(run, metavar="RUN", help="run directory, or a step-N in it", **kwargs)
        sub.add_argument("--device", default="auto", help="cpu, cuda or mps (default: the best there is)")
        return sub.add_argument

    add = command("loss", loss_command, nargs="+", required=True)
    add("--data", help="folder made by data.py (default: the first run's own)")
    add("--top_k", type=lambda text: [int(k) for k in text.split(",")], metavar="K,K", help="a row for each")
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
    command("choices", choices_command, required=True)("--file", required=True, help="questions: .jsonl")
    add = command("bench", bench_command, required=True)
    add("--tasks", required=True, metavar="A,B,..", help="names of the harness, or of --include_path")
    add("--include_path", metavar="FOLDER", help="the harness's own: YAML files of more tasks")
    add("--limit", type=int, help="the first questions of each task only")
    add("--shots", type=int, help="examples before each question (default: the task's)")
    add("--confirm_run_unsafe_code", action="store_true", help="run what the model wrote, on your machine")
    args = parser.parse_args(argv)
    with data.one_line_errors():
        args.device = parallel.pick_device(args.device)
        args.function(args)


if __name__ == "__main__":
    main()
