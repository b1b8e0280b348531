"""How parameters are held: fp32 masters, low-precision copies that compute, and checkpoints of both.

Knows nothing of data, schedules or logging.
"""

import gc
import hashlib
import json
import os
import re
import shutil
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
import torch.nn as nn

# --- precision --------------------------------------------------------------------------------------------

class Masters:
    """The fp32 parameters that the optimizer owns, by name, while the model computes in `dtype`.

    With float32 they are the model's own.  With bfloat16 the matrices of the model become copies, refreshed
    once per step: casting all experts in every forward pass costs more than their own work, since most of
    them see few tokens.  A copy's gradient is added to its master's in fp32 as soon as it is complete, so
    that accumulation over micro-batches does not round.  Routers and norms are not copied; they compute in
    fp32.
    """

    def __init__(self, model, dtype=torch.float32):
        self.named, self.copies = {}, []
        self.buffers = dict(model.named_buffers())                # selection biases: state, but not optimized
        for name, p in model.named_parameters():
            self.named[name] = p
            if dtype != torch.float32 and p.dim() > 1 and "router" not in name:
                self.hold(name, p, dtype)

    def hold(self, name, p, dtype):
        """From now on p computes in dtype, and its fp32 master is the optimizer's."""
        self.named[name] = master = nn.Parameter(p.detach().clone())
        p.data = p.data.to(dtype)
        p.register_post_accumulate_grad_hook(accumulate_into(master))
        self.copies.append((p, master))

    @torch.no_grad()
    def refresh(self):
        """Make the copies equal to the masters again: after each update, and after loading."""
        if self.copies:
            torch._foreach_copy_([copy for copy, _ in self.copies], [master for _, master in self.copies])


def accumulate_into(master):
    """-> a hook that moves the gradient of a copy to its master; on a CPU in memory taken once, since fresh
    memory costs more there than what is written to it."""
    memory = torch.empty_like(master) if master.device.type == "cpu" else None

    def hook(copy):
        if master.grad is None:
            master.grad = copy.grad.float() if memory is None else memory.copy_(copy.grad)
        else:
            master.grad += copy.grad
        copy.grad = None

    return hook


def adamw(masters, lr, betas, eps, weight_decay):
    """AdamW with decay on matrices only, its state laid out at once, so that a checkpoint can be loaded into
    it."""
    matrices = [p for p in masters.named.values() if p.dim() > 1]
    others = [p for p in masters.named.values() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    for p in masters.named.values():
        optimizer.state[p] = {"step": torch.zeros((), device=p.device),
                              "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


@torch.no_grad()
def clip_gradients(masters, max_norm):
    """Scale the gradients so that the norm of all together is at most max_norm.

    -> (that norm before scaling [], the norm of each tensor {name: []})."""
    named = {name: p.grad for name, p in masters.named.items() if p.grad is not None}
    norms = torch._foreach_norm(list(named.values()))
    total = torch.stack(norms).square().sum().sqrt()
    torch._foreach_mul_(list(named.values()), (max_norm / (total + 1e-6)).clamp(max=1.0))
    return total, dict(zip(named, norms))


# --- checkpoints ------------------------------------------------------------------------------------------

FAILURES = (Exception, dcp.CheckpointException)                   # the latter is no Exception


@contextmanager
def quiet():
    """Without torch's warning that there is one process only, and what files say that cannot be closed."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.unraisablehook = hook


def training_state(masters, optimizer=None):
    """All tensors of a checkpoint under flat names: model.NAME and, with an optimizer, its state of each."""
    state = {f"model.{name}": p.detach() for name, p in (masters.named | masters.buffers).items()}
    for name, p in masters.named.items() if optimizer else ():
        state |= {f"{key}.{name}": value for key, value in optimizer.state[p].items()}
    return state


def checkpoints(out):
    """Steps of the whole checkpoints in a run directory, oldest first."""
    found = (re.fullmatch(r"step-(\d+)", p.name) for p in Path(out).glob("step-*"))
    return sorted(int(m[1]) for m in found if m)


def save_checkpoint(out, step, state, keep):
    """Write out/step-N: aside, made durable, renamed; only then are all but the newest `keep` deleted.

    Whatever goes wrong, the checkpoints that were there stay whole.  OSError says what did (a full disk,
    say).
    """
    path, aside, problem = Path(out) / f"step-{step}", Path(out) / f"step-{step}.tmp", None
    for left_by_a_crash in Path(out).glob("step-*.tmp"):
        shutil.rmtree(left_by_a_crash)
    try:
        with quiet():
            dcp.save(state, checkpoint_id=aside, no_dist=True)    # syncs its files
        manifest = {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in sorted(aside.iterdir())}
        with open(aside / "manifest.json", "w") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(aside)
        os.rename(aside, path)
        sync_folder(out)
    except FAILURES as error:
        problem = reason(error)
        if shutil.disk_usage(out).free < sum(t.nbytes for t in state.values()):
            problem = "No space left on device"                   # torch's own message hides it at times
    if problem:
        with quiet():
            gc.collect()                                          # torch's half-written files, which complain
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"could not write {path}: {problem}")
    for old in checkpoints(out)[:-keep]:
        shutil.rmtree(Path(out) / f"step-{old}")


def load_checkpoint(path, state):
    """Fill the tensors of state, in place, from a checkpoint.  ValueError if it is corrupt or lacks one of
    them."""
    path = Path(path)
    problem = damage(path)
    if not problem:
        try:
            with quiet():
                dcp.load(state, checkpoint_id=path, no_dist=True)
            return
        except FAILURES as error:
            problem = reason(error)
    raise ValueError(f"checkpoint {path} is corrupt or of another model: {problem}")


def damage(path):
    """What is wrong with the files of a checkpoint, or None: sizes and checksums are compared with its
    manifest."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if ".metadata" not in manifest:
            return "manifest.json does not list its files"
        for name, expected in manifest.items():
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if sha256(path / name) != expected["sha256"]:
                return f"{name} does not have its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


def reason(error):
    """The innermost message of what torch.distributed.checkpoint raises."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return " ".join(str(error).split())[:300]


def sha256(path):
    return hashlib.sha256(np.memmap(path, np.uint8, "r")).hexdigest()


def sync_folder(path):
    """Make the names in a folder durable, where the system lets a folder be opened."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
