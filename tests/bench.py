"""Speed, beside transformers, a dense model and what the machine can do at most.

    python tests/bench.py                                       every table; needs .[test,hf]
    python tests/bench.py step --sizes medium --top_k 1 --rounds 9

The candidates of a table run in turn in one process, so that a noisy machine is noisy for all of them, on
inputs that change from round to round.  A time is the median of the rounds (least and most behind it):
process CPU time on one CPU thread, wall time on several, device events on a GPU.  A ratio is the median of
the rounds' ratios.  Never a test: nothing here passes or fails.

    step        a whole training step, beside transformers and a dense model
    processes   weak scaling, and bytes sent
    scale       arithmetic: the paper's model on many GPUs
    gpu         what one card does, in four minutes: steps, compile time, memory, kernels, generation
"""

import argparse
import dataclasses
import datetime
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))             # also without an install
import parallel
import train
from model import (
    PRESETS,
    Model,
    ModelConfig,
    count_parameters,
    flops_per_token,
    state_bytes,
)

# sizes, sequences per step and tokens per sequence
SIZES = {
    "laptop": (PRESETS["laptop"], 32, 128),
    "medium": (ModelConfig(vocab_size=8192, n_layer=8, n_head=8, n_kv_head=4, head_dim=32, d_model=256,
                           n_expert=96, d_expert=128, tie_embeddings=True, max_seq_len=512), 8, 512),
    "paper": (dataclasses.replace(PRESETS["sigma-moe-tiny"], n_layer=1, vocab_size=8192, tie_embeddings=True,
                                  max_seq_len=512), 8, 512)}     # one layer of the paper's, a small head
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def dense(config):
    """The model with one expert that has as many FLOPs as the active ones together, and nothing to route."""
    return dataclasses.replace(config, n_expert=1, top_k=1, d_expert=config.d_expert * config.top_k)


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
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    work()
    return clock() - began


def interleave(candidates, args):
    """{name: work} -> {name: seconds of each round}.  The first rounds, which fill caches, do not count."""
    times = {name: [] for name in candidates}
    bar = tqdm(total=(args.warm + args.rounds) * len(candidates), leave=False, disable=None)
    with bar:
        for turn in range(args.warm + args.rounds):
            for name, work in candidates.items():
                taken = seconds(work, args.device)
                if turn >= args.warm:
                    times[name].append(taken)
                bar.update()
    return times


def ratio(times, others):
    """Median of others / times over the rounds, with the least and the most."""
    each = [b / a for a, b in zip(times, others)]
    return f"{median(each):.2f} ({min(each):.2f} to {max(each):.2f})"


def table(title, head, rows):
    print(f"\n### {title}\n| " + " | ".join(head) + " |\n" + "| --- " * len(head) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def report(title, times, flops, device):
    """A row per candidate: its time, its share of the rate of a large product, its time over ours.

    flops: {name: FLOPs} of a round."""
    limit, product_flops = times["large product"], 2 * SIDE[device] ** 3
    rows = [(name, f"{median(each) * 1e3:.1f}", f"{min(each) * 1e3:.1f}", f"{max(each) * 1e3:.1f}",
             f"{median(a / b for a, b in zip(limit, each)) * flops[name.split()[0]] / product_flops:.0%}",
             ratio(times["ours"], each) if name != "ours" else "")
            for name, each in times.items() if name != "large product"]
    table(title, ("candidate", "ms", "least", "most", "of the limit", "times ours"), rows)
    print(f"limit: {flops['ours'] / 1e9:.1f} GFLOP at {product_flops / median(limit) / 1e9:.0f} GFLOP/s; "
          f"ours / dense: {ratio(times['dense'], times['ours'])}")


SIDE = {"cpu": 2048, "cuda": 8192}                                # of the matrices below


def product(dtype, device):
    """The limit: a product of two large matrices, into memory that is there."""
    a, b, out = (torch.randn(SIDE[device], SIDE[device], device=device).to(dtype) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)


# --- candidates -------------------------------------------------------------------------------------------

def our_run(config, batch, seq_len, dtype, device, grid=parallel.ALONE, accumulate=1):
    """A train.Run on made-up tokens; on a GPU in bf16 compiled, as train.py has it."""
    s = train.Settings(steps=10 ** 6, batch_size=batch, seq_len=seq_len, dtype=str(dtype)[6:], lr=1e-4,
                       warmup=0, decay=0, accumulate=accumulate)
    model = parallel.build_model(config, grid, device, dtype, 0)
    masters = parallel.Masters(model, dtype)
    if train.compiles(s, device, dtype, grid):
        parallel.compile_blocks(model, masters)
    optimizer = parallel.make_optimizer(
        masters, s.optimizer, s.lr, (s.beta1, s.beta2), s.weight_decay, s.momentum)
    corpus = train.Corpus(Tokens(config.vocab_size, seq_len))
    return train.Run(s, config, model, masters, optimizer, corpus, device, dtype, grid)


def our_step(run):
    """A training step of this project: train.train_step as it is."""
    done = 0

    def work():
        nonlocal done
        train.train_step(run, done)
        done += 1
    return work


def transformers_model(config, device):
    """Qwen3MoeForCausalLM with the weights that ours is initialised with."""
    try:
        import transformers
        from test_model import hf_folder
    except ImportError as error:
        raise SystemExit(f"{error}: the comparison needs pip install -e '.[test,hf]'") from None
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        folder = hf_folder(Model(config, 0), Path(folder))
        return transformers.Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)


class AllCopied(parallel.Masters):
    """Masters for transformers in bf16: routers and norms have copies too, as its code wants them."""

    def __init__(self, model, dtype):
        self.named, self.copies, self.buffers = dict(model.named_parameters()), [], {}
        for name, p in model.named_parameters() if dtype != torch.float32 else ():
            self.hold(name, p, dtype)


def their_step(model, config, batch, seq_len, dtype, device):
    """A training step of transformers' model: our optimizer, clipping and fp32 masters, its own forward and
    backward, its own balance loss."""
    masters = AllCopied(model, dtype)
    optimizer = parallel.make_optimizer(masters, "adamw", 1e-4, (0.9, 0.95), 0.1)
    sampler, done = Tokens(config.vocab_size, seq_len), 0

    def step():
        nonlocal done
        tokens = sampler.rows(done * batch, batch)[0].to(device)
        done += 1
        model(input_ids=tokens, labels=tokens, use_cache=False, output_router_logits=True).loss.backward()
        parallel.clip_gradients(masters, 1.0, optimizer)
        optimizer.step()
        masters.refresh()
        optimizer.zero_grad(set_to_none=True)
    return step


# --- tables -----------------------------------------------------------------------------------------------

def bench_step(args):
    for size, top_k, kind in cases(args):
        config, batch, seq_len = SIZES[size]
        config, dtype = dataclasses.replace(config, top_k=top_k), DTYPES[kind]
        run = our_run(config, batch, seq_len, dtype, args.device)
        model = transformers_model(config, args.device)
        theirs = their_step(model, config, batch, seq_len, dtype, args.device)
        candidates = {
            "large product": product(dtype, args.device),
            "ours": our_step(run),
            "dense": our_step(our_run(dense(config), batch, seq_len, dtype, args.device)),
            "transformers grouped_mm": with_experts(model, "grouped_mm", theirs)}
        if top_k == 1 and size != "paper":                        # there it takes a minute
            candidates["transformers eager"] = with_experts(model, "eager", theirs)
        times = interleave(candidates, args)
        flops = {name: flops_per_token(each, seq_len) * batch * seq_len
                 for name, each in (("ours", config), ("dense", dense(config)), ("transformers", config))}
        report(f"step, {size}, K = {top_k}, {batch * seq_len:,} tokens, {kind}", times, flops, args.device)
        print(f"optimizer, clipping and copies: {optimizer_share(run):.0%} of ours")
        del run, model, theirs, candidates
        gc.collect()


def optimizer_share(run, steps=5):
    """Median over some steps of the time in clipping, AdamW and the copies, as a part of the whole."""
    shares = []
    for i in range(steps):
        whole = seconds(lambda i=i: train.train_step(run, i), run.device)
        for p in run.masters.named.values():
            p.grad = torch.zeros_like(p)

        def update():
            parallel.clip_gradients(run.masters, 1.0, run.optimizer)
            run.optimizer.step()
            run.masters.refresh()
        shares.append(seconds(update, run.device) / whole)
        run.optimizer.zero_grad(set_to_none=True)
    return median(shares)


def with_experts(model, experts, work):
    """work() with transformers' experts computed in this way."""
    def chosen():
        model.set_experts_implementation(experts)
        work()
    return chosen


def cases(args):
    return [(size, top_k, kind) for size in args.sizes for top_k in args.top_k for kind in args.dtypes]


# --- one card ---------------------------------------------------------------------------------------------

def bench_gpu(args):
    """One command for whoever has a card.  On a CPU the same with the laptop preset, to see that it runs."""
    card = args.device == "cuda"
    paper = dataclasses.replace(PRESETS["sigma-moe-tiny"], n_layer=6, vocab_size=8192, tie_embeddings=True)
    small = dataclasses.replace(PRESETS["laptop"], n_layer=2)
    cases = {"gpu, as python train.py runs it": (PRESETS["gpu"], 64, 1024, 1),
             "gpu-1b": (PRESETS["gpu-1b"], 64, 1024, 1),
             "6 layers of the paper's": (paper, 64, 4096, 4),
             "dense of equal active FLOPs": (dense(paper), 64, 4096, 4)}
    table("one card, bf16, compiled", ("what", "tokens a step", "ms", "tokens/s", "MFU", "optimizer",
                                       "peak GiB", "first step, s"), [])
    for name, (config, batch, seq_len, micro) in cases.items():
        config, batch, seq_len = (config, batch, seq_len) if card else (small, 8, 64)
        run = our_run(config, batch, seq_len, torch.bfloat16, args.device, accumulate=micro)
        work, tokens = our_step(run), batch * seq_len
        began = time.perf_counter()
        work()
        if card:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        first = time.perf_counter() - began
        times = [seconds(work, args.device) for _ in range(args.warm + args.rounds)][args.warm:]
        memory = torch.cuda.max_memory_allocated() / 2 ** 30 if card else 0
        rate = tokens / median(times)
        mfu = train.utilisation(run, config.layer_top_k(), rate)
        print(f"| {name} | {tokens:,} in {micro} | {median(times) * 1e3:.1f} | {rate:,.0f} | "
              f"{f'{mfu:.1%}' if mfu else 'unknown'} | {optimizer_share(run):.0%} | {memory:.1f} | "
              f"{first:.0f} |", flush=True)
        if name == "gpu-1b":
            print_kernels(work)
        del run, work
        gc.collect()
    config, batch, seq_len = (PRESETS["gpu-1b"], 16, 1024) if card else (small, 8, 64)
    model = Model(config, 0).to(args.device, torch.bfloat16)
    bench_generation(model, args)
    theirs = transformers_model(config, args.device)
    step = their_step(theirs, config, batch, seq_len, torch.bfloat16, args.device)
    times = interleave({"ours": our_step(our_run(config, batch, seq_len, torch.bfloat16, args.device)),
                        "transformers": with_experts(theirs, "grouped_mm", step)}, args)
    print(f"\ntransformers grouped_mm / ours, {batch * seq_len:,} tokens: "
          f"{ratio(times['ours'], times['transformers'])}")


def bench_generation(model, args, prompt=32, new=128):
    rows = []
    for batch in (1, 32):
        tokens = torch.randint(0, 2000, (batch, prompt), device=args.device)
        times = [seconds(partial(model.generate, tokens, new, temperature=0), args.device)
                 for _ in range(args.warm + args.rounds)][args.warm:]
        rows.append((str(batch), *(f"{batch * new / pick(times):,.0f}" for pick in (median, max, min))))
    table(f"generate, bf16, {prompt} tokens + {new}", ("sequences", "tokens/s", "least", "most"), rows)


def print_kernels(work):
    """The ten largest of a step."""
    with torch.profiler.profile() as profile:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    kinds = [(e.self_device_time_total or e.self_cpu_time_total, e.count, e.key)
             for e in profile.key_averages()
             if (e.device_type == torch.autograd.DeviceType.CUDA) == torch.cuda.is_available()]
    total = sum(took for took, _, _ in kinds)
    for took, count, name in sorted(kinds, reverse=True)[:10]:
        print(f"  {took / total:6.1%} {took / 1e3:8.2f} ms {count:6} x  {name[:90]}")


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
            "copies": micro * 2 * away(replicate) * 4 * total / shard,
            "sums": 2 * away(world) * 8 * counted}


KINDS = {"rows": "rows to their experts and back", "loads": "how many rows", "weights": "weights, gathered",
         "gradients": "gradients, to their shard", "copies": "gradients, between copies of the model",
         "sums": "counts, statistics, norms"}
LAYOUTS = [(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 1, 2)]            # processes, ep, replicate


def bench_processes(args):
    """Weak scaling on this machine (as many sequences per process), and what was sent."""
    found = {layout: [] for layout in LAYOUTS}
    for _ in tqdm(range(args.rounds), leave=False, disable=None):
        for layout, answers in found.items():
            answers.append(in_processes(*layout, args))
    alone = [a["seconds"] for a in found[1, 1, 1]]
    rows = []
    for layout, answers in found.items():
        times = [a["seconds"] for a in answers]
        rows.append((*map(str, layout), *(f"{pick(times) * 1e3:.0f}" for pick in (median, min, max)),
                     ratio(times, alone)))
    table("weak scaling, laptop, fp32, one CPU thread per process", (
        "processes", "ep", "replicate", "ms per step", "least", "most", "one process / these"), rows)
    rows = []
    for (world, ep, replicate), answers in found.items():
        sent = answers[0]["sent"]
        formula = traffic(SIZES["laptop"][0], world, ep, replicate, answers[0]["rows"]) if world > 1 else {}
        rows += [(str(world), str(ep), str(replicate), KINDS[kind], f"{sent.get(kind, 0):,.0f}", f"{n:,.0f}")
                 for kind, n in formula.items()]
    table("bytes sent by a process in a step (mean)",
          ("processes", "ep", "replicate", "kind", "counted", "formula"), rows)


def in_processes(world, ep, replicate, args):
    """Start this program under torchrun -> what its rank 0 found out."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}",
               __file__, "--layout", f"{ep},{replicate}", "--warm", str(args.warm)]
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def one_of_many(args):
    """A process of those: steps of the laptop preset, the last one with its traffic counted."""
    torch.set_num_threads(1)
    config, batch, length = SIZES["laptop"]
    grid = parallel.meet()
    parallel.join(grid, *args.layout, "cpu", 600)
    run = our_run(config, batch * grid.world, length, torch.float32, "cpu", grid)
    times = []
    for step in range(args.warm + 5):
        began = time.perf_counter()
        train.train_step(run, step)
        times.append(time.perf_counter() - began)
    share = config.n_expert // args.layout[0]
    mine = grid.rank % args.layout[0]                             # the rank in its group of ep
    leaving = []
    for block in run.model.blocks:
        block.moe.router.register_forward_hook(
            lambda module, inputs, routing: leaving.append(int((routing.experts // share != mine).sum())))
    with Traffic() as counted:
        train.train_step(run, 99)
    everyone = [(sum(leaving), counted.sent)] * grid.world
    if grid.world > 1:
        dist.all_gather_object(everyone, everyone[0])
    sent = sum((Counter(sent) for _, sent in everyone), Counter())
    if grid.rank == 0:
        print(json.dumps({"seconds": median(times[args.warm:]),
                          "rows": sum(rows for rows, _ in everyone) / grid.world,
                          "sent": {kind: n / grid.world for kind, n in sent.items()}}))
    parallel.leave(grid)


# what the arithmetic of `scale` takes for given: an H100's bf16 peak and links as published, in one direction
GPU = {"flops": 989e12, "in a node": 450e9, "between nodes": 50e9}
SHARE = 0.47                # of a large product's rate: a layer of the paper's, bf16, one expert; on a CPU


def bench_scale(args):
    """No measurement: what sigma-moe-tiny would take on many GPUs, if a layer came as near to a GPU's peak as
    it does to a CPU's."""
    config, length, sequences = PRESETS["sigma-moe-tiny"], 4096, 1024
    rows = []
    for world, ep, replicate, micro in ((8, 8, 1, 32), (64, 8, 1, 4), (64, 8, 8, 4), (512, 8, 8, 1),
                                        (512, 8, 64, 1)):
        tokens = sequences * length / world                       # of a GPU, in a step
        flops = flops_per_token(config, length)
        work = tokens * flops * 4 / 3 / (SHARE * GPU["flops"])    # a third more: layers are computed again
        leaving = config.n_layer * tokens * config.top_k * (ep - 1) / ep
        sent = traffic(config, world, ep, replicate, leaving, micro, 2, recomputed=True)
        near = world // replicate <= 8                            # a copy of the model lies in one node
        inside = GPU["in a node"]
        away = {"rows": inside, "loads": inside, "copies": GPU["between nodes"], "sums": GPU["between nodes"],
                "weights": inside if near else GPU["between nodes"],
                "gradients": inside if near else GPU["between nodes"]}
        took = {kind: n / away[kind] for kind, n in sent.items()}
        exchange = took.pop("rows") + took.pop("loads")           # nothing else can be done meanwhile
        least, most = work + exchange, work + exchange + sum(took.values())
        mfu = [tokens * flops / GPU["flops"] / t for t in (most, least)]
        rows.append((str(world), str(ep), str(replicate), str(micro), f"{tokens / micro:,.0f}",
                     f"{state_bytes(config, world) * replicate / 1e9:.1f}", f"{work:.3f}",
                     f"{exchange:.3f}", f"{took['weights']:.3f}", f"{took['gradients'] + took['copies']:.3f}",
                     f"{least:.2f} to {most:.2f}", f"{mfu[0]:.0%} to {mfu[1]:.0%}"))
    table(f"arithmetic: sigma-moe-tiny, {sequences} sequences of {length} tokens a step", (
        "GPUs", "ep", "replicate", "micro-batches", "tokens in one, per GPU", "GB of state", "compute, s",
        "exchange, s", "weights, s", "gradients, s", "step, s", "MFU"), rows)


TABLES = {"step": bench_step, "processes": bench_processes, "scale": bench_scale, "gpu": bench_gpu}


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(TABLES)} (all)")
    many = {"type": lambda text: text.split(","), "metavar": "A,B"}
    parser.add_argument("--sizes", default=list(SIZES), help=", ".join(SIZES), **many)
    parser.add_argument("--dtypes", default=list(DTYPES), help=", ".join(DTYPES), **many)
    parser.add_argument("--top_k", default=[1, 8], type=lambda text: [int(k) for k in text.split(",")],
                        metavar="K,K", help="experts per token (1,8)")
    parser.add_argument("--rounds", type=int, default=5, help="that count (5)")
    parser.add_argument("--warm", type=int, default=3, help="rounds before them (3)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (1)")
    parser.add_argument("--device", default="auto", help="cpu or cuda (the best there is)")
    parser.add_argument("--layout", default=[], type=lambda text: [int(n) for n in text.split(",")],
                        help=argparse.SUPPRESS)                   # one of the processes of `processes`
    args = parser.parse_args(argv)
    for given, known in (args.tables, TABLES), (args.sizes, SIZES), (args.dtypes, DTYPES):
        for name in given:
            if name not in known:
                parser.error(f"{name!r} is none of {', '.join(known)}")
    if min(args.rounds, args.threads, *args.top_k) < 1 or args.warm < 0:
        parser.error("--rounds, --threads and --top_k must be at least 1, and --warm 0")
    args.device = parallel.pick_device(args.device)
    if args.device not in SIDE:
        parser.error(f"--device must be one of {', '.join(SIDE)}, not {args.device}")
    return args


def main(argv=None):
    args = parse(argv)
    if args.layout:
        return one_of_many(args)
    torch.set_num_threads(args.threads)
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")                # as train.py has it
    warnings.filterwarnings("ignore")
    settings = {name: value for name, value in os.environ.items() if name.startswith(("MALLOC_", "GLIBC_"))}
    print(f"torch {torch.__version__}, {train.device_name(args.device)}, "
          f"{datetime.date.today()}; allocator: {json.dumps(settings) if settings else 'as it comes'}")
    for name in args.tables or TABLES:
        TABLES[name](args)


if __name__ == "__main__":
    main()
