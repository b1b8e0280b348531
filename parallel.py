"""Many processes, fp32 master weights, optimizers and checkpoints.

The processes that torchrun starts (`ranks`) form two meshes:

    dense   replicate x shard         attention, norms, embeddings, routers
    moe     replicate x edp x ep      the experts; edp * ep = shard, the ranks of an ep group are neighbours

FSDP2 shards parameters over `shard` and copies them over `replicate` (ZeRO-3, arXiv 1910.02054).  Experts are
stacked [E, in, out]: `ep` splits E, so that whole experts live on a rank and tokens travel to them (GShard,
arXiv 2006.16668), and `edp` shards what is left.

A rank's loss is a sum over its own tokens divided by the count of ALL ranks.  So losses, gradients and
statistics are only summed, never averaged.  An expert's rank has its rows from the whole ep group, so that
its gradient is their sum; FSDP sums over the rest.  One process makes no group, no collective.
"""

import errno
import json
import math
import os
import pickle
import re
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, is_dataclass
from datetime import timedelta
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path, PurePath

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from data import InputError, fail, file_sha256, read_json
from model import Experts, Model, ModelConfig, Permute, cross_entropy, sort_by_expert

# --- processes --------------------------------------------------------------------------------------------

@dataclass(eq=False)
class Layout:
    """The rank of this process and the meshes it is in; by default a single process."""

    rank: int = 0
    world: int = 1
    ep: int = 1
    replicate: int = 1
    dense: DeviceMesh = None
    moe: DeviceMesh = None
    files: dist.ProcessGroup = None     # gloo with a long timeout, for objects and checkpoints


SINGLE_PROCESS = Layout()


def rank_of_start():
    """This process's rank as torchrun tells it, 0 without torchrun."""
    return int(os.environ.get("RANK") or 0) if int(os.environ.get("WORLD_SIZE") or 1) > 1 else 0


def init_distributed(timeout=120):
    """Form one group of the processes that torchrun started -> Layout.

    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 saves a minute after torchrun --max-restarts over several nodes."""
    told = {"RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    for name in ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if int(os.environ.get(name) or 1) > 1 and not told:
            raise InputError(f"{name} is {os.environ[name]}, but nothing tells this process its rank and "
                             f"where the others are: start it with torchrun (docs/scaling.md) or unset it")
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        return SINGLE_PROCESS
    wait, backend = timedelta(seconds=timeout), "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, world = next(rendezvous("env://", timeout=wait))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's store outlives its workers: restarted ones would read the addresses of the dead
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
    return Layout(rank, world, files=dist.new_group(backend="gloo", timeout=timedelta(hours=12)))


def gather(layout, value):
    """The value of each rank -> a list of them, on every rank."""
    values = [value] * layout.world
    if layout.world > 1:
        dist.all_gather_object(values, value, group=layout.files)
    return values


def on_all_ranks(layout, work):
    """Run work(), which has no collective, on every rank, for hours if need be -> its value there.

    If it raises, all ranks end: the first where it did with that error, the others with SystemExit."""
    value, error, code = None, None, None
    try:
        value = work()
    except SystemExit as end:                                     # --help ends with 0
        error, code = end, end.code or 0
    except BaseException as raised:
        error, code = raised, 2 if isinstance(raised, (InputError, OSError)) else 1
    for rank, end in enumerate(gather(layout, code)):
        if end is not None:
            raise error if rank == layout.rank else SystemExit(end)
    return value


def on_rank_0(layout, work):
    """As on_all_ranks, but on rank 0 alone -> its value, on every rank."""
    return gather(layout, on_all_ranks(layout, work if layout.rank == 0 else lambda: None))[0]


def check_shared(layout, out):
    """End all ranks, with one line, if one does not see a file that rank 0 writes into a run directory."""
    probe = gather(layout, Path(out) / f".shared-{os.urandom(16).hex()}")[0]
    on_rank_0(layout, probe.touch)
    seen = gather(layout, probe.exists())
    on_rank_0(layout, probe.unlink)
    if not all(seen):
        why = f"not all nodes see {out}: --out must lie on a file system that they share"
        on_rank_0(layout, partial(fail, why))


def check_layout(world, ep, replicate, n_expert, device):
    """InputError if so many processes cannot be laid out, or do not have a device each."""
    if world % (ep * replicate):
        raise InputError(f"ep x replicate ({ep} x {replicate}) must divide the number of processes ({world})"
                         "; --ep 1 --replicate 1 fit any")
    if n_expert % ep:
        raise InputError(f"ep ({ep}) must divide n_expert ({n_expert})")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    devices = {"cpu": here, "cuda": torch.cuda.device_count()}.get(device, 1)
    if here > devices:
        raise InputError(f"--nproc-per-node ({here}) is above the number of {device} devices here, {devices}")


def make_meshes(layout, ep, replicate, device, timeout):
    """Lay out the meshes.  Collectives now fail after `timeout` seconds; those of checkpoints after half an
    hour at least, since some ranks have more to write than others."""
    if layout.world == 1:
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    layout.ep, layout.replicate, n_shard = ep, replicate, layout.world // replicate
    layout.dense = init_device_mesh(device, (replicate, n_shard), mesh_dim_names=("replicate", "shard"))
    layout.moe = init_device_mesh(device, (replicate, n_shard // ep, ep),
                                mesh_dim_names=("replicate", "edp", "ep"))
    set_timeout = dist.distributed_c10d._set_pg_timeout           # init_device_mesh takes no timeout
    set_timeout(timedelta(seconds=max(timeout, 1800)), layout.files)
    for group in [dist.group.WORLD, *layout.dense.get_all_groups(), *layout.moe.get_all_groups()]:
        set_timeout(timedelta(seconds=timeout), group)


def pick_device(name="auto"):
    """cuda, mps or cpu: the first that is available, or the one named.  InputError if that one is not."""
    available = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name != "auto" and not re.fullmatch(rf"({'|'.join(available)})(:\d+)?", name):
        raise InputError(f"device {name!r} is not available; there is {', '.join(available)}")
    return available[0] if name == "auto" else name


def all_sum(layout, tensors):
    """Sums over all ranks, without gradient: one reduction in float64, which holds counts exactly."""
    tensors = [t.detach() for t in tensors]
    if layout.world == 1:
        return tensors
    flat = torch.cat([t.flatten().double() for t in tensors])
    dist.all_reduce(flat)
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors)]


# --- expert parallelism: tokens travel to the rank that has their expert ----------------------------------

def expert_exchange(mesh):
    """-> Experts.exchange for the ranks of an ep mesh, each of which has the same number of experts.

    A rank that receives no rows computes on none: FSDP needs every rank at the same place."""
    all_to_all, n = partial(all_to_all_single_autograd, group=mesh.get_group()), mesh.size()

    def exchange(rows, rows_per_expert):
        theirs = all_to_all(rows_per_expert, None, None).view(n, -1)      # rows each rank has for my experts
        mine = rows_per_expert.view(n, -1)
        sends, recvs = torch.stack([mine.sum(1), theirs.sum(1)]).tolist()         # the one device sync
        rows = all_to_all(rows.contiguous(), recvs, sends)
        # rows arrive sorted by (rank, expert), and are computed sorted by (expert, rank)
        expert = torch.arange(theirs.shape[1], device=rows.device).repeat(n)
        expert = expert.repeat_interleave(theirs.flatten(), output_size=len(rows))
        order, inverse = sort_by_expert(expert)

        def send_back(rows):
            return all_to_all(Permute.apply(rows, inverse, order), sends, recvs)

        return Permute.apply(rows, order, inverse), theirs.sum(0), send_back

    return exchange


# --- sharding, compilation, recomputation -----------------------------------------------------------------

def shard(model, layout, dtype):
    """Shard a model that computes in `dtype`.  FSDP gathers experts and attention of a layer just before use,
    embeddings once per pass, all in `dtype`; routers and norms once per pass in fp32."""
    if layout.world == 1:
        return
    copies = ("replicate",) if layout.replicate > 1 else ()
    dense, edp = layout.dense[(*copies, "shard")], layout.moe[(*copies, "edp")]
    policy = MixedPrecisionPolicy(dtype, torch.float32) if dtype == torch.bfloat16 else MixedPrecisionPolicy()

    def along(n):       # stacked matrices in a dim that n ranks divide, since FSDP shards only dim 0 unevenly
        return lambda p: Shard(next((dim for dim in (1, 2) if p.dim() == 3 and p.shape[dim] % n == 0), 0))
    for block in model.blocks:
        experts = block.moe.experts
        if layout.ep > 1:                                         # a rank keeps E / ep whole experts
            experts.exchange = expert_exchange(layout.moe["ep"])
            for name, p in list(experts.named_parameters()):
                mine = distribute_tensor(p.detach(), layout.moe["ep"], [Shard(0)], src_data_rank=None)
                experts.register_parameter(name, nn.Parameter(mine, p.requires_grad))
        fully_shard(experts, mesh=edp, mp_policy=policy, shard_placement_fn=along(layout.moe["edp"].size()))
        matrices = [m for name, m in block.named_modules() if isinstance(m, (nn.Linear, Experts))
                    and m is not experts and "router" not in name]             # which stay in fp32
        fully_shard(matrices, mesh=dense, mp_policy=policy,
                    shard_placement_fn=along(layout.dense["shard"].size()))
    fully_shard([model.embed, model.head], mesh=dense, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=dense)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)                # sum, do not average
            module.set_force_sum_reduction_for_comms(True)        # gloo has no sum with a factor


@torch.no_grad()
def build_model(config, layout, device, dtype, seed):
    """A sharded Model, initialised to the same values on every layout.

    It begins without memory (device meta); then every rank draws one whole tensor at a time."""
    with torch.device("meta"):
        model = Model(config)
    shard(model, layout, dtype)
    n = len(list(model.parameters()))
    model.to_empty(device=device)
    model.tie()
    if len(list(model.parameters())) != n:
        raise ValueError("to_empty() parts shared parameters: share them again in Model.tie() (model.py)")
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        whole = torch.empty(t.shape, dtype=t.dtype, device=local(t).device)
        model.init_parameter(name, whole, seed)
        copy_shard(t, whole)
    return model


def copy_shard(t, whole):
    """Fill a tensor, or this rank's shard of it, from the whole."""
    if isinstance(t, DTensor):
        whole = distribute_tensor(whole, t.device_mesh, t.placements, src_data_rank=None).to_local()
    local(t).copy_(whole)


def local(t):
    return t.to_local() if isinstance(t, DTensor) else t


def compile_and_recompute(model, masters, compiled, recomputed, backend="inductor"):
    """How blocks run: compiled, recomputed in the backward pass, both, or neither.

    The order is compile, then checkpoint(): both passes run the same graphs, one for each K, shape and grad
    mode.  One process compiles whole blocks.  FSDP's hooks (on qkv and out, and on the experts) would cut
    that graph: many processes compile what lies between them."""
    model.recompute = recomputed
    if compiled:
        torch._dynamo.config.recompile_limit = 64                 # the default 8 is below the number of K
        how = dict(backend=backend, dynamic=False, fullgraph=True)
        for block in model.blocks:
            if isinstance(model, FSDPModule):
                block.attn.attend = torch.compile(block.attn.attend, **how)
                block.moe.router.compile(**how)
                experts, rows_vary = block.moe.experts, how | {"dynamic": True}
                experts.compute = torch.compile(experts.compute, **rows_vary)
            else:
                block.compile(**how)
        model.head.chunk_loss = torch.compile(cross_entropy, **how)
        masters.add = torch.compile(masters.add, **how)           # torch's kernel for two dtypes is slow


def reduce_between_copies(model, now):
    """Whether the next backward pass sums gradients over `replicate`, as the last of a step has to."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_all_reduce(now, recurse=False)


# --- precision, optimizer, clipping -----------------------------------------------------------------------

class MasterWeights:
    """The fp32 parameters that the optimizer owns, by name.

    When the model computes in bfloat16, its matrices are copies of these, refreshed once per step: to cast
    all experts in every forward pass costs more than their products.  A copy's gradient is added to its
    master's in fp32, so that micro-batches do not round.  Routers and norms stay fp32; FSDP casts shards."""

    def __init__(self, model, dtype=torch.float32):
        self.model, self.named, self.copies = model, dict(model.named_parameters()), []
        for name, p in model.named_parameters() if dtype == torch.bfloat16 else ():
            if p.dim() > 1 and "router" not in name and not isinstance(p, DTensor):
                self.add_master(name, p, dtype)

    buffers = property(lambda self: dict(self.model.named_buffers()))        # biases, and what a fork assigns

    def add_master(self, name, p, dtype):
        """Give p a master in fp32, and let p itself be the copy."""
        self.named[name] = master = nn.Parameter(p.detach().clone())
        p.data = p.data.to(dtype)
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(partial(self.accumulate, master))
        self.copies.append((p, master))

    def accumulate(self, master, copy):
        """Add the gradient of a copy to its master's, in fp32, and free it."""
        if master.grad is None:
            master.grad = copy.grad.float()
        else:
            self.add(master.grad, copy.grad)
        copy.grad = None

    @staticmethod
    def add(total, part):                                         # compile_and_recompute may compile it
        total.add_(part)

    @torch.no_grad()
    def refresh(self):
        """Make the copies equal to the masters again: after each update, and after loading."""
        if self.copies:
            torch._foreach_copy_([copy for copy, _ in self.copies], [master for _, master in self.copies])


def make_optimizer(masters, kind, lr, betas, weight_decay, momentum=0.95):
    """adamw or muon.  Matrices decay, norms do not.  The state exists at once: checkpoints load in place."""
    matrices, norms = ({"params": [], "weight_decay": decay} for decay in (weight_decay, 0.0))
    muon, muon_pairs = (matrices | {"params": [], "momentum": momentum, "parts": parts} for parts in (1, 2))
    for name, p in masters.named.items():
        group = matrices if p.dim() > 1 else norms
        if kind == "muon" and p.dim() > 1 and name.endswith(("qkv.weight", "out.weight", "w_in", "w_out")):
            group = muon_pairs if name.endswith("w_in") else muon           # two matrices side by side
        group["params"].append(p)
    groups = [group for group in (matrices, norms, muon, muon_pairs) if group["params"]]
    optimizer = Muon(groups, lr=lr, betas=betas, fused=True)
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {"momentum": torch.zeros_like(p)} if "momentum" in group else {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


class Muon(torch.optim.AdamW):
    """AdamW, but Muon for parameter groups that have a momentum.  Each expert is a matrix of its own, or two
    where gate and up stand side by side.

    Muon's update is the momentum with all singular values near 1, times 0.2 sqrt(longer side): the root mean
    square of AdamW's, so that both share a learning rate (arXiv 2502.16982, eq. 4)."""

    @torch.no_grad()
    def step(self):
        for group in [group for group in self.param_groups if "momentum" in group]:
            lr, beta, parts = group["lr"], group["momentum"], group["parts"]
            for p in (p for p in group["params"] if p.grad is not None):      # None: frozen
                momentum = self.state[p]["momentum"].lerp_(p.grad, 1 - beta)
                # an expert without tokens has no gradient, but its momentum, of whatever size, would become a
                # full step in an old direction, in every step
                active = p.grad.abs().amax((-2, -1), keepdim=True) > 0
                update = orthogonalize(p.grad.lerp(momentum, beta) * active, parts)
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update, alpha=-lr * 0.2 * max(p.shape[-2], p.shape[-1] // parts) ** 0.5)
                p.grad = None                                     # so that AdamW leaves it alone
        super().step()


def orthogonalize(t, parts=1):
    """newton_schulz of each matrix of t [.., m, parts * n]: gathers shards of matrices, not whole experts."""
    if not isinstance(t, DTensor):
        return torch.cat([newton_schulz(part) for part in t.chunk(parts, -1)], -1)
    whole = [p if t.dim() == 3 and type(p) is Shard and p.dim == 0 else Replicate() for p in t.placements]
    update = orthogonalize(t.redistribute(placements=whole).to_local(), parts)
    update = DTensor.from_local(update, t.device_mesh, whole, shape=t.shape, stride=t.stride())
    return update.redistribute(placements=t.placements)


def newton_schulz(matrices):
    """U V^T of matrices U S V^T [.., m, n], with singular values between 0.7 and 1.2 in place of 1: five
    steps of a quintic iteration (K. Jordan, 2024), in bf16 on a GPU."""
    x = matrices.reshape(-1, *matrices.shape[-2:])
    x = x.to(torch.bfloat16) if x.is_cuda else x
    x = x.mT if x.shape[-2] < x.shape[-1] else x                  # x.mT @ x is the smaller square
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(5):
        square = x.mT @ x
        polynomial = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, x, polynomial, beta=3.4445)
    x = x if x.shape[-2:] == matrices.shape[-2:] else x.mT
    return x.reshape(matrices.shape).to(matrices.dtype)


@torch.no_grad()
def clip_gradients(masters, max_norm, layout=SINGLE_PROCESS):
    """Scale the gradients so that the norm of all together is at most max_norm -> the norm before that [].

    One reduction: every rank has a part of each gradient, in `replicate` copies."""
    gradients = [local(p.grad) for p in masters.named.values() if p.grad is not None]
    square = torch.stack(torch._foreach_norm(gradients)).square().sum()
    norm = (all_sum(layout, [square])[0] / layout.replicate).sqrt()
    torch._foreach_div_(gradients, ((norm + 1e-6) / max_norm).clamp(min=1.0))
    return norm


# --- checkpoints ------------------------------------------------------------------------------------------

def training_state(masters, optimizer=None):
    """All tensors of a checkpoint under flat names: model.NAME and, with an optimizer, its state of each."""
    state = {f"model.{name}": p.detach() for name, p in (masters.named | masters.buffers).items()}
    for name, p in masters.named.items() if optimizer else ():
        state |= {f"{key}.{name}": value for key, value in optimizer.state[p].items()}
    return state


def differing_ranks(layout, masters):
    """Ranks whose parameters differ from the first replica's, or whose buffers from rank 0's: one flipped bit
    changes a checksum."""
    tensors = list((masters.named | masters.buffers).values())
    sums = torch.stack([local(t).reshape(-1).view(torch.uint8).sum(dtype=torch.int64) for t in tensors])
    everyone, n_shard = gather(layout, sums.tolist()), layout.world // layout.replicate
    return [rank for rank, its in enumerate(everyone) if its != [
        everyone[rank % n_shard if isinstance(t, DTensor) else 0][i] for i, t in enumerate(tensors)]]


def run_folder(ckpt):
    """The run directory of itself, or of a step-N folder in it."""
    return Path(ckpt).parent if Path(ckpt).name.startswith("step-") else Path(ckpt)


def newest(ckpt):
    """The newest step-N folder of a run directory; a step-N folder is itself."""
    steps = checkpoints(ckpt)
    if not steps and (Path(ckpt) == run_folder(ckpt) or not Path(ckpt).is_dir()):
        raise InputError(f"{ckpt} has no checkpoint")
    return Path(ckpt) / f"step-{steps[-1]}" if steps else Path(ckpt)


def read_settings(out):
    """settings.json of a run directory, and its ModelConfig as "config".  InputError if it is none."""
    def check(saved):
        seq_len, folder = saved["settings"]["seq_len"], saved["settings"]["data"]
        if not (type(seq_len) is int and seq_len > 0 and isinstance(folder, str)):
            raise ValueError("seq_len or data is of another type")
        return saved | {"config": ModelConfig(**saved["model"])}
    return read_json(Path(out) / "settings.json", "of a directory of this train.py", check)


def read_meta(path):
    """meta.json of a step-N folder: what it was trained with."""
    return read_json(Path(path) / "meta.json", "that of a checkpoint", lambda saved: saved | {
        "step": int(saved["step"]), "top_k": list(map(int, saved["top_k"]))})


def is_hf(folder):
    """Whether a folder is a model of Hugging Face, and not a run."""
    return (Path(folder) / "config.json").exists() and not (Path(folder) / "settings.json").exists()


def checkpoints(out):
    """Steps of the complete checkpoints in a run directory, oldest first."""
    names = (path.name[len("step-"):] for path in Path(out).glob("step-*"))
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


def save_checkpoint(out, step, state, keep, layout=SINGLE_PROCESS, meta=None):
    """Write out/step-N, every rank its part, and delete all but the newest `keep`.  meta: for its meta.json.

    InputError if that fails, as on a full disk, on one rank; the others end.  Older ones stay whole."""
    out, path, tmp = Path(out), Path(out) / f"step-{step}", Path(out) / f"step-{step}.tmp"

    def publish():
        (tmp / "meta.json").write_text(json.dumps(meta))
        manifest = checksums([tmp / "meta.json", tmp / ".metadata"])
        for sums in sums_of_ranks:
            manifest |= sums
        (tmp / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for written in (".metadata", "meta.json", "manifest.json", "."):
            fsync(tmp / written)
        os.rename(tmp, path)
        fsync(out)
        for old in checkpoints(out)[:-keep]:                      # only now
            shutil.rmtree(out / f"step-{old}", ignore_errors=True)

    try:
        on_rank_0(layout, lambda: [crashed.unlink() if crashed.is_symlink() else shutil.rmtree(crashed)
                                   for crashed in out.glob("step-*.tmp")])
        run_dcp(dcp.save, state, layout, storage_writer=dcp.FileSystemWriter(tmp, sync_files=False))
        ours = tmp.glob(f"__{layout.rank}_*")                     # of this rank
        sums_of_ranks = gather(layout, on_all_ranks(layout, lambda: checksums(ours, True)))
        on_rank_0(layout, publish)
    except (InputError, OSError) as error:
        free = shutil.disk_usage(out).free / 1e6
        shutil.rmtree(tmp, ignore_errors=True)
        raise InputError(f"could not write {path}: {free:,.1f} MB are free; {error}") from error


def run_dcp(action, state, layout, **storage):
    """dcp.save or dcp.load.  An error, of which they tell every rank, is InputError on rank 0, and the others
    end.  What is no error of the files is raised as it is."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled")           # with one process
    try:
        action(state, process_group=layout.files, no_dist=layout.world == 1, **storage)
    except dcp.CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))            # of a rank; its traceback
        bugs = (NameError, TypeError, AttributeError) if action is dcp.save else ()
        if isinstance(cause, (KeyboardInterrupt, MemoryError, *bugs)):
            raise cause from None
        raise (InputError(repr(cause)) if layout.rank == 0 else SystemExit(2)) from cause


def load_newest(out, steps, state, layout=SINGLE_PROCESS):
    """Fill state from the newest whole checkpoint of these steps -> its step.  Corrupt ones become
    step-N.corrupt; InputError if none is whole."""
    def newest_whole():
        for step in reversed(steps):
            path = Path(out) / f"step-{step}"
            try:
                verify(path)
                if read_meta(path)["step"] != step:
                    raise InputError("its meta.json is of another step")
                return step
            except InputError as error:
                corrupt = f"{path}.corrupt"
                while os.path.exists(corrupt):                    # this step was corrupt before
                    corrupt += "+"
                os.rename(path, corrupt)
                print(f"checkpoint {path} is corrupt ({error}); it is now {Path(corrupt).name}",
                      file=sys.stderr)
        raise InputError(f"no checkpoint of {out} is whole; all are kept as step-N.corrupt")

    step = on_rank_0(layout, newest_whole)
    load_checkpoint(Path(out) / f"step-{step}", state, layout, resume=True)
    return step


def load_checkpoint(path, state, layout=SINGLE_PROCESS, resume=False, may_lack=False):
    """Fill the tensors of state, in place, from a checkpoint of any layout.  InputError, on one rank, if it
    is corrupt, has extra parameters, which dcp.load would ignore, or lacks one; the others end.
    resume: files are checked already, and optimizer state must fit, too.  may_lack: what it lacks stays."""
    path, reader = Path(path), dcp.FileSystemReader(path)
    try:
        on_rank_0(layout, lambda: resume or verify(path))
        metadata = on_all_ranks(layout, lambda: read_descriptions(path, state, resume))
        reader.read_metadata = lambda: metadata                   # torch's own unpickles whatever it finds
        new = sorted(state.keys() - metadata.state_dict_metadata.keys())
        if new and may_lack:
            print(f"{path} lacks {', '.join(new)}: they keep their initial values")
        planner = dcp.DefaultLoadPlanner(allow_partial_load=may_lack)
        run_dcp(dcp.load, state, layout, storage_reader=reader, planner=planner)
    except InputError as error:
        raise InputError(f"checkpoint {path} is corrupt or of another model: {error}") from error


def verify(path):
    """InputError if the files of a checkpoint are not those of its manifest, OSError if they cannot be read
    just now.  Files that the manifest does not name do not count."""
    def differing(manifest):
        names = {".metadata", "meta.json", *manifest}
        found = checksums(path / name for name in names if name == os.path.basename(name)
                          and (path / name).is_file() and not (path / name).is_symlink())
        return sorted(name for name in names if name not in found or found[name] != manifest.get(name))
    wrong = read_json(path / "manifest.json", "that of a checkpoint", differing)
    if wrong:
        raise InputError(f"{', '.join(wrong)} does not match manifest.json")


def checksums(files, flush=False):
    """{file name: size and sha256}, as in manifest.json.  flush: make them durable meanwhile."""
    files = list(files)
    with ThreadPoolExecutor() as threads:                         # sha256 takes longer than reading
        flushed = threads.map(fsync, files if flush else ())
        digests = threads.map(file_sha256, files)
        list(flushed)                                             # raises what one of them did
    return {file.name: {"bytes": file.stat().st_size, "sha256": sha} for file, sha in zip(files, digests)}


def read_descriptions(path, state, resume):
    """.metadata of a checkpoint.  InputError unless of whole tensors in files of its manifest, none extra."""
    try:
        manifest = read_json(path / "manifest.json", "that of a checkpoint", dict)
        with open(path / ".metadata", "rb") as file:
            metadata = TensorDescriptions(file).load()
        for name, tensor in metadata.state_dict_metadata.items():
            if not tiles(tensor.chunks, tensor.size):
                raise ValueError(f"its parts of {name} do not cover it")
            if name not in state and (resume or name.startswith("model.")):
                raise ValueError(f"it holds {name}, .., which this code's model and optimizer do not")
        for part in metadata.storage_data.values():
            if part.relative_path not in manifest:
                raise ValueError(f"manifest.json does not name {part.relative_path}")
        return metadata
    except Exception as error:                                    # somebody may have made it up
        raise InputError(f"{type(error).__name__}: {error}") from error


def tiles(chunks, size):
    """Whether chunks cover a tensor of this size, each element once: as a grid, which all layouts write."""
    boxes = {tuple(zip(chunk.offsets, chunk.sizes)) for chunk in chunks if 0 not in chunk.sizes}
    edges = [sorted({box[dim] for box in boxes}) for dim in range(len(size))]     # (offset, length) of parts
    for parts, full in zip(edges, size):
        offsets, lengths = zip(*parts) if parts else ((), ())
        if [*offsets, full] != [0, *accumulate(lengths)] or min(lengths, default=0) < 0:
            return False
    return len(boxes) == math.prod(map(len, edges))


class TensorDescriptions(pickle._Unpickler):
    """An unpickler that calls only what describes shapes, dtypes, offsets and paths, and changes only such
    descriptions: BUILD would also set attributes of a class or a function, and so run code."""

    ALLOWED = {"torch.Size", "torch.serialization._get_layout",
               "torch.distributed.checkpoint.filesystem._StorageInfo"} | {
        f"torch.distributed.checkpoint.metadata.{name}" for name in (
            "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
            "TensorStorageMetadata", "_MEM_FORMAT_ENCODING")}

    def find_class(self, module, name):
        if module.split(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath"):
            return PurePath                                       # where it was written, on any system
        if (module, name) == ("builtins", "getattr"):             # as Python 3.11.2 pickles Enums
            return lambda _, member: dcp.metadata._MEM_FORMAT_ENCODING[member]
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or f"{module}.{name}" in self.ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f".metadata asks for {module}.{name}")

    def load_build(self):
        if isinstance(self.stack[-2], type) or not is_dataclass(self.stack[-2]):
            raise pickle.UnpicklingError(f".metadata changes a {type(self.stack[-2]).__name__}")
        super().load_build()

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}
    dispatch.pop(pickle.BYTEARRAY8[0])                            # takes memory before it reads


def write_durably(path, text):
    """Write a file so that after a crash it is the old one or the new one."""
    tmp = path.with_suffix(".tmp")
    tmp.unlink(missing_ok=True)                                   # it may be a link
    tmp.write_text(text, encoding="utf-8")
    fsync(tmp)
    os.replace(tmp, path)


def fsync(path):
    """Flush a file, or the entries of a folder, to the disk, if the file system can."""
    if os.name == "posix":                                        # elsewhere folders cannot be opened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
                raise
            say_once("this file system cannot flush its files: a power cut may lose a checkpoint")
        finally:
            os.close(descriptor)


@lru_cache
def say_once(text):
    print(text, file=sys.stderr)
