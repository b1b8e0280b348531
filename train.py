"""Train a sparse language model, or resume the run in --out.

    python train.py                                   what fits: the laptop preset, or gpu on a GPU
    python train.py --n_expert 1 --out out/dense      the same model with one expert: the dense control
    python train.py --preset gpu-1b --data data/mine  a larger model, a corpus made by data.py
    python train.py --init_from out/laptop --data data/functions      tune the run's model on conversations
    torchrun --standalone --nproc-per-node 8 train.py --ep 8     eight processes, which share the experts

A run is its directory: settings.json, encoding.json (the tokenizer), log.jsonl and step-N/ (checkpoints).
Every schedule is a pure function of the step, and so are the sequences that a step reads; a checkpoint holds
weights, selection biases, optimizer state, the guard's window and the step, no more, and a resumed run
repeats the uninterrupted one.
"""

import argparse
import contextlib
import dataclasses
import difflib
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

# before torch: OpenMP threads that spin long while they wait make training several times slower on busy cores
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")       # what --deterministic needs
if __name__ == "__main__" and sys.stderr and sys.stderr.isatty():
    print("loading torch ..", end="\r", file=sys.stderr)          # seconds, and more from a slow disk

import torch
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import data
import eval as evaluation
import parallel
import router
from data import Corpus, InputError
from model import PRESETS, ModelConfig, count_parameters, flops_per_token, grouped_mm_limitation

# --- from the command line to the report ------------------------------------------------------------------

@dataclasses.dataclass
class Run:
    """What the loop works on."""

    settings: "Settings"
    config: ModelConfig
    model: torch.nn.Module
    masters: parallel.MasterWeights     # the fp32 parameters
    optimizer: torch.optim.Optimizer
    corpus: Corpus
    device: str
    dtype: torch.dtype          # of the matrix products
    layout: parallel.Layout = parallel.SINGLE_PROCESS
    step: int = 0               # steps done
    validated: tuple = None     # loss and Statistics of the last validation
    next_batch: tuple = None    # load_batch() of the next step
    log: object = None          # log.jsonl, open and locked; rank 0's alone
    wandb: object = None

    def __post_init__(self):
        self.recent = torch.zeros(128, 2, dtype=torch.float64)    # loss and gradient norm of the last steps
        self.counts = torch.zeros(3, dtype=torch.int64)           # finite, skipped, not finite in a row

    def state(self):
        """The tensors of a checkpoint: {name: tensor}."""
        guard = {"guard.recent": self.recent, "guard.counts": self.counts}
        return parallel.training_state(self.masters, self.optimizer) | guard


def main(argv=None):
    began, run = time.perf_counter(), None
    with data.one_line_errors(parallel.rank_of_start()), contextlib.ExitStack() as stack:
        try:
            layout = parallel.init_distributed()
            plan = parallel.on_rank_0(layout, lambda: make_plan(argv, layout.world))
            s, config, device = plan.settings, plan.config, plan.device
            corpus = parallel.on_all_ranks(layout, lambda: open_same_corpus(s, plan))
            dtype, compiled = precision(s, config, device)
            parallel.make_meshes(layout, s.ep, s.replicate, device, s.timeout)
            model = parallel.build_model(config, layout, device, dtype, s.seed)
            sums = (router.BALANCE[s.balance] or (None, ()))[1]   # what the balance loss is a function of
            for block in model.blocks:
                block.moe.router.temperature = s.temperature if "sharp_sum" in sums else 1.0
                block.moe.router.collect_margins = s.balance == "quantile"
            masters = parallel.MasterWeights(model, dtype)
            parallel.compile_and_recompute(model, masters, compiled, s.activation_checkpointing)
            optimizer = parallel.make_optimizer(masters, s.optimizer, s.lr, (s.beta1, s.beta2),
                                                s.weight_decay, s.momentum)
            run = Run(s, config, model, masters, optimizer, corpus, device, dtype, layout)
            parallel.on_rank_0(layout, lambda: open_log(run, plan, stack))
            parallel.check_shared(layout, s.out)
            load(run, plan)
            parallel.on_rank_0(layout, lambda: open_directory(run, plan, stack))
            stop = stop_on_signals(stack)
            if introduce(run):
                train(run, stop)
                report(run, time.perf_counter() - began)
            if layout.world > 1:
                torch.distributed.destroy_process_group()
        except (MemoryError, RuntimeError) as error:
            explain(error, run)
            raise


def train(run, stop):
    """The loop: steps run.step .. steps-1, with their log, validations and checkpoints."""
    s, quarter, stopping = run.settings, max(1, run.settings.steps // 4), False
    eval_every, save_every = s.eval_every or max(100, quarter), s.save_every or min(1000, quarter)
    clock, n_tokens = time.perf_counter(), 0                      # since the last log, validation or save
    with tqdm(total=s.steps, initial=run.step, disable=True if run.layout.rank else None, dynamic_ncols=True,
              bar_format="{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}") as bar:
        while run.step < s.steps and not stopping:
            result = train_step(run, run.step, stop)
            run.step += 1
            stopping, last = result.stop, run.step == s.steps
            n_tokens += result.n_tokens
            bar.update()
            if result.skipped and run.log:
                bar.write(f"step {run.step} skipped: {result.skipped}", file=sys.stderr)
            if run.counts[2] >= s.max_nonfinite:
                why = f"{s.max_nonfinite} steps in a row skipped: {result.skipped}; lower --lr"
                parallel.on_rank_0(run.layout, partial(data.fail, why, 1))
            log = run.step % s.log_every == 0
            validate = run.corpus.val is not None and (run.step % eval_every == 0 or last)
            save = run.step % save_every == 0 or last or stopping
            if log or validate:
                rate = n_tokens / (time.perf_counter() - clock)
                row = {"step": run.step, **log_row(run, result), "tokens_per_s": rate,
                       "mfu": utilisation(run, result.top_k, rate)}
                most, layer = max((most, layer) for layer, most in enumerate(row["load_max"]))
                bar.set_postfix_str(f"loss {row['loss']:.3f}, {rate:,.0f} tokens/s, "
                                    f"load {100 * most:+.0f} % (layer {layer})")
                if bar.disable and run.log and log:               # a file or a pipe: a line, written at once
                    left = (s.steps - run.step) * row["tokens"] / rate / 60
                    print(f"step {run.step}/{s.steps}: loss {row['loss']:.4f}, lr {row['lr']:.3g}, "
                          f"{rate:,.0f} tokens/s, {left:.1f} minutes left", flush=True)
                if validate:
                    row |= {"val_loss": validation(run), "stable_rank": stable_ranks(run.masters)}
                    bar.write(f"step {run.step}: loss {row['loss']:.4f}, held out {row['val_loss']:.4f}")
                write_row(run, row)
            if save:
                save_checkpoint(run)
            if log or validate or save:
                clock, n_tokens = time.perf_counter(), 0


def load_batch(run, step):
    """Cut this rank's part of a step -> step, micro-batches, counts.

    A micro-batch is (tokens, targets) or, of conversations, (tokens, targets, doc), all [B, T], on its way to
    the device.  Its counts are [targets, tokens routed] of all ranks."""
    s, layout = run.settings, run.layout
    micro = s.batch_size // s.accumulate
    parts = [run.corpus.train.rows(step * s.batch_size + m * micro, micro, layout.rank, layout.world)
             for m in range(s.accumulate)]
    # a target of -1 is not learned, and a doc of -1 is padding, which is not counted
    counts = torch.tensor([[(targets != -1).sum(), (doc[0] >= 0).sum() if doc else tokens.numel()]
                           for tokens, targets, *doc in parts])
    counts = parallel.all_sum(layout, [counts])[0].tolist()
    if run.device.startswith("cuda"):
        parts = [[t.pin_memory() for t in part] for part in parts]
    return step, [[t.to(run.device, non_blocking=True) for t in part] for part in parts], counts


def train_step(run, step, stop=None):
    """One update of the weights -> its result, the same on every rank: step, top_k [L], n_tokens (routed:
    padding is not), loss [] (mean cross-entropy in nats), statistics [L, ..] of the whole step, norm [] of
    the gradient before clipping, skipped (why nothing was changed, or None), stop (a rank was asked to).

    Every loss is a sum over this rank's micro-batch divided by a count of the whole step, so that ranks and
    micro-batches only ever add up.  The balance loss of a micro-batch sees those before it in the step, of
    all ranks, so that its gradient is that of the whole step's loss if accumulate is 1.

    It waits for the device once (and at every exchange of tokens), and cuts the next batch before."""
    s, model, layout = run.settings, run.model, run.layout
    # what a fork draws, as for dropout, is a function of the step, too
    torch.manual_seed(zlib.crc32(f"{s.seed}, step {step}, rank {layout.rank}".encode()))
    top_k = (router.drawn_top_k(step, s.seed, s.top_k_choices, run.config.n_layer) if s.top_k_choices
             else top_k_at(step, s, run.config))
    ready = run.next_batch and run.next_batch[0] == step
    _, parts, counts = run.next_batch if ready else load_batch(run, step)
    n_targets, n_tokens = map(sum, zip(*counts))
    loss, flags, sums, tokens_so_far = 0.0, 0, None, 0            # over micro-batches and ranks
    for m, ((tokens, targets, *doc), (_, n)) in enumerate(zip(parts, counts)):
        out = model(tokens, targets, top_k, *doc)
        mine = out.loss.new_zeros(layout.world + 1)               # whose loss is not finite; who is to stop
        mine[layout.rank], mine[-1] = ~out.loss.isfinite(), stop is not None and stop.requested
        micro_loss, mine, *micro = parallel.all_sum(layout, [out.loss, mine, *out.statistics])
        micro = router.Statistics(*micro)
        sums = router.Statistics(*map(torch.add, sums, micro)) if sums else micro
        loss, flags, tokens_so_far = loss + micro_loss, flags + mine, tokens_so_far + n
        objective = out.loss / max(1, n_targets)
        if router.BALANCE[s.balance] and s.lbl_coef:
            seen, n_seen = (micro, n) if s.lbl_scope == "micro" else (sums, tokens_so_far)
            balance = router.balance_objective(s.balance, seen, n_seen, out.statistics)
            objective = objective + s.lbl_coef * n_seen / n_tokens * balance      # all tokens weigh the same
        if s.z_coef:
            objective = objective + s.z_coef * router.router_z_loss(out.statistics.z_sum, n_tokens).sum()
        parallel.reduce_between_copies(model, now=m == len(parts) - 1)
        objective.backward()
    norm = parallel.clip_gradients(run.masters, s.clip, layout)
    loss = loss / max(1, n_targets)
    run.next_batch = load_batch(run, step + 1) if step + 1 < s.steps else None
    loss_now, norm_now, *nonfinite, stop_now = torch.cat([torch.stack([loss, norm]), flags]).tolist()
    skipped = reason_to_skip(run, loss_now, norm_now, nonfinite)
    if not skipped:
        for group in run.optimizer.param_groups:                  # a group of a fork may have its own factor
            group["lr"] = learning_rate(step, s) * group.get("lr_factor", 1.0)
        run.optimizer.step()
        run.masters.refresh()
        move_biases(run, sums, top_k)
    run.optimizer.zero_grad()
    return SimpleNamespace(step=step, top_k=top_k, n_tokens=n_tokens, loss=loss, statistics=sums, norm=norm,
                           skipped=skipped, stop=stop_now > 0)


def move_biases(run, sums, top_k):
    """Balance without a loss: each layer's selection biases, from the loads of the whole step."""
    for block, load, margins, k in zip(run.model.blocks, sums.load, sums.margins, top_k):
        if run.settings.balance == "loss-free":
            router.update_bias(block.moe.router.bias, load, run.settings.bias_rate)
        elif run.settings.balance == "quantile" and k < run.config.n_expert:
            block.moe.router.bias.copy_(router.quantile_bias(margins, k))


def learning_rate(step, s):
    """Warm-up, stable, decay (arXiv 2404.06395): both ends linear."""
    rise = (step + 1) / (s.warmup * s.steps) if s.warmup else 1.0
    fall = (s.steps - step) / (s.decay * s.steps) if s.decay else 1.0
    return s.lr * min(1.0, rise, fall)


def top_k_at(step, s, config):
    """Experts activated in each layer at a step [L]."""
    return router.active_experts(step, s.steps, s.initial_top_k, config.top_k, s.switch_fraction,
                                 config.n_layer)


def reason_to_skip(run, loss, norm, nonfinite_by_rank):
    """Why a step must not change the weights, or None.  nonfinite_by_rank: how many of its losses are not.

    A spike has a loss or norm `spike` standard deviations above the mean of the last 128 finite ones.  Those
    that were skipped count too, so that a lasting change of level is soon the new level."""
    finite, spike = math.isfinite(loss) and math.isfinite(norm), False
    if finite:
        seen, now = int(run.counts[0]), torch.tensor([loss, norm], dtype=torch.float64)
        limit = run.recent.mean(0) + run.settings.spike * run.recent.std(0)
        spike = bool(run.settings.spike and seen >= len(run.recent) and (now > limit).any())
        run.recent[seen % len(run.recent)] = now
    run.counts += torch.tensor([finite, spike or not finite, 1])
    run.counts[2] *= not finite
    if spike:
        return f"its loss and gradient norm ({loss:.4g}, {norm:.4g}) are a spike"
    if not finite:
        ranks = ", ".join(str(rank) for rank, n in enumerate(nonfinite_by_rank) if n and run.layout.world > 1)
        of = f" of rank {ranks}" if ranks else ""
        return f"the {'gradient' if math.isfinite(loss) else 'loss'}{of} is not finite"


def stop_on_signals(stack):
    """SIGINT, SIGTERM, SIGHUP and SIGUSR1 set stop.requested, so that the loop saves and ends.  A second
    SIGINT kills.  Signals that are ignored already, as by nohup, stay ignored."""
    stop = SimpleNamespace(requested=False)

    def request(number, _):
        stop.requested = True
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        with contextlib.suppress(AttributeError, ValueError):     # Windows; not the main thread
            number = getattr(signal, name)
            if signal.getsignal(number) is not signal.SIG_IGN:
                stack.callback(signal.signal, number, signal.signal(number, request))
    return stop


# --- the log ----------------------------------------------------------------------------------------------

def log_row(run, result):
    """What the log says of a step: {name: number, or one for each layer}."""
    n_tokens, sums = result.n_tokens, result.statistics
    lbl = router.load_balancing_loss(sums.load, sums.prob_sum, n_tokens)
    share = sums.load / sums.load.sum(-1, keepdim=True) * run.config.n_expert - 1        # 0.5 is +50 %
    floor = [router.noise_floor(n_tokens, run.config.n_expert, k) for k in result.top_k]
    row = {"loss": result.loss, "lbl": lbl.mean(), "lr": learning_rate(result.step, run.settings),
           "grad_norm": result.norm, "skipped": run.counts[1], "tokens": n_tokens, "top_k": result.top_k,
           "load_max": share.amax(-1), "load_min": share.amin(-1),
           "noise_max": [high for high, _ in floor], "noise_min": [low for _, low in floor],    # by chance
           "lbl_layer": lbl, "top_prob": sums.top_sum / n_tokens, "gate_entropy": sums.entropy_sum / n_tokens}
    return {name: value.tolist() if torch.is_tensor(value) else value for name, value in row.items()}


def stable_ranks(masters):
    """Of each layer's attn.out, sum of squared singular values / the largest squared [L].  It falls before a
    run fails (arXiv 2602.01734)."""
    matrices = [p.detach() for name, p in masters.named.items() if name.endswith("attn.out.weight")]
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in matrices]
    singular = [torch.linalg.svdvals(p) if p.isfinite().all() else p * math.nan for p in whole]
    return [(values.square().sum() / values.max().square()).item() for values in singular]


# dense bf16 FLOP/s as published; on any other device MFU is null rather than wrong
PEAK = {"H200 NVL": 836e12, "H200": 989e12, "H100 80GB HBM3": 989e12, "H100 PCIe": 756e12, "A100": 312e12,
        "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def utilisation(run, top_k, tokens_per_s):
    """Model FLOPs utilisation, with the K of every layer as it is at this step; None on an unknown device."""
    name = device_name(run.device) if run.dtype == torch.bfloat16 else ""
    peaks = [peak for known, peak in PEAK.items() if re.search(rf"{known}(?! Ti| D| Laptop)\b", name)]
    peak = peaks[0] if peaks else None
    flops = flops_per_token(run.config, run.settings.seq_len, top_k) * tokens_per_s
    return peak and flops / (peak * run.layout.world)


def write_row(run, row):
    """A line of log.jsonl, in which null stands for what is not finite."""
    if run.log:
        row_text = re.sub(r"(?<=[ \[])(NaN|-?Infinity)(?=[],}])", "null", json.dumps(row))
        run.log.write((row_text + "\n").encode())
    if run.wandb and "loss" in row:
        run.wandb.log(row, step=row["step"])


def validation(run):
    """Held-out loss, with the K of the last step.  The Statistics are kept for the report."""
    top_k = top_k_at(max(0, run.step - 1), run.settings, run.config)
    s = run.settings
    run.validated = evaluation.validate(run.model, run.corpus.val, top_k, run.device, s.eval_tokens,
                                        s.batch_size // s.accumulate, run.layout)[:2]
    return run.validated[0]


def save_checkpoint(run):
    """Write step-N, unless copies of the model differ.  meta.json in it says what it was trained with."""
    ranks = parallel.differing_ranks(run.layout, run.masters) if run.layout.world > 1 else []
    if ranks:
        why = (f"the run ends at step {run.step}: the weights of rank {', '.join(map(str, ranks))} are not "
               "those of the first replica (buffers: of rank 0); what was saved before is whole")
        parallel.on_rank_0(run.layout, partial(data.fail, why, 1))
    s = run.settings
    if not (Path(s.out) / "settings.json").exists():
        raise InputError(f"{s.out} was moved or deleted: step {run.step} is not saved")
    meta = {"step": run.step, "top_k": top_k_at(run.step - 1, s, run.config)}
    parallel.save_checkpoint(s.out, run.step, run.state(), s.keep, run.layout, meta)


# --- settings ---------------------------------------------------------------------------------------------

def setting(default, help):
    """A field with a line of help, "group: sentence"."""
    default = {"default_factory": list} if default == [] else {"default": default}
    return dataclasses.field(**default, metadata={"help": help})


@dataclasses.dataclass
class Settings:
    """Everything about a run but the model's sizes.  A new setting is a new line."""

    preset: str = setting("", f"run: {', '.join(PRESETS)}")
    out: str = setting("", "run: its directory (out/PRESET, with --init_from out/RUN-next or out/RUN-chat)")
    data: str = setting("data/stdlib", "run: folder or token file of data.py; the default is made if missing")
    init_from: str = setting("", "run: begin with weights and settings of a run, its step-N, or a Qwen3-MoE")
    growth_noise: float = setting(0.01, "run: std of the noise on grown copies, relative to the weight's")
    device: str = setting("auto", "run: cpu, cuda or mps; auto: the best there is")
    dtype: str = setting("auto", "run: float32 or bfloat16, of matrix products; auto: bfloat16 on CUDA")
    compile: str = setting("auto", "run: true or false, in bfloat16; auto: on CUDA")
    deterministic: bool = setting(False, "run: true: a GPU repeats a run bit for bit, and is slower")
    seed: int = setting(0, "run: of the initial weights and the order of the data")

    steps: int = setting(1000, "schedule: updates of the weights; for tuning on chats four epochs")
    batch_size: int = setting(32, "schedule: sequences per step, of all processes")
    accumulate: int = setting(1, "schedule: micro-batches that a step is cut into")
    seq_len: int = setting(128, "schedule: tokens per sequence")
    lr: float = setting(6e-3, "schedule: learning rate after warm-up; for tuning on chats 0.3 of it")
    warmup: float = setting(0.03, "schedule: fraction of the steps in which it rises from 0")
    decay: float = setting(0.4, "schedule: fraction of the steps, the last ones, in which it falls to 0")

    optimizer: str = setting("adamw", "optimizer: adamw, or muon for the matrices of attention and experts")
    momentum: float = setting(0.95, "optimizer: Muon's decay of the average gradient")
    beta1: float = setting(0.9, "optimizer: AdamW's decay of the average gradient")
    beta2: float = setting(0.95, "optimizer: AdamW's decay of the average squared gradient")
    weight_decay: float = setting(0.1, "optimizer: on matrices only")
    clip: float = setting(1.0, "optimizer: largest norm of the gradient")

    balance: str = setting("lbl", f"balance: {', '.join(router.BALANCE)}: what keeps the experts evenly used")
    lbl_coef: float = setting(0.01, "balance: weight of each layer's balance loss, lbl or top1")
    lbl_scope: str = setting("global", "balance: global: load of the step so far; micro: of a micro-batch")
    temperature: float = setting(0.2, "balance: of the probabilities in top1; below 1 sharpens them")
    bias_rate: float = setting(1e-3, "balance: step of the selection biases in loss-free")
    z_coef: float = setting(0.0, "balance: weight of each layer's router z-loss")
    initial_top_k: list = setting([], "balance: K of layer 0, 1, .. before the switch, as in 8,4,2")
    top_k_choices: list = setting([], "balance: K that each layer draws from in each step, as in 1,2,4")
    switch_fraction: float = setting(0.9, "balance: fraction of the steps before all use top_k; 1: never")

    max_nonfinite: int = setting(10, "guard: end after so many steps in a row that are not finite")
    spike: float = setting(0.0, "guard: skip steps so many standard deviations above the last 128; 0: off")

    log_every: int = setting(10, "watching: steps between lines of log.jsonl")
    eval_every: int = setting(0, "watching: steps between validations; 0: a quarter of the run, at least 100")
    eval_tokens: int = setting(1 << 17, "watching: held-out tokens of a validation, at most")
    save_every: int = setting(0, "watching: steps between checkpoints; 0: a quarter of the run, at most 1000")
    keep: int = setting(2, "watching: checkpoints kept, the newest ones")
    wandb: bool = setting(False, "watching: true: also log to W&B (extra log)")
    sample_tokens: int = setting(120, "watching: tokens of text that one process writes at the end")

    ep: int = setting(1, "processes: expert parallelism: processes that share out a layer's experts")
    replicate: int = setting(1, "processes: copies of the model, each sharded over its processes")
    timeout: int = setting(600, "processes: seconds after which a collective fails")
    activation_checkpointing: bool = setting(False, "processes: keep each layer's input, recompute the rest")

    def check(self, config):
        """InputError, naming the field, for what is impossible."""
        one_of = {"dtype": ("auto", "float32", "bfloat16"), "compile": ("auto", "true", "false"),
                  "optimizer": ("adamw", "muon"), "lbl_scope": ("global", "micro"), "balance": router.BALANCE}
        fractions = ("warmup", "decay", "momentum", "beta1", "beta2", "switch_fraction")
        may_be_0 = (*fractions[:5], "seed", "eval_every", "save_every", "sample_tokens", "weight_decay",
                    "lbl_coef", "bias_rate", "z_coef", "spike", "growth_noise")
        for name, value in vars(self).items():
            if value not in one_of.get(name, [value]):
                raise InputError(f"{name} must be one of {', '.join(one_of[name])}, got {value!r}")
            if type(value) in (int, float) and not (0 < value < 2 ** 63 or value == 0 and name in may_be_0):
                least = "0 or more" if name in may_be_0 else "above 0"
                raise InputError(f"{name} must be {least}, got {value}")
            if name in fractions and value > 1 or name in ("beta1", "beta2") and value == 1:
                raise InputError(f"{name} must be {'below' if value == 1 else 'at most'} 1, got {value}")
        for name in ("initial_top_k", "top_k_choices"):
            if not all(type(k) is int and 1 <= k <= config.n_expert for k in getattr(self, name)):
                raise InputError(f"{name} ({getattr(self, name)}) must be 1 to {config.n_expert} (n_expert)")
        if len(self.initial_top_k) > config.n_layer:
            raise InputError(f"initial_top_k {self.initial_top_k} is longer than n_layer ({config.n_layer})")
        if self.batch_size % self.accumulate:
            raise InputError(f"accumulate ({self.accumulate}) must divide batch_size ({self.batch_size})")
        if self.seq_len > config.max_seq_len:
            raise InputError(f"seq_len ({self.seq_len}) must not be above max_seq_len ({config.max_seq_len})")
        if self.top_k_choices and (self.initial_top_k or self.balance == "quantile"):
            raise InputError("top_k_choices must be without initial_top_k and quantile, fitted to one K")


TRAINING = {                                                      # what a preset sets beside the sizes
    "laptop": dict(steps=800, seq_len=256, lr=0.024, optimizer="muon"),
    "gpu": dict(steps=2000, batch_size=64, seq_len=1024, lr=3e-3, optimizer="muon", data="data/installed"),
    "gpu-1b": dict(steps=20000, batch_size=64, seq_len=1024, lr=6e-4, data="data/installed"),
    "sigma-moe-tiny": dict(steps=100000, batch_size=1024, seq_len=4096, accumulate=8, lr=2.6e-4,
                           lbl_coef=1e-3, initial_top_k=[8, 8, 6, 6, 4, 4, 2, 2]),
}
SIZES = tuple(field.name for field in dataclasses.fields(ModelConfig))
RENAMED = {"switch": "switch_fraction", "bad_steps": "max_nonfinite"}         # in older runs, and as flags
CHAT_EPOCHS, CHAT_LR = 4, 0.3   # tuning on conversations: how long, at what part of the run's learning rate


def preset_values(preset=None):
    """{field: value} of a new run: that of the preset, by default laptop, or gpu on a GPU."""
    preset = preset or ("gpu" if parallel.pick_device().startswith("cuda") else "laptop")
    if preset not in PRESETS:
        raise InputError(f"preset {preset!r} is unknown; there are {', '.join(PRESETS)}")
    return dataclasses.asdict(Settings(preset)) | TRAINING[preset] | dataclasses.asdict(PRESETS[preset])


def parse(argv):
    """The settings that were typed: {field: value}.  --help shows the values of the preset."""
    def truth(text):
        return ("false", "true").index(text.lower()) == 1         # ValueError if it is neither

    def numbers(text):
        return [int(n) for n in text.split(",")]
    first = data.make_parser(add_help=False)
    first.add_argument("--preset")
    values, groups, flags = preset_values(first.parse_known_args(argv)[0].preset), {}, {}
    parser = data.make_parser(prog="train.py", usage="train.py [--SETTING VALUE ..]", description=__doc__,
                              argument_default=argparse.SUPPRESS)
    for field in (*dataclasses.fields(Settings), *dataclasses.fields(ModelConfig)):
        group, help = field.metadata["help"].split(": ", 1)
        groups[group] = groups.get(group) or parser.add_argument_group(group)
        names = [f"--{name}" for name in (field.name, *RENAMED) if RENAMED.get(name, name) == field.name]
        groups[group].add_argument(
            *names, dest=field.name, metavar="X",
            type={bool: truth, list: numbers}.get(field.type, field.type),
            help=help + f" ({values[field.name]})" * (values[field.name] not in ("", [])))
        flags |= dict.fromkeys(names, group)
    typed, unknown = parser.parse_known_args(argv)
    if unknown:                                                   # no guess, but those of the likeliest group
        group = flags[max(flags, key=lambda flag: difflib.SequenceMatcher(None, flag, unknown[0]).ratio())]
        parser.error(f"unrecognized arguments: {' '.join(unknown)}; settings of {group} are "
                     + ", ".join(flag for flag in flags if flags[flag] == group))
    return vars(typed)


def resolve(typed):
    """Typed settings -> Settings, ModelConfig, settings.json of a run in --out, whether it tunes on chats.

    What was not typed comes from that run, else from what --init_from names, else from the preset.  What a
    run of an older version did not save has its default."""
    typed = typed | {name: os.path.normpath(typed[name]) for name in {"out", "data", "init_from"} & {*typed}}
    values, source = preset_values(typed.get("preset")), typed.get("init_from")
    tunes = bool(source) and "data" in typed and data.holds_chats(typed["data"])
    name = f"{parallel.run_folder(source).name}-{'chat' if tunes else 'next'}" if source else values["preset"]
    out = Path(typed.get("out", f"out/{name}"))
    saved = parallel.read_settings(out) if (out / "settings.json").exists() else {}
    if saved:
        values |= saved_values(out)
        for name in sorted(name for name in typed if name != "out" and typed[name] != values[name]):
            if name in (*SIZES, "preset", "init_from", "optimizer", "seed", "batch_size", "seq_len"):
                raise InputError(f"{out} was made with {name} {values[name]}, not {typed[name]}; leave out "
                                 f"--{name} to resume it, or choose another --out")
            print(f"changed: {name} {values[name]} -> {typed[name]}"
                  + ", with all schedules, the learning rate's too" * (name == "steps"))
    elif out.name.startswith("step-") or out.exists() and any(
            path.stat().st_size for path in out.iterdir() if path.name != "settings.tmp"):
        raise InputError(f"{out} is not empty and no run, or named like a checkpoint; choose another --out")
    elif source:
        values |= inherited_values(source, typed)
        values["lr"] *= CHAT_LR if tunes else 1
    values |= typed | {"out": str(out)}                           # a directory may have been renamed
    s = Settings(**{field.name: values[field.name] for field in dataclasses.fields(Settings)})
    try:
        config = ModelConfig(**{name: values[name] for name in SIZES})
    except ValueError as error:
        raise InputError(error) from None
    if "initial_top_k" not in typed:                              # a preset's may be of more layers, experts
        schedule = [] if s.top_k_choices else s.initial_top_k[:config.n_layer]
        s.initial_top_k = [min(k, config.n_expert) for k in schedule]
    s.check(config)
    if "lbl_coef" in typed and not router.BALANCE[s.balance]:
        raise InputError(f"lbl_coef has no meaning for balance {s.balance}, which is no loss; leave it out")
    return s, config, saved, tunes and not saved


def saved_values(out):
    """{field: value} of a run's settings.json.  InputError if this code lacks one of the fields."""
    saved = parallel.read_settings(out)
    saved = {RENAMED.get(name, name): value for name, value in (saved["settings"] | saved["model"]).items()}
    known = preset_values("laptop")
    unknown = saved.keys() - known.keys()
    if unknown:
        raise InputError(f"{out}/settings.json has {', '.join(unknown)}, which this code lacks")
    for name, value in saved.items():
        if type(value) not in ((int, float) if type(known[name]) is float else (type(known[name]),)):
            raise InputError(f"{out}/settings.json: {name} {value!r} is of another type")
    return saved


def inherited_values(source, typed):
    """{field: value} of the run, its step-N folder or the Hugging Face model that a new run starts from."""
    if parallel.is_hf(source):
        values, top_k = dataclasses.asdict(evaluation.read_hf_config(source)), []
    else:
        values = saved_values(parallel.run_folder(source))
        top_k = parallel.read_meta(parallel.newest(source))["top_k"]
        times = max(1, typed.get("n_layer", 0) // values["n_layer"])              # layers grow in place
        top_k = [] if {*top_k} == {values["top_k"]} else [k for k in top_k for _ in range(times)]
    # goes on with the K that its layers have, not where its schedule began, unless another is typed
    values |= {"initial_top_k": top_k, "switch_fraction": 1.0}
    if typed.keys() & {"top_k", "initial_top_k", "top_k_choices"}:
        values |= {"initial_top_k": [], "top_k_choices": [], "switch_fraction": Settings.switch_fraction}
    for name in ("n_layer", "n_expert"):
        if typed.get(name, values[name]) % values[name]:
            raise InputError(f"{name} ({typed[name]}) must be a multiple of the {values[name]} of {source}: "
                             "a model grows by copies")
    for name in ("vocab_size", "d_model", "d_expert", "n_head", "n_kv_head", "head_dim", "tie_embeddings"):
        if typed.get(name, values[name]) != values[name]:
            raise InputError(f"{name} ({typed[name]}) must be that of {source}, {values[name]}")
    values["max_seq_len"] = max(typed.get("seq_len", 0), values["max_seq_len"])
    return values | {"ep": 1, "replicate": 1}                     # what fits the processes of this run


# --- opening a run ----------------------------------------------------------------------------------------

def open_same_corpus(s, plan):
    """-> Corpus, on every rank; one of each node compares it with that of rank 0."""
    corpus = data.open_corpus(s.data, s.seq_len, s.seed)
    first = parallel.rank_of_start() > 0 and os.environ.get("LOCAL_RANK") == "0"
    if first and corpus.checksums() != plan.sha256:
        raise InputError(f"{s.data} on this node, {platform.node()}, is not that of rank 0's node")
    return corpus


def make_plan(argv, world):
    """Resolve settings, data and checkpoints, on rank 0 -> what all ranks need to start: settings, config,
    device, sha256 of training and held-out tokens (None: nothing is held out), saved (settings.json of a run
    that exists), steps of its checkpoints, and source, the folder whose weights a new one starts from, or "".

    Prepares the corpus if it is missing.  InputError for what the user has to change."""
    typed = parse(argv)
    s, config, saved, tunes = resolve(typed)
    device = parallel.pick_device(s.device)
    parallel.check_layout(world, s.ep, s.replicate, config.n_expert, device)
    if s.wandb:
        evaluation.import_extra("wandb", "log")
    if not Path(s.data).exists() and Path(s.data) in (Path("data/stdlib"), Path("data/installed")):
        print("preparing the corpus, once:")
        data.prepare(s.data, [Path(s.data).name])
    corpus = data.open_corpus(s.data, s.seq_len, s.seed)
    sha256 = corpus.checksums()
    if tunes and "steps" not in typed:
        s.steps = -(-CHAT_EPOCHS * corpus.train.n_windows // s.batch_size)
    if not (saved or s.init_from or "vocab_size" in typed):      # round up for the matrix products
        config.vocab_size = -(-corpus.vocab_size // 64) * 64
    largest = max(int(each.tokens.max()) for each in (corpus.train, corpus.val) if each)
    needed = max(corpus.vocab_size, largest + 1)
    if needed > config.vocab_size:
        raise InputError(f"vocab_size ({config.vocab_size}) is below the {needed} of {s.data}")
    steps = parallel.checkpoints(s.out)
    source = s.init_from if s.init_from and not steps else ""
    for other in [s.out] * bool(saved) + [parallel.run_folder(source)] * bool(source):
        evaluation.same_tokenizer(other, corpus.file.parent)
    if saved and (saved.get("data_sha256"), saved.get("val_sha256", sha256[1])) != sha256:
        raise InputError(f"data {s.data} is not what {s.out} was made with; choose another --out")
    if not steps and any(Path(s.out).glob("step-*.corrupt*")):
        raise InputError(f"no checkpoint of {s.out} is whole, only .corrupt ones; choose another --out")
    if source and not parallel.is_hf(source):
        source = str(parallel.newest(source))
    return SimpleNamespace(settings=s, config=config, device=device, sha256=sha256, saved=saved,
                           steps=steps, source=source)


@torch.no_grad()
def load(run, plan):
    """Load the newest whole checkpoint of the run, or the weights that a new one starts from: of a step-N
    folder of another run, or a Hugging Face model.  They grow if that has fewer layers or experts."""
    s, source, model, masters = run.settings, plan.source, run.model, run.masters
    if plan.steps:
        run.step = parallel.load_newest(s.out, plan.steps, run.state(), run.layout)
    elif source:
        hf = parallel.is_hf(source)
        old = (evaluation.read_hf_config(source) if hf
               else parallel.read_settings(parallel.run_folder(source))["config"])
        grows = (old.n_layer, old.n_expert) != (run.config.n_layer, run.config.n_expert)
        if grows:                                                 # from a whole one, on the CPU of every rank
            model = parallel.build_model(old, parallel.SINGLE_PROCESS, "cpu", torch.float32, 0)
            masters = parallel.MasterWeights(model)
        if hf:
            evaluation.from_hf(evaluation.load_hf_weights(source), model,
                               lambda name, p, whole: parallel.copy_shard(masters.named[name], whole))
        else:
            parallel.load_checkpoint(source, parallel.training_state(masters), run.layout, may_lack=True)
        small = masters.named | masters.buffers
        for name, t in (run.masters.named | run.masters.buffers).items() if grows else ():
            parallel.copy_shard(t, grown(name, run.config, old, small, s.growth_noise, s.seed))
    run.masters.refresh()


@torch.no_grad()
def grown(name, config, old, weights, noise, seed):
    """The whole parameter `name` of a model that grew from `old` (arXiv 2510.08008), whose weights are given.

    Layers are repeated in place (l1 l1 l2 l2), experts with their router rows too; the copies get Gaussian
    noise, as a part of the weight's standard deviation."""
    if not name.startswith("blocks."):
        return weights[name].detach()
    _, layer, rest = name.split(".", 2)
    layers, experts = config.n_layer // old.n_layer, config.n_expert // old.n_expert
    w = weights[f"blocks.{int(layer) // layers}.{rest}"].detach()
    if w.dim() == 0:
        return w
    is_copy = torch.full(w.shape[:1], int(layer) % layers > 0)
    if ".experts." in name or ".router." in name:
        w = w.repeat_interleave(experts, 0)
        is_copy = is_copy.repeat_interleave(experts) | (torch.arange(len(w)) % experts > 0)
    generator = torch.Generator().manual_seed((seed + zlib.crc32(name.encode())) % 2**63)
    change = noise * w.std(correction=0) * torch.randn(w.shape, generator=generator)
    return w + change * is_copy.view(-1, *[1] * (w.dim() - 1))


def precision(s, config, device):
    """-> dtype of the matrix products, whether the model is compiled.  Says what the device cannot do, and
    what is done instead.  InputError if the model cannot be compiled and was asked to."""
    cuda, dtype = device.startswith("cuda"), torch.float32
    if s.dtype == "bfloat16" or s.dtype == "auto" and cuda and torch.cuda.is_bf16_supported(
            including_emulation=False):
        dtype = torch.bfloat16
    why = config.n_expert > 1 and grouped_mm_limitation(
        dtype, device.split(":")[0], (config.d_model, config.d_expert))
    if why:
        print(f"the experts run one after the other, which is slower: grouped_mm refuses ({why})")
    if cuda:
        torch.set_float32_matmul_precision("high")                # TF32 for the products that stay fp32
        # attention sums the gradient of its queries in no fixed order, unless told otherwise
        torch.use_deterministic_algorithms(s.deterministic)
        torch.backends.cuda.enable_cudnn_sdp(not s.deterministic)
    compiled = s.compile == "true" or s.compile == "auto" and cuda and dtype == torch.bfloat16 and not why
    if compiled and (why or dtype != torch.bfloat16):
        raise InputError("compile (true) needs --dtype bfloat16" + f" and other widths: {why}" * bool(why))
    if compiled:
        print("the first steps compile the model, which takes a while")
    return dtype, compiled


def open_log(run, plan, stack):
    """Open log.jsonl, locked where the system can: two processes at once would destroy a run."""
    out = Path(run.settings.out)
    out.mkdir(parents=True, exist_ok=True)
    for path in (out / "log.jsonl", out / "settings.json", out / "encoding.json"):
        if path.is_symlink() or path.exists() and not path.is_file():
            raise InputError(f"{path} is a link or no file: a run writes into its own directory alone")
    run.log = stack.enter_context(open(out / "log.jsonl", "a+b", buffering=0))
    try:
        import fcntl
        fcntl.flock(run.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError) as error:                       # Windows has no fcntl, Lustre no flock
        if isinstance(error, BlockingIOError):
            raise InputError(f"{out} is in use by another process") from None
        print(f"no lock protects {out} here: let no other process train it", file=sys.stderr)
    if (bool(plan.saved), plan.steps) != ((out / "settings.json").exists(), parallel.checkpoints(out)):
        raise InputError(f"another process has changed {out} meanwhile; start again")


def open_directory(run, plan, stack):
    """Write what a run's directory holds beside its checkpoints, and cut the log back to the checkpoint."""
    s, out = run.settings, Path(run.settings.out)
    settings = {"settings": dataclasses.asdict(s), "model": dataclasses.asdict(run.config),
                "data_sha256": plan.sha256[0], "val_sha256": plan.sha256[1],
                "wandb_id": plan.saved.get("wandb_id") or os.urandom(16).hex()}
    if not plan.saved or run.step < s.steps:                      # nothing new trains in a complete run
        parallel.write_durably(out / "settings.json", json.dumps(settings, indent=1))
    if run.corpus.encoding and not (out / "encoding.json").exists():
        encoding = (run.corpus.file.parent / "encoding.json").read_text(encoding="utf-8")
        parallel.write_durably(out / "encoding.json", encoding)
    run.log.seek(0)
    kept = 0
    for line in run.log.readlines():                              # the last one may be cut short by a crash
        step = re.match(rb'{"step": (\d+),', line)
        if not line.endswith(b"\n") or step and int(step[1]) > run.step:
            if not plan.steps:                                    # its checkpoints are gone: keep its lines
                shutil.copy(out / "log.jsonl", out / f"log-{time.time_ns()}.jsonl")
            run.log.truncate(kept)
            break
        kept += len(line)
    about = {"versions": {"python": platform.python_version(), "torch": torch.__version__},
             "commit": commit(), "device": device_name(run.device), "processes": run.layout.world,
             "dtype": str(run.dtype)[6:]}
    if not kept:
        write_row(run, settings | about)
    elif run.step < s.steps:
        write_row(run, {"step": run.step, "resumed": about})
    if s.wandb:                                                   # log.jsonl stays the truth
        run.wandb = stack.enter_context(evaluation.import_extra("wandb", "log").init(
            project="nanosigma", name=s.out, id=settings["wandb_id"], resume="allow", config=settings))


def commit():
    """The commit of this code, "+ changes" if it was changed; None if git does not track this file."""
    def git(*args):
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True)
    if shutil.which("git") and not git("ls-files", "--error-unmatch", Path(__file__).name).returncode:
        return git("describe", "--always", "--exclude=*", "--abbrev=40", "--dirty= + changes").stdout.strip()


def device_name(device):
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device}, {platform.machine()}, {torch.get_num_threads()} threads"


# --- what is shown ----------------------------------------------------------------------------------------

def explain(error, run):
    """End with one line if it was for memory or for another process, for which torch has no classes."""
    text, rank = " ".join(str(error).split()), parallel.rank_of_start()
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        data.fail(f"rank {rank}: out of memory; --accumulate makes micro-batches smaller, "
                  "--activation_checkpointing true keeps less of them", 1)
    step = f"after step {run.step}" if run else "at the start"
    lost = "gloo/transport|Connection (closed|reset) by peer|Timed out waiting"
    if isinstance(error, torch.distributed.DistError) or "RANK" in os.environ and re.search(lost, text):
        data.fail(f"rank {rank}: {step} another process did not answer ({text[:200]}); what was saved before "
                  "is whole", 1)


def introduce(run):
    """Say what the steps will see -> whether there is anything left to do."""
    s, config, text, layout = run.settings, run.config, run.corpus.train, run.layout
    if run.step >= s.steps:
        print(f"{s.out} is complete: {run.step} steps.  --steps {2 * run.step} goes on, --out NAME begins")
        return False
    total, active, _ = count_parameters(config)
    print(f"{s.out}: {total / 1e6:.1f}M parameters, {active / 1e6:.2f}M active per token\n"
          f"{config.n_layer} layers of {config.n_expert} experts, top {config.top_k}; "
          f"{device_name(run.device)}, {str(run.dtype)[6:]}; "
          f"processes {layout.world}, ep {layout.ep}, replicate {layout.replicate}\n"
          f"{s.steps:,} steps of {s.batch_size * s.seq_len:,} tokens, an epoch is "
          f"{text.n_windows / s.batch_size:,.2f} steps; Ctrl-C saves and ends, the same command resumes")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0              # not on Windows
    if run.device == "cpu" and torch.get_num_threads() > 1 and load > (os.cpu_count() or 1):
        print(f"the cores are busy (load {load:.0f}): OMP_NUM_THREADS=1 may be faster")
    moved = not router.BALANCE[s.balance] and s.balance != "none"
    if not moved and any(block.moe.router.bias.any() for block in run.model.blocks):
        print(f"the selection biases stay as they are: balance {s.balance} does not move them")
    if run.corpus.has_chats:
        print(f"{len(text.spans):,} conversations in {text.n_windows:,} sequences; of those longer than "
              f"{s.seq_len} tokens {text.n_cut:,} are cut, {text.n_left_out:,} left out")
    n, epochs = text.n_windows, s.steps * s.batch_size / text.n_windows
    if s.batch_size > n and not run.step:
        print(f"warning: a step has all {n:,} sequences more than once; --batch_size {-(-n // 8)} would fit, "
              "with another --out")
    elif epochs > 4 and not run.corpus.has_chats and not run.step:
        print(f"warning: {epochs:.0f} epochs: after some four, text is learned by heart; "
              f"--steps {max(1, 4 * n // s.batch_size)} would fit")
    if run.step:
        print(f"resuming from step {run.step}")
        before = parallel.read_meta(Path(s.out) / f"step-{run.step}")["top_k"]
        if before != top_k_at(run.step, s, config):               # the switch, which --steps may move
            print(f"experts per layer: {before} so far, {top_k_at(run.step, s, config)} from here on")
    elif run.corpus.val is not None:
        print("step 0: held out ..", end="\r" if sys.stdout.isatty() else "\n", flush=True)    # takes a while
        print(f"step 0: held out {validation(run):.4f}")
    if run.corpus.val is None:
        print("nothing is held out: no loss but that of training is known")
    return True


def report(run, seconds):
    """What there is to see at the end of a run."""
    s, corpus, chats = run.settings, run.corpus, run.corpus.has_chats
    if run.step < s.steps:
        print(f"stopped and saved after step {run.step}; the same command resumes")
        return
    if corpus.val is not None:
        loss, statistics = run.validated
        guess = math.log(run.config.vocab_size)
        print(f"\nheld-out loss {loss:.4f} nats per token (a uniform guess: {guess:.4f})")
        if run.config.n_expert > 1:
            print("load of each expert on held-out text; half height is the uniform share:\n"
                  + evaluation.draw_load(statistics.load))
    if corpus.encoding and s.sample_tokens and run.layout.world == 1 and not chats:
        run.model.eval()
        torch.use_deterministic_algorithms(False)                 # sampling has no such kernels
        prompt = [corpus.encoding.encode_single_token("<|endoftext|>")]
        with torch.compiler.set_stance("force_eager"):            # a compilation takes longer than a sample
            texts = evaluation.generate_text(
                run.model, corpus.encoding, prompt, min(s.sample_tokens, s.seq_len),
                top_k_at(run.step - 1, s, run.config))
            print("\nsample:\n" + "".join(texts))
    print(f"\n{s.out}/step-{run.step} and log.jsonl, {seconds / 60:.1f} minutes since the start; try next\n"
          f"  python eval.py routing {s.out}\n  python eval.py loss --ckpt {s.out}\n"
          f"  python eval.py {'chat' if chats else 'sample'} --ckpt {s.out}")


if __name__ == "__main__":
    main()
