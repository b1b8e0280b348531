"""Which expert takes which token: gate, top-k, balance losses and the sparsification schedule.

Shape letters, used in every file:

    B  batch            T  sequence         N = B*T tokens       D  width of the residual stream
    H  query heads      G  key/value heads  L  layers            V  vocabulary
    E  experts          K  experts activated per token           F  hidden width of one expert
    R = N*K rows routed (a token activates K experts, so it appears in K rows)

A router scores every expert for every token with one matrix, keeps the K best, and hands the token to them.
Nothing in that forces the experts to be used evenly; that is what the losses below are for.  They are
functions of SUMS over tokens, which, unlike means, add up over micro-batches and processes; the caller
divides by the count of the whole step.
"""

import math
import random
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

GATES = ("softmax", "sigmoid", "normalized")                      # scores from 0 to 1, as count_margins needs


class Statistics(NamedTuple):
    """Sums over the tokens of one layer; Model stacks them to [L, ..].

    p is always the softmax of the logits over all experts, also when the gate is sigmoid."""

    load: torch.Tensor          # [E] int64, rows that each expert gets; sums to N*K without padding
    prob_sum: torch.Tensor      # [E] p of each expert; it and the next three have a gradient
    sharp_sum: torch.Tensor     # [E] p at the router's temperature, softmax(logits / temperature)
    sharp_top_sum: torch.Tensor # [] the largest such p of each token
    z_sum: torch.Tensor         # [] squared logsumexp of the logits
    top_sum: torch.Tensor       # [] the largest p of each token, for the log
    entropy_sum: torch.Tensor   # [] entropy of p in nats; log E is a flat gate
    margins: torch.Tensor       # [E, BINS] int64 histograms for quantile balancing, else [E, 0]


class Routing(NamedTuple):
    """Where the N tokens of one layer go."""

    weights: torch.Tensor       # [N, K] factor on each expert's output, with gradient
    experts: torch.Tensor       # [N, K] int64, the chosen experts, the best one first
    rows_per_expert: torch.Tensor   # [E] int64, padding too
    statistics: Statistics      # of the tokens that are not padding, or None


class Router(nn.Module):
    """Scores E experts for each token and keeps the top K.

    Computed in fp32 or wider (on a GPU the product is TF32): bf16 flips choices between near-equal scores.

    At K = 1, p / (sum of the chosen p) is the constant 1: the language-model loss gives no gradient.  So a
    gate is one of

      softmax      the plain probability p_k, softmax taken over ALL experts and never renormalised
                   (Switch Transformer, arXiv 2101.03961, eq. 2)
      sigmoid      sigmoid(z_k), each expert scored by itself (DeepSeek-V3, arXiv 2412.19437, eq. 15)
      normalized   p_k / detach(sum of the chosen p): sums to one for every K, so the size of the output does
                   not change with K; its gradient is weight * that of log p_k

    The choice is made by score + bias.  The bias [E] is 0 unless loss-free or quantile balancing moves it;
    it is no parameter, has no gradient, and never enters the weights."""

    def __init__(self, d_model, n_expert, gate):
        super().__init__()
        self.gate = gate
        self.weight = nn.Parameter(torch.empty(n_expert, d_model))
        self.register_buffer("bias", torch.zeros(n_expert))
        self.temperature = 1.0                                    # of sharp_sum; train.py sets it,
        self.collect_margins = False                               # and this, for quantile balancing

    def forward(self, h, top_k, valid=None, with_stats=True):
        """h [N, D] -> Routing with K = top_k.  valid [N] is False for padding, which is routed like text,
        so that shapes are static, but is not counted; its output reaches no loss."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        logits = F.linear(h.to(wide), self.weight.to(wide))                       # [N, E]
        prob = logits.softmax(-1)
        score = logits.sigmoid() if self.gate == "sigmoid" else prob
        choice = score.detach() + self.bias
        # a top-1 is a maximum, and much cheaper as one
        experts = choice.argmax(-1, keepdim=True) if top_k == 1 else choice.topk(top_k, -1).indices
        weights = score.gather(-1, experts)
        if self.gate == "normalized":
            weights = weights / weights.sum(-1, keepdim=True).detach()
        rows, statistics = count_rows(experts, prob.shape[-1]), None
        if with_stats:
            load = rows if valid is None else count_rows(experts, len(rows), valid)
            margins = rows.new_zeros(len(rows), 0)
            if self.collect_margins:
                margins = count_margins(score.detach(), choice, top_k, valid)
            statistics = self.compute_statistics(logits, prob, load, margins, valid)
        return Routing(weights, experts, rows, statistics)

    def compute_statistics(self, logits, prob, load, margins, valid):
        """logits, prob [N, E], load [E], valid [N] or None -> Statistics."""
        def total(x):                                             # over tokens, without padding
            return x.sum(0) if valid is None else (x * valid.view(-1, *[1] * (x.dim() - 1))).sum(0)
        prob_sum, top = total(prob), prob.amax(-1)
        sharp_sum, sharp_top_sum = prob_sum, total(top)
        if self.temperature != 1:
            sharp = (logits / self.temperature).softmax(-1)
            sharp_sum, sharp_top_sum = total(sharp), total(sharp.amax(-1))
        log_total = logits.logsumexp(-1)
        with torch.no_grad():
            entropy_sum = total(log_total - torch.linalg.vecdot(prob, logits))
        return Statistics(load, prob_sum, sharp_sum, sharp_top_sum, total(log_total.square()),
                          total(top.detach()), entropy_sum, margins)


def count_rows(experts, n_expert, valid=None):
    """experts [N, K] -> how often each comes [E] int64, of the tokens that are text [N] (None: all).  Never
    bincount, which waits for the device."""
    ones = torch.ones_like(experts) if valid is None else valid[:, None].expand_as(experts).long()
    return experts.new_zeros(n_expert).scatter_add_(0, experts.flatten(), ones.flatten())


# --- losses: functions of sums ----------------------------------------------------------------------------

def load_balancing_loss(load, prob_sum, n_tokens):
    """The conventional load-balancing loss: E * sum_i f_i p_i, per layer (arXiv 2101.03961, eq. 4-6).

    f_i is the fraction of routed rows that expert i gets (no gradient), p_i its mean probability.  1.0 is
    balanced, for every K, and E/K is collapse onto the same K experts.  1.0 is also reached by a flat p with
    any f at all: the shortcut that Sigma-MoE-Tiny (arXiv 2512.16248, Figure 2) sees a top-1 of 96 take.

    load [..., E] counts, prob_sum [..., E], n_tokens a number -> [...], one value per layer."""
    load = load.to(prob_sum.dtype)
    return load.shape[-1] * (load * prob_sum).sum(-1) / (load.sum(-1).clamp(min=1) * n_tokens)


def top1_balancing_loss(sharp_sum, sharp_top_sum, n_tokens):
    """Top-1 LBL: E * sum_i fhat_i^2 / pbar, per layer (arXiv 2512.16248, Figure 4).

    fhat_i is the mean over tokens of p_i = softmax(z / temperature)_i, a differentiable stand-in for f_i, and
    pbar the mean of each token's largest p.  1.0 only when p is one-hot AND balanced; a flat p gives E, and
    so does collapse: the shortcut of the conventional loss is closed.

    sharp_sum [..., E], sharp_top_sum [...] -> [...], one value per layer."""
    return sharp_sum.shape[-1] * sharp_sum.square().sum(-1) / (n_tokens * sharp_top_sum)


# what --balance may be: the loss and the statistics that it is a function of, if it is a loss
BALANCE = {"lbl": (load_balancing_loss, ("load", "prob_sum")),
           "top1": (top1_balancing_loss, ("sharp_sum", "sharp_top_sum")),
           "loss-free": None, "quantile": None, "none": None}


def router_z_loss(z_sum, n_tokens):
    """Mean squared logsumexp of the logits, which keeps them small (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return z_sum / n_tokens


def balance_objective(balance, global_sums, n_tokens, local_sums):
    """A scalar whose gradient, summed over micro-batches and ranks, is that of a balance loss at the global
    sums, added up over layers.  global_sums, local_sums: Statistics [L, ..]; n_tokens: of the global ones.

    A balance loss wants the statistics of the whole batch, but a process (or a micro-batch) only has the
    graph of its own tokens.  By the chain rule the whole gradient is the sum over micro-batches and ranks of
    (d loss / d sums)(global) * d sums (local): exact for every differentiable function of the sums, and no
    gradient crosses a collective."""
    loss, names = BALANCE[balance]
    sums = [getattr(global_sums, name).detach() for name in names]
    leaves = {name: t.requires_grad_() for name, t in zip(names, sums)        # in place
              if getattr(local_sums, name).requires_grad}
    slopes = torch.autograd.grad(loss(*sums, n_tokens).sum(), list(leaves.values()))
    return sum((slope * getattr(local_sums, name)).sum() for name, slope in zip(leaves, slopes))


@torch.no_grad()
def update_bias(bias, load, rate):
    """Loss-free balancing: b_i += rate * sign(mean load - load_i), in place, once per step from the load of
    the whole step (arXiv 2408.15664, Algorithm 1).  bias, load [..., E]."""
    bias += rate * (load.sum(-1, keepdim=True) - load.shape[-1] * load).sign()


# bins of the histograms: margins lie between -2 and 2, and asinh makes those near 0 as fine as 3e-5
BINS, SCALE, LIMIT = 512, 1e-3, math.asinh(2 / 1e-3)


def count_margins(score, choice, top_k, valid=None):
    """Histograms [E, BINS] int64 of c_i - s_ij over the tokens i, for quantile_bias.

    c_i is the (K+1)-th largest of token i's biased scores choice [N, E], and s_ij = score [N, E]: token i has
    chosen expert j if j's bias is above that margin."""
    margin = choice.topk(min(top_k + 1, len(choice.T)), -1).values[:, -1:] - score
    bins = (((margin / SCALE).asinh() / LIMIT + 1) / 2 * BINS).long().clamp(0, BINS - 1)
    bins = bins + BINS * torch.arange(score.shape[1], device=score.device)
    return count_rows(bins, score.shape[1] * BINS, valid).view(-1, BINS)


def quantile_bias(margins, top_k):
    """Quantile balancing (J. Su, 2026): the bias [E] with which K/E of a step's tokens would have taken each
    expert, centred.  A function of histograms [E, BINS], so exact over ranks and micro-batches."""
    below = margins.cumsum(-1)
    wanted = below[:, -1:] * (top_k / len(margins))
    place = (below < wanted).sum(-1, keepdim=True)                  # that the quantile is in, and where in it
    fraction = 1 - (below.gather(1, place) - wanted) / margins.gather(1, place)
    bias = SCALE * (((place + fraction) / BINS * 2 - 1) * LIMIT).sinh()[:, 0]       # undoes the asinh
    return bias - bias.mean()


# --- baselines, and the schedule of K ---------------------------------------------------------------------

def noise_floor(n_tokens, n_expert, top_k):
    """Largest and smallest relative deviation of the load that a UNIFORM router would show by chance, with
    loads that are nearly normal: their expected maximum is that quantile (Blom 1958).  0.4 is +40 %."""
    spread = ((n_expert - top_k) / max(1, n_expert - 1) * n_expert / top_k / n_tokens) ** 0.5
    quantile = torch.tensor((n_expert - 0.375) / (n_expert + 0.25), dtype=torch.float64)
    most = spread * torch.special.ndtri(quantile).item()
    return most, max(-1.0, -most)


def zipf_bound(top_share, n_expert, top_k):
    """Smallest possible largest deviation, if the router were a function of the token id alone: all tokens of
    the most frequent id, top_share of the corpus, go to the same K experts.  0 below a fair share."""
    return max(0.0, top_share * n_expert / top_k - 1)


def active_experts(step, steps, initial, target, switch, n_layer):
    """Experts activated per token in each layer at this step: a list of n_layer integers.

    Progressive sparsification (arXiv 2512.16248): the low layers, where routing collapses first, start with
    more experts (`initial`, from layer 0 up; layers beyond the list use `target`) and change to `target` at
    once when the fraction `switch` of the steps is over.  switch = 1 never changes."""
    before = switch >= 1 or step < round(switch * steps, 6)      # 0.29 * 100 is 28.999999999999996
    initial = list(initial or [])[:n_layer] if before else []
    return initial + [target] * (n_layer - len(initial))


def drawn_top_k(step, seed, choices, n_layer):
    """Matryoshka training (arXiv 2509.26520): every layer draws its K anew in every step, so that one model
    serves every K of `choices`.  A pure function of seed and step -> n_layer integers."""
    return random.Random(f"K of step {step}, seed {seed}").choices(choices, k=n_layer)
