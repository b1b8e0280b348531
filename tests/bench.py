"""Speed, beside transformers, a dense model and what the machine can do at most.

    python tests/bench.py                                       every table; needs .[test,hf]
    python tests/bench.py step --sizes medium --top_k 1 --rounds 9

    step        a whole training step, beside transformers and a dense model
    scale       arithmetic: the paper's model on many GPUs
    gpu         what one card does, in four minutes: steps, compile time, memory, generation

The candidates of a table run in turn in one process, so that a noisy machine is noisy for all of them.  A
time is the median of the rounds: process CPU time of one thread, or device events on a GPU; a ratio is the
median of the rounds' ratios.  fp32 on a CPU, bf16 on a GPU.  Never a test: nothing here passes or fails.
"""

import argparse
import datetime
import gc
import itertools
import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent))             # also without an install
import parallel
import train
from eval import generate, hf_config, to_hf
from model import PRESETS, Model, ModelConfig, count_parameters, flops_per_token

# sizes, sequences per step and tokens per sequence
SIZES = {
    "laptop": (PRESETS["laptop"], 32, 256),
    "medium": (ModelConfig(vocab_size=8192, n_layer=8, n_head=8, n_kv_head=4, head_dim=32, d_model=256,
                           n_expert=96, d_expert=128, tie_embeddings=True, max_seq_len=512), 8, 512),
    "paper": (replace(PRESETS["sigma-moe-tiny"], n_layer=1, vocab_size=8192, tie_embeddings=True,
                      max_seq_len=512), 8, 512)}                 # one layer of the paper's, a small head


def dense(config):
    """The model with one expert that has as many FLOPs as the active ones together, and nothing to route."""
    return replace(config, n_expert=1, top_k=1, d_expert=config.d_expert * config.top_k)


class Tokens:
    """What train_step asks a sampler for: tokens as frequent as words are (1 / rank)."""

    def __init__(self, vocab_size, seq_len):
        self.frequency, self.seq_len = 1 / torch.arange(1, vocab_size + 1, dtype=torch.float64), seq_len

    def rows(self, first, count, rank=0, world=1):
        generator = torch.Generator().manual_seed(first)
        rows = torch.multinomial(self.frequency, count * (self.seq_len + 1), True, generator=generator)
        rows = rows.view(count, -1)[count * rank // world:count * (rank + 1) // world]
        return rows[:, :-1], rows[:, 1:]


# --- timing -----------------------------------------------------------------------------------------------

def seconds(work, device):
    """How long work() takes."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    began = time.process_time()
    work()
    return time.process_time() - began


def interleave(candidates, args):
    """{name: work} -> {name: seconds of each round}.  The first rounds, which fill caches, do not count."""
    rounds = [[seconds(work, args.device) for work in candidates.values()]
              for _ in range(args.warm + args.rounds)]
    return dict(zip(candidates, zip(*rounds[args.warm:])))


def ratio(times, others):
    """Median of others / times over the rounds, with the least and the most."""
    each = [b / a for a, b in zip(times, others)]
    return f"{median(each):.2f} ({min(each):.2f} to {max(each):.2f})"


def table(title, head, rows):
    print(f"\n### {title}\n| " + " | ".join(head) + " |\n" + "| --- " * len(head) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


SIDE = {"cpu": 2048, "cuda": 8192}                                # of the matrices of a large product


def our_run(config, batch, seq_len, dtype, device, **changes):
    """A train.Run on made-up tokens; on a GPU in bf16 compiled, as train.py has it."""
    s = train.Settings(steps=10 ** 6, batch_size=batch, seq_len=seq_len, dtype=str(dtype)[6:], lr=1e-4,
                       warmup=0, decay=0, **changes)
    model = parallel.build_model(config, parallel.SINGLE_PROCESS, device, dtype, 0)
    masters = parallel.MasterWeights(model, dtype)
    _, compiled = train.precision(s, config, device)
    parallel.compile_and_recompute(model, masters, compiled, s.activation_checkpointing)
    optimizer = parallel.make_optimizer(
        masters, s.optimizer, s.lr, (s.beta1, s.beta2), s.weight_decay, s.momentum)
    corpus = train.Corpus(Tokens(config.vocab_size, seq_len))
    return train.Run(s, config, model, masters, optimizer, corpus, device, dtype)


def our_step(run):
    """A training step of this project: train.train_step as it is."""
    steps = itertools.count()
    return lambda: train.train_step(run, next(steps))


def transformers_model(config, device):
    """Qwen3MoeForCausalLM with the weights that ours is initialised with, its experts grouped products."""
    import transformers
    from safetensors.torch import save_file
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(hf_config(config)))
        save_file(to_hf(Model(config, 0)), Path(folder) / "model.safetensors", metadata={"format": "pt"})
        model = transformers.Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    model.set_experts_implementation("grouped_mm")
    return model


class AllCopied(parallel.MasterWeights):
    """MasterWeights for transformers in bf16: routers and norms have copies too, as its code wants them."""

    def __init__(self, model, dtype):
        self.model, self.named, self.copies = model, dict(model.named_parameters()), []
        for name, p in model.named_parameters() if dtype != torch.float32 else ():
            self.add_master(name, p, dtype)


def their_step(config, batch, seq_len, dtype, device):
    """A training step of transformers' model and balance loss, with our optimizer, clipping, fp32 masters."""
    sampler, steps = Tokens(config.vocab_size, seq_len), itertools.count()
    model = transformers_model(config, device)
    masters = AllCopied(model, dtype)
    optimizer = parallel.make_optimizer(masters, "adamw", 1e-4, (0.9, 0.95), 0.1)

    def step():
        tokens = sampler.rows(next(steps) * batch, batch)[0].to(device)
        model(input_ids=tokens, labels=tokens, use_cache=False, output_router_logits=True).loss.backward()
        update(masters, optimizer)
    return step


def update(masters, optimizer):
    parallel.clip_gradients(masters, 1.0)
    optimizer.step()
    masters.refresh()
    optimizer.zero_grad(set_to_none=True)


def bench_step(args):
    dtype, device = torch.bfloat16 if args.device == "cuda" else torch.float32, args.device
    for size, top_k in itertools.product(args.sizes, args.top_k):
        config, batch, seq_len = SIZES[size]
        config = replace(config, top_k=top_k)
        a, b, out = (torch.randn(SIDE[device], SIDE[device], device=device).to(dtype) for _ in range(3))
        times = interleave({
            "limit": partial(torch.mm, a, b, out=out),
            "ours": our_step(our_run(config, batch, seq_len, dtype, device)),
            "transformers": their_step(config, batch, seq_len, dtype, device),
            "dense": our_step(our_run(dense(config), batch, seq_len, dtype, device))}, args)
        # the limit: as many FLOPs at the rate of one large product
        scale = flops_per_token(config, seq_len) * batch * seq_len / (2 * SIDE[device] ** 3)
        times["limit"] = [scale * t for t in times["limit"]]
        table(f"step, {size}, K = {top_k}, {batch * seq_len:,} tokens", ("candidate", "ms", "times ours"), [
            (name, f"{median(each) * 1e3:.1f}", ratio(times["ours"], each)) for name, each in times.items()])
        gc.collect()


def optimizer_share(run, steps=5):
    """Median over some steps of the time in clipping, AdamW and the copies, as a part of the whole."""
    shares = []
    for i in range(steps):
        whole = seconds(partial(train.train_step, run, i), run.device)
        for p in run.masters.named.values():
            p.grad = torch.zeros_like(p)
        shares.append(seconds(partial(update, run.masters, run.optimizer), run.device) / whole)
    return median(shares)


def ten_kernels(work, device):
    """-> lines: the ten kernels (on a CPU, operations) that take most of work(), with their part of it."""
    with torch.profiler.profile() as profile:
        seconds(work, device)
    kind = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    took = {event.key: getattr(event, kind) for event in profile.key_averages()
            if event.device_type.name.lower() == device}
    return [f"    {took[name] / sum(took.values()):6.1%}  {name[:90]}"
            for name in sorted(took, key=took.get, reverse=True)[:10]]


def bench_gpu(args):
    """One command for whoever has a card.  On a CPU the same with the laptop preset, to see that it runs."""
    card = args.device == "cuda"
    paper = replace(PRESETS["sigma-moe-tiny"], n_layer=6, vocab_size=8192, tie_embeddings=True)
    small = replace(PRESETS["laptop"], n_layer=2)
    cases = {"gpu, as python train.py runs it": (PRESETS["gpu"], 64, 1024, 1, "muon"),
             "gpu with AdamW": (PRESETS["gpu"], 64, 1024, 1, "adamw"),
             "gpu-1b": (PRESETS["gpu-1b"], 64, 1024, 1, "adamw"),
             "6 layers of the paper's": (paper, 64, 4096, 4, "adamw"),
             "dense of equal active FLOPs": (dense(paper), 64, 4096, 4, "adamw")}
    table("one card, bf16, compiled", ("what", "tokens a step", "ms", "tokens/s", "MFU", "optimizer",
                                       "peak GiB", "first step, s"), [])
    kernels = []
    for name, (config, batch, seq_len, micro, optimizer) in cases.items():
        config, batch, seq_len = (config, batch, seq_len) if card else (small, 8, 64)
        run = our_run(config, batch, seq_len, torch.bfloat16, args.device, accumulate=micro,
                      optimizer=optimizer)
        work, tokens, began = our_step(run), batch * seq_len, time.perf_counter()
        work()
        if card:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        first = time.perf_counter() - began
        took = median(interleave({"": work}, args)[""])
        memory = torch.cuda.max_memory_allocated() / 2 ** 30 if card else 0
        mfu = train.utilisation(run, config.layer_top_k(), tokens / took)
        print(f"| {name} | {tokens:,} in {micro} | {took * 1e3:.1f} | {tokens / took:,.0f} | "
              f"{f'{mfu:.1%}' if mfu else 'unknown'} | "
              f"{optimizer_share(run):.0%} | {memory:.1f} | {first:.0f} |", flush=True)
        kernels = ten_kernels(work, args.device) if name == "gpu-1b" else kernels
        del run, work
        gc.collect()
    print("\nof a step of gpu-1b", *kernels, sep="\n")
    config, batch, seq_len = (PRESETS["gpu-1b"], 16, 1024) if card else (small, 8, 64)
    model = Model(config, 0).to(args.device, torch.bfloat16)
    for rows in 1, 32:
        prompt = torch.randint(0, 2000, (rows, 32), device=args.device)
        times = interleave({"": partial(generate, model, prompt, 128, temperature=0)}, args)[""]
        print(f"\ngenerate, 32 tokens + 128, {rows} sequences: {rows * 128 / median(times):,.0f} tokens/s")
    what = config, batch, seq_len, torch.bfloat16, args.device
    times = interleave({"ours": our_step(our_run(*what)), "transformers": their_step(*what)}, args)
    print(f"\ntransformers grouped_mm / ours, {batch * seq_len:,} tokens: "
          f"{ratio(times['ours'], times['transformers'])}")


# --- many processes ---------------------------------------------------------------------------------------

class Traffic(TorchDispatchMode):
    """Bytes that this rank sends to others, by kind: as a ring sends them, and rows to each their rank."""

    def __init__(self):
        super().__init__()
        self.sent = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("c10d::")
        if name == "_c10d_functional::all_to_all_single":
            rows, _, splits, group = args
            stays = splits[dist.distributed_c10d._resolve_process_group(group).rank()] * rows[:1].nbytes
            self.sent["loads" if rows.dtype == torch.int64 else "rows"] += rows.nbytes - stays
        elif name == "_allgather_base_":
            self.sent["weights"] += args[0].nbytes - args[1].nbytes
        elif name == "_reduce_scatter_base_":
            self.sent["gradients"] += args[1].nbytes - args[0].nbytes
        elif name == "allreduce_":
            n, (t,) = dist.ProcessGroup.unbox(args[1]).size(), args[0]
            kind = "sums" if t.dtype == torch.float64 else "copies"
            self.sent[kind] += 2 * (n - 1) * t.nbytes / n
        return func(*args, **(kwargs or {}))


def traffic(config, world, ep, replicate, rows, micro=1, size=4, recomputed=False):
    """The same by formula: {kind: bytes that a rank sends in a step}.

    rows: that leave the rank on their way to an expert, in all layers and micro-batches; with even experts
    micro * L * N * K * (ep - 1) / ep.  size: bytes of a number that the model computes with."""
    L, E, D = config.n_layer, config.n_expert, config.d_model
    shard, edp = world // replicate, world // replicate // ep
    total = count_parameters(config)[0]
    experts = L * 3 * E * D * config.d_expert / ep                # of a rank, before edp shards them
    tables = config.vocab_size * D * (1 if config.tie_embeddings else 2)
    small = L * (2 * D + 2 * config.head_dim + E * D) + D         # norms and routers
    attention = total - experts * ep - tables - small

    def away(n):
        return (n - 1) / n
    gathered = 2 * size * (experts * away(edp) + attention * away(shard))     # forward and backward
    gathered += (size * tables + 4 * small) * away(shard)                     # once
    reduced = 4 * (experts * away(edp) + (total - experts * ep) * away(shard))
    counted = 2 * micro + micro * (2 + world + L * (3 * E + 4)) + 1           # the last: the norm
    return {"rows": (6 if recomputed else 4) * rows * D * size,
            "loads": (2 if recomputed else 1) * micro * L * E * 8 * away(ep),
            "weights": micro * gathered,
            "gradients": micro * reduced,
            "copies": 2 * away(replicate) * 4 * total / shard,
            "sums": 2 * away(world) * 8 * counted}


# what `scale` takes for given: an H100's bf16 peak and links as published, in one direction
GPU, NODE, NET = 989e12, 450e9, 50e9                              # FLOP/s, bytes/s in a node, between nodes
SHARE = 0.51      # of a large product's rate: `step --sizes paper --top_k 1` on a CPU, fp32, one thread


def bench_scale(args):
    """No measurement: what sigma-moe-tiny would take on many GPUs, if a layer came as near to a GPU's peak as
    it does to a CPU's."""
    config, length, sequences, rows = PRESETS["sigma-moe-tiny"], 4096, 1024, []
    for world, ep, replicate, micro in ((8, 8, 1, 32), (64, 8, 1, 4), (64, 8, 8, 4), (512, 8, 8, 1),
                                        (512, 8, 64, 1)):
        tokens, flops = sequences * length / world, flops_per_token(config, length)   # of a GPU, in a step
        work = tokens * flops * 4 / 3 / (SHARE * GPU)             # a third more: layers are computed again
        leaving = config.n_layer * tokens * config.top_k * (ep - 1) / ep
        sent = traffic(config, world, ep, replicate, leaving, micro, 2, recomputed=True)
        near = NODE if world // replicate <= 8 else NET           # does a copy of the model lie in one node?
        speed = {"rows": NODE, "loads": NODE, "copies": NET, "sums": NET, "weights": near, "gradients": near}
        took = {kind: n / speed[kind] for kind, n in sent.items()}
        exchange = took.pop("rows") + took.pop("loads")           # nothing else can be done meanwhile
        least, most = work + exchange, work + exchange + sum(took.values())
        mfu = [tokens * flops / GPU / t for t in (most, least)]
        rows.append((str(world), str(ep), str(replicate), str(micro), f"{tokens / micro:,.0f}",
                     f"{16e-9 * count_parameters(config)[0] * replicate / world:.1f}", f"{work:.3f}",
                     f"{exchange:.3f}", f"{took['weights']:.3f}", f"{took['gradients'] + took['copies']:.3f}",
                     f"{least:.2f} to {most:.2f}", f"{mfu[0]:.0%} to {mfu[1]:.0%}"))
    table(f"arithmetic: sigma-moe-tiny, {sequences} sequences of {length} tokens a step", (
        "GPUs", "ep", "replicate", "micro-batches", "tokens in one, per GPU", "GB of state", "compute, s",
        "exchange, s", "weights, s", "gradients, s", "step, s", "MFU"), rows)


TABLES = {"step": bench_step, "scale": bench_scale, "gpu": bench_gpu}


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(TABLES)} (all)")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--top_k", nargs="+", default=[1, 8], type=int, metavar="K", help="of step (1 8)")
    parser.add_argument("--rounds", type=int, default=5, help="that count (5)")
    parser.add_argument("--warm", type=int, default=3, help="rounds before them (3)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=SIDE)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")                    # as train.py has it
    warnings.filterwarnings("ignore")
    print(f"torch {torch.__version__}, {train.device_name(args.device)}, {datetime.date.today()}")
    for name in args.tables or TABLES:
        TABLES[name](args)


if __name__ == "__main__":
    main()
