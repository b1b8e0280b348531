"""MasterWeights and copies, clipping, checkpoints; what many processes do beside computing the same."""

import errno
import os
import re
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from bench import Traffic, traffic
from conftest import rows, small, small_run, train_until
from test_exact import make_run, whole
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
import parallel
import train
from model import Experts, Model
from parallel import (
    SINGLE_PROCESS,
    checkpoints,
    clip_gradients,
    load_checkpoint,
    save_checkpoint,
    training_state,
)
from router import Router


def build(dtype=torch.float32, seed=0, kind="adamw", **changes):
    model = Model(small(**changes), seed=seed)
    masters = parallel.MasterWeights(model, dtype)
    return model, masters, parallel.make_optimizer(masters, kind, 1e-2, (0.9, 0.95), 0.1)


def backward(model, seed):
    tokens = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(seed))
    (model(tokens, tokens).loss / tokens.numel()).backward()


def step(model, masters, optimizer, seed=0):
    backward(model, seed)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    masters.refresh()


# --- precision --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tied", [True, False])
def test_bf16_copies_follow_fp32_masters(tied):
    model, masters, _ = build()
    assert all(masters.named[name] is p for name, p in model.named_parameters()) and not masters.copies
    model, masters, optimizer = build(torch.bfloat16, tie_embeddings=tied)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert kinds["blocks.0.moe.experts.w_in"] == kinds["embed.weight"] == torch.bfloat16
    assert kinds["blocks.0.moe.router.weight"] == kinds["norm.weight"] == torch.float32
    assert all(p.dtype == torch.float32 for p in masters.named.values())
    before = {name: p.detach().clone() for name, p in masters.named.items()}
    for i in range(3):
        step(model, masters, optimizer, i)
    for name, p in model.named_parameters():
        assert not torch.equal(masters.named[name], before[name])
        assert torch.equal(p, masters.named[name].to(p.dtype)), name


def test_bf16_gradients_accumulate_in_fp32():
    """1,000 small micro-batch gradients: bf16 would stop growing at 256 of them."""
    model, masters, _ = build(torch.bfloat16)
    copy, master = masters.copies[0]
    for _ in range(1000):
        (copy.float().sum() * 1.0).backward()
    assert copy.grad is None and master.grad.dtype == torch.float32
    assert (master.grad == 1000).all()


@pytest.mark.parametrize("kind", ["adamw", "muon", "a fork's"])
@pytest.mark.parametrize("max_norm", [0.05, 1e9])
def test_clipping_equals_torch(max_norm, kind):
    (a, masters, optimizer), (b, _, theirs) = build(kind=kind), build(kind=kind)
    if kind == "a fork's":
        optimizer, theirs = (torch.optim.SGD(model.parameters(), 0.1) for model in (a, b))
    backward(a, 0)
    backward(b, 0)
    total = clip_gradients(masters, max_norm)
    torch.testing.assert_close(total, torch.nn.utils.clip_grad_norm_(b.parameters(), max_norm))
    optimizer.step()
    theirs.step()
    torch.testing.assert_close(list(a.parameters()), list(b.parameters()))


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (3, 8, 30), (16, 16)])
def test_newton_schulz_against_the_svd(shape):
    """The singular vectors are kept; the singular values come near 1, also small ones."""
    matrices = torch.randn(shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    got = parallel.newton_schulz(matrices)
    rotated = u.mT @ got @ v.mT                                   # diagonal in the basis of the SVD
    values = rotated.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(rotated, torch.diag_embed(values), atol=1e-9, rtol=0)
    big = s > 0.1 * s.amax(-1, keepdim=True)
    assert 0.6 < values[big].min() and values.max() < 1.25
    assert not parallel.newton_schulz(torch.zeros(2, 3)).any()


def test_muon_is_what_its_paper_says():
    """Matrices of attention and experts, one expert at a time, gate and up each; all else as with AdamW."""
    (a, _, muon), (b, _, adamw) = build(kind="muon"), build()
    for i in range(3):
        b.load_state_dict(a.state_dict())
        before = {name: p.detach().clone() for name, p in a.named_parameters()}
        momentum = {name: muon.state[p]["momentum"].clone() for name, p in a.named_parameters()
                    if "momentum" in muon.state[p]}
        assert {name.split(".", 2)[2] for name in momentum} == {
            "attn.qkv.weight", "attn.out.weight", "moe.experts.w_in", "moe.experts.w_out"}
        backward(a, i)
        backward(b, i)
        muon.step()
        adamw.step()
        for (name, p), q in zip(a.named_parameters(), b.parameters()):
            if name in momentum:
                m = 0.95 * momentum[name] + 0.05 * q.grad
                u = 0.05 * q.grad + 0.95 * m
                parts = 2 if name.endswith("w_in") else 1
                u = torch.stack([torch.cat(list(map(parallel.newton_schulz, each.chunk(parts, -1))), -1)
                                 for each in u.view(-1, *p.shape[-2:])])
                u = 0.2 * max(p.shape[-2], p.shape[-1] // parts) ** 0.5 * u.view_as(p)
                torch.testing.assert_close(p, before[name] * (1 - 1e-2 * 0.1) - 1e-2 * u)
            elif i == 0:                                          # later the others' gradients differ
                torch.testing.assert_close(p, q)
        muon.zero_grad()
        adamw.zero_grad()
    muon.step()                                                   # nothing has a gradient: frozen by a fork


def test_an_expert_without_tokens_does_not_move_under_muon():
    """Its momentum, however small, would be a full step; decay alone changes it."""
    model, masters, optimizer = build(kind="muon")
    step(model, masters, optimizer)                               # all have a momentum now
    for block in model.blocks:
        block.moe.router.bias[2] = 100.0
    experts = model.blocks[0].moe.experts
    before = [p.detach().clone() for p in (experts.w_in, experts.w_out)]
    step(model, masters, optimizer, 1)
    for old, new in zip(before, (experts.w_in, experts.w_out)):
        idle = torch.arange(6) != 2
        torch.testing.assert_close(new[idle], old[idle] * (1 - 1e-2 * 0.1))
        assert (new[2] - old[2]).abs().mean() > 1e-3


# --- checkpoints ------------------------------------------------------------------------------------------

def test_a_checkpoint_is_read_by_torch_and_not_by_another_model(tmp_path):
    _, masters, optimizer = build()
    save_checkpoint(tmp_path, 1, training_state(masters, optimizer), keep=1, meta={"step": 1, "top_k": [1]})
    state = {"model.norm.weight": torch.zeros(16)}
    dcp.load(state, checkpoint_id=tmp_path / "step-1", no_dist=True)          # without this project's code
    assert torch.equal(state["model.norm.weight"], torch.ones(16))
    for changes in (dict(n_layer=1), dict(n_layer=3), dict(d_model=32)):
        with pytest.raises(ValueError, match="step-1 is corrupt or of another model"):
            load_checkpoint(tmp_path / "step-1", training_state(build(**changes)[1]))
    with pytest.raises(ValueError, match="holds step.*this code's model and optimizer do not"):
        parallel.load_newest(tmp_path, [1], training_state(masters))             # an optimizer's lazy state


def test_durable_then_renamed_then_the_old_one_is_deleted(tmp_path, monkeypatch):
    """At every moment there is a whole checkpoint."""
    _, masters, _ = build()
    save_checkpoint(tmp_path, 1, training_state(masters), keep=1)
    calls = []
    for module, name in ((parallel, "fsync"), (parallel.os, "rename"), (parallel.shutil, "rmtree")):
        monkeypatch.setattr(module, name, lambda path, *args, real=getattr(module, name), name=name, **kwargs:
                            calls.append((name, Path(path).name)) or real(path, *args, **kwargs))
    save_checkpoint(tmp_path, 2, training_state(masters), keep=1)
    calls = [call for call in calls if call[1] != ".metadata.tmp"]                # torch's own
    files = "__0_0.distcp", ".metadata", "meta.json", "manifest.json", "step-2.tmp"
    assert calls == [*(("fsync", name) for name in files), ("rename", "step-2.tmp"), ("fsync", tmp_path.name),
                     ("rmtree", "step-1")]


# --- the grid of processes --------------------------------------------------------------------------------

def meshes(grid):
    """-> places in the grid, this rank's ep, seconds after which a collective of any of its groups fails."""
    groups = [dist.group.WORLD, *grid.dense.get_all_groups(), *grid.moe.get_all_groups()]
    return grid.moe.mesh.tolist(), grid.moe["ep"].mesh.tolist(), {
        group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}


def test_the_ranks_of_one_ep_are_neighbours_and_every_group_has_the_timeout(ranks):
    """A hanging process: test_faults.py."""
    assert [a.value for a in ranks(4, meshes, layout=(2, 1))] == [
        ([[[0, 1], [2, 3]]], pair, {60.0}) for pair in ([0, 1], [0, 1], [2, 3], [2, 3])]
    assert ranks(4, meshes, layout=(2, 2))[0].value[0] == [[[0, 1]], [[2, 3]]]


@pytest.mark.parametrize("changes, named", [
    (dict(world=6, ep=4), "ep x replicate"), (dict(ep=3, replicate=2), "number of processes"),
    (dict(ep=2, world=1), "number of processes"), (dict(ep=4, n_expert=6), "must divide n_expert"),
    (dict(device="mps"), "number of mps devices here, 1"), (dict(device="cuda"), "of cuda devices here, 2")])
def test_an_impossible_layout_is_refused(monkeypatch, changes, named):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    possible = dict(world=4, ep=1, replicate=1, n_expert=12, device="cpu")
    parallel.check_layout(**possible)
    with pytest.raises(ValueError, match=named):
        parallel.check_layout(**possible | changes)


def slow_work_of_rank_0(timeout):
    """It takes twice as long as the processes would wait for anything else."""
    grid = parallel.init_distributed(timeout)
    return parallel.on_rank_0(grid, lambda: time.sleep(2 * timeout) or {"rank": grid.rank})


def test_the_others_wait_for_rank_0(ranks):
    ranks(3, os.getpid)                                           # so that they have all been started
    assert [a.value for a in ranks(3, slow_work_of_rank_0, 1)] == [{"rank": 0}] * 3


def failing_work(error):
    def work():
        raise error
    return parallel.on_rank_0(parallel.init_distributed(), work)


@pytest.mark.parametrize("end", [0, 2])
def test_if_rank_0_ends_all_end_with_its_exit_code(ranks, end):
    assert [(a.code, a.err) for a in ranks(3, failing_work, SystemExit(end))] == [(end, "")] * 3


# --- what is sent -----------------------------------------------------------------------------------------

def sent(grid, accumulate, recomputed, dtype):
    """-> bytes counted, and by the formula, of a step."""
    run = make_run(grid, dtype, accumulate=accumulate, recomputed=recomputed, top_k=2)
    leaving, mine = [], grid.rank % grid.ep
    for block in run.model.blocks:
        block.moe.router.register_forward_hook(
            lambda m, x, routing: leaving.append(int((routing.experts // (12 // grid.ep) != mine).sum())))
    train.train_step(run, 0)                                   # .. which cuts the batch of the next one
    leaving.clear()
    with Traffic() as counted:
        train.train_step(run, 1)
    rows = sum(leaving) // (2 if recomputed else 1)               # the router was run again, too
    return counted.sent, traffic(run.config, grid.world, grid.ep, grid.replicate, rows, accumulate,
                                 dtype.itemsize, recomputed)


PLAIN, RECOMPUTED = (1, False, torch.float32), (2, True, torch.bfloat16)


@pytest.mark.parametrize("layout, how", [
    ((1, 1), PLAIN), ((2, 1), RECOMPUTED), ((4, 1), PLAIN), ((2, 2), RECOMPUTED), ((1, 4), RECOMPUTED)])
def test_bytes_sent_equal_the_formula(ranks, layout, how):
    answers = [a.value for a in ranks(4, sent, *how, layout=layout)]
    counted, formula = ({kind: sum(each[i][kind] for each in answers) for kind in answers[0][1]}
                        for i in (0, 1))
    assert counted == pytest.approx(formula, rel=1e-12) and counted["sums"] > 0
    assert (counted["rows"] > 0) == (layout[0] > 1) and (counted["copies"] > 0) == (layout[1] > 1)


class Waiting(TorchDispatchMode):
    """Operators that wait for a GPU, since sizes or Python depend on what it computed."""

    names = ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.name().removeprefix("aten::"), kwargs or {}
        masks = name == "index.Tensor" and any(i is not None and i.dtype == torch.bool for i in args[1])
        unsized = name == "repeat_interleave.Tensor" and kwargs.get("output_size") is None
        if masks or unsized or name in ("_local_scalar_dense", "nonzero", "masked_select", "bincount"):
            self.names += (name,)
        return func(*args, **kwargs)


def count_syncs(grid):
    """How often Python asks for the value of a tensor while a model computes: on a GPU each would wait."""
    run, calls, real = make_run(grid, torch.float32, n_expert=12), [], torch.Tensor.tolist
    with pytest.MonkeyPatch.context() as patch, Waiting() as waiting:
        patch.setattr(torch.Tensor, "tolist", lambda t: calls.append("tolist") or real(t))
        run.model(*run.corpus.train.rows(0, 4)).loss.backward()
    return [*calls, *waiting.names]


def test_one_device_synchronisation_per_layer(ranks):
    assert [a.value for a in ranks(2, count_syncs, layout=(2, 1))] == [["tolist"] * 2] * 2
    assert count_syncs(SINGLE_PROCESS) == []


# --- starting without memory ------------------------------------------------------------------------------

def memory_of_start(grid):
    """-> bytes by which this process grew at most, of the whole model, of its largest parameter."""
    def held(field):
        return int(Path("/proc/self/status").read_text().split(field)[1].split()[0]) * 1024
    # parameters so large that memory goes back to the system when they are freed
    config = small(vocab_size=4096, n_layer=4, head_dim=32, d_model=256, n_expert=32, d_expert=1024)
    parallel.build_model(small(n_expert=12), grid, "cpu", torch.float32, 0)     # torch loads code
    Path("/proc/self/clear_refs").write_text("5")                 # the peak is what it is now
    before = held("VmRSS:")
    model = parallel.build_model(config, grid, "cpu", torch.float32, 0)
    sizes = [4 * p.numel() for p in model.parameters()]
    return held("VmHWM:") - before, sum(sizes), max(sizes)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the peak")
def test_a_rank_never_holds_more_than_its_shard_and_a_parameter_twice(ranks):
    ranks.stop()                                                  # new ones have no memory to use again
    for grown, total, largest in (a.value for a in ranks(4, memory_of_start, layout=(4, 1))):
        assert total > 400e6 and largest > 64e6 and total / 5 < grown < total / 4 + 2.2 * largest


# --- what forks are made of -------------------------------------------------------------------------------

class ForkedRouter(Router):
    """A gate of two layers, with statistics that are assigned anew, on every rank its own."""

    def __init__(self, d_model, *args):
        super().__init__(d_model, *args)
        self.first = torch.nn.Linear(d_model, d_model, bias=False)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, h, *args, **kwargs):
        self.seen = self.seen + h.detach().float().norm()
        hidden = self.first(h.float())
        self.precision = hidden.dtype
        return super().forward(hidden, *args, **kwargs)


def forked(grid):
    """-> what became of it in bf16, with frozen experts and a shared one; ranks that differ."""
    init = Model.init_parameter
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_module, "Router", ForkedRouter)
        patch.setattr(Model, "init_parameter", lambda self, name, t, seed: t.fill_(0.1) if name.endswith(
            ("first.weight", "seen", "steps")) else init(self, name, t, seed))
        patch.setattr(Experts, "__init__", lambda self, config, real=Experts.__init__: (
            real(self, config), self.requires_grad_(config.n_expert == 1))[0])
        run = make_run(grid, torch.bfloat16, shared=True)
    train.train_step(run, 0)
    moe = run.model.blocks[0].moe
    saved = parallel.training_state(run.masters)["model.blocks.0.moe.router.seen"]
    return (moe.router.precision, any(p.requires_grad for p in moe.experts.parameters()),
            torch.equal(saved, moe.router.seen), moe.shared.w_in.to_local().shape[1:],
            parallel.differing_ranks(grid, run.masters))


def test_forks_are_on_many_processes_what_they_are_on_one(ranks):
    """Frozen stays frozen, routers stay in fp32, buffers are saved and compared, large parameters sharded."""
    for answer in ranks(4, forked, layout=(2, 1)):
        assert answer.value == (torch.float32, False, True, (4, 24), [1, 2, 3])


# --- checkpoints of any grid ------------------------------------------------------------------------------

def save_after(grid, out):
    """Two steps, a checkpoint -> what it holds, whole."""
    run = make_run(grid, torch.float32, balance="loss-free", batch_size=10)
    for step in range(2):
        train.train_step(run, step)
    state = training_state(run.masters, run.optimizer)
    save_checkpoint(out, 2, state, 2, grid)
    return {name: whole(t) for name, t in state.items()}


def load_into(grid, out):
    run = make_run(grid, torch.float32, n_expert=12)
    state = training_state(run.masters, run.optimizer)
    load_checkpoint(out / "step-2", state, grid)
    return {name: whole(t) for name, t in state.items()}


def test_any_grid_loads_what_another_saved(ranks, tmp_path):
    want = ranks(4, save_after, tmp_path, layout=(2, 1))[0].value
    assert checkpoints(tmp_path) == [2] and any(t.any() for n, t in want.items() if n.endswith("bias"))
    assert len(list((tmp_path / "step-2").glob("*.distcp"))) == 4
    loaded = [load_into(SINGLE_PROCESS, tmp_path)]
    for world, *layout in ((2, 2, 1), (3, 3, 1), (4, 1, 2)):
        loaded += [a.value for a in ranks(world, load_into, tmp_path, layout=layout)]
    for found in loaded:
        torch.testing.assert_close(found, want, rtol=0, atol=0)


def failing_save(grid, out, name, rank):
    """A function fails on one rank -> what this rank raises."""
    state = training_state(make_run(grid, torch.float32).masters)
    save_checkpoint(out, 1, state, 2, grid)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")
    with pytest.MonkeyPatch.context() as patch, pytest.raises((ValueError, SystemExit)) as raised:
        if grid.rank == rank:
            patch.setattr(name, fail)
        save_checkpoint(out, 2, state, 2, grid)
    load_checkpoint(out / "step-1", state, grid)
    return str(raised.value)


@pytest.mark.parametrize("name, rank", [
    ("torch.distributed.checkpoint.FileSystemWriter.write_data", 1), ("parallel.checksums", 1),
    ("parallel.fsync", 0), ("os.rename", 0)])
def test_a_save_that_fails_on_one_rank_fails_on_all(ranks, tmp_path, name, rank):
    """On a real full disk: test_faults.py."""
    answers = ranks(3, failing_save, tmp_path, name, rank, layout=(1, 1))
    said = [a.value for a in answers if a.value != "2"]           # the others: SystemExit(2)
    assert len(said) == 1 and [p.name for p in tmp_path.iterdir()] == ["step-1"]
    assert re.search("could not write .*step-2: .*MB are free; .*Input/output error", said[0])


# --- training ---------------------------------------------------------------------------------------------

def losses(out):
    return [[r[k] for k in ("loss", "lbl", "grad_norm", "val_loss") if k in r] + r["load_max"] + r["load_min"]
            for r in rows(out)]


def test_training_goes_on_with_other_numbers_of_processes(ranks, corpus, tmp_path):
    """4 -> 2 -> 1 -> 4 processes, and one all the way: the same curve, and the same held-out losses."""
    base = "--batch_size 9 --accumulate 3 --lr 1e-3 --balance top1 --save_every 2 --steps 8 --eval_every 2"
    train.main(small_run(corpus, tmp_path / "one", base))
    for world, last, more in ((4, 2, "--ep 2"), (2, 4, "--ep 1 --replicate 2"), (1, 6, "--replicate 1"),
                              (4, 8, "")):
        answers = ranks(world, train_until, small_run(corpus, tmp_path / "many", f"{base} {more}"), last)
        assert all(a.code is None for a in answers), answers
        assert all(a.out == "" for a in answers[1:]) and "held out" in answers[0].out
    one, many = losses(tmp_path / "one"), losses(tmp_path / "many")
    assert len(one) == len(many) == 8
    for a, b in zip(one, many):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("more, message", [
    ("--ep 3", "ep x replicate (3 x 1) must divide the number of processes (2)"),
    ("--data nowhere", "nowhere"), ("--nonsense 1", "unrecognized arguments: --nonsense")])
def test_bad_input_is_one_line_of_rank_0_alone(ranks, corpus, tmp_path, more, message):
    answers = ranks(2, train.main, small_run(corpus, tmp_path / "run", more))
    assert [a.code for a in answers] == [2, 2]
    line, = answers[0].err.splitlines()
    assert line.startswith("error: ") and message in line
    assert answers[1].err == "" and all(a.out == "" for a in answers)
    assert not (tmp_path / "run").exists()
