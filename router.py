"""Which expert takes which token: gate, top-k, balance losses and the sparsification schedule.

Shape letters, used in every file:

    B  batch            T  sequence         N = B*T tokens       D  width of the residual stream
    H  query heads      G  key/value heads  L  layers            V  vocabulary
    E  experts          K  experts activated per token           F  hidden width of one expert
    R = N*K rows routed (a token activates K experts, so it appears in K rows)

A router scores every expert for every token with one matrix, keeps the K best, and hands the token to them.
Nothing in that forces the experts to be used evenly; that is what the losses below are for.

The statistics of a forward pass are SUMS over tokens (counts, sums of probabilities).  Sums add up over
micro-batches and over processes, means do not, so every loss here is a function of sums.
"""

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

GATES = ("softmax", "sigmoid", "normalized")
BALANCE = ("lbl", "none")


class Routing(NamedTuple):
    """Where the N tokens of one layer go."""

    weights: torch.Tensor   # [N, K] factor on each expert's output, with gradient
    experts: torch.Tensor   # [N, K] int64, the chosen experts
    load: torch.Tensor      # [E] int64, rows that each expert gets; sums to N*K
    prob_sum: torch.Tensor  # [E] softmax probability of each expert, summed over tokens, with gradient
    z_sum: torch.Tensor     # [] squared logsumexp of the logits, summed over tokens, with gradient


class Router(nn.Module):
    """Scores E experts for each token and keeps the top K.

    Computed in fp32 (or wider): rounding the scores to bf16 flips choices between near-equal experts.

    Every gate must leave the router a gradient from the language-model loss at K = 1.  Probabilities divided
    by the sum of the chosen ones are the constant 1 there, and the router learns nothing; hence

      softmax      the plain probability p_k, softmax taken over ALL experts and never renormalised
                   (Switch Transformer, arXiv 2101.03961, eq. 2)
      sigmoid      sigmoid(z_k), each expert scored by itself (DeepSeek-V3, arXiv 2412.19437, eq. 15)
      normalized   p_k / detach(sum of the chosen p): sums to one for every K, so the size of the output does
                   not change with K; its gradient is that of log p
    """

    def __init__(self, d_model, n_expert, gate):
        super().__init__()
        self.gate = gate
        self.weight = nn.Parameter(torch.empty(n_expert, d_model))

    def forward(self, h, top_k):
        """h [N, D] -> Routing with K = top_k."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        logits = F.linear(h.to(wide), self.weight.to(wide))                       # [N, E]
        prob = logits.softmax(-1)
        score = logits.sigmoid() if self.gate == "sigmoid" else prob
        # a top-1 is a maximum, and much cheaper as one
        weights, experts = score.max(-1, keepdim=True) if top_k == 1 else score.topk(top_k, -1)
        if self.gate == "normalized":
            weights = weights / weights.sum(-1, keepdim=True).detach()
        flat = experts.flatten()
        load = flat.new_zeros(prob.shape[-1]).scatter_add_(0, flat, torch.ones_like(flat))  # no device sync
        return Routing(weights, experts, load, prob.sum(0), logits.logsumexp(-1).square().sum())


# --- losses: functions of sums ----------------------------------------------------------------------------

def load_balancing_loss(load, prob_sum, n_tokens):
    """The conventional load-balancing loss: E * sum_i f_i p_i, per layer (arXiv 2101.03961, eq. 4-6).

    f_i is the fraction of routed rows that expert i gets (no gradient), p_i the mean probability of expert i.
    1.0 is balanced, for every K, and E is full collapse onto one expert.  1.0 is also reached by a flat p
    with any f at all: the shortcut that Sigma-MoE-Tiny (arXiv 2512.16248, Figure 2) sees a top-1 of 96 take.

    load [..., E] counts, prob_sum [..., E], n_tokens a number -> [...], one value per layer.
    """
    load = load.to(prob_sum.dtype)
    return load.shape[-1] * (load * prob_sum).sum(-1) / (load.sum(-1).clamp(min=1) * n_tokens)


def router_z_loss(z_sum, n_tokens):
    """Mean squared logsumexp of the router's logits, which keeps them small (ST-MoE, arXiv 2202.08906, eq.
    5).

    z_sum [...] -> [...]."""
    return z_sum / n_tokens


def differentiate_at(loss, total, local):
    """Evaluate a loss at global sums, and give its gradient to the local ones.

    A balance loss wants the statistics of the whole batch, but a process (or a micro-batch) only has the
    graph of its own part.  By the chain rule the whole gradient is the sum over parts of (d loss / d
    sums)(global) * d sums (local), so no gradient need cross a collective: exact for every differentiable
    function of the sums.

    loss: sums -> [L].  total: global sums.  local: this part's sums, with graph.
    Returns (value [L], detached; a scalar whose gradient, summed over the parts, is that of loss.sum()).
    """
    total = total.detach().requires_grad_()
    with torch.enable_grad():
        value = loss(total)
        (slope,) = torch.autograd.grad(value.sum(), total)
    return value.detach(), (slope * local).sum()


# --- schedule ---------------------------------------------------------------------------------------------

def active_experts(step, steps, initial, target, switch, n_layer):
    """Experts activated per token in each layer at this step: a list of n_layer integers.

    Progressive sparsification (arXiv 2512.16248): the low layers, where routing collapses first, start with
    more experts (`initial`, from layer 0 up; layers beyond the list use `target`) and change to `target` at
    once when the fraction `switch` of the steps is over.  switch = 1 never changes.  Without `initial` all
    layers use target.
    """
    before = switch >= 1 or step < round(switch * steps, 6)      # 0.29 * 100 is 28.999999999999996
    initial = list(initial or [])[:n_layer] if before else []
    return initial + [target] * (n_layer - len(initial))
