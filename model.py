"""The model: a decoder-only transformer in which every feed-forward layer is a mixture of experts.

    tokens [B,T] -> embedding [B,T,D]
      per layer:  x + attention(norm(x))       grouped-query attention, QK-norm, rotary positions
                  x + moe(norm(x))
         moe:     router     h [N,D] -> weights [N,K], experts [N,K], load [E], sums for the losses
                  dispatch   rows sorted by expert [R,D]
                  experts    SwiGLU on stacked weights [E,D,2F] and [E,F,D], one grouped product each -> [R,D]
                  combine    back to token order, times weights, summed over K -> [N,D]
    norm -> logits [B,T,V] -> cross-entropy SUMMED over the targets

The architecture is Qwen3-MoE's (the weights load into transformers) at the sizes of Sigma-MoE-Tiny
(arXiv 2512.16248).  A dense model is the same model with one expert.  The shape letters are in router.py.

    python model.py --preset sigma-moe-tiny --ranks 64    parameters, FLOPs per token, bytes of state per rank
"""

import zlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from router import GATES, Router, Statistics


@dataclass
class ModelConfig:
    """Sizes of a model.  Raises ValueError, naming the field, for values that cannot be."""

    vocab_size: int               # V, the special tokens and any padding included
    n_layer: int                  # L
    n_head: int                   # H, query heads
    n_kv_head: int                # G, key/value heads; H / G query heads share one
    head_dim: int                 # even (rotary positions turn pairs); need not be d_model / n_head
    d_model: int                  # D
    n_expert: int                 # E; 1 is a dense model
    d_expert: int                 # F
    top_k: int = 1                # K, the same in all layers unless the forward pass is given another
    gate: str = "softmax"         # softmax, sigmoid or normalized: see router.Router
    token_router: bool = False    # a control: layer 0 routes on the token's embedding, before attention
    rope_base: float = 10000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    max_seq_len: int = 4096

    def __post_init__(self):
        for name in ("vocab_size", "n_layer", "n_head", "n_kv_head", "head_dim", "d_model", "n_expert",
                     "d_expert", "top_k", "max_seq_len"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("rope_base", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (rotary positions turn pairs), got {self.head_dim}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head ({self.n_head}) must be a multiple of n_kv_head ({self.n_kv_head})")
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
    # two CPU cores, five minutes; the paper's proportions: experts half as wide as the residual stream
    "laptop": ModelConfig(
        vocab_size=2048, n_layer=4, n_head=2, n_kv_head=2, head_dim=32, d_model=64, n_expert=96, d_expert=32,
        tie_embeddings=True, max_seq_len=512),
    # one 24 GB card: 18 bytes of training state per parameter are 19 GB
    "gpu": ModelConfig(
        vocab_size=50304, n_layer=13, n_head=16, n_kv_head=4, head_dim=64, d_model=1024, n_expert=96,
        d_expert=256, tie_embeddings=True, max_seq_len=2048),
    # 19.98B parameters, 0.537B of them active without embeddings.  Head and expert widths are inferred from
    # the published totals; vocabulary and rotary base are those of sibling models by the same authors.
    "sigma-moe-tiny": ModelConfig(
        vocab_size=200064, n_layer=56, n_head=16, n_kv_head=4, head_dim=96, d_model=1536, n_expert=96,
        d_expert=768),
}


# --- layers -----------------------------------------------------------------------------------------------

class Function(torch.autograd.Function):
    """An autograd function whose call() leaves autograd out when no gradients are wanted: a quarter of the
    time of a generated token went there."""

    @classmethod
    def call(cls, *args):
        return cls.apply(*args) if torch.is_grad_enabled() else cls.forward(NO_CONTEXT, *args)


NO_CONTEXT = SimpleNamespace(save_for_backward=lambda *tensors: None)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, statistics in the weight's dtype (fp32) or wider."""

    def __init__(self, size, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x):
        if torch.is_grad_enabled() and not x.is_cuda:
            return RootMeanSquare.apply(x, self.weight, self.eps)
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight, self.eps).to(x.dtype)


class RootMeanSquare(torch.autograd.Function):
    """F.rms_norm where torch has no kernel for it: 2 to 5 times faster, and keeping less.

    y = x r w with r = (mean of x^2 + eps)^-1/2, so that for a gradient g of y
    dx = r w g - x r^3 / D * (sum of x w g over D), and dw = sum of x r g over the tokens."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.to(torch.promote_types(x.dtype, weight.dtype))
        r = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (wide * r).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, r = ctx.saved_tensors
        wide, grad = x.to(r.dtype), grad.to(r.dtype)
        product = (wide * grad).flatten(0, -2)
        slope = (product @ weight).view_as(r) * r ** 3 / x.shape[-1]
        return torch.addcmul(grad.mul(weight).mul_(r), wide, slope, value=-1).to(x.dtype), \
            product.T @ r.flatten(), None


def rotary(positions, head_dim, base, dtype):
    """cos and sin [T, 1, head_dim] of the angles that positions [T] turn each pair by (arXiv 2104.09864), as
    rotate() wants them: each angle twice, the first sine negative."""
    wide = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=wide) / head_dim
    angle = positions.to(wide)[:, None, None] * (1.0 / base ** exponent)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x, cos, sin):
    """Turn x [B, T, heads, head_dim]; dimension i is paired with i + head_dim/2, as in transformers."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Rotate(Function):
    """rotate(), whose gradient is turned back: nothing need be kept of x."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return rotate(grad, cos, -sin), None, None


class KVCache:
    """Keys and values of the positions seen so far, in memory taken once: L layers of [B, G, capacity,
    head_dim].  Of each row the first padding [B] positions are seen by nobody."""

    def __init__(self, config, batch, capacity, dtype, device, padding=None):
        shape = (config.n_layer, 2, batch, config.n_kv_head, capacity, config.head_dim)
        self.memory = torch.empty(shape, dtype=dtype, device=device)
        self.padding = padding
        self.length = 0                                           # positions filled, the same in all layers

    def append(self, layer, k, v):
        """Add k, v [B, G, T, head_dim] behind the filled positions; returns all keys and values so far."""
        end = self.length + k.shape[2]
        for memory, new in zip(self.memory[layer], (k, v)):
            memory[:, :, self.length:end] = new
        return self.memory[layer][:, :, :, :end]


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

    def forward(self, x, cos, sin, mask=None, cache=None, layer=None):
        """x [B, T, D] -> [B, T, D].  mask [B, 1, T, T'] says what each query may see; None is plainly
        causal."""
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, -1, self.head_dim).split(self.heads, dim=2)  # [B, T, heads, hd]
        q, k = Rotate.call(self.q_norm(q), cos, sin), Rotate.call(self.k_norm(k), cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)            # [B, heads, T, hd]
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if mask is None and q.device.type == "cpu" and 1 < T <= CHUNKED_UP_TO:
            y = chunked_attention(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1,
                                               enable_gqa=self.heads[0] != self.heads[1])
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


CHUNKED_UP_TO = 1024                                              # positions; at 4,096 it is no faster


def chunked_attention(q, k, v, size=64):
    """scaled_dot_product_attention(is_causal=True) in plain products, `size` queries at a time.

    On a CPU it takes 0.7 of the time of torch's in fp32 and a third in bf16, but keeps the T^2/2
    probabilities of every head, and rounds scores to bf16 there (error of the output 0.35 % instead of 0.20).

    q [B, H, T, head_dim], k, v [B, G, T, head_dim] -> [B, H, T, head_dim]."""
    B, H, T, hd = q.shape
    groups, share = B * k.shape[1], H // k.shape[1]               # heads that share keys go into one product
    q, k, v = q.reshape(groups, share, T, hd), k.reshape(groups, T, hd), v.reshape(groups, T, hd)
    mask = torch.full((T, T), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    parts = []
    for a in range(0, T, size):
        end = min(a + size, T)                                    # nothing is computed for later keys
        score = torch.baddbmm(mask[a:end, :end].repeat(share, 1), q[:, :, a:end].flatten(1, 2),
                              k[:, :end].transpose(1, 2), alpha=hd ** -0.5)
        parts.append((score.softmax(-1) @ v[:, :end]).view(groups, share, end - a, hd))
    return torch.cat(parts, 2).view(B, H, T, hd)


class Dispatch(Function):
    """h [N, D] -> its rows in the experts' order, h[source].

    The gradient is gathered too, by place [N, K], where autograd's own would scatter one row at a time (slow
    on CPU, and in no fixed order on a GPU).
    """

    @staticmethod
    def forward(ctx, h, source, place):
        ctx.save_for_backward(place)
        return h.index_select(0, source)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        place, = ctx.saved_tensors
        return add_up(grad.index_select(0, slot) for slot in place.unbind(1)), None, None


class Combine(Function):
    """rows [R, D] in the experts' order, place [N, K], weights [N, K] -> [N, D], the weighted sum of each
    token's rows.

    One choice after the other, so that nothing of size [N, K, D] is made; rows that no token has get a
    gradient of 0."""

    @staticmethod
    def forward(ctx, rows, place, weights):
        ctx.save_for_backward(rows, place, weights)
        parts = (rows.index_select(0, slot) * weight[:, None]
                 for slot, weight in zip(place.unbind(1), weights.to(rows.dtype).unbind(1)))
        return add_up(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, place, weights = ctx.saved_tensors
        grad_rows, grad_weights = torch.zeros_like(rows), torch.empty_like(weights)
        for k, slot in enumerate(place.unbind(1)):
            grad_weights[:, k] = torch.linalg.vecdot(rows.index_select(0, slot), grad)
            grad_rows.index_copy_(0, slot, grad * weights[:, k, None].to(grad.dtype))
        return grad_rows, None, grad_weights


def add_up(parts):
    """The sum of some tensors, rounded once to their dtype."""
    total = next(parts)
    dtype = total.dtype
    for part in parts:                                            # none for K = 1
        total = total.to(torch.promote_types(dtype, torch.float32)).add_(part)
    return total.to(dtype)


def sort_by_expert(experts, load, multiple):
    """experts [N, K], load [E] -> source [R] the token of each row, place [N, K] the row of each token's
    choices, sizes [E] the rows of each expert, filled up to a multiple (R is then more than N*K)."""
    order = experts.flatten().argsort(stable=True)
    rows, sizes = torch.arange(len(order), device=order.device), load
    if multiple > 1:
        sizes = (load + multiple - 1) // multiple * multiple
        rows = rows + (sizes.cumsum(0) - sizes - load.cumsum(0) + load).repeat_interleave(load)
    place = torch.empty_like(order).scatter_(0, order, rows)
    source = order if experts.shape[1] == 1 else order // experts.shape[1]
    if multiple > 1:
        source = source.new_zeros(int(sizes.sum())).index_copy_(0, rows, source)
    return source, place.view_as(experts), sizes


def grouped_product(rows, weights, ends):
    """rows [R, in] sorted by expert, weights [E, in, out] -> [R, out]; expert e owns rows ends[e-1] :
    ends[e].

    torch's grouped_mm, or the loop below for what that refuses.  Experts without rows are normal.  When text
    is generated on a CPU, most have none, and the loop is faster: grouped_mm visits them all.
    """
    few = rows.device.type == "cpu" and few_rows(len(rows), len(weights))
    if few or refused(rows.dtype, rows.device.type, weights.shape[1:]):
        return looped_product(rows, weights, ends)
    return F.grouped_mm(rows, weights, offs=ends)


def few_rows(rows, n_expert):
    """Whether this is generation, in which most experts have no rows."""
    return rows < n_expert and not torch.is_grad_enabled()


def refused(dtype, device, widths):
    """Why grouped_mm does not take rows and weights of these widths, or None."""
    dtypes = {"cpu": (torch.float32, torch.bfloat16, torch.float16), "cuda": (torch.bfloat16,)}
    if dtype not in dtypes.get(device, ()):
        return f"it does not compute in {str(dtype)[6:]} on {device}"
    unit = 16 // dtype.itemsize                                   # a stride is a multiple of 16 bytes
    wrong = [width for width in widths if width % unit]
    return f"in {str(dtype)[6:]} widths are multiples of {unit}, and {wrong[0]} is not" if wrong else None


def looped_product(rows, weights, ends):
    """What grouped_product computes, one expert after the other."""
    begin, parts = 0, []
    each = weights.unbind() if torch.is_grad_enabled() else weights       # 96 views cost more than a token
    for expert, end in enumerate(ends.tolist()):
        if end > begin:
            parts.append(rows[begin:end] @ each[expert])
        begin = end
    return torch.cat(parts) if parts else rows @ each[0]          # no rows at all: for the graph


class Experts(nn.Module):
    """E SwiGLU networks without biases (arXiv 2002.05202), their weights stacked along dim 0."""

    def __init__(self, config):
        super().__init__()
        E, D, F_ = config.n_expert, config.d_model, config.d_expert
        self.w_in = nn.Parameter(torch.empty(E, D, 2 * F_))       # gate and up projections side by side
        self.w_out = nn.Parameter(torch.empty(E, F_, D))

    def forward(self, rows, load):
        """rows [R, D] sorted by expert, load [E] rows of each (fillers too) -> [R, D] in the same order.

        The seam of expert parallelism: parallel code replaces this method, and nothing outside changes."""
        return self.compute(rows, load, self.w_in, self.w_out)

    def filled_up_to(self, h, n_rows):
        """The rows of an expert are filled up to a multiple of this: on a CPU, bf16 products are prepared
        anew for every number of rows, and slow for odd ones."""
        slow = h.device.type == "cpu" and h.dtype == torch.bfloat16
        return 16 if slow and not few_rows(n_rows, len(self.w_in)) else 1

    @staticmethod
    def compute(rows, load, w_in, w_out):
        ends = load.cumsum(0).to(torch.int32)
        return grouped_product(SwiGLU.call(grouped_product(rows, w_in, ends)), w_out, ends)


class SwiGLU(Function):
    """gate and up side by side [R, 2F] -> silu(gate) * up [R, F].  Keeps its input alone, and writes the
    gradient's halves where they belong."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, -1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_x


class MoE(nn.Module):
    """Router and experts: dispatch, compute, combine.  No capacity: no token is ever dropped."""

    def __init__(self, config):
        super().__init__()
        self.router = Router(config.d_model, config.n_expert, config.gate)
        self.experts = Experts(config)

    def forward(self, x, top_k, keep=None, scored=None, counted=True):
        """x [B, T, D] -> output [B, T, D], Statistics.

        keep: indices of the tokens to route (None is all); the output of the others is zero.
        scored: what the router sees in place of x.
        counted: False leaves out all statistics but the load."""
        h = kept(x, keep)
        routing = self.router(h if scored is None else kept(scored, keep), top_k, counted)
        multiple = self.experts.filled_up_to(h, routing.experts.numel())
        source, place, sizes = sort_by_expert(routing.experts, routing.statistics.load, multiple)
        rows = self.experts(Dispatch.call(h, source, place), sizes)
        out = Combine.call(rows, place, routing.weights)
        if keep is not None:
            out = out.new_zeros(x.shape).flatten(0, -2).index_copy(0, keep, out)
        return out.view_as(x), routing.statistics


def kept(x, keep):
    """x [B, T, D] -> the rows of the tokens `keep` [N, D]; None is all."""
    return x.flatten(0, -2) if keep is None else x.flatten(0, -2).index_select(0, keep)


class Block(nn.Module):
    """One layer.  Returns a plain tuple of tensors, x and with no cache the statistics: sharding and
    recomputation handle nothing else everywhere."""

    def __init__(self, config, token_router=False):
        super().__init__()
        self.token_router = token_router
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config)
        self.moe_norm = RMSNorm(config.d_model, config.norm_eps)
        self.moe = MoE(config)

    def forward(self, x, top_k, cos, sin, mask=None, keep=None, cache=None, layer=None):
        scored = self.moe_norm(x) if self.token_router else None
        x = x + self.attn(self.attn_norm(x), cos, sin, mask, cache, layer)
        y, statistics = self.moe(self.moe_norm(x), top_k, keep, scored, counted=cache is None)
        if cache is not None:
            return (x + y,)
        sizes = {"output_sq": sum_of_squares(y), "stream_sq": sum_of_squares(kept(x, keep))}
        return x + y, *statistics._replace(**sizes)


def sum_of_squares(x):
    """In fp32 or wider, without gradient."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x.detach(), dtype=wide).square()


class ChunkedCrossEntropy(torch.autograd.Function):
    """Output head and cross-entropy, some rows at a time: the [N, V] logits never exist.

    At a vocabulary of 200,064 the logits of 4,096 tokens would be 3.3 GB.  The gradient is computed beside
    the loss, so that no chunk is computed twice; softmax and loss are in fp32 or wider.
    """

    ROWS = 256                                                    # at a time on a CPU, for its caches
    LOGITS = 1 << 26                                              # at a time elsewhere: 400 MB

    @staticmethod
    def forward(ctx, x, weight, targets, with_grad):
        """x [N, D], weight [V, D], targets [N], -1 for none -> sum of the cross-entropies."""
        wide = torch.promote_types(x.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=x.device)
        grad_x, grad_w = torch.empty_like(x), torch.zeros_like(weight, dtype=wide)
        many = max(128, ChunkedCrossEntropy.LOGITS // len(weight))
        size = min(len(x), ChunkedCrossEntropy.ROWS if x.device.type == "cpu" else many)
        memory = [x.new_empty(size, len(weight), dtype=dtype) for dtype in (x.dtype, wide)]
        for a in range(0, len(x), size):
            rows, target = x[a:a + size], targets[a:a + size, None]
            valid, target = (target != -1).to(wide), target.clamp(min=0)
            logits, prob = (m[:len(rows)] for m in memory)
            torch.mm(rows, weight.T, out=logits)
            top, at = logits.max(-1, keepdim=True)
            torch.softmax(logits, -1, dtype=wide, out=prob)
            log_sum = top - prob.gather(1, at).log()              # logsumexp, without exponentiating twice
            loss += ((log_sum - logits.gather(1, target)) * valid).sum()
            if with_grad:                                         # d loss / d logits = softmax - one-hot
                grad = prob.scatter_add_(1, target, -torch.ones_like(valid))
                grad = grad if x.dtype == wide else logits.copy_(grad)
                grad_x[a:a + size] = (grad @ weight) * valid.to(x.dtype)
                grad_w += grad.T @ (rows * valid.to(x.dtype))
        if with_grad:
            ctx.save_for_backward(grad_x, grad_w.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grad.to(grad_x.dtype), grad_w * grad.to(grad_w.dtype), None, None


class Head(nn.Linear):
    """The output matrix [V, D].  Logits and loss both pass through its forward(), where sharding gathers it.
    """

    def forward(self, x, targets=None):
        """x [B, T, D] -> logits [B, T, V], fp32 or wider; with targets [B, T] the summed cross-entropy []."""
        if targets is None:
            return super().forward(x).to(torch.promote_types(x.dtype, torch.float32))
        return ChunkedCrossEntropy.apply(x.flatten(0, 1), self.weight, targets.flatten(),
                                         torch.is_grad_enabled())


def pick_device(name="auto"):
    """cuda, mps or cpu: the first there is, or the one named.  ValueError if that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device in there if there[device])
    if not there.get(name.split(":")[0]):
        raise ValueError(f"device {name!r} is not there; there is {', '.join(d for d in there if there[d])}")
    return name


# --- the model --------------------------------------------------------------------------------------------

class Output(NamedTuple):
    """What a forward pass with targets returns.  All of it adds up over micro-batches and processes."""

    loss: torch.Tensor      # [] cross-entropy in nats, SUMMED over the targets that are not -1
    n_targets: int
    n_tokens: int           # tokens routed: padding is not
    statistics: Statistics  # of all layers, [L, ..]

    @property
    def load(self):         # [L, E] int64
        return self.statistics.load

    @property
    def prob_sum(self):     # [L, E] with gradient
        return self.statistics.prob_sum


class Model(nn.Module):
    """A sparse language model, initialised (see init_weights)."""

    def __init__(self, config, seed=None):
        super().__init__()
        self.config = config
        self.rope_base = config.rope_base                         # train.py sets it where a new stage begins
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, config.token_router and i == 0)
                                    for i in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = Head(config.d_model, config.vocab_size, bias=False)
        self.tie()
        if not self.embed.weight.is_meta:
            self.init_weights(torch.initial_seed() if seed is None else seed)

    def tie(self):
        """One tensor for embedding and head, if the config says so.  Needed again after to_empty(), which
        parts them."""
        if self.config.tie_embeddings:
            self.head.weight = self.embed.weight

    @torch.no_grad()
    def init_weights(self, seed):
        """Draw all parameters; selection biases are zero.

            norms                         1
            routers                       uniform +-1/sqrt(D), nn.Linear's default and the authors' choice
            attn.out, experts.w_out       normal, std 0.5/sqrt(D) / sqrt(2L): the residual adds 2L of them
            everything else               normal, std 0.5/sqrt(D): 0.0128 at D = 1536; siblings have 0.0125

        """
        for bias in self.buffers():
            bias.zero_()
        for name, p in self.named_parameters():
            self.draw(name, p, seed)

    def draw(self, name, p, seed):
        """Fill p, the whole of the parameter of this name, from a generator of its own, seeded by the name:
        a process that holds a part of the parameters only draws the same ones."""
        D, L = self.config.d_model, self.config.n_layer
        generator = torch.Generator(p.device).manual_seed((seed + zlib.crc32(name.encode())) % 2**63)
        if p.dim() == 1:
            p.fill_(1.0)
        elif "router" in name:
            p.uniform_(-D ** -0.5, D ** -0.5, generator=generator)
        else:
            std = 0.5 * D ** -0.5
            p.normal_(0.0, std / (2 * L) ** 0.5 if name.endswith(("attn.out.weight", "w_out")) else std,
                      generator=generator)

    def forward(self, tokens, targets=None, top_k=None, doc=None, cache=None):
        """Logits, or with targets the loss and the routing statistics.

        tokens, targets  [B, T] int64; a target of -1 is not counted
        top_k            experts activated per token: one number, or one for each layer; default the config's
        doc              [B, T] document ids: attention stays inside a document; -1 is padding, which is
                         neither routed nor counted
        cache            a KVCache: tokens continue what it holds, and only the last position's logits are
                         returned (without gradient)

        -> logits [B, T, V] (fp32 or wider), or Output.
        """
        if cache is not None and targets is not None:
            raise ValueError("targets and cache do not go together: with a cache nothing is counted")
        if targets is not None and not len(tokens):               # a process without data: as one of padding,
            tokens, nothing = tokens.new_zeros(1, tokens.shape[1]), tokens.new_full((1, tokens.shape[1]), -1)
            targets = doc = nothing                               # so that it does whatever the others do
        x, sums, keep = self.features(tokens, top_k, doc, cache)
        if targets is None:
            return self.head(x)
        if keep is not None:
            targets = targets.masked_fill(doc < 0, -1)
        loss = self.head(x, targets)
        statistics = Statistics(*(torch.stack(s) for s in zip(*sums)))
        n_tokens = tokens.numel() if keep is None else len(keep)
        return Output(loss, int((targets != -1).sum()), n_tokens, statistics)

    def features(self, tokens, top_k=None, doc=None, cache=None):
        """-> what the head sees [B, T, D] (the last position alone with a cache), the statistics of each
        layer, and which of the B*T tokens are none of padding (None: all).  Arguments as in forward()."""
        B, T = tokens.shape
        if cache is not None and doc is not None:
            raise ValueError("doc and cache do not go together: a cache holds one document per row")
        past = cache.length if cache is not None else 0
        if past + T > self.config.max_seq_len:
            raise ValueError(f"{past + T} tokens are longer than max_seq_len ({self.config.max_seq_len})")
        x = self.embed(tokens)
        positions = torch.arange(past, past + T, device=tokens.device)
        cos, sin = rotary(positions, self.config.head_dim, self.rope_base, x.dtype)
        mask = attention_mask(doc, T, past, tokens.device, cache.padding if cache is not None else None)
        padded = doc is not None and bool((doc < 0).any())
        keep = (doc.flatten() >= 0).nonzero().squeeze(1) if padded else None
        sums = []
        for layer, (block, k) in enumerate(zip(self.blocks, self.config.layer_top_k(top_k))):
            x, *statistics = block(x, k, cos, sin, mask, keep, cache, layer)
            sums.append(statistics)
        if cache is not None:
            cache.length += T
            x = x[:, -1:]
        return self.norm(x), sums, keep

    def generate(self, tokens, max_new_tokens, *args, **kwargs):
        """Continue tokens [B, T] by sampling -> [B, T + new].  Arguments as in stream()."""
        return torch.cat([tokens, *(new[:, None] for new in self.stream(tokens, max_new_tokens, *args,
                                                                        **kwargs))], 1)

    @torch.no_grad()
    def stream(self, tokens, max_new_tokens, temperature=1.0, top_p=1.0, top_k=None, stop=None,
               generator=None, use_cache=True, padding=None):
        """Continue tokens [B, T] by sampling: yields the next token of every sequence [B], again and again.

        temperature 0 is greedy; top_p keeps the most probable tokens that together reach it; stop ends the
        text when every sequence has produced that token (those that have repeat it).  When the context is
        full, the older half of it is forgotten.  use_cache=False recomputes everything for each token: the
        slow reference.  padding [B]: the first tokens of each row that are none of its text, so that rows
        of different lengths end together; the context must have room for all then.
        """
        window = self.config.max_seq_len
        if padding is not None and (not use_cache or tokens.shape[1] + max_new_tokens > window):
            raise ValueError(f"padding needs the cache, and at most {window} tokens (max_seq_len) in all")
        capacity = min(window, tokens.shape[1] + max_new_tokens)
        out, start, cache = tokens, max(0, tokens.shape[1] - window), None     # the model sees out[:, start:]
        done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for _ in range(max_new_tokens):
            if out.shape[1] - start > window:
                start, cache = out.shape[1] - max(1, window // 2), None
            if not use_cache:
                logits = self(out[:, start:], top_k=top_k)[:, -1]
            else:
                if cache is None:
                    cache = KVCache(self.config, len(out), capacity, self.embed.weight.dtype, out.device,
                                    padding)
                logits = self(out[:, start + cache.length:], top_k=top_k, cache=cache)[:, -1]
            new = sample(logits, temperature, top_p, generator)
            if stop is not None:
                new = new.masked_fill(done, stop)
                done |= new == stop
            out = torch.cat([out, new[:, None]], 1)
            yield new
            if stop is not None and done.all():
                break


class Context(NamedTuple):
    """What a step sees of the text."""

    stage: int          # from 0
    seq_len: int        # tokens per sequence
    rope_base: float    # of the rotary positions
    first: int          # step of the stage


def context_at(step, seq_len, rope_base, stages):
    """Progressive context: the Context of a step, from stages [(seq_len, rope_base, steps), ..] that follow
    one another; the last one goes on.  Without stages the first two numbers hold throughout."""
    first = 0
    for stage, (seq_len, rope_base, steps) in enumerate(stages):
        if step < first + steps or stage == len(stages) - 1:
            return Context(stage, seq_len, rope_base, first)
        first += steps
    return Context(0, seq_len, rope_base, 0)


def attention_mask(doc, T, past, device, padding=None):
    """Which of past + T positions each of the last T may see: [.., T, past + T] bool, or None for plainly
    causal."""
    if doc is None and padding is None and (past == 0 or T == 1):
        return None                                               # a single new token may see everything
    causal = torch.ones(T, past + T, dtype=torch.bool, device=device).tril(past)
    if padding is not None:
        position = torch.arange(past + T, device=device)
        seen = (position >= padding[:, None, None]) | (position == position[past:, None])     # itself always
        return (causal & seen)[:, None]
    return causal if doc is None else (causal & (doc[:, :, None] == doc[:, None, :]))[:, None]


def sample(logits, temperature=1.0, top_p=1.0, generator=None):
    """One token for each row of logits [B, V] -> [B].  temperature 0 is greedy."""
    if not (0 <= temperature < float("inf") and 0 < top_p):
        raise ValueError(f"temperature must be 0 or more and top_p above 0, got {temperature} and {top_p}")
    if temperature == 0:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature           # no overflow, however cold
    prob, token = logits.softmax(-1).sort(-1, descending=True)
    prob = prob * (prob.cumsum(-1) - prob < top_p)                # the likeliest, until top_p is reached
    return token.gather(1, torch.multinomial(prob, 1, generator=generator)).squeeze(1)


# --- counting ---------------------------------------------------------------------------------------------

def count_parameters(config, top_k=None):
    """-> (total, active, active without embeddings): parameters, and those that one token makes use of.

    Counted on the meta device, which takes no memory.  top_k as in Model.forward.  The output head counts as
    an embedding, and once when tied.
    """
    with torch.device("meta"):
        model = Model(config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    total, experts = sum(sizes.values()), sum(n for name, n in sizes.items() if ".experts." in name)
    embeddings = sum(n for name, n in sizes.items() if name in ("embed.weight", "head.weight"))
    active = total - experts + experts // (config.n_layer * config.n_expert) * sum(config.layer_top_k(top_k))
    return total, active, active - embeddings


def flops_per_token(config, seq_len, top_k=None):
    """Floating-point operations of forward and backward pass for one token: 6 per active weight of a product.

    With the K of every layer as it is now, the router, the head and the causal half of attention (each query
    sees seq_len / 2 keys on average); without recomputation, padding, and the optimizer.
    """
    matrices = count_parameters(config, top_k)[2] + config.vocab_size * config.d_model
    attention = config.n_layer * config.n_head * config.head_dim * seq_len    # 2 products, half masked
    return 6 * (matrices + attention)


def state_bytes(config, ranks=1, replicate=1, bf16=True):
    """Bytes of training state on each of `ranks` processes that hold `replicate` copies of the model, each
    copy sharded over the processes that share it (however experts are divided among those).

    Per parameter: fp32 weight, gradient and two AdamW moments (16), and in one process the bf16 copy that
    computes (2)."""
    return (18 if bf16 and ranks == 1 else 16) * count_parameters(config)[0] * replicate // ranks


def passing_bytes(config, ranks, replicate=1, ep=1, bf16=True):
    """Bytes that each of several processes holds at least beside its state for a while -> (weights gathered:
    the tables, and two layers, of which one is on its way; gradients before they are sharded, which
    --accumulate keeps to the end of the step unless --no_sync false).  What is sent is copied beside it."""
    if ranks == 1:
        return 0, 0
    L, D = config.n_layer, config.d_model
    experts = 3 * L * config.n_expert * D * config.d_expert
    total = count_parameters(config)[0]
    tables = config.vocab_size * D * (1 if config.tie_embeddings else 2)
    gathered = (tables + 2 * (experts // ep + total - experts - tables) // L) * (2 if bf16 else 4)
    return gathered, 4 * (experts // ep + total - experts - total * replicate // ranks)


# --- Hugging Face names -----------------------------------------------------------------------------------

def hf_names(config):
    """Pairs (our name, names and sizes along dim 0 of the tensors that transformers' files have in its
    place)."""
    H, G, hd = config.n_head, config.n_kv_head, config.head_dim
    yield "embed.weight", {"model.embed_tokens.weight": config.vocab_size}
    for i in range(config.n_layer):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        yield ours + "attn_norm.weight", {theirs + "input_layernorm.weight": config.d_model}
        yield ours + "attn.qkv.weight", {theirs + f"self_attn.{n}_proj.weight": heads * hd
                                         for n, heads in (("q", H), ("k", G), ("v", G))}
        yield ours + "attn.out.weight", {theirs + "self_attn.o_proj.weight": config.d_model}
        yield ours + "attn.q_norm.weight", {theirs + "self_attn.q_norm.weight": hd}
        yield ours + "attn.k_norm.weight", {theirs + "self_attn.k_norm.weight": hd}
        yield ours + "moe_norm.weight", {theirs + "post_attention_layernorm.weight": config.d_model}
        yield ours + "moe.router.weight", {theirs + "mlp.gate.weight": config.n_expert}
        yield ours + "moe.experts.w_in", {theirs + f"mlp.experts.{e}.{n}_proj.weight": config.d_expert
                                          for e in range(config.n_expert) for n in ("gate", "up")}
        yield ours + "moe.experts.w_out", {theirs + f"mlp.experts.{e}.down_proj.weight": config.d_model
                                           for e in range(config.n_expert)}
    yield "norm.weight", {"model.norm.weight": config.d_model}
    if not config.tie_embeddings:
        yield "head.weight", {"lm_head.weight": config.vocab_size}


def flat(p):
    """Our tensor as the concatenation of theirs along dim 0 (a view): experts are stacked and multiply from
    the right."""
    return p.transpose(1, 2).flatten(0, 1) if p.dim() == 3 else p


def hf_config(config, top_k=None):
    """config.json of transformers' Qwen3MoeForCausalLM.  top_k as in Model.forward.

    ValueError for what that model does not have, with the way out."""
    no, found = "transformers' Qwen3-MoE has no", config.layer_top_k(top_k)
    if len(set(found)) > 1:
        raise ValueError(f"{no} layers with different numbers of experts per token ({found}); after the "
                         "switch there are none: export a later checkpoint, or train on with --init_from")
    if config.gate == "sigmoid":
        raise ValueError(f"{no} sigmoid gate; train with --gate softmax or normalized, or use eval.py on the "
                         "run itself")
    if config.token_router:
        raise ValueError(f"{no} token_router; it is a control, for eval.py routing")
    return {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "float32",
            "vocab_size": config.vocab_size, "hidden_size": config.d_model,
            "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
            "num_key_value_heads": config.n_kv_head, "head_dim": config.head_dim,
            "num_experts": config.n_expert, "num_experts_per_tok": found[0],
            "moe_intermediate_size": config.d_expert, "intermediate_size": config.d_expert,
            "norm_topk_prob": config.gate == "normalized", "decoder_sparse_step": 1, "mlp_only_layers": [],
            "hidden_act": "silu", "attention_bias": False, "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope_base, "max_position_embeddings": config.max_seq_len,
            "tie_word_embeddings": config.tie_embeddings}


def from_hf_config(saved):
    """What a config.json of a Qwen3-MoE or a dense Qwen3 says: {field of ModelConfig: value}.

    A dense one says nothing of experts but their width.  ValueError lists what is not implemented here."""
    if not isinstance(saved, dict):
        raise ValueError("it is no object")
    if "num_local_experts" in saved:                              # since transformers 5
        saved = {"num_experts": saved["num_local_experts"]} | saved
    dense, rope = saved.get("model_type") == "qwen3", saved.get("rope_parameters") or {}
    known = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False,
             "quantization_config": None, "mlp_only_layers": [], "decoder_sparse_step": 1}
    problems = [f"{name} {saved[name]}" for name, value in known.items() if saved.get(name, value) != value]
    if saved.get("model_type") not in ("qwen3", "qwen3_moe"):
        problems.append(f"model_type {saved.get('model_type')!r}")
    for kind in (rope, saved.get("rope_scaling") or {}):
        if kind.get("rope_type", kind.get("type", "default")) != "default":
            problems.append(f"rope_scaling {kind}")
    if problems:
        raise ValueError(f"only Qwen3-MoE and dense Qwen3 can be read, without {', '.join(problems)}")
    names = {"vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
             "n_kv_head": "num_key_value_heads", "head_dim": "head_dim", "d_model": "hidden_size",
             "d_expert": "intermediate_size" if dense else "moe_intermediate_size",
             "norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings",
             "max_seq_len": "max_position_embeddings"}
    if not dense:
        names |= {"n_expert": "num_experts", "top_k": "num_experts_per_tok"}
    missing = [theirs for theirs in names.values() if theirs not in saved]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    gate = "normalized" if dense or saved.get("norm_topk_prob") else "softmax"
    base = rope.get("rope_theta", saved.get("rope_theta", 10000.0))
    return {ours: saved[theirs] for ours, theirs in names.items()} | {"gate": gate, "rope_base": float(base),
                                                                     "token_router": False}


def to_hf(model):
    """-> state dict with the names of transformers' Qwen3MoeForCausalLM on disk: one tensor per expert, no
    lm_head when tied.  ValueError for selection biases, for which there is no place."""
    if any(bias.any() for bias in model.buffers()):
        raise ValueError("transformers' Qwen3-MoE has no selection biases, which --balance loss-free makes; "
                         "train on with --init_from and another --balance, which zeroes them")
    parameters, state = dict(model.named_parameters()), {}
    for name, parts in hf_names(model.config):
        pieces = flat(parameters[name].detach()).split(list(parts.values()))
        state |= {theirs: piece.clone(memory_format=torch.contiguous_format)
                  for theirs, piece in zip(parts, pieces)}
    return state


def upcycled(state, config, routers):
    """The weights of a dense Qwen3 as those of a sparse one (arXiv 2212.05055): every expert is the FFN,
    and routers [L][E, D] are the given ones.  The same tensors, not copies."""
    sparse = {f"model.layers.{i}.mlp.gate.weight": router for i, router in enumerate(routers)}
    for name, tensor in state.items():
        layer, found, rest = name.partition(".mlp.")
        sparse |= {f"{layer}.mlp.experts.{e}.{rest}": tensor
                   for e in range(config.n_expert)} if found else {name: tensor}
    return sparse


@torch.no_grad()
def from_hf(state, model, parameters=None, put=lambda name, p, whole: p.copy_(whole)):
    """Fill a model from a mapping with transformers' names, one parameter after the other -> model.

    parameters {our name: tensor} are to be filled instead of the model's own, and put(name, p, whole value)
    fills one.  ValueError lists what is missing, unknown or of another shape; nothing is changed then."""
    problems, wanted, config = [], set(), model.config
    parameters = dict(model.named_parameters()) if parameters is None else parameters
    for name, parts in hf_names(config):
        wanted |= set(parts)
        tail = tuple(parameters[name].shape[1:2])                 # experts are stacked the other way round
        for theirs, rows in parts.items():
            if theirs not in state:
                problems.append(f"{theirs} is missing")
            elif tuple(state[theirs].shape) != (rows, *tail):
                problems.append(f"{theirs} is {tuple(state[theirs].shape)}, should be {(rows, *tail)}")
    extra = set(state) - wanted - ({"lm_head.weight"} if config.tie_embeddings else set())
    problems += [f"{theirs} is unknown" for theirs in sorted(extra)]
    if problems:
        raise ValueError(f"these weights do not fit the model: {'; '.join(problems[:20])}"
                         + (f"; and {len(problems) - 20} more" if len(problems) > 20 else ""))
    for name, parts in hf_names(config):
        p, whole = parameters[name], torch.cat([state[theirs] for theirs in parts])
        if p.dim() == 3:
            whole = whole.view(p.shape[0], p.shape[2], p.shape[1]).transpose(1, 2)
        put(name, p, whole)
    for bias in model.buffers():
        bias.zero_()
    return model


def main(argv=None):
    from data import Parser, one_line_errors  # for the command line only

    parser = Parser(prog="model.py", description="Count a preset: parameters, FLOPs, bytes.")
    parser.add_argument("--preset", default="laptop", choices=PRESETS, metavar="NAME",
                        help=", ".join(PRESETS))
    parser.add_argument("--top_k", type=lambda text: [int(k) for k in text.split(",")], default=[],
                        metavar="K,K,...",
                        help="experts activated in layer 0, 1, ...; the rest activate the preset's")
    parser.add_argument("--seq_len", type=int, metavar="T",
                        help="for the FLOPs of attention (default: the longest)")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes (1)")
    parser.add_argument("--replicate", type=int, default=1, metavar="R", help="copies of the model (1)")
    parser.add_argument("--ep", type=int, default=1, metavar="P", help="processes that share out experts (1)")
    args = parser.parse_args(argv)
    with one_line_errors():
        print(describe(args.preset, args.top_k, args.seq_len, args.ranks, args.replicate, args.ep))


def describe(preset, top_k, seq_len, ranks, replicate, ep):
    """The counts of a preset as text.  ValueError for an impossible list or grid."""
    config = PRESETS[preset]
    top_k = top_k + [config.top_k] * (config.n_layer - len(top_k))
    seq_len = config.max_seq_len if seq_len is None else seq_len
    if min(seq_len, ranks, replicate, ep) < 1 or ranks % (replicate * ep) or config.n_expert % ep:
        raise ValueError(f"seq_len ({seq_len}), replicate ({replicate}) and ep ({ep}) must be at least 1, "
                         f"replicate x ep divide ranks ({ranks}, the number of GPUs), and ep n_expert "
                         f"({config.n_expert})")
    total, active, core = count_parameters(config, top_k)
    flops = flops_per_token(config, seq_len, top_k)
    shown = ", ".join(map(str, sorted(set(top_k), reverse=True)))
    where = "one GPU" if ranks == 1 else f"each of {ranks} GPUs (ep {ep}, replicate {replicate})"
    text = f"""{preset}: {config.n_layer} layers of {config.n_expert} experts, top {shown}
parameters         {total:>16,}
active per token   {active:>16,}   {core:,} without embeddings
FLOPs per token    {flops:>16.4g}   forward and backward, at {seq_len} tokens
bytes, in bfloat16, on {where}
  state            {state_bytes(config, ranks, replicate):>16,}   weights, gradients, moments
  layers' inputs   {2 * config.n_layer * config.d_model:>16,}   per token, with activation checkpointing"""
    if ranks > 1:
        gathered, kept = passing_bytes(config, ranks, replicate, ep)
        text += f"""
  gathered         {gathered:>16,}   weights while they are used, at least
  not yet sent     {kept:>16,}   gradients, at least; with --no_sync false of one layer"""
    return text


if __name__ == "__main__":
    main()
