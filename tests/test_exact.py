"""Every grid of processes does what one process does: the same losses, loads, gradients and weights.

In float64 to 1e-12, where only a difference in logic shows; on one grid also in float32, to rounding."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import small

import model as model_module
import parallel
from model import Experts, MoE
from train import Corpus, Run, Settings, train_step

# processes, ep, replicate
GRIDS = [(4, 1, 2), (4, 2, 1), (4, 2, 2), (3, 1, 1), (3, 3, 1), (2, 1, 2)]
SIZES = dict(n_expert=12)                                         # 4, 3 and 2 divide it
CASES = {
    "plain": dict(),
    "96 experts, top-1 loss": dict(n_expert=96, top_k=3, balance="top1", lbl_coef=0.5, z_coef=0.1),
    "sigmoid, accumulate": dict(gate="sigmoid", accumulate=3, balance="top1", lbl_coef=0.5, clip=0.05),
    "normalized, micro": dict(gate="normalized", top_k=3, tie_embeddings=True, accumulate=2, lbl_coef=0.5,
                              lbl_scope="micro"),
    "loss-free": dict(balance="loss-free", bias_rate=0.01, initial_top_k=[3], switch_fraction=0.1,
                      batch_size=10),
    "quantile": dict(balance="quantile", initial_top_k=[3], accumulate=2),
    "no data": dict(batch_size=2, lbl_coef=0.5),                  # for some ranks
    "documents, recomputed": dict(documents=True, recomputed=True, accumulate=2, z_coef=0.1, lbl_coef=0.5,
                                  chosen=[1, 2], top_k=3, tie_embeddings=True),
    "one expert chosen": dict(chosen=[1]),                        # the others, and ranks, get nothing
    "few experts chosen, odd widths": dict(chosen=[2, 3, 9], top_k=3, batch_size=3, d_model=15, d_expert=15,
                                           n_expert=10),          # shards of unequal size
    "shared expert": dict(shared=True, accumulate=2, optimizer="muon"),       # the README's fork
    "muon, idle experts": dict(chosen=[1], optimizer="muon"),
    "muon, odd": dict(optimizer="muon", d_model=15, d_expert=15, n_expert=10, clip=0.05, accumulate=2),
    "muon, dense": dict(optimizer="muon", n_expert=1),
}
# on every grid and in float32, too; the others in float64 on the grids of four processes
EVERYWHERE = ("plain", "96 experts, top-1 loss", "no data", "documents, recomputed", "muon, odd",
              "few experts chosen, odd widths")


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


class SharedExpert(MoE):
    """The README's fork: a dense expert beside the sparse ones."""

    def __init__(self, config):
        super().__init__(config)
        self.shared = Experts(replace(config, n_expert=1, top_k=1))

    def forward(self, x, *args, **kwargs):
        out, statistics = super().forward(x, *args, **kwargs)
        h = x.flatten(0, 1)
        return out + self.shared(h, torch.tensor([len(h)])).view_as(x), statistics


def make_run(grid, dtype, documents=False, chosen=(), recomputed=False, shared=False, **changes):
    """A run without files, as train.main makes it."""
    names = ("n_expert", "top_k", "gate", "tie_embeddings", "d_model", "d_expert")
    config = small(**SIZES | {k: changes.pop(k) for k in names if k in changes})
    s = Settings(**dict(seq_len=12, batch_size=12, lr=1e-2, steps=10, warmup=0) | changes)
    s.check(config)
    torch.set_default_dtype(torch.float64 if dtype == torch.float64 else torch.float32)
    model_module.MoE = SharedExpert if shared else MoE
    try:
        model = parallel.build_model(config, grid, "cpu", dtype, seed=1)
    finally:
        torch.set_default_dtype(torch.float32)
        model_module.MoE = MoE
    model.recompute = recomputed and grid.world > 1               # and equals what is kept
    masters = parallel.MasterWeights(model, dtype)
    for block in model.blocks:
        block.moe.router.temperature = s.temperature
        block.moe.router.collect_margins = s.balance == "quantile"
        block.moe.router.bias[list(chosen)] = 100.0
    optimizer = parallel.make_optimizer(
        masters, s.optimizer, s.lr, (s.beta1, s.beta2), s.weight_decay, s.momentum)
    return Run(s, config, model, masters, optimizer, Corpus(Rows(documents)), "cpu", dtype, grid)


def two_steps(grid, dtype, case):
    """-> {quantity: tensor} of two steps and the weights after them."""
    run, found = make_run(grid, dtype, **CASES[case]), {}
    for step in range(2):
        did = train_step(run, step)
        sums = torch.cat([t.flatten().to(dtype) for t in did.statistics])
        found |= {f"loss {step}": did.loss, f"norm {step}": did.norm, f"sums {step}": sums,
                  f"load {step}": did.statistics.load}
    weights = {f"weight {name}": whole(p) for name, p in run.masters.named.items()}
    biases = {f"bias {name}": p.clone() for name, p in run.masters.buffers.items()}
    return found | weights | biases | {"all weights": torch.cat([p.flatten() for p in weights.values()])}


@cache
def one_process(dtype, case):
    return two_steps(parallel.SINGLE_PROCESS, dtype, case)


def whole(p):
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()


@pytest.mark.parametrize("grid, case", [
    pytest.param(grid, case, id="processes {}, ep {}, replicate {}, {}".format(*grid, case))
    for grid in GRIDS for case in CASES
    if (grid[0] == 4 or case in EVERYWHERE) and not CASES[case].get("n_expert", 12) % grid[1]])
def test_every_grid_equals_one_process(ranks, grid, case):
    """Loads and biases are equal, everything else by its relative distance, on every rank."""
    world, *layout = grid
    both = grid == (4, 2, 2) and case in EVERYWHERE
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-4))[:1 + both]:
        want = one_process(dtype, case)
        for found in (a.value for a in ranks(world, two_steps, dtype, case, layout=tuple(layout))):
            for name, value in want.items():
                if name.startswith(("load", "bias")):
                    assert torch.equal(found[name], value), name
                elif dtype == torch.float64 or "weight " not in name:            # AdamW magnifies rounding
                    distance = (found[name] - value).norm() / value.norm().clamp(min=1e-30)
                    assert distance <= limit, (name, distance)
