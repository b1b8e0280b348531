"""Train a sparse language model, or resume the run in --out.

    python train.py                                   what fits: the laptop preset, or gpu on a GPU
    python train.py --n_expert 1 --out out/dense      the same model with one expert: the dense control
    python train.py --preset gpu-1b --data data/mine  a larger model, a corpus made by data.py
    python train.py --init_from out/laptop --data chats.jsonl         tune the run's model on conversations
    torchrun --standalone --nproc-per-node 8 train.py --ep 8     eight processes, which share the experts

A run is its directory: settings.json, encoding.json (the tokenizer), log.jsonl and step-N/ (checkpoints).
Every schedule is a pure function of the step, and the rows of a step of the seed and of the sequences before
it; so a checkpoint need hold only weights, optimizer state and the step, and a resumed run repeats the
uninterrupted one.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

# before torch: OpenMP threads that spin while they wait make training 10 times slower on busy cores
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

try:
    import fcntl
except ImportError:                                               # Windows
    fcntl = None

import data
import eval as evaluation
import parallel
from model import (
    PRESETS,
    Model,
    ModelConfig,
    count_parameters,
    flops_per_token,
    from_hf,
    grouped_mm_limitation,
)
from router import (
    BALANCE,
    Statistics,
    active_experts,
    differentiate_at,
    load_balancing_loss,
    noise_floor,
    router_z_loss,
    top1_balancing_loss,
    update_bias,
    zipf_bound,
)

# --- settings ---------------------------------------------------------------------------------------------


def setting(default, group, help):
    default = {"default_factory": list} if default == [] else {"default": default}
    return dataclasses.field(**default, metadata={"group": group, "help": help})


@dataclass
class Settings:
    """Everything about a run but the model's sizes.  check() raises ValueError, naming the field."""

    preset: str = setting("", "run", f"sizes and schedule to start from: {', '.join(PRESETS)} (default: gpu "
                          "on a GPU, else laptop)")
    out: str = setting("", "run", "the run's directory (default: out/PRESET, or out/RUN-chat for the run "
                       "that conversations tune)")
    data: str = setting("data/stdlib", "run", "folder or token file of data.py (default: data/stdlib, or for "
                        "gpu and gpu-1b data/installed, made if missing); "
                        "or conversations for the model of --init_from: a .jsonl, .jsonl.gz or .json, or the "
                        "word functions, which are Python's own documented ones")
    init_from: str = setting("", "run", "start from the weights of another run (or of a step-N folder in it),"
                             " or from a folder of Hugging Face's Qwen3-MoE")
    device: str = setting("auto", "run", "cpu, cuda or mps (default: the best there is)")
    dtype: str = setting("auto", "run", "float32 or bfloat16: of the matrix products; weights stay fp32 "
                         "(default: bfloat16 on CUDA)")
    compile: str = setting("auto", "run", "true or false: compile the blocks, for one process in bfloat16 "
                           "(default: on CUDA)")
    seed: int = setting(0, "run", "of the initial weights and the order of the data")

    steps: int = setting(1600, "schedule", "updates of the weights; of tuning: four epochs")
    batch_size: int = setting(32, "schedule", "sequences per step")
    ramp_from: int = setting(0, "schedule", "sequences of the first step, if the batch is to grow; 0 is off")
    ramp: float = setting(0.1, "schedule", "fraction of the steps in which it grows to batch_size")
    accumulate: int = setting(1, "schedule", "micro-batches that a step is cut into")
    seq_len: int = setting(128, "schedule", "tokens per sequence")
    pack: bool = setting(True, "schedule", "true: several conversations in a sequence, which do not see each "
                         "other; false: one, and padding")
    lr: float = setting(6e-3, "schedule", "learning rate after warm-up; of tuning: 0.3 of that of the run")
    warmup: float = setting(0.03, "schedule", "fraction of the steps in which it rises from 0")
    decay: float = setting(0.4, "schedule", "fraction of the steps, the last ones, in which it falls to 0")

    beta1: float = setting(0.9, "optimizer", "AdamW's average of the gradient")
    beta2: float = setting(0.95, "optimizer", "AdamW's average of its square")
    eps: float = setting(1e-8, "optimizer", "AdamW's epsilon")
    weight_decay: float = setting(0.1, "optimizer", "on matrices only")
    clip: float = setting(1.0, "optimizer", "largest norm of the gradient")

    balance: str = setting("lbl", "balance", f"{', '.join(BALANCE)}: what keeps the experts evenly used")
    lbl_coef: float = setting(0.01, "balance", "weight of each layer's balance loss, lbl or top1")
    lbl_scope: str = setting("global", "balance", "global: load of the step so far; micro: of a micro-batch")
    temperature: float = setting(0.2, "balance", "of the probabilities in top1; below 1 sharpens them")
    bias_rate: float = setting(1e-3, "balance", "step of the selection biases in loss-free")
    z_coef: float = setting(0.0, "balance", "weight of each layer's router z-loss")
    initial_top_k: list = setting([], "balance", "experts activated in layer 0, 1, .. before the switch: 8,4")
    switch: float = setting(0.9, "balance", "fraction of the steps before all activate top_k; 1 is never")

    spike: float = setting(6.0, "guard", "standard deviations of the last 128 steps beyond which a loss or a "
                           "norm skips the update; 0 is off")
    bad_steps: int = setting(10, "guard", "steps in a row without a finite loss that end the run")
    check_every: int = setting(500, "guard", "steps between comparisons of the model's copies, which are "
                             "compared before a save, too; 0 is off")

    log_every: int = setting(10, "watching", "steps between lines of log.jsonl")
    eval_every: int = setting(0, "watching", "steps between validations (default: a quarter of the run)")
    eval_tokens: int = setting(1 << 17, "watching", "held-out tokens of a validation, at most")
    save_every: int = setting(0, "watching", "steps between checkpoints (default: a quarter of the run)")
    keep: int = setting(2, "watching", "checkpoints kept, the newest ones")
    wandb: bool = setting(False, "watching", "true: show the log at Weights & Biases too (extra log)")
    sample_tokens: int = setting(120, "watching", "tokens of text that one process writes at the end")

    ep: int = setting(1, "processes", "expert parallelism: processes that share out a layer's experts")
    replicate: int = setting(1, "processes", "copies of the model, each sharded over its processes")
    timeout: int = setting(600, "processes", "seconds without an answer in training that make an error")
    activation_checkpointing: bool = setting(False, "processes", "true: of each layer keep the input only, "
                                             "and compute the rest again; for memory")
    no_sync: bool = setting(True, "processes", "true: gradients are added up over the micro-batches, then "
                            "sent; false: each is sent, for memory")

    def check(self, config):
        for name in ("steps", "batch_size", "accumulate", "seq_len", "keep", "log_every", "ep", "replicate",
                     "timeout", "bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "clip", "eps", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("seed", "ramp_from", "eval_every", "save_every", "eval_tokens", "sample_tokens",
                     "weight_decay", "lbl_coef", "z_coef", "bias_rate", "spike",
                     "check_every"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("warmup", "decay", "ramp", "beta1", "beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        choices = {"dtype": ("auto", "float32", "bfloat16"), "compile": ("auto", "true", "false"),
                   "balance": BALANCE, "lbl_scope": ("global", "micro")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not 0 < self.switch <= 1:
            raise ValueError(f"switch must be above 0 and at most 1, got {self.switch}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size ({self.batch_size}) must be a multiple of accumulate "
                             f"({self.accumulate})")
        if self.ramp_from > self.batch_size:
            raise ValueError(f"ramp_from ({self.ramp_from}) must not be above batch_size ({self.batch_size})")
        if self.seq_len > config.max_seq_len:
            raise ValueError(f"seq_len ({self.seq_len}) must not be above max_seq_len ({config.max_seq_len})")
        possible = all(1 <= k <= config.n_expert for k in self.initial_top_k)
        if len(self.initial_top_k) > config.n_layer or not possible:
            raise ValueError(f"initial_top_k ({self.initial_top_k}) must be at most {config.n_layer} numbers "
                             f"(n_layer) from 1 to {config.n_expert} (n_expert)")


TRAINING = {                                                  # what a preset sets beside the model's sizes
    "laptop": {},
    "gpu": dict(steps=2000, batch_size=64, seq_len=1024, lr=1.5e-3, data="data/installed"),
    "gpu-1b": dict(steps=20000, batch_size=64, seq_len=1024, lr=6e-4, data="data/installed"),
    "sigma-moe-tiny": dict(steps=100000, batch_size=1024, seq_len=4096, accumulate=8, lr=2.6e-4,
                           lbl_coef=1e-3, initial_top_k=[8, 8, 6, 6, 4, 4, 2, 2]),
}
# prepared if it is missing: {folder: (sources, vocabulary)}
CORPORA = {"data/stdlib": (["stdlib"], 2048), "data/installed": (["installed"], 8192)}
# tuning on conversations: how long, its learning rate as a part of that of the run whose model it tunes, and
# what else it takes over from that run
CHAT_EPOCHS = 4
CHAT_LR = 0.3
TAKEN_OVER = ("preset", "dtype", "batch_size", "accumulate", "seq_len", "balance", "lbl_coef", "lbl_scope",
              "temperature", "bias_rate", "z_coef", "weight_decay", "beta1", "beta2", "eps", "clip")
# what may differ when a run is resumed; everything else must be the run's own
MAY_CHANGE = {"out", "steps", "device", "compile", "log_every", "eval_every", "eval_tokens", "save_every",
              "keep", "sample_tokens", "wandb", "spike", "bad_steps", "check_every", "ep", "replicate",
              "timeout", "activation_checkpointing", "no_sync"}


def parse(argv):
    """The settings that were typed: {field: value}."""
    parser = data.Parser(prog="train.py", description=__doc__)
    groups = {}
    fields = [(f, f.metadata["group"], f.metadata["help"]) for f in dataclasses.fields(Settings)]
    fields += [(f, "model (default: the preset's)", SIZES[f.name]) for f in dataclasses.fields(ModelConfig)]
    for field, group, help in fields:
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        if isinstance(field.default, (int, float)) and field.default and "default" not in help + group:
            help += f" ({field.default})"
        read = READ.get(field.name, READ.get(field.type, field.type))
        groups[group].add_argument(f"--{field.name}", type=read, metavar="", help=help)
    return {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}


def truth(text):
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def numbers(text):
    return [int(n) for n in text.split(",") if n]


READ = {bool: truth, list: numbers}
SIZES = {
    "vocab_size": "rows of the embedding (default: the data's vocabulary, rounded up to a multiple of 64)",
    "n_layer": "layers", "n_head": "query heads", "n_kv_head": "key and value heads",
    "head_dim": "width of a head", "d_model": "width of the residual stream",
    "n_expert": "experts per layer; 1 is a dense model",
    "d_expert": "hidden width of an expert", "top_k": "experts activated per token",
    "gate": "softmax, sigmoid or normalized",
    "token_router": "true or false: a control, in which layer 0 routes on the token's embedding alone",
    "rope_base": "base of the rotary positions",
    "norm_eps": "epsilon of the norms", "tie_embeddings": "true or false: one matrix for embedding and head",
    "max_seq_len": "longest sequence, prompt and generated text together"}


def resolve(typed):
    """Typed settings -> (Settings, ModelConfig, whether the run exists).

    What was not typed comes from the run in --out if there is one, else from --init_from and the preset."""
    typed |= {name: os.path.normpath(typed[name]) for name in ("out", "data", "init_from") if name in typed}
    source, chats = typed.get("init_from", ""), data.holds_chats(typed.get("data", ""))
    tuned = chats and source and not evaluation.is_hf(source)
    base = evaluation.read_settings(evaluation.run_folder(source))["settings"] if tuned else {}
    device = parallel.pick_device(typed.get("device", "auto"))
    preset = typed.get("preset", base.get("preset", "gpu" if device.startswith("cuda") else "laptop"))
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is unknown; there are {', '.join(PRESETS)}")
    out = Path(typed.get("out") or (f"out/{evaluation.run_folder(source).name}-chat" if chats and source
                                    else f"out/{preset}"))
    if out.name.startswith("step-"):
        raise ValueError(f"out ({out}) must not begin with step-, which is the name of a checkpoint")
    exists = (out / "settings.json").exists()
    if data.is_chat_source(typed.get("data", "")):
        if not (exists or source):
            raise ValueError(f"data {typed['data']} are conversations: --init_from names the run (or the "
                             "folder of Hugging Face) whose model they tune, and whose tokenizer they need")
        typed["data"] = str(data.chats_folder(typed["data"], tokenizer_of(out, exists, source)))
    if exists:
        saved = evaluation.read_settings(out)
        given, sizes = saved["settings"], saved["model"]
        for name, value in typed.items():
            old = given.get(name, sizes.get(name))
            ramped = name == "steps" and given["ramp_from"]       # the sequences consumed would be others
            if (name not in MAY_CHANGE or ramped) and value != old:
                raise ValueError(f"{out} was made with {name} {old}, not {value}; leave out --{name} to "
                                 "resume it, or choose another --out")
    elif out.exists() and {p.name for p in out.iterdir()} - {"log.jsonl", "encoding.json", "settings.tmp"}:
        raise ValueError(f"{out} is not empty and not a directory of train.py; choose another --out")
    else:
        given = given_by(preset, base, chats) | {"out": str(out), "preset": preset}
        sizes = sizes_of(preset, typed)
    names = {f.name for f in dataclasses.fields(ModelConfig)}
    try:
        settings = Settings(**given | {k: v for k, v in typed.items() if k not in names})
        config = ModelConfig(**sizes | {k: v for k, v in typed.items() if k in names})
    except TypeError as error:
        raise ValueError(f"{out / 'settings.json'} is of another version of train.py ({error})") from None
    if "initial_top_k" not in typed:                          # a preset's list is cut to the layers there are
        settings.initial_top_k = settings.initial_top_k[:config.n_layer]
    settings.check(config)
    return settings, config, exists


def tokenizer_of(out, exists, source):
    """The tokenizer of a run, or of what it starts from (a run, a step-N in it, a folder of Hugging Face)."""
    return data.read_tokenizer(out if exists else evaluation.run_folder(source))


def given_by(preset, base, chats):
    """Settings of a new run that the preset gives, and if it is to be tuned, the run it starts from."""
    given = dataclasses.asdict(Settings()) | TRAINING[preset]
    if chats:
        given |= {name: base[name] for name in TAKEN_OVER if name in base} | {"initial_top_k": []}
        given["lr"] = CHAT_LR * base.get("lr", given["lr"])
    return given


def sizes_of(preset, typed):
    """The model's sizes that a new run gets from --init_from or the preset: {field of ModelConfig: value}."""
    source, sizes = typed.get("init_from", ""), dataclasses.asdict(PRESETS[preset])
    if source and evaluation.is_hf(source):
        sizes |= evaluation.read_hf_config(source)
    elif source:
        sizes = evaluation.read_settings(evaluation.run_folder(source))["model"]
    longest = max(typed.get("seq_len", 0), sizes["max_seq_len"]) if source else sizes["max_seq_len"]
    return sizes | {"max_seq_len": longest}


# --- schedules: pure functions of the step ----------------------------------------------------------------

def learning_rate(step, s):
    """Warm-up, stable, decay (arXiv 2404.06395): both ends linear."""
    rise = (step + 1) / (s.warmup * s.steps) if s.warmup else 1.0
    fall = (s.steps - step) / (s.decay * s.steps) if s.decay else 1.0
    return s.lr * min(1.0, rise, fall)


def sequences(step, s):
    """Sequences of this step: batch_size, after a linear ramp, always a multiple of accumulate."""
    if not s.ramp_from or step >= s.ramp * s.steps:
        return s.batch_size
    size = s.ramp_from + (s.batch_size - s.ramp_from) * step / (s.ramp * s.steps)
    return max(1, int(size) // s.accumulate) * s.accumulate


# --- bad numbers ------------------------------------------------------------------------------------------

class Guard:
    """Decides whether a step may change the weights.  Its tensors are part of a checkpoint.

    A step is skipped if its loss or the norm of its gradient is not finite, or lies more than `spike`
    standard deviations above the mean of the last 128 finite ones, skipped ones too: a lasting change of
    level is soon the new level, and at most five are skipped in a row.  The memory begins anew wherever a
    schedule has a border (the switch of K, the ends of warm-up and of the constant learning rate), and
    nothing is a spike before it is full, nor during warm-up."""

    SIZE, IN_A_ROW = 128, 5

    def __init__(self):
        self.recent = torch.zeros(self.SIZE, 2, dtype=torch.float64)      # loss, norm
        self.counts = torch.zeros(5, dtype=torch.int64)  # seen, spikes, in a row, not finite, in a row

    def state(self):
        return {"guard.recent": self.recent, "guard.counts": self.counts}

    def objection(self, loss, norm, step, s, config):
        """-> why this step may not change the weights, or None."""
        if step and phase(step, s, config) != phase(step - 1, s, config):
            self.counts[0] = 0
        seen, _, spikes, _, _ = self.counts.tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.counts[3:] += 1
            return f"its {'gradient' if math.isfinite(loss) else 'loss'} is not finite"
        self.counts[4] = 0
        value = torch.tensor([loss, norm], dtype=torch.float64)
        mean, spread = self.recent.mean(0), self.recent.std(0, correction=0)
        limit = mean + s.spike * torch.maximum(spread, 1e-6 * mean.abs())
        ready = s.spike and seen >= self.SIZE and spikes < self.IN_A_ROW and phase(step, s, config)[0] > 0
        above = [name for name, high in zip(("loss", "gradient norm"), value > limit) if ready and high]
        self.recent[seen % self.SIZE] = value
        self.counts[0] += 1
        self.counts[1] += bool(above)
        self.counts[2] = spikes + 1 if above else 0
        if above:
            return f"its {' and '.join(above)} ({loss:.4g}, {norm:.4g}) is a spike"


def phase(step, s, config):
    """Which part of the schedules a step is in: warm-up, constant or falling learning rate (0, 1, 2); K."""
    rate = 0 if step + 1 < s.warmup * s.steps else 1 if s.steps - step > s.decay * s.steps else 2
    return rate, top_k_at(step, s, config)


def top_k_at(step, s, config):
    """Experts activated in each layer at a step [L]."""
    return active_experts(step, s.steps, s.initial_top_k, config.top_k, s.switch, config.n_layer)


def consumed(step, s):
    """Sequences of the steps before this one."""
    return sum(sequences(before, s) for before in range(step))


# --- the run ----------------------------------------------------------------------------------------------

@dataclass
class Corpus:
    """The text of a run."""

    train: data.Sampler
    vocab_size: int = 0
    top_share: float = 0.0      # of the most frequent token
    val: data.Sampler = None    # of the held-out tokens, if there are any
    encoding: tiktoken.Encoding = None      # if there is one beside the token file
    folder: Path = None
    file: Path = None
    sha256: str = None          # of the file; known to rank 0

    def sizes(self):
        return [self.vocab_size, *(len(part.tokens) for part in (self.train, self.val) if part)]

    def has_chats(self):
        return isinstance(self.train, data.ChatSampler)

    def check(self):
        """ValueError if a token file is not the one that data.py wrote beside this meta.json."""
        self.sha256 = data.file_sha256(self.file)
        if not (self.folder / "meta.json").exists():
            return
        meta = data.load_meta(self.folder)                    # the tokenizer fits the tokens
        found = {"train.bin": self.sha256} if self.file.name == "train.bin" else {}
        if self.val is not None:
            found["val.bin"] = data.file_sha256(self.folder / "val.bin")
        for name, digest in found.items():
            if digest != meta[name[:-4]]["sha256"]:
                raise ValueError(f"{self.folder / name} is not what data.py wrote (its sha256 is not that of "
                                 "meta.json): prepare it anew under another --name")


@dataclass
class Run:
    """What a training step works on."""

    settings: Settings
    config: ModelConfig
    model: Model
    masters: parallel.Masters
    optimizer: torch.optim.Optimizer
    corpus: Corpus
    device: str
    dtype: torch.dtype          # that the matrix products are computed in
    grid: parallel.Grid = parallel.ALONE
    guard: Guard = dataclasses.field(default_factory=Guard)
    done: int = 0               # steps
    ahead: tuple = None         # the Batch of the next step
    lost: int = 0               # lines of the log and checkpoints that could not be written
    log: TextIO = None          # log.jsonl, open and locked; rank 0's alone
    shown: object = None        # the run at Weights & Biases

    def __post_init__(self):
        self.window = Window(self.config, self.device)


def open_corpus(s):
    """-> Corpus.  ValueError if it does not fit the settings."""
    source = Path(s.data)
    file, folder = (source, source.parent) if source.is_file() else (source / "train.bin", source)
    if not file.exists():
        raise ValueError(f"data {s.data} is neither a token file nor a folder made by data.py: "
                         "python data.py --source PATH --name NAME makes data/NAME")

    def cut(path):
        return data.make_sampler(data.load_tokens(path), path, s.seq_len, s.seed, s.pack)
    encoding = data.load_encoding(folder) if (folder / "encoding.json").exists() else None
    train, val = cut(file), cut(folder / "val.bin") if (folder / "val.bin").exists() else None
    vocab_size = data.vocabulary(file)
    share = data.largest_share(train.tokens, vocab_size)
    return Corpus(train, vocab_size, share, val, encoding, folder, file)


def decide(argv, world):
    """What one process finds out for all: the settings of the run, whether it exists, its checkpoints.

    Prepares the corpus if need be.  ValueError for what the user has to change."""
    typed = parse(argv)
    asked = typed.get("data", "")
    s, config, exists = resolve(typed)
    device = parallel.pick_device(s.device)
    parallel.check_layout(world, s.ep, s.replicate, config.n_expert, device)
    if not Path(s.data).exists() and s.data in CORPORA:
        sources, vocab_size = CORPORA[s.data]
        print("preparing the corpus, once:")
        print(data.describe(s.data, data.prepare(Path(s.data), sources, vocab_size=vocab_size)))
    if data.is_chat_source(asked) and not Path(s.data).exists():
        print(f"preparing the conversations of {asked}, once:")
        encoding = tokenizer_of(s.out, exists, s.init_from)
        print(data.describe(s.data, data.prepare(Path(s.data), [asked], tokenizer=encoding, chats=True)))
    corpus = open_corpus(s)
    corpus.check()
    if corpus.has_chats() and not (exists or "steps" in typed):
        s.steps = -(-CHAT_EPOCHS * corpus.train.n_windows // s.batch_size)
    if not exists and "vocab_size" not in typed and not s.init_from:
        config.vocab_size = -(-corpus.vocab_size // 64) * 64  # the data's, rounded up for the matrix products
    if corpus.vocab_size > config.vocab_size:
        raise ValueError(f"vocab_size ({config.vocab_size}) is below the {corpus.vocab_size} of {s.data}")
    steps = parallel.checkpoints(s.out)
    foreign = bool(s.init_from) and evaluation.is_hf(s.init_from)
    source = s.init_from if foreign else evaluation.run_folder(s.init_from)
    for other in [s.out] * exists + [source] * bool(s.init_from and not steps):
        evaluation.same_tokenizer(other, corpus.folder)
    before = evaluation.read_settings(s.out).get("data_sha256") if exists else None
    if before and before != corpus.sha256:
        raise ValueError(f"data {s.data} is not what {s.out} was made with (its sha256 is another): bring "
                         "that back, or choose another --out")
    corrupt = sorted(str(path) for path in Path(s.out).glob("step-*.corrupt*"))
    if corrupt and not steps:
        raise ValueError(f"no checkpoint of {s.out} is whole ({', '.join(corrupt)}): bring one back, or "
                         "choose another --out")
    if s.init_from and not steps and not foreign:
        source = evaluation.newest(s.init_from)
    return {"settings": dataclasses.asdict(s), "model": dataclasses.asdict(config), "device": device,
            "exists": exists, "steps": steps, "weights": str(source), "foreign": foreign, "corpus": corpus,
            "sizes": corpus.sizes()}


def start(decided, grid):
    """Prepare the model, and load the newest checkpoint of the run -> Run."""
    s, config = Settings(**decided["settings"]), ModelConfig(**decided["model"])
    device, corpus = decided["device"], decided["corpus"] or open_corpus(s)
    if corpus.sizes() != decided["sizes"]:
        raise ValueError(f"data {s.data} is not on every machine that of rank 0")
    parallel.join(grid, s.ep, s.replicate, device, s.timeout)
    dtype = compute_dtype(s.dtype, config, device)
    if device.startswith("cuda"):                             # TF32 for the products that stay fp32
        torch.set_float32_matmul_precision("high")
    model = parallel.build_model(config, grid, device, dtype, s.seed)
    masters = parallel.Masters(model, dtype)
    if compiles(s, device, dtype, grid):
        parallel.compile_blocks(model, masters)
    if s.activation_checkpointing:
        parallel.recompute_blocks(model)
    optimizer = parallel.adamw(masters, s.lr, (s.beta1, s.beta2), s.eps, s.weight_decay)
    run = Run(s, config, model, masters, optimizer, corpus, device, dtype, grid)
    if decided["exists"]:                                     # nobody else may touch it from here on
        run.log = parallel.from_rank_0(grid, lambda: open_log(s.out))
    if decided["steps"]:
        run.done = parallel.load_newest(s.out, decided["steps"], state_of(run), grid)
    elif decided["foreign"]:
        load_foreign(run)
    elif s.init_from:
        parallel.load_checkpoint(decided["weights"], parallel.training_state(masters), grid)
        for bias in masters.buffers.values() if s.balance != "loss-free" else ():
            bias.zero_()                                          # nothing would ever move them again
    masters.refresh()
    for block in model.blocks if s.balance == "top1" else ():
        block.moe.router.temperature = s.temperature
    run.log = parallel.from_rank_0(grid, lambda: open_run(run, decided["exists"]))
    return run


def load_foreign(run):
    """Fill the weights from a folder of Hugging Face."""
    s, problem = run.settings, None
    try:
        from_hf(evaluation.Weights(s.init_from), run.model, lambda name, p, whole: parallel.put_part(
            run.masters.named[name], whole))
    except (ValueError, OSError) as error:
        problem = f"rank {run.grid.rank}: " * bool(run.grid.rank) + f"{s.init_from}: {error}"
    problem = next(filter(None, parallel.gather(run.grid, problem)), None)
    if problem:
        raise SystemExit(2) if run.grid.rank else ValueError(problem)


def state_of(run):
    """All that a checkpoint of a run holds: {name: tensor}."""
    return parallel.training_state(run.masters, run.optimizer) | run.guard.state() | run.window.state()


def open_run(run, exists):
    """Write what a run's directory holds beside its checkpoints -> its log, locked."""
    out, log = Path(run.settings.out), run.log or open_log(run.settings.out)
    if (parallel.checkpoints(out) or [0])[-1] != run.done:
        raise ValueError(f"{out} was in use by another process just now; the same command goes on with it")
    if run.corpus.encoding and not exists:
        shutil.copy(run.corpus.folder / "encoding.json", out / "encoding.json")
    write_settings(run, log)
    cut_log(log, run.done)
    if run.settings.wandb:                                    # log.jsonl stays the truth
        run.shown = show_elsewhere(run, out)
    return log


def show_elsewhere(run, out):
    """Begin, or go on with, a run at Weights & Biases, named by the directory."""
    wandb, name = evaluation.needed("wandb", "log"), re.sub(r"\W+", "-", str(out.resolve()).strip("/"))[-100:]
    try:
        return wandb.init(project="nanosigma", name=out.name, id=name, resume="allow", dir=out,
                          config=dataclasses.asdict(run.settings) | dataclasses.asdict(run.config))
    except Exception as error:                                # it has no class for all of its own
        raise ValueError(f"--wandb: {error}; WANDB_MODE=offline keeps it here") from None


def compute_dtype(asked, config, device):
    """The dtype of the matrix products.  What the device cannot do is said, and what is done instead."""
    if asked == "auto":
        asked = "bfloat16" if device.startswith("cuda") and computes_bf16(device) else "float32"
    dtype = getattr(torch, asked)
    if dtype == torch.bfloat16 and not computes_bf16(device):
        print(f"{device_name(device)} does not compute in bfloat16: float32 is used instead")
        dtype = torch.float32
    why = grouped_mm_limitation(dtype, device.split(":")[0], (config.d_model, config.d_expert))
    if why and config.n_expert > 1:
        print(f"the experts run one after the other, which is slower: grouped_mm refuses ({why})")
    return dtype


def compiles(s, device, dtype, grid):
    """Whether blocks are compiled.  ValueError if they cannot be and were asked to."""
    possible = dtype == torch.bfloat16 and grid.world == 1
    if s.compile == "true" and not possible:
        raise ValueError("compile (true) is for one process with --dtype bfloat16: torch compiles no grouped "
                         "product in fp32, and FSDP cuts a block at every module that it shards")
    return possible and (s.compile == "true" or s.compile == "auto" and device.startswith("cuda"))


def computes_bf16(device):
    """Whether a device has bfloat16; a CPU always does, some of them slowly."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        return bool(torch.ones(1, dtype=torch.bfloat16, device=device).sum())
    except (TypeError, RuntimeError):                             # Apple's before macOS 14
        return False


def open_log(out):
    """The log, held for this process alone where the system can: two at once would destroy a run."""
    Path(out).mkdir(parents=True, exist_ok=True)
    log = open(Path(out) / "log.jsonl", "a+", buffering=1, errors="replace")
    if fcntl:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{out} is in use by another process") from None
    return log


def write_settings(run, log):
    """settings.json as they are now (steps may have changed), and the header of a new log."""
    s, out = run.settings, Path(run.settings.out)
    settings = {"settings": dataclasses.asdict(s), "model": dataclasses.asdict(run.config),
                "data_sha256": run.corpus.sha256}
    text, file = json.dumps(settings, indent=1), out / "settings.json"
    if not file.exists() or file.read_text() != text:
        with open(out / "settings.tmp", "w") as aside:
            aside.write(text)
            aside.flush()
            os.fsync(aside.fileno())
        os.replace(out / "settings.tmp", file)
    if log.tell():
        return
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                "tiktoken": tiktoken.__version__}
    header = settings | {"versions": versions, "commit": commit(), "device": device_name(run.device),
                         "processes": run.grid.world, "computes_in": str(run.dtype)[6:]}
    print(json.dumps(header), file=log)


def commit():
    """The commit of this code, or None outside a git checkout."""
    try:
        return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, text=True,
                                       stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def cut_log(log, step):
    """Drop the lines after a checkpoint's step, which will be written again, and what a crash left."""
    log.seek(0)
    header, *lines = log.readlines()
    kept = [line for line in lines if 0 < evaluation.step_of(line) <= step]
    if len(kept) < len(lines):
        log.seek(0)
        log.truncate()
        log.writelines([header, *kept])


def device_name(device):
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device}, {platform.machine()}, {torch.get_num_threads()} threads"


class Batch(NamedTuple):
    """This rank's part of a step, cut into micro-batches."""

    step: int
    first: int          # sequence of the step
    parts: list         # of (tokens, targets) or (tokens, targets, doc) [B, T], on the device
    counts: list        # of [targets, tokens routed] of each part, of all ranks
    n_beyond: int       # tokens and targets beyond the vocabulary, of all ranks


def load_batch(run, step, first):
    """Cut sequences first, first + 1, .. -> Batch, on its way to the device: nothing waits for it."""
    s, grid = run.settings, run.grid
    micro = sequences(step, s) // s.accumulate
    parts = [run.corpus.train.rows(first + m * micro, micro, grid.rank, grid.world)
             for m in range(s.accumulate)]
    counts = torch.tensor([count_tokens(run.config.vocab_size, *part) for part in parts])
    counts = parallel.all_sum(grid, [counts])[0].tolist()
    if run.device.startswith("cuda"):
        parts = [[t.pin_memory() for t in part] for part in parts]
    parts = [[t.to(run.device, non_blocking=True) for t in part] for part in parts]
    return Batch(step, first, parts, [count[:2] for count in counts], sum(count[2] for count in counts))


class Step(NamedTuple):
    """What came of one step.  The same on every rank."""

    top_k: list                 # [L]
    sequences: int
    n_tokens: int               # routed: padding is not
    loss: torch.Tensor          # [] mean cross-entropy in nats
    statistics: Statistics      # [L, ..] of the whole step
    norm: torch.Tensor          # [] of the gradient, before clipping
    norms: dict                 # {name: []}
    skipped: str                # why nothing was changed, or None
    asked: bool                 # whether a rank was asked to stop


def train_step(run, step, first, asked=lambda: False):
    """One update of the weights, from sequences first, first + 1, ... of all ranks -> Step.

    Every loss is a sum over this part of the step divided by a count of the whole step, so parts (of ranks,
    of micro-batches) only ever add up.  A balance loss is that of the step's tokens so far, of all ranks:
    with several micro-batches the first ones see few of them, and its gradient is that of the whole step's
    loss only if there is one.

    The device is waited for once, by the guard; the next batch is cut while it computes.
    """
    s, model, grid = run.settings, run.model, run.grid
    top_k, count = top_k_at(step, s, run.config), sequences(step, s)
    ready = run.ahead and run.ahead[:2] == (step, first)
    batch = run.ahead if ready else load_batch(run, step, first)
    n_targets, n_tokens = map(sum, zip(*batch.counts))
    if batch.n_beyond:                                        # a GPU's embedding would end without a word
        end(run, f"data {s.data} has changed since the start: {batch.n_beyond} tokens of step {step + 1} are "
            f"beyond the vocabulary ({run.config.vocab_size}); what was saved before is whole", 2)
    loss, seen, total, bad = 0.0, 0, None, 0                      # sums over the micro-batches so far
    for m, (tokens, targets, *doc) in enumerate(batch.parts):
        parallel.synchronize(model, grid, m == s.accumulate - 1 or not s.no_sync)
        out = model(tokens, targets, top_k, *doc)
        flag, mark = out.loss.new_full((), asked()), out.loss.new_zeros(grid.world)
        mark[grid.rank] = ~out.loss.isfinite()
        part_loss, flag, mark, *part = parallel.all_sum(grid, [out.loss, flag, mark, *out.statistics])
        part = Statistics(*part)
        total = Statistics(*map(torch.add, total, part)) if m else part
        loss, seen, bad = loss + part_loss, seen + batch.counts[m][1], bad + mark
        objective = out.loss * (n_tokens / max(1, n_targets))
        if BALANCE[s.balance] and s.lbl_coef:
            at, n = (total, seen) if s.lbl_scope == "global" else (part, batch.counts[m][1])
            objective = objective + s.lbl_coef * balance_gradient(s.balance, at, n, out.statistics)
        if s.z_coef:
            objective = objective + s.z_coef * out.statistics.z_sum.sum()
        (objective / max(1, n_tokens)).backward()
    norm, norms = parallel.clip_gradients(run.masters, s.clip, run.optimizer, grid)
    loss = loss / max(1, n_targets)
    run.ahead = load_batch(run, step + 1, first + count) if step + 1 < s.steps else None
    loss_now, norm_now, flag = torch.stack([loss, norm, flag]).tolist()
    skipped = run.guard.objection(loss_now, norm_now, step, s, run.config)
    if skipped and grid.world > 1 and bad.any():
        ranks = ", ".join(str(rank) for rank, n in enumerate(bad.tolist()) if n)
        skipped = f"the loss of rank {ranks} is not finite"
    if not skipped:
        update(run, step, total.load)
    # on a CPU fresh memory costs more than zeros; copies and shards are not better off for it
    in_place = run.device == "cpu" and grid.world == 1 and not run.masters.copies
    run.optimizer.zero_grad(set_to_none=not in_place)
    return Step(top_k, count, n_tokens, loss, total, norm, norms, skipped, bool(flag))


def count_tokens(vocab_size, tokens, targets, doc=None):
    """-> [targets that count, tokens that are routed, tokens and targets beyond the vocabulary]."""
    return [int((targets != -1).sum()), tokens.numel() if doc is None else int((doc >= 0).sum()),
            int((tokens >= vocab_size).sum() + (targets >= vocab_size).sum())]


def balance_gradient(balance, total, n_tokens, part):
    """A scalar with the gradient of n_tokens * (sum over layers of the balance loss at `total`), for `part`.
    """
    loss, names = BALANCE[balance]
    totals, parts = ([getattr(statistics, name) for name in names] for statistics in (total, part))
    return n_tokens * differentiate_at(lambda *sums: loss(*sums, n_tokens), totals, parts)[1]


def update(run, step, load):
    """Move the weights by the gradients, and the selection biases by the load [L, E] of the whole step."""
    s = run.settings
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(step, s)
    run.optimizer.step()
    run.masters.refresh()
    if s.balance == "loss-free":
        for block, layer_load in zip(run.model.blocks, load):
            update_bias(block.moe.router.bias, layer_load, s.bias_rate)


class Window:
    """The steps since the last line of the log; load, steps and tokens as far as these activated the same
    numbers of experts.  Its tensors are part of a checkpoint."""

    def __init__(self, config, device):
        self.load = torch.zeros(config.n_layer, config.n_expert, dtype=torch.int64, device=device)
        self.top_k = torch.zeros(config.n_layer, dtype=torch.int64)
        self.counts = torch.zeros(3, dtype=torch.int64)           # steps, tokens, skipped

    def state(self):
        return {"window.load": self.load, "window.top_k": self.top_k, "window.counts": self.counts}

    def add(self, did):
        if did.top_k != self.top_k.tolist():
            self.load.zero_()
            self.counts[:2] = 0
            self.top_k.copy_(torch.tensor(did.top_k))
        self.load += did.statistics.load
        self.counts += torch.tensor([1, did.n_tokens, bool(did.skipped)])

    def clear(self):
        self.load.zero_()
        self.counts.zero_()


def describe(run, step, did):
    """What the log says of a step and of the window that it ends: {name: number, or one for each layer}."""
    s, n_tokens, sums = run.settings, did.n_tokens, did.statistics
    window_steps, window_tokens, skipped = run.window.counts.tolist()
    lbl = load_balancing_loss(sums.load, sums.prob_sum, n_tokens)
    row = {"loss": did.loss, "lbl": lbl.mean(), "lr": learning_rate(step, s), "grad_norm": did.norm,
           "skipped": skipped, "top_k": did.top_k, "sequences": did.sequences, "tokens": n_tokens}
    row |= deviation(sums.load, "load") | chance(run, did.top_k, n_tokens, "noise")
    row |= deviation(run.window.load, "window") | chance(run, did.top_k, window_tokens, "window_noise")
    if s.balance == "top1":
        row["top1_lbl_layer"] = top1_balancing_loss(sums.sharp_sum, sums.sharp_top_sum, n_tokens)
    row |= {
        "window": window_steps,
        "zipf": [zipf_bound(run.corpus.top_share, run.config.n_expert, k) for k in did.top_k],
        "lbl_layer": lbl,
        "z_layer": router_z_loss(sums.z_sum, n_tokens),
        "top_prob": sums.top_sum / n_tokens,
        "gate_entropy": sums.entropy_sum / n_tokens,
        "bias_range": torch.stack([b.max() - b.min() for b in run.masters.buffers.values()]),
        "grad_norm_layer": layer_norms(did.norms, run.config.n_layer)}
    return {name: value.tolist() if torch.is_tensor(value) else value for name, value in row.items()}


def deviation(load, name):
    """Relative deviation of the most and least loaded expert from a fair share: 0.5 is +50 %, -1 no token."""
    share = load / load.sum(-1, keepdim=True) * load.shape[-1] - 1
    return {f"{name}_max": share.amax(-1), f"{name}_min": share.amin(-1)}


def chance(run, top_k, n_tokens, name):
    """The same of a uniform router, for which it is chance alone."""
    floor = [noise_floor(n_tokens, run.config.n_expert, k) for k in top_k]
    return {f"{name}_max": [high for high, _ in floor], f"{name}_min": [low for _, low in floor]}


def layer_norms(norms, n_layer):
    """Norms of tensors {name: []} -> norm of each layer [L]."""
    layers = [[n for name, n in norms.items() if name.startswith(f"blocks.{i}.")] for i in range(n_layer)]
    return torch.stack([torch.stack(layer).square().sum().sqrt() for layer in layers])


# dense bf16 FLOP/s as published; on any other device MFU is null rather than wrong
PEAK = {"H200 NVL": 836e12, "H200": 989e12, "H100 80GB HBM3": 989e12, "H100 PCIe": 756e12, "A100": 312e12,
        "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def utilisation(run, top_k, tokens_per_s):
    """Model FLOPs utilisation, with the K of every layer as it is at this step; None on an unknown device."""
    name = device_name(run.device) if run.dtype == torch.bfloat16 else ""
    peak = next((peak for known, peak in PEAK.items() if known in name), None)
    flops = flops_per_token(run.config, run.settings.seq_len, top_k) * tokens_per_s
    return peak and flops / (peak * run.grid.world)


AT_ONCE = "ended at once; what was saved before is whole"


class Stop:
    """Ctrl-C and SIGTERM ask the loop to save and end after the step in hand; a second Ctrl-C ends the
    process at once, also when it waits for others, where no handler in Python would run."""

    def __enter__(self):
        self.asked, self.old = False, {}
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        try:
            self.wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False), ours, theirs
        except ValueError:                                        # not the main thread
            return self
        threading.Thread(target=self.watch, args=(ours,), daemon=True).start()
        for number in (signal.SIGINT, signal.SIGTERM):
            self.old[number] = signal.signal(number, self.ask)
        return self

    def ask(self, number, frame):
        self.asked = True

    def watch(self, wakeup):
        """Every signal puts its number into the socket, whatever the main thread does."""
        interrupts = 0
        while interrupts < 2:
            came = wakeup.recv(64)
            if not came:
                return
            interrupts += came.count(signal.SIGINT)
        os.write(2, f"\n{AT_ONCE}\n".encode())
        os._exit(1)

    def __exit__(self, *_):
        if self.old:
            old, ours, theirs = self.wakeup
            signal.set_wakeup_fd(old)
            theirs.close()                                        # ends the thread
        for number, old in self.old.items():
            signal.signal(number, old)


def train(run):
    """The loop: steps run.done .. steps-1, with its log, validations and checkpoints."""
    s, done = run.settings, run.done
    quarter = max(1, s.steps // 4)
    eval_every, save_every = s.eval_every or quarter, s.save_every or quarter
    first = consumed(done, s)
    clock, since = time.perf_counter(), 0
    stopping = False
    bar = tqdm(total=s.steps, initial=done, disable=True if run.grid.rank else None, dynamic_ncols=True,
               bar_format="{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}")
    with Stop() as stop, bar:
        while done < s.steps and not stopping:
            did = train_step(run, done, first, lambda: stop.asked)
            # all ranks after the same step: an asked one waits for the sum that tells the others
            stopping = did.asked or run.grid.world == 1 and stop.asked
            run.done = done = done + 1
            first += did.sequences
            since += did.n_tokens
            run.window.add(did)
            bar.update()
            if did.skipped and run.log:
                bar.write(f"step {done} changed nothing: {did.skipped}", file=sys.stderr)
            due = done % save_every == 0 or done == s.steps or stopping
            end_if_hopeless(run, did, due)
            evaluate = run.corpus.val is not None and (done % eval_every == 0 or done == s.steps)
            if done % s.log_every == 0 or evaluate:
                rate = since / (time.perf_counter() - clock)
                row = {"step": done, **describe(run, done - 1, did), "tokens_per_s": rate}
                row["mfu"] = utilisation(run, did.top_k, rate)
                if done % s.log_every == 0:
                    run.window.clear()
                worst = max(range(run.config.n_layer), key=row["load_max"].__getitem__)
                bar.set_postfix_str(f"loss {row['loss']:.3f}, {rate:,.0f} tokens/s, "
                                    f"load {100 * row['load_max'][worst]:+.0f} % (layer {worst})")
                if evaluate:
                    row["val_loss"] = validation(run, row["top_k"])[0]
                    bar.write(f"step {done}: loss {row['loss']:.4f}, held out {row['val_loss']:.4f}",
                              file=sys.stdout)
                write_row(run, row)
                clock, since = time.perf_counter(), 0
            if due:
                save(run, last=done == s.steps or stopping)
                clock, since = time.perf_counter(), 0


def save(run, last):
    """Save a checkpoint.  If one cannot be written, training goes on; OSError if it is the last."""
    try:
        parallel.save_checkpoint(run.settings.out, run.done, state_of(run), run.settings.keep, run.grid)
    except OSError as error:
        if last:
            raise
        missed(run, error)


def missed(run, error):
    """Count what could not be written, and say it."""
    run.lost += 1
    if run.log:
        tqdm.write(f"step {run.done}: {error}; training goes on", file=sys.stderr)


def write_row(run, row):
    """A line of the log.  One that cannot be written is said and counted."""
    if not run.log:
        return
    file, line = run.log.fileno(), json.dumps(finite(row), allow_nan=False).encode() + b"\n"
    before = os.fstat(file).st_size
    try:
        if os.write(file, line) < len(line):                      # not by a buffer, which would try again
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        with contextlib.suppress(OSError):
            os.ftruncate(file, before)                            # half a line
        missed(run, f"a line of the log is lost ({error})")
    if run.shown:                                             # its own thread sends, and tries again
        run.shown.log({name if i is None else f"{name}/{i}": number for name, value in row.items()
                       for i, number in (enumerate(value) if isinstance(value, list) else [(None, value)])},
                      step=row["step"])


def lost(run):
    return f"; {run.lost} lines of the log or checkpoints could not be written" * bool(run.lost)


def finite(value):
    """A value for JSON, in which null stands for numbers that are not finite: JSON has no word for them."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def end_if_hopeless(run, did, due):
    """End on all ranks with exit code 1 if nothing is learned any more, or copies of the model differ: they
    are compared every now and then, and before a checkpoint is saved.  Nothing is saved then."""
    s, why = run.settings, None
    if run.guard.counts[4] >= s.bad_steps:
        why = f"{s.bad_steps} steps in a row changed nothing, for {did.skipped}; a lower --lr may help"
    elif s.check_every and run.grid.world > 1 and (due or run.done % s.check_every == 0):
        ranks = ", ".join(map(str, parallel.differing_ranks(run.grid, run.masters)))
        why = ranks and f"the weights of rank {ranks} are not those of the first replica of the same shard"
    if why:
        end(run, f"the run ends at step {run.done}: {why}; what was saved before is whole", 1)


def end(run, why, code):
    """End on all ranks; rank 0 alone says why."""
    if run.grid.rank:
        raise SystemExit(code)
    data.fail(why, code)


def validation(run, top_k):
    """On held-out text, or conversations."""
    s = run.settings
    try:
        return evaluation.validate(run.model, run.corpus.val, top_k, run.device, s.eval_tokens, grid=run.grid)
    except ValueError as error:                               # on all ranks: the file has changed
        end(run, f"{error}; what was saved before is whole", 2)


def report(run, seconds):
    """What there is to see at the end of a run."""
    s, encoding = run.settings, run.corpus.encoding
    top_k = top_k_at(run.done - 1, s, run.config)
    if run.corpus.val is not None:
        loss, statistics, _ = validation(run, top_k)
        guess = math.log(run.config.vocab_size)
        print(f"\nheld-out loss {loss:.4f} nats per token (a uniform guess: {guess:.4f})")
        if run.config.n_expert > 1:
            print("load of each expert on held-out text; half height is the uniform share:")
            print(evaluation.draw_load(statistics.load))
        if not math.isfinite(loss):
            print("the weights are no numbers any more; a new run with a lower --lr may help")
            return
    chats = run.corpus.has_chats()
    if encoding and s.sample_tokens and run.grid.world == 1:
        with torch.compiler.set_stance("force_eager"):        # a compilation takes longer than a sample
            write_sample(run, top_k)
    same = "".join(f" --{name} {getattr(s, name)}" for name in ("preset", "data")
                   if getattr(s, name) != getattr(Settings, name))
    print(f"""
{run.done} steps, {seconds / 60:.1f} minutes
log         {s.out}/log.jsonl
checkpoint  {s.out}/step-{run.done}
try next""")
    print(f"""\
  python eval.py chat --ckpt {s.out}
  python eval.py loss --ckpt {s.out} {s.init_from}     # on its held-out conversations, before and after
  python eval.py routing {s.out}         # which expert takes which token
  python train.py --help""" if chats else f"""\
  python eval.py loss --ckpt {s.out}     # beside a uniform model and a trigram
  python eval.py sample --ckpt {s.out} --prompt "def "
  python eval.py routing {s.out}         # which expert takes which token
  python train.py{same} --n_expert 1 --out out/dense     # the dense control
  python train.py --init_from {s.out} --data functions   # tune it on conversations
  python train.py --help""")


def write_sample(run, top_k):
    """Print a text of the model, or its answer to a held-out question."""
    encoding, n = run.corpus.encoding, run.settings.sample_tokens
    if not run.corpus.has_chats():
        print("\nit writes:")
        print(evaluation.write_text(run.model, encoding, "", n, top_k))
    elif run.corpus.val:
        prompt = run.corpus.val.first_question()
        print(f"\na held-out question, and its answer:\n{encoding.decode(prompt)}",
              *evaluation.reply(run.model, encoding, prompt, n, top_k), sep="")


class Console:
    """stdout or stderr, without which training goes on: what a full disk or a closed pipe does not take is
    lost."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def main(argv=None):
    began = time.perf_counter()
    rank, run = int(os.environ.get("RANK", 0)), None
    with contextlib.ExitStack() as stack:
        silent = stack.enter_context(open(os.devnull, "w")) if rank else None     # one process speaks for all
        stack.enter_context(contextlib.redirect_stdout(Console(silent or sys.stdout)))
        stack.enter_context(contextlib.redirect_stderr(Console(sys.stderr)))
        try:
            with data.one_line_errors(f"rank {rank}: " if rank else ""):
                grid = parallel.meet()
                decided = parallel.from_rank_0(grid, lambda: decide(argv, grid.world))
                run = start(decided, grid)
            with run.log or contextlib.nullcontext(), run.shown or contextlib.nullcontext():
                go(run, decided["exists"], began)
            parallel.leave(grid)
        except KeyboardInterrupt:                             # outside the loop, which has its own
            raise SystemExit(1 if rank else AT_ONCE) from None
        except (MemoryError, RuntimeError) as error:
            why = explanation(error, run)
            if not why:
                raise
            print(f"error: rank {rank}: {why}", file=sys.stderr)
            raise SystemExit(1) from None


def explanation(error, run):
    """Why a run ended, if it was for memory or for another process, for which torch has no classes."""
    text = " ".join(str(error).split())
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
        return ("out of memory; --accumulate makes micro-batches smaller, --activation_checkpointing true "
                "keeps less of them")
    step = f"after step {run.done}" if run else "at the start"
    if "RANK" in os.environ and re.search("gloo|nccl|timed out|connection (closed|reset)", text, re.I):
        return f"{step} another process did not answer ({text[:200]}); what was saved before is whole"


def layout(grid):
    """In words, for more than one process."""
    return f"; {grid.world} processes: ep {grid.ep}, replicate {grid.replicate}" if grid.world > 1 else ""


def introduction(run):
    """What the steps will see, and what is to be known of conversations."""
    s, sampler = run.settings, run.corpus.train
    what = "tokens"
    if run.corpus.has_chats():
        what += f", {len(sampler.spans):,} conversations in {sampler.n_windows:,} sequences"
    yield (f"{s.steps:,} steps of {s.batch_size * s.seq_len:,} {what}, an epoch is "
           f"{max(1, sampler.n_windows / s.batch_size):,.0f} steps")
    if run.corpus.has_chats() and sampler.n_cut + sampler.n_left_out:
        yield (f"longer than {s.seq_len} tokens: {sampler.n_cut:,} conversations end with the last answer "
               f"that fits; {sampler.n_left_out:,}, whose first does not, are left out")
    yield "Ctrl-C saves and ends; the same command resumes"


def go(run, exists, began):
    """Introduce the run, train, and show what came of it."""
    s, config = run.settings, run.config
    if run.done >= s.steps:
        print(f"{s.out} is complete: {run.done} steps.  --steps {2 * run.done} goes on; --out NAME is a new "
              "run")
        return
    total, active, _ = count_parameters(config)
    print(f"{s.out}: {total / 1e6:.1f}M parameters, {active / 1e6:.2f}M active per token\n"
          f"{config.n_layer} layers of {config.n_expert} experts, top {config.top_k}; "
          f"{device_name(run.device)}, {str(run.dtype)[6:]}{layout(run.grid)}")
    if s.batch_size // s.accumulate < run.grid.world:
        print(f"micro-batches of {s.batch_size // s.accumulate} sequences leave some processes without any: "
              "a larger --batch_size or a smaller --accumulate gives them work")
    for line in [f"from step {run.done}"] if exists else introduction(run):
        print(line)
    if not exists and run.corpus.val is not None:
        print(f"step 0: held out {validation(run, top_k_at(0, s, config))[0]:.4f}")
    try:
        train(run)
    except OSError as error:                                  # a full disk: what was saved before is whole
        end(run, f"{error}; resume with the same command{lost(run)}", 2)
    if run.lost:
        print(lost(run)[2:], file=sys.stderr)
    if run.done < s.steps:
        print(f"stopped and saved after step {run.done}; the same command resumes")
        return
    report(run, time.perf_counter() - began)


if __name__ == "__main__":
    main()
