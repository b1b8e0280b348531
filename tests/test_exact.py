"""Every grid of processes does what one process does: the same losses, loads, gradients and weights.

In float64 to 1e-12, where only a difference in logic shows; on one grid also in float32, to rounding."""

from functools import cache, partial

import pytest
import torch
from conftest import SMALL, small

import parallel
from model import grouped_mm_limitation
from router import load_balancing_loss, router_z_loss, top1_balancing_loss
from train import Corpus, Run, Settings, train_step

# processes, ep, replicate
GRIDS = [(4, 1, 2), (4, 2, 1), (4, 2, 2), (3, 1, 1), (3, 3, 1), (2, 1, 2)]
SIZES = dict(n_expert=12)                                         # 4, 3 and 2 divide it
CASES = {
    "plain": dict(),
    "96 experts": dict(n_expert=96, top_k=3),
    "sigmoid": dict(gate="sigmoid", lbl_coef=0.5),
    "normalized": dict(gate="normalized", top_k=3, tie_embeddings=True),
    "top-1 loss": dict(balance="top1", lbl_coef=0.5, z_coef=0.1, top_k=3),
    "loss-free": dict(balance="loss-free", bias_rate=0.01),
    "muon": dict(optimizer="muon", clip=0.05, accumulate=2),
    "quantile": dict(balance="quantile", initial_top_k=[3], accumulate=2),
    "switch": dict(initial_top_k=[3], switch=0.1),
    "accumulate": dict(accumulate=3, balance="top1", lbl_coef=0.5),
    "micro": dict(accumulate=2, lbl_scope="micro", lbl_coef=0.5),
    "clipped": dict(clip=0.05),
    "ragged": dict(batch_size=10),
    "no data": dict(batch_size=2, lbl_coef=0.5),                  # for some ranks
    "documents": dict(documents=True, z_coef=0.1, lbl_coef=0.5, accumulate=2),
    "one expert chosen": dict(chosen=[1]),                        # the others, and ranks, get nothing
    "few experts chosen": dict(chosen=[2, 3, 11], top_k=3, batch_size=3),
    "recomputed": dict(recomputed=True, accumulate=2, balance="top1", tie_embeddings=True),
    "odd widths": dict(d_model=15, d_expert=15),
    "odd widths and number": dict(d_model=15, d_expert=15, n_expert=10),          # shards of unequal size
}


class Rows:
    """Sequences that all differ, cut by rank as data.Sampler does; with documents and padding if asked."""

    def __init__(self, documents):
        generator = torch.Generator().manual_seed(0)
        self.tokens, self.targets = torch.randint(0, 64, (2, 60, 12), generator=generator)
        self.doc = None
        if documents:
            self.doc = (torch.arange(12) // torch.randint(3, 9, (60, 1), generator=generator))
            self.doc[torch.arange(12) >= torch.randint(5, 20, (60, 1), generator=generator)] = -1
            self.doc[3:8] = -1                                    # whole sequences, of some ranks all
            self.targets[torch.rand(60, 12, generator=generator) < 0.3] = -1

    def rows(self, first, count, rank=0, world=1):
        mine = slice(first + count * rank // world, first + count * (rank + 1) // world)
        return [t[mine] for t in (self.tokens, self.targets, self.doc) if t is not None]


def make_run(grid, dtype, documents=False, chosen=(), recomputed=False, **changes):
    """A run without files, as train.start makes it."""
    names = ("n_expert", "top_k", "gate", "tie_embeddings", "d_model", "d_expert")
    config = small(**SIZES | {k: changes.pop(k) for k in names if k in changes})
    s = Settings(**dict(seq_len=12, batch_size=12, lr=1e-2, steps=10, warmup=0) | changes)
    s.check(config)
    torch.set_default_dtype(torch.float64 if dtype == torch.float64 else torch.float32)
    try:
        model = parallel.build_model(config, grid, "cpu", dtype, seed=1)
    finally:
        torch.set_default_dtype(torch.float32)
    if recomputed:
        parallel.recompute_blocks(model)
    masters = parallel.Masters(model, dtype)
    for block in model.blocks:
        block.moe.router.temperature = s.temperature
        block.moe.router.counts_margins = s.balance == "quantile"
        block.moe.router.bias[list(chosen)] = 100.0
    optimizer = parallel.make_optimizer(
        masters, s.optimizer, s.lr, (s.beta1, s.beta2), s.weight_decay, s.momentum)
    return Run(s, config, model, masters, optimizer, Corpus(Rows(documents)), "cpu", dtype, grid)


def two_steps(grid, dtype, case):
    """-> {quantity: tensor} of two steps and the weights after them."""
    run, found = make_run(grid, dtype, **CASES[case]), {}
    for step in range(2):
        did = train_step(run, step)
        sums, n = did.statistics, did.n_tokens
        found |= {f"{name} {step}": value for name, value in dict(
            loss=did.loss, norm=did.norm, load=sums.load,
            lbl=load_balancing_loss(sums.load, sums.prob_sum, n), z=router_z_loss(sums.z_sum, n),
            top1=top1_balancing_loss(sums.sharp_sum, sums.sharp_top_sum, n),
            sums=torch.cat([t.flatten().to(dtype) for t in sums])).items()}
    found |= {f"parameter {name}": whole(p) for name, p in run.masters.named.items()}
    return found | {f"bias {name}": p.clone() for name, p in run.masters.buffers.items()}


@cache
def one_process(dtype, case):
    return two_steps(parallel.ALONE, dtype, case)


def whole(p):
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()


def distance(a, b):
    """Relative, of two tensors."""
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def compare(found, want):
    """-> {kind of quantity: relative distance, at worst}.  Loads and biases are equal, or it fails."""
    worst = {}
    for name, value in want.items():
        kind = name.split()[0]
        assert found[name].shape == value.shape and value.isfinite().all() and found[name].isfinite().all()
        if kind in ("load", "bias"):
            assert torch.equal(found[name], value), name
        worst[kind] = max(worst.get(kind, 0.0), distance(found[name], value))
    names = [name for name in want if name.startswith("parameter ")]
    weights = (torch.cat([each[name].flatten() for name in names]) for each in (found, want))
    return worst | {"all parameters": distance(*weights)}


def test_float32_is_grouped_and_float64_looped():
    """.. and odd widths looped in both."""
    limitation = partial(grouped_mm_limitation, device="cpu")
    assert limitation(torch.float32, widths=(16, 12)) is None and limitation(torch.float64, widths=(16, 12))
    assert limitation(torch.float32, widths=(15, 15)) and (SMALL["d_model"], SMALL["d_expert"]) == (16, 12)


@pytest.mark.parametrize("grid, case", [
    pytest.param(grid, case, id="processes {}, ep {}, replicate {}, {}".format(*grid, case))
    for grid in GRIDS for case in CASES if not CASES[case].get("n_expert", 12) % grid[1]])
def test_every_grid_equals_one_process(ranks, grid, case):
    world, *layout = grid
    for dtype in (torch.float64, torch.float32) if grid == (4, 2, 2) else (torch.float64,):
        want = one_process(dtype, case)
        answers = [a.value for a in ranks(world, two_steps, dtype, case, layout=tuple(layout))]
        for found in answers:                                     # every rank knows the same
            for kind, error in compare(found, want).items():
                if dtype == torch.float64:
                    assert error <= 1e-12, (kind, error)
                elif kind != "parameter":                         # Adam divides rounding by itself
                    assert error <= (1e-5 if kind == "all parameters" else 1e-6), (kind, error)
