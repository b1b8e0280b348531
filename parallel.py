"""Everything about many processes, and how parameters are held: fp32 masters, checkpoints.

The processes that torchrun starts (`ranks`) are laid out as two grids over the same ranks:

    dense   replicate x shard            attention, norms, embeddings, routers
    moe     replicate x edp x ep         the experts; shard = edp * ep, where the edp ranks hold shards of the
                                         same experts, and the ep ranks are neighbours

Parameters are sharded over `shard` and copied over `replicate` (FSDP2: ZeRO-3, arXiv 1910.02054, gathered
layer by layer).  Experts are stacked [E, in, out]: `ep` splits E, so that whole experts live on a rank and
tokens travel to them (GShard, arXiv 2006.16668), and `edp` shards what is left.  Every rank has its own data.

One rule makes every gradient right: a rank's loss is a sum over its tokens divided by the count of ALL ranks;
so losses, gradients and statistics are only ever summed, never averaged.  An expert's gradient is already
summed over its ep group by the exchange that brings gradients back; FSDP sums over the rest.

With one process there is no group and no collective.  Knows nothing of data, schedules or logging.
"""

import errno
import gc
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import sys
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path, PurePath

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch.autograd.function import once_differentiable
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from model import Model, Permute, cross_entropy, sort_by_expert

# --- the grid of processes --------------------------------------------------------------------------------

@dataclass(eq=False)
class Grid:
    """This process's place among all.  As it stands: alone."""

    rank: int = 0
    world: int = 1
    ep: int = 1
    replicate: int = 1
    store: dist.Store = None            # what the processes talk through before they are a group
    dense: DeviceMesh = None
    moe: DeviceMesh = None
    files: dist.ProcessGroup = None     # for checkpoints, which may be written while training goes on
    asked: int = 0                      # calls of from_rank_0 so far: they name what is in the store


ALONE = Grid()


def meet(timeout=120):
    """Meet the processes that torchrun started (alone without it), not yet as a group -> Grid.

    ValueError if the address cannot be had, or not all have come after `timeout` seconds; a rank that another
    program answers ends without a word."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Grid()
    address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    # torchrun's agents may keep a store for their workers, with what dead ones wrote, which ends in a hang
    alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if kept and not alone and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        together(Grid(int(os.environ["RANK"])), ValueError(
            "torchrun --max-restarts on several nodes needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its "
            "environment: without it the processes cannot meet again"))
    # another program may have the address: rank 0 says so, but the others would wait for it without end
    watch = threading.Timer(timeout + 5, os._exit, [2])
    watch.daemon = True
    watch.start()
    try:
        store, rank, world = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
    except (ValueError, dist.DistError) as error:
        raise ValueError(f"the processes cannot meet at {address} (torchrun --master-port chooses another): "
                         f"{str(error).splitlines()[0]}") from None
    finally:
        watch.cancel()
    # on one node all count the same restarts
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"
    return Grid(rank, world, store=dist.PrefixStore(f"nanosigma {attempt}", store))


def from_rank_0(grid, work, timeout=math.inf):
    """What work() returns on rank 0, on every rank; of what JSON does not know the others get None.

    They wait that long (seconds): it may prepare a corpus.  If it fails, rank 0 alone says why, and all end
    with its exit code."""
    if grid.world == 1:
        return work()
    grid.asked += 1
    key, answer, end = f"answer {grid.asked}", {"exit": 1}, time.monotonic() + timeout
    if grid.rank:
        while not grid.store.check([key]):
            if time.monotonic() > end:
                raise RuntimeError("timed out waiting for rank 0")
            time.sleep(0.05)
        answer = json.loads(grid.store.get(key))
        grid.store.add(f"{key} read", 1)
        if "exit" in answer:
            raise SystemExit(answer["exit"])
        return answer["value"]
    try:
        value = work()
        answer = {"value": value}
        return value
    except BaseException as error:
        known = error.code if isinstance(error, SystemExit) else 2
        answer["exit"] = known if isinstance(error, (SystemExit, ValueError, OSError)) else 1
        raise
    finally:
        grid.store.set(key, json.dumps(answer, default=lambda _: None))
        for _ in range(0 if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 100):
            if grid.store.add(f"{key} read", 0) == grid.world - 1:
                break
            time.sleep(0.05)                                      # without torchrun the store is rank 0's own


def check_layout(world, ep, replicate, n_expert, device, backend):
    """ValueError if so many processes cannot be laid out, or cannot talk about tensors on this device."""
    if world % (ep * replicate):
        hint = "started without torchrun? " if world == 1 else ""
        raise ValueError(f"ep x replicate ({ep} x {replicate}) must divide the number of processes "
                         f"({world}); {hint}--ep and --replicate change what a run was started with")
    if n_expert % ep:
        raise ValueError(f"ep ({ep}) must divide n_expert ({n_expert})")
    known = {"cuda": "nccl", "cpu": "gloo"}
    if world > 1 and device not in known:
        raise ValueError(f"device ({device}) must be cuda or cpu for {world} processes")
    if world > 1 and backend not in ("auto", known[device]):
        raise ValueError(f"backend ({backend}) does not carry tensors on {device}; {known[device]} does")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if world > 1 and device == "cuda" and torch.cuda.device_count() < here:
        raise ValueError(f"{here} processes on a machine with {torch.cuda.device_count()} GPUs: "
                         "torchrun --nproc-per-node must not be above that")


def join(grid, ep, replicate, device, timeout):
    """Make the processes a group, and lay them out.  Collectives fail after `timeout` seconds, but those of
    checkpoints, where some ranks have more to write than others, not before half an hour."""
    if grid.world == 1:
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("cuda:nccl,cpu:gloo" if device == "cuda" else "gloo", rank=grid.rank,
                            world_size=grid.world, store=grid.store, timeout=timedelta(seconds=timeout))
    shard = grid.world // replicate
    grid.ep, grid.replicate = ep, replicate
    grid.files = dist.new_group(backend="gloo", timeout=timedelta(seconds=max(timeout, 1800)))
    grid.dense = init_device_mesh(device, (replicate, shard), mesh_dim_names=("replicate", "shard"))
    grid.moe = init_device_mesh(device, (replicate, shard // ep, ep),
                                mesh_dim_names=("replicate", "edp", "ep"))
    for group in grid.dense.get_all_groups() + grid.moe.get_all_groups():
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), group)      # a mesh takes none


def pick_device(name="auto"):
    """cuda, mps or cpu: the first there is, or the one named.  ValueError if that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device in there if there[device])
    if not there.get(name.split(":")[0]):
        raise ValueError(f"device {name!r} is not there; there is {', '.join(d for d in there if there[d])}")
    return name


def leave(grid):
    if grid.world > 1:
        dist.destroy_process_group()


def all_sum(grid, tensors):
    """Sums over all ranks, in one reduction: of the same shapes and dtypes, without gradient.

    In float64, in which counts are exact."""
    tensors = [t.detach() for t in tensors]
    if grid.world == 1:
        return tensors
    flat = torch.cat([t.flatten().double() for t in tensors])
    dist.all_reduce(flat)
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors)]


# --- expert parallelism: tokens travel to the rank that has their expert ----------------------------------

class Exchange(torch.autograd.Function):
    """rows [R, D], of which the first sends[0] go to rank 0 of the group, the next to rank 1 .. -> the rows
    that come from rank 0, rank 1 ..  The gradient takes the same way back."""

    @staticmethod
    def forward(ctx, rows, sends, recvs, group):
        ctx.back = recvs, sends, group
        out = rows.new_empty(sum(recvs), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), recvs, sends, group=group)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return Exchange.apply(grad, *ctx.back), None, None, None


def expert_parallel(experts, mesh):
    """Keep this rank's share of the experts, and send every row to the rank that has its expert.

    Outside nothing changes: forward() takes rows sorted by expert and a count for each, and returns them in
    that order.  The experts of a rank without rows compute on none, since sharding needs all ranks at the
    same place."""
    group, n = mesh.get_group(), mesh.size()
    for name, p in list(experts.named_parameters()):
        mine = distribute_tensor(p.detach(), mesh, [Shard(0)], src_data_rank=None)
        experts.register_parameter(name, nn.Parameter(mine))

    def forward(rows, load):
        theirs = torch.empty_like(load)                           # rows that each rank has for my experts
        dist.all_to_all_single(theirs, load, group=group)
        theirs = theirs.view(n, -1)
        sends, recvs = torch.stack([load.view(n, -1).sum(1), theirs.sum(1)]).tolist()    # the one device sync
        rows = Exchange.apply(rows, sends, recvs, group)
        # they come sorted by (rank, expert), and are computed sorted by (expert, rank)
        expert = torch.arange(theirs.shape[1], device=rows.device).repeat(n)
        expert = expert.repeat_interleave(theirs.flatten(), output_size=len(rows))
        order, inverse = sort_by_expert(expert)
        rows = experts.compute(Permute.apply(rows, order, inverse), theirs.sum(0),
                               experts.w_in.to_local(), experts.w_out.to_local())
        return Exchange.apply(Permute.apply(rows, inverse, order), recvs, sends, group)

    experts.forward = forward


# --- sharding ---------------------------------------------------------------------------------------------

def shard(model, grid, dtype):
    """Split a model over the grid, to compute in `dtype`.

    What is gathered at a time: the experts of a layer and the matrices of its attention, before they are
    used, in `dtype`; the embeddings for a whole pass; routers and norms, in fp32, for a whole pass."""
    if grid.world == 1:
        return
    dense, edp = grid.dense["shard"], grid.moe["edp"]
    if grid.replicate > 1:
        dense, edp = grid.dense, grid.moe["replicate", "edp"]
    n = grid.moe["edp"].size()
    policy = MixedPrecisionPolicy(dtype, torch.float32) if dtype == torch.bfloat16 else MixedPrecisionPolicy()
    for block in model.blocks:
        if grid.ep > 1:
            expert_parallel(block.moe.experts, grid.moe["ep"])
        # ep has split dim 0: edp splits another one that it divides, for torch has no uneven ones there
        fully_shard(block.moe.experts, mesh=edp, mp_policy=policy, shard_placement_fn=lambda p: Shard(
            next((dim for dim in (1, 2) if p.shape[dim] % n == 0), 0)))
        fully_shard([block.attn.qkv, block.attn.out], mesh=dense, mp_policy=policy)
    fully_shard([model.embed, model.head], mesh=dense, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=dense)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)                # sum ..
            module.set_force_sum_reduction_for_comms(True)        # .. not scaled before, which gloo lacks


@torch.no_grad()
def build_model(config, grid, device, dtype, seed):
    """A Model with its initial values, the same on every grid, of which every rank has its part.

    It begins without memory (device meta); then one whole parameter is drawn at a time."""
    with torch.device("meta"):
        model = Model(config)
    shard(model, grid, dtype)
    model.to_empty(device=device)
    model.tie()
    for bias in model.buffers():
        bias.zero_()
    for name, p in model.named_parameters():
        if isinstance(p, DTensor):
            draw_part(model, name, p, seed)
        else:
            model.draw(name, p, seed)
    return model


def draw_part(model, name, p, seed):
    """Draw the whole of DTensor p, and keep what this rank has of it."""
    whole = torch.empty(p.shape, dtype=p.dtype, device=p.to_local().device)
    model.draw(name, whole, seed)
    put_part(p, whole)


def put_part(p, whole):
    """Fill a parameter, or what this rank has of it, from the whole."""
    local(p).copy_(own_part(whole, p) if isinstance(p, DTensor) else whole)


def whole(p):
    """All of a parameter, on every rank."""
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach()


def own_part(whole, p):
    """The part of a whole tensor that this rank has of DTensor p: a view, where distribute_tensor() copies.

    The last dim of the mesh splits first: with E = 4, ep = 2 and edp = 2 the rank at (edp 1, ep 0) has expert
    1 of the experts 0 and 1 that its ep has."""
    mesh = p.device_mesh
    for i in reversed(range(mesh.ndim)):
        if not p.placements[i].is_replicate():
            chunks = whole.chunk(mesh.size(i), p.placements[i].dim)
            at = mesh.get_local_rank(i)                           # uneven ones leave the last ranks nothing
            whole = chunks[at] if at < len(chunks) else whole.narrow(p.placements[i].dim, 0, 0)
    return whole


def compile_blocks(model, masters, backend="inductor"):
    """Compile every block, the loss of a chunk of rows, and the addition of gradients.  Blocks share compiled
    code, one for each K, shape and grad mode: the switch of K and validation need more than dynamo's 8.

    For one process: FSDP's hooks would cut the graph of a block at every module that is sharded in it."""
    torch._dynamo.config.recompile_limit = 64
    compiled = partial(torch.compile, backend=backend, dynamic=False, fullgraph=True)
    for block in model.blocks:
        block.forward = compiled(block.forward)
    model.head.chunk_loss = compiled(cross_entropy)
    masters.add = compiled(add_in_place)


def recompute_blocks(model):
    """Activation checkpointing (arXiv 1604.06174): of each block only the input is kept, and the rest
    computed again in the backward pass."""
    for block in model.blocks:
        block.forward = partial(recomputed, block.forward)


def recomputed(forward, *args):
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)


def synchronize(model, grid, now):
    """Whether the next backward pass sends its gradients and those that were kept before, or keeps them."""
    if grid.world > 1:
        model.set_requires_gradient_sync(now)


def local(t):
    return t.to_local() if isinstance(t, DTensor) else t


# --- precision --------------------------------------------------------------------------------------------

class Masters:
    """The fp32 parameters that the optimizer owns, by name, while the model computes in `dtype`.

    With float32 they are the model's own.  With bfloat16 the matrices of the model become copies, refreshed
    once per step: casting all experts in every forward pass costs more than their own work, since most of
    them see few tokens.  A copy's gradient is added to its master's in fp32 as soon as it is complete, so
    that accumulation over micro-batches does not round.  Routers and norms are not copied; they compute in
    fp32.  What is sharded needs no copy here: it is cast as it is gathered (see shard).
    """

    def __init__(self, model, dtype=torch.float32):
        self.named, self.copies = {}, []
        self.buffers = dict(model.named_buffers())                # selection biases: state, but not optimized
        self.add = add_in_place                                   # compiled, it is one kernel
        for name, p in model.named_parameters():
            self.named[name] = p
            sharded = isinstance(p, DTensor)
            if dtype == torch.bfloat16 and p.dim() > 1 and "router" not in name and not sharded:
                self.hold(name, p, dtype)

    def hold(self, name, p, dtype):
        """From now on p computes in dtype, and its fp32 master is the optimizer's."""
        self.named[name] = master = nn.Parameter(p.detach().clone())
        p.data = p.data.to(dtype)
        p.register_post_accumulate_grad_hook(partial(self.accumulate, master))
        self.copies.append((p, master))

    def accumulate(self, master, copy):
        """Move the gradient of a copy to its master, in fp32."""
        if master.grad is None:
            master.grad = copy.grad.float()
        else:
            self.add(master.grad, copy.grad)
        copy.grad = None

    @torch.no_grad()
    def refresh(self):
        """Make the copies equal to the masters again: after each update, and after loading."""
        if self.copies:
            torch._foreach_copy_([copy for copy, _ in self.copies], [master for _, master in self.copies])


def add_in_place(total, part):
    total += part


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
def clip_gradients(masters, max_norm, optimizer, grid=ALONE):
    """Scale the gradients so that the norm of all together is at most max_norm.  One reduction, for every
    rank has a part of each, in `replicate` copies.

    -> (that norm before scaling [], the norm of each tensor {name: []})."""
    named = {name: local(p.grad) for name, p in masters.named.items() if p.grad is not None}
    squares = torch.stack(torch._foreach_norm(list(named.values()))).square()
    squares = all_sum(grid, [squares])[0] / grid.replicate
    total = squares.sum().sqrt()
    excess = ((total + 1e-6) / max_norm).clamp(min=1.0)
    if grid.world == 1 and total.device.type in ("cpu", "cuda") and total.dtype == torch.float32:
        optimizer.grad_scale = excess                             # the fused AdamW divides as it reads
    else:
        torch._foreach_div_(list(named.values()), excess)
    return total, dict(zip(named, squares.sqrt()))


def differing_ranks(grid, masters):
    """Ranks whose copy of a parameter, or of a selection bias, is not that of most; all that have one, if
    there is no majority.  [] if all is well, or there is one copy.

    Compared are sums of the bits of what each rank holds, in which one flipped bit shows."""
    held = [local(t).contiguous() for t in (masters.named | masters.buffers).values()]
    sums = torch.stack([t.view(torch.int32).sum(dtype=torch.int64) for t in held]).cpu()
    n, shard, found = len(masters.named), grid.world // grid.replicate, set()
    everyone = [torch.empty_like(sums) for _ in range(grid.world)]
    dist.all_gather(everyone, sums)                               # a save may be using grid.files
    everyone = [(tuple(sums[:n].tolist()), tuple(sums[n:].tolist())) for sums in everyone]
    groups = [(range(i, grid.world, shard), 0) for i in range(shard)] + [(range(grid.world), 1)]
    for ranks, part in groups:
        (common, times), = Counter(everyone[rank][part] for rank in ranks).most_common(1)
        tied = 2 * times <= len(ranks) > times
        found |= {rank for rank in ranks if tied or everyone[rank][part] != common}
    return sorted(found)


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


def save_checkpoint(out, step, state, keep, grid=ALONE):
    """Write out/step-N, every rank its part: aside, made durable, renamed; only then are all but the newest
    `keep` deleted.

    Whatever goes wrong, the checkpoints that were there stay whole.  OSError, on every rank, says what did
    (a full disk, say).
    """
    path, aside = Path(out) / f"step-{step}", Path(out) / f"step-{step}.tmp"
    for left_by_a_crash in Path(out).glob("step-*.tmp") if grid.rank == 0 else ():
        shutil.rmtree(left_by_a_crash, ignore_errors=True)
    gather(grid, None)                                            # nobody writes before that
    mine, problem = {}, None
    try:
        with quiet():
            dcp.save(state, checkpoint_id=aside, **on(grid))      # syncs its files
        mine = {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in sorted(aside.iterdir())
                if rank_of(f.name) == grid.rank}
    except FAILURES as error:
        problem = "No space left on device" if is_full(out, state) else reason(error)
    everyone = gather(grid, (mine, problem))
    problem = next((problem for _, problem in everyone if problem), None)
    if grid.rank == 0 and not problem:
        problem = publish(aside, path, {name: f for files, _ in everyone for name, f in files.items()})
    problem = gather(grid, problem)[0]
    if grid.rank == 0 and problem:
        with quiet():
            gc.collect()                                          # torch's half-written files, which complain
        shutil.rmtree(aside, ignore_errors=True)
    if problem:
        raise OSError(f"could not write {path}: {problem}")
    for old in checkpoints(out)[:-keep] if grid.rank == 0 else ():
        shutil.rmtree(Path(out) / f"step-{old}", ignore_errors=True)      # the new one is what matters


def is_full(out, state):
    """Whether a disk has no space for a state: torch's own message hides it at times."""
    try:
        return shutil.disk_usage(out).free < sum(local(t).nbytes for t in state.values())
    except OSError:
        return False


def publish(aside, path, manifest):
    """Write the manifest, and give the checkpoint its name.  -> what went wrong, or None."""
    try:
        with open(aside / "manifest.json", "w") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(aside)
        os.rename(aside, path)
        sync_folder(path.parent)
    except OSError as error:
        return reason(error)


class Saver:
    """Saves checkpoints; with `background` from a copy, while training goes on.

    There is one at a time: the next one waits for it.  What went wrong is raised by the call after."""

    def __init__(self, out, keep, grid, background):
        self.out, self.keep, self.grid = out, keep, grid
        here = [torch.cuda.set_device, [torch.cuda.current_device()]] if torch.cuda.is_initialized() else []
        self.thread = ThreadPoolExecutor(1, "saver", *here) if background else None
        self.saving = None

    def save(self, step, state):
        self.finish()
        if self.thread is None:
            return save_checkpoint(self.out, step, state, self.keep, self.grid)
        state = BlockingAsyncStager().stage(state)
        self.saving = self.thread.submit(save_checkpoint, self.out, step, state, self.keep, self.grid)

    def finish(self):
        """Wait for the save in hand."""
        saving, self.saving = self.saving, None
        if saving:
            saving.result()


def load_newest(out, steps, state, grid=ALONE):
    """Fill state from the newest whole checkpoint of a run, of these steps.  -> its step.

    Newer ones that are corrupt are set aside as step-N.corrupt, never deleted.  ValueError, on rank 0, if
    none is whole; the others end."""
    found = []
    for step in reversed(steps):
        path = Path(out) / f"step-{step}"
        problem = damage(path, grid)
        if not problem:
            load_checkpoint(path, state, grid, checked=True)
            return step
        found.append(f"{path.name}: {problem}")
        refused = gather(grid, grid.rank == 0 and set_aside(path, problem))[0]
        if refused:
            together(grid, refused)
    together(grid, ValueError(f"no checkpoint of {out} is whole; all are kept as step-N.corrupt: "
                              f"{'; '.join(found)}"))


def set_aside(path, problem):
    """Rename a corrupt checkpoint.  -> OSError if that cannot be."""
    aside = next(name for i in range(1000) if not (name := path.with_name(
        f"{path.name}.corrupt{i or ''}")).exists())
    try:
        os.rename(path, aside)
    except OSError as error:
        return error
    print(f"checkpoint {path} is corrupt ({problem}); it is now {aside.name}", file=sys.stderr)


def load_checkpoint(path, state, grid=ALONE, checked=False):
    """Fill the tensors of state, in place, from a checkpoint that any grid wrote.  ValueError, on rank 0, if
    it is corrupt or lacks one of them; the others end."""
    path, problem = Path(path), None
    if not checked:
        problem = damage(path, grid)
    if not problem:
        try:
            reader = Reader(path)
            reader.read_metadata()                                # torch 2.11 would hide what this raises
            with quiet():
                dcp.load(state, storage_reader=reader, **on(grid))
        except FAILURES as error:
            problem = reason(error)
        problem = next(filter(None, gather(grid, problem)), None)
    if problem:
        together(grid, ValueError(f"checkpoint {path} is corrupt or of another model: {problem}"))


class Reader(dcp.FileSystemReader):
    """torch's reader, which unpickles .metadata without looking, and what that says are no tensors."""

    def read_metadata(self, *args, **kwargs):
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = Metadata(file).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class Metadata(pickle.Unpickler):
    """Only what describes tensors.  UnpicklingError for everything else, before it is called."""

    KNOWN = {("torch", "Size"), ("torch.serialization", "_get_layout"),
             ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
             *(("torch.distributed.checkpoint.metadata", name) for name in (
                 "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
                 "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"))}

    def find_class(self, module, name):
        if module.split(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath"):
            return PurePath                                       # where it was written, on any system
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in self.KNOWN:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f".metadata asks for {module}.{name}")


def damage(path, grid=ALONE):
    """What is wrong with the files of a checkpoint, or None: sizes and checksums are compared with its
    manifest, by each rank of a share of them.  Every rank gets the same answer.

    OSError, on rank 0, if they cannot be read for another reason; the others end."""
    found = [f for f in gather(grid, damage_of_share(path, grid)) if f]
    for error in found:
        if isinstance(error, OSError):
            together(grid, error)
    return found[0] if found else None


def damage_of_share(path, grid):
    """-> None, what is wrong, or an OSError that says nothing of the files (too many are open, say)."""
    try:
        if not path.exists():
            return OSError(f"{path} is not there for rank {grid.rank}: is its disk mounted?")
        manifest = json.loads((path / "manifest.json").read_text())
        if set(manifest) != {f.name for f in path.iterdir()} - {"manifest.json"}:
            return "manifest.json does not list its files"
        for name, expected in list(manifest.items())[grid.rank::grid.world]:
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if sha256(path / name) != expected["sha256"]:
                return f"{name} does not have its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOENT, errno.EIO):
            return error
        return f"{type(error).__name__}: {error}"


def on(grid):
    """How torch.distributed.checkpoint is told which processes there are."""
    return {"no_dist": True} if grid.world == 1 else {"process_group": grid.files}


def gather(grid, value):
    """[value of rank 0, of rank 1, ..] on every rank."""
    values = [value] * grid.world
    if grid.world > 1:
        dist.all_gather_object(values, value, group=grid.files)
    return values


def together(grid, error):
    """End on all ranks; rank 0 alone says why."""
    raise error if grid.rank == 0 else SystemExit(2)


def rank_of(name):
    """The rank that wrote a file of a checkpoint, __RANK_I.distcp; rank 0 writes all others."""
    found = re.match(r"__(\d+)_", name)
    return int(found[1]) if found else 0


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
