"""The model: a decoder-only transformer in which every feed-forward layer is a mixture of experts.

    tokens [B,T] -> embedding [B,T,D]
      per layer:  x + attention(norm(x))       grouped-query attention, QK-norm, rotary positions
                  x + moe(norm(x))
         moe:     router     h [N,D] -> weights [N,K], experts [N,K], rows per expert [E], statistics
                  dispatch   rows sorted by expert [R,D]
                  experts    SwiGLU on stacked weights [E,D,2F] and [E,F,D], one grouped product each -> [R,D]
                  combine    back to token order, times weights, summed over K -> [N,D]
    norm -> logits [B,T,V] -> cross-entropy SUMMED over the targets

Qwen3-MoE's architecture (the weights load into transformers) at the sizes of Sigma-MoE-Tiny (arXiv
2512.16248).  A dense model is the same with one expert.  The shape letters are in router.py.
"""

import zlib
from dataclasses import dataclass, field, fields
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from router import GATES, Router, Statistics


def size(help, **default):
    """A field with the line of help that train.py shows."""
    return field(**default, metadata={"help": f"model: {help}"})


@dataclass(unsafe_hash=True)
class ModelConfig:
    """Sizes of a model.  Raises ValueError, naming the field, for impossible values."""

    vocab_size: int = size("V, rows of the embedding (default: the data's, rounded up to a multiple of 64)")
    n_layer: int = size("L, layers")
    n_head: int = size("H, query heads")
    n_kv_head: int = size("G, key and value heads; H / G query heads share one")
    head_dim: int = size("width of a head, even; need not be d_model / n_head")
    d_model: int = size("D, width of the residual stream")
    n_expert: int = size("E, experts per layer; 1 is a dense model")
    d_expert: int = size("F, hidden width of an expert")
    top_k: int = size("K, experts activated per token", default=1)
    gate: str = size(f"{', '.join(GATES)}: see Router in router.py", default="softmax")
    rope_base: float = size("base of the rotary positions", default=10000.0)
    norm_eps: float = size("epsilon of the norms", default=1e-6)
    tie_embeddings: bool = size("true or false: one matrix for embedding and head", default=False)
    max_seq_len: int = size("longest sequence, prompt and generated text together", default=4096)

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is int and (type(value) is not int or not 1 <= value < 1 << 31):
                raise ValueError(f"{f.name} must be a whole number from 1 to 2^31, got {value!r}")
            if f.type is float and not value > 0:
                raise ValueError(f"{f.name} must be above 0, got {value!r}")
        if self.head_dim % 2 or self.n_head % self.n_kv_head:
            raise ValueError(f"head_dim ({self.head_dim}) must be even, and n_head ({self.n_head}) a "
                             f"multiple of n_kv_head ({self.n_kv_head})")
        if self.top_k > self.n_expert:
            raise ValueError(f"top_k ({self.top_k}) must not be above n_expert ({self.n_expert})")
        if self.gate not in GATES:
            raise ValueError(f"gate must be one of {', '.join(GATES)}, got {self.gate!r}")

    def layer_top_k(self, top_k=None):
        """One K per layer from None, a number or a list.  Raises ValueError if a K is impossible."""
        top_k = self.top_k if top_k is None else top_k
        top_k = [top_k] * self.n_layer if isinstance(top_k, int) else list(top_k)
        if len(top_k) != self.n_layer or not all(1 <= k <= self.n_expert for k in top_k):
            raise ValueError(f"top_k must be {self.n_layer} numbers from 1 to {self.n_expert}, got {top_k}")
        return top_k


PRESETS = {
    # minutes on two CPU cores; as in the paper, experts are half as wide as the residual stream
    "laptop": ModelConfig(
        vocab_size=2048, n_layer=4, n_head=4, n_kv_head=2, head_dim=32, d_model=64, n_expert=96, d_expert=32,
        tie_embeddings=True, max_seq_len=512),
    # 0.31B parameters (4.4 GB of training state), 9M of them active; --accumulate 2 on 16 GB, 8 on 8 to 12 GB
    "gpu": ModelConfig(
        vocab_size=8192, n_layer=8, n_head=8, n_kv_head=2, head_dim=64, d_model=512, n_expert=96,
        d_expert=256, tie_embeddings=True, max_seq_len=1024),
    # 1.1B parameters (19 GB of training state), 0.1B active; --accumulate 4 on 40 GB, 16 on 24 GB
    "gpu-1b": ModelConfig(
        vocab_size=50304, n_layer=13, n_head=16, n_kv_head=4, head_dim=64, d_model=1024, n_expert=96,
        d_expert=256, tie_embeddings=True, max_seq_len=2048),
    # 19.98B parameters, 0.537B active without embeddings.  Head and expert widths are inferred from these
    # published totals; vocabulary and rotary base are those of sibling models by the same authors.
    "sigma-moe-tiny": ModelConfig(
        vocab_size=200064, n_layer=56, n_head=16, n_kv_head=4, head_dim=96, d_model=1536, n_expert=96,
        d_expert=768),
}


# --- attention --------------------------------------------------------------------------------------------

class RMSNorm(nn.RMSNorm):
    """In the weight's dtype (fp32) or wider, and back."""

    def forward(self, x):
        return super().forward(x.to(torch.promote_types(x.dtype, self.weight.dtype))).to(x.dtype)


def rotary(positions, head_dim, base, dtype):
    """positions [.., T] -> cos, sin [.., T, 1, head_dim/2] of the angle of each pair (arXiv 2104.09864)."""
    wide = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=wide) / head_dim
    angle = positions.to(wide)[..., None, None] / base ** exponent
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """Turn x [B, T, heads, head_dim]; dimension i is paired with i + head_dim/2, as in transformers."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    """Causal grouped-query attention (arXiv 2305.13245) with RMS-normalised queries and keys."""

    def __init__(self, config):
        super().__init__()
        self.heads = (config.n_head, config.n_kv_head, config.n_kv_head)
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.d_model, sum(self.heads) * config.head_dim, bias=False)
        self.out = nn.Linear(config.n_head * config.head_dim, config.d_model, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x, cos, sin, mask=None, cache=None, pos=None):
        """x [B, T, D] -> [B, T, D].  mask [B, 1, T, T'] says what each query sees; None is causal.  cache:
        keys and values [B, capacity, G, head_dim], written at positions pos [B, T], and read if masked."""
        return self.out(self.attend(self.qkv(x), cos, sin, mask, cache, pos))

    def attend(self, qkv, cos, sin, mask, cache, pos):
        B, T, _ = qkv.shape
        q, k, v = qkv.view(B, T, -1, self.head_dim).split(self.heads, dim=2)          # [B, T, heads, hd]
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        if cache is not None:
            row = torch.arange(B, device=qkv.device)[:, None]
            cache[0][row, pos], cache[1][row, pos] = k, v
            k, v = (k, v) if mask is None else cache
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)             # [B, heads, T, hd]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           enable_gqa=self.heads[0] != self.heads[1])
        return y.transpose(1, 2).reshape(B, T, -1)


# --- mixture of experts -----------------------------------------------------------------------------------

class Permute(torch.autograd.Function):
    """rows[order], whose gradient is gathered by the inverse permutation, not scattered."""

    @staticmethod
    def forward(ctx, rows, order, inverse):
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def sort_by_expert(experts):
    """experts [R] -> order [R], which sorts rows by their expert, and its inverse [R]."""
    order = experts.argsort(stable=True)
    return order, torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


class MoE(nn.Module):
    """Router and experts: dispatch, compute, combine.  No capacity: no token is ever dropped."""

    def __init__(self, config):
        super().__init__()
        self.router = Router(config.d_model, config.n_expert, config.gate)
        self.experts = Experts(config)

    def forward(self, x, top_k, valid=None, with_stats=True):
        """x [B, T, D], valid [N] (see Router) -> output [B, T, D], Statistics (None without with_stats)."""
        h = x.flatten(0, 1)
        weights, experts, rows_per_expert, statistics = self.router(h, top_k, valid, with_stats)
        if not with_stats and experts.numel() <= len(rows_per_expert):    # generating: most experts idle
            rows = self.experts.forward_gathered(h, experts)
        else:
            order, inverse = sort_by_expert(experts.flatten())
            rows = h[:, None].expand(-1, top_k, -1).flatten(0, 1)         # [R, D]; its gradient sums over K
            rows = self.experts(Permute.apply(rows, order, inverse), rows_per_expert)
            rows = Permute.apply(rows, inverse, order).view(len(h), top_k, -1)              # [N, K, D]
        out = rows * weights[..., None]                           # in fp32: K rows are rounded once
        return (out.sum(1) if top_k > 1 else out).to(x.dtype).view_as(x), statistics


class Experts(nn.Module):
    """E SwiGLU networks (arXiv 2002.05202) with stacked weights, gate and up projections side by side.

    With expert parallelism a rank has some of the experts, and `exchange` (parallel.py sets it) sends each
    row to the rank that has its expert: (rows, rows_per_expert) -> the same of this rank's experts, and a
    function that sends results back."""

    def __init__(self, config):
        super().__init__()
        self.exchange = None
        self.w_in = nn.Parameter(torch.empty(config.n_expert, config.d_model, 2 * config.d_expert))
        self.w_out = nn.Parameter(torch.empty(config.n_expert, config.d_expert, config.d_model))

    def forward(self, rows, rows_per_expert):
        """rows [R, D] sorted by expert, rows_per_expert [E] -> [R, D] in the same order."""
        if self.exchange is None:
            return self.compute(rows, rows_per_expert, self.w_in, self.w_out)
        rows, rows_per_expert, send_back = self.exchange(rows, rows_per_expert)
        return send_back(self.compute(rows, rows_per_expert, self.w_in.to_local(), self.w_out.to_local()))

    @staticmethod
    def compute(rows, rows_per_expert, w_in, w_out):
        """The experts' own products, on the weights [e, D, 2F] and [e, F, D] that this rank has."""
        ends = rows_per_expert.cumsum(0).to(torch.int32)
        gate, up = grouped_product(rows, w_in, ends).chunk(2, -1)
        return grouped_product(F.silu(gate) * up, w_out, ends)

    def forward_gathered(self, h, experts):
        """h [N, D], experts [N, K] -> [N, K, D]: gathers the weights of each row's expert, no sorting."""
        gate, up = torch.einsum("nd,nkdf->nkf", h, self.w_in[experts]).chunk(2, -1)
        return torch.einsum("nkf,nkfd->nkd", F.silu(gate) * up, self.w_out[experts])


def grouped_product(rows, weights, ends):
    """rows [R, in] sorted by expert, weights [E, in, out] -> [R, out].  Expert e has ends[e-1]:ends[e]."""
    if grouped_mm_limitation(rows.dtype, rows.device.type, weights.shape[1:]):    # one expert after the other
        parts = rows.tensor_split(ends.tolist()[:-1])
        return torch.cat([part @ weight for part, weight in zip(parts, weights.unbind())])
    return F.grouped_mm(rows, weights, offs=ends)


def grouped_mm_limitation(dtype, device, widths):
    """Why torch's grouped_mm does not take rows and weights of these widths, or None."""
    if (device, dtype) not in (("cpu", torch.float32), ("cpu", torch.bfloat16), ("cuda", torch.bfloat16)):
        return f"no {str(dtype)[6:]} on {device}"
    if any(width * dtype.itemsize % 16 for width in widths):
        return f"in {str(dtype)[6:]} widths must be multiples of {16 // dtype.itemsize}"


# --- a layer, and the loss --------------------------------------------------------------------------------

class Block(nn.Module):
    """One layer.  Returns a plain tuple of tensors, x and the statistics: FSDP and checkpoint() need that."""

    def __init__(self, config):
        super().__init__()
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config)
        self.moe_norm = RMSNorm(config.d_model, config.norm_eps)
        self.moe = MoE(config)

    def forward(self, x, top_k, cos, sin, mask=None, valid=None, cache=None, pos=None):
        x = x + self.attn(self.attn_norm(x), cos, sin, mask, cache, pos)
        y, statistics = self.moe(self.moe_norm(x), top_k, valid, with_stats=cache is None)
        return x + y, *(statistics or ())


def cross_entropy(x, weight, targets):
    """x [n, D], weight [V, D], targets [n] (-1: none) -> summed cross-entropy [] in fp32 or wider, and its
    gradient with respect to the logits [n, V], softmax - one-hot, in x's dtype."""
    log_prob = (x @ weight.T).to(torch.promote_types(x.dtype, torch.float32)).log_softmax(-1)
    valid, target = (targets != -1)[:, None], targets.clamp(min=0)[:, None]
    right = log_prob.gather(1, target)
    grad = log_prob.exp_().mul_(valid).to(x.dtype)
    return -(right * valid).sum(), grad.scatter_(1, target, ((right.exp() - 1) * valid).to(x.dtype))


class ChunkedCrossEntropy(torch.autograd.Function):
    """Output head and cross-entropy of x [N, D], weight [V, D], targets [N] (-1: none), some rows at a time:
    the [N, V] logits never exist (52 GB for 65,536 tokens at a vocabulary of 200,064).  The gradient is
    computed beside the loss: no chunk is computed twice."""

    @staticmethod
    def forward(ctx, x, weight, targets, chunk_loss, with_grad):      # chunk_loss: cross_entropy, or compiled
        rows = 256 if x.device.type == "cpu" else 4096            # on a CPU what its caches hold
        loss, grad_x = 0.0, torch.empty_like(x)
        grad_w = torch.zeros_like(weight, dtype=torch.promote_types(x.dtype, torch.float32))
        for part, target, out in zip(x.split(rows), targets.split(rows), grad_x.split(rows)):
            part_loss, grad = chunk_loss(part, weight, target)
            loss = loss + part_loss
            if with_grad:
                torch.mm(grad, weight, out=out)
                grad_w += grad.T @ part
        ctx.save_for_backward(grad_x, grad_w.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grad, grad_w * grad, None, None, None     # grad [] does not change their dtypes


class Head(nn.Linear):
    """The output matrix [V, D].  Logits and loss both pass through forward(), where FSDP gathers it."""

    chunk_loss = staticmethod(cross_entropy)                      # parallel.py may compile it

    def forward(self, x, targets=None):
        """x [B, T, D] -> logits [B, T, V], fp32 or wider; with targets [B, T] the summed cross-entropy []."""
        if targets is None:
            return super().forward(x).to(torch.promote_types(x.dtype, torch.float32))
        return ChunkedCrossEntropy.apply(x.flatten(0, 1), self.weight, targets.flatten(), self.chunk_loss,
                                         torch.is_grad_enabled())


# --- the model --------------------------------------------------------------------------------------------

class Output(NamedTuple):
    """What a forward pass with targets returns: sums, over micro-batches and processes too."""

    loss: torch.Tensor          # [] cross-entropy in nats, SUMMED over the targets that are not -1
    counts: torch.Tensor        # [2] int64: targets, and tokens routed without padding
    statistics: Statistics      # of all layers, [L, ..]

    n_targets = property(lambda self: int(self.counts[0]))        # waits for the device
    n_tokens = property(lambda self: int(self.counts[1]))
    load = property(lambda self: self.statistics.load)            # [L, E] int64
    prob_sum = property(lambda self: self.statistics.prob_sum)    # [L, E] with gradient


class Model(nn.Module):
    """A sparse language model, initialised (see init_parameter)."""

    recompute = False           # activation checkpointing (arXiv 1604.06174): keep the input of each block

    def __init__(self, config, seed=None):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = Head(config.d_model, config.vocab_size, bias=False)
        self.tie()
        for name, t in [*self.named_parameters(), *self.named_buffers()]:
            if not t.is_meta:
                self.init_parameter(name, t, torch.initial_seed() if seed is None else seed)

    def tie(self):
        """One tensor for embedding and head, if tied; again after to_empty(), which parts them."""
        if self.config.tie_embeddings:
            self.head.weight = self.embed.weight

    @torch.no_grad()
    def init_parameter(self, name, t, seed):
        """Fill t, the whole parameter or buffer of this name, from a generator seeded by name: the same on
        every layout.  A constructor's values do not survive: ValueError for a name without a rule here."""
        D, L = self.config.d_model, self.config.n_layer
        generator = torch.Generator(t.device).manual_seed((seed + zlib.crc32(name.encode())) % 2**63)
        if name.endswith("norm.weight"):
            t.fill_(1.0)
        elif name.endswith("router.weight"):                      # nn.Linear's default, and the authors'
            t.uniform_(-D ** -0.5, D ** -0.5, generator=generator)
        elif name.endswith("router.bias"):                        # of the selection, not a parameter
            t.zero_()
        elif name.endswith(("embed.weight", "head.weight", "qkv.weight", "w_in")):
            t.normal_(0.0, 0.5 * D ** -0.5, generator=generator)  # 0.0128 at D = 1536 (their others: 0.0125)
        elif name.endswith(("attn.out.weight", "w_out")):         # the residual stream adds 2L of them
            t.normal_(0.0, 0.5 * D ** -0.5 / (2 * L) ** 0.5, generator=generator)
        else:
            raise ValueError(f"{name} has no initial values: add a rule to Model.init_parameter (model.py)")

    def forward(self, tokens, targets=None, top_k=None, doc=None):
        """tokens [B, T] int64 -> logits [B, T, V] in fp32 or wider, or with targets Output.

        targets  [B, T]; -1 is not counted
        top_k    experts activated per token: one number, or one for each layer; default the config's
        doc      [B, T] document ids: attention stays inside a document; -1 is padding, counted nowhere"""
        if targets is not None and not len(tokens):
            tokens = tokens.new_zeros(1, tokens.shape[1])         # no rows on this rank: run one of padding,
            targets = doc = torch.full_like(tokens, -1)           # so that collectives match
        x, statistics = self.features(tokens, top_k, doc)
        if targets is None:
            return self.head(x)
        targets = targets if doc is None else targets.masked_fill(doc < 0, -1)
        routed = torch.ones_like(tokens) if doc is None else doc >= 0
        return Output(self.head(x, targets), torch.stack([(targets != -1).sum(), routed.sum()]), statistics)

    def features(self, tokens, top_k=None, doc=None, cache=None, pos=None):
        """-> what the head sees [B, T, D], Statistics of all layers [L, ..] (None with a cache)."""
        T, config, mask = tokens.shape[1], self.config, None
        if T > config.max_seq_len:
            raise ValueError(f"{T} tokens are longer than max_seq_len ({config.max_seq_len})")
        x, valid = self.embed(tokens), None if doc is None else (doc >= 0).flatten()
        pos = torch.arange(T, device=x.device)[None] if pos is None else pos
        if doc is not None:
            mask = ((pos[:, None] <= pos[:, :, None]) & (doc[:, None] == doc[:, :, None]))[:, None]
        elif cache is not None and T == 1:                        # decoding; a prompt is causal
            mask = (torch.arange(cache[0][0].shape[1], device=x.device) <= pos)[:, None, None]
        cos, sin = rotary(pos, config.head_dim, config.rope_base, x.dtype)
        sums, caches = [], cache or [None] * len(self.blocks)
        for block, k, kv in zip(self.blocks, config.layer_top_k(top_k), caches):
            run = partial(checkpoint, block, use_reentrant=False) if self.recompute else block
            x, *statistics = run(x, k, cos, sin, mask, valid, kv, pos)
            sums.append(statistics)
        return self.norm(x), None if cache else Statistics(*map(torch.stack, zip(*sums)))


@lru_cache
def parameter_sizes(config):
    with torch.device("meta"):                                    # takes no memory
        return {name: p.numel() for name, p in Model(config).named_parameters()}


def count_parameters(config, top_k=None):
    """-> parameters: all, those that a token makes use of, and of these all but embedding and output head."""
    sizes = parameter_sizes(config)
    total, experts = sum(sizes.values()), sum(n for name, n in sizes.items() if ".experts." in name)
    embeddings = sum(n for name, n in sizes.items() if name in ("embed.weight", "head.weight"))
    active = total - experts + experts // (config.n_layer * config.n_expert) * sum(config.layer_top_k(top_k))
    return total, active, active - embeddings


def flops_per_token(config, seq_len, top_k=None):
    """FLOPs of forward and backward pass: 6 per active weight, the head included, and causal attention."""
    matrices = count_parameters(config, top_k)[2] + config.vocab_size * config.d_model
    attention = config.n_layer * config.n_head * config.head_dim * seq_len    # 2 products, half masked
    return 6 * (matrices + attention)
