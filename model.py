"""The model: a decoder-only transformer in which every feed-forward layer is a mixture of experts.

    tokens [B,T] -> embedding [B,T,D]
      per layer:  x + attention(norm(x))       grouped-query attention, QK-norm, rotary positions
                  x + moe(norm(x))
         moe:     router     h [N,D] -> weights [N,K], experts [N,K], load [E], statistics
                  dispatch   rows sorted by expert [R,D]
                  experts    SwiGLU on stacked weights [E,D,2F] and [E,F,D], one grouped product each -> [R,D]
                  combine    back to token order, times weights, summed over K -> [N,D]
    norm -> logits [B,T,V] -> cross-entropy SUMMED over the targets

Qwen3-MoE's architecture (the weights load into transformers) at the sizes of Sigma-MoE-Tiny (arXiv
2512.16248).  A dense model is the same with one expert.  The shape letters are in router.py.

    python model.py --preset sigma-moe-tiny --ranks 64    parameters, FLOPs per token, bytes of state per rank
"""

import argparse
import zlib
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from router import GATES, Router, Statistics


def size(help, **default):
    """A field with the line of help that train.py shows."""
    return field(**default, metadata={"help": help})


@dataclass
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
            if f.type is int and (type(value) is not int or value < 1):
                raise ValueError(f"{f.name} must be a whole number of at least 1, got {value!r}")
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
    # six minutes on two CPU cores; as in the paper, experts are half as wide as the residual stream
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

    def forward(self, x, top_k, is_text=None, with_stats=True):
        """x [B, T, D], is_text [N] (see Router) -> output [B, T, D], Statistics (None without with_stats)."""
        h = x.flatten(0, 1)
        weights, experts, rows_per_expert, statistics = self.router(h, top_k, is_text, with_stats)
        if not with_stats and experts.numel() <= len(rows_per_expert):    # generating: most experts idle
            rows = self.experts.few_rows(h, experts)
        else:
            order, inverse = sort_by_expert(experts.flatten())
            rows = h[:, None].expand(-1, top_k, -1).flatten(0, 1)         # [R, D]; its gradient sums over K
            rows = self.experts(Permute.apply(rows, order, inverse), rows_per_expert)
            rows = Permute.apply(rows, inverse, order).view(len(h), top_k, -1)              # [N, K, D]
        out = rows * weights[..., None]                           # in fp32: K rows are rounded once
        return (out.sum(1) if top_k > 1 else out).to(x.dtype).view_as(x), statistics


class Experts(nn.Module):
    """E SwiGLU networks (arXiv 2002.05202) with stacked weights, gate and up projections side by side."""

    def __init__(self, config):
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(config.n_expert, config.d_model, 2 * config.d_expert))
        self.w_out = nn.Parameter(torch.empty(config.n_expert, config.d_expert, config.d_model))

    def forward(self, rows, rows_per_expert):
        """rows [R, D] sorted by expert, rows_per_expert [E] -> [R, D] in the same order.  parallel.py
        replaces this method for expert parallelism; few_rows is for one process."""
        return self.compute(rows, rows_per_expert, self.w_in, self.w_out)

    @staticmethod
    def compute(rows, rows_per_expert, w_in, w_out):
        ends = rows_per_expert.cumsum(0).to(torch.int32)
        gate, up = grouped_product(rows, w_in, ends).chunk(2, -1)
        return grouped_product(F.silu(gate) * up, w_out, ends)

    def few_rows(self, h, experts):
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


# --- attention, block, loss -------------------------------------------------------------------------------

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
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, -1, self.head_dim).split(self.heads, dim=2)  # [B, T, heads, hd]
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        if cache is not None:
            row = torch.arange(B, device=x.device)[:, None]
            cache[0][row, pos], cache[1][row, pos] = k, v
            k, v = (k, v) if mask is None else cache
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)             # [B, heads, T, hd]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           enable_gqa=self.heads[0] != self.heads[1])
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class Block(nn.Module):
    """One layer.  Returns a plain tuple of tensors, x and the statistics: FSDP and checkpoint() need that.
    parallel.py may wrap forward(), to compile or to recompute it."""

    def __init__(self, config):
        super().__init__()
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config)
        self.moe_norm = RMSNorm(config.d_model, config.norm_eps)
        self.moe = MoE(config)

    def forward(self, x, top_k, cos, sin, mask=None, is_text=None, cache=None, pos=None):
        x = x + self.attn(self.attn_norm(x), cos, sin, mask, cache, pos)
        y, statistics = self.moe(self.moe_norm(x), top_k, is_text, with_stats=cache is None)
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
    the [N, V] logits never exist (3.3 GB for 4,096 tokens at a vocabulary of 200,064).  The gradient is
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

    chunk_loss = staticmethod(cross_entropy)

    def forward(self, x, targets=None):
        """x [B, T, D] -> logits [B, T, V], fp32 or wider; with targets [B, T] the summed cross-entropy []."""
        if targets is None:
            return super().forward(x).to(torch.promote_types(x.dtype, torch.float32))
        return ChunkedCrossEntropy.apply(x.flatten(0, 1), self.weight, targets.flatten(), self.chunk_loss,
                                         torch.is_grad_enabled())


# --- the model, generation, counts ------------------------------------------------------------------------

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

    def __init__(self, config, seed=None):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = Head(config.d_model, config.vocab_size, bias=False)
        self.tie()
        for name, p in self.named_parameters() if not self.embed.weight.is_meta else ():
            self.init_parameter(name, p, torch.initial_seed() if seed is None else seed)

    def tie(self):
        """One tensor for embedding and head, if tied; again after to_empty(), which parts them."""
        if self.config.tie_embeddings:
            self.head.weight = self.embed.weight

    @torch.no_grad()
    def init_parameter(self, name, p, seed):
        """Fill p, the whole parameter of this name, from a generator seeded by name: the same on every grid.

        norms                         1
        routers                       uniform +-1/sqrt(D), nn.Linear's default and the authors' choice
        attn.out, w_out               normal, std 0.5/sqrt(D) / sqrt(2L): the residual adds 2L of them
        everything else               normal, std 0.5/sqrt(D): 0.0128 at D = 1536 (their others: 0.0125)"""
        D, L = self.config.d_model, self.config.n_layer
        generator = torch.Generator(p.device).manual_seed((seed + zlib.crc32(name.encode())) % 2**63)
        if p.dim() == 1:
            p.fill_(1.0)
        elif "router" in name:
            p.uniform_(-D ** -0.5, D ** -0.5, generator=generator)
        else:
            residual = name.endswith(("attn.out.weight", "w_out"))
            p.normal_(0.0, 0.5 * D ** -0.5 / ((2 * L) ** 0.5 if residual else 1), generator=generator)

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
        text = torch.ones_like(tokens) if doc is None else doc >= 0
        return Output(self.head(x, targets), torch.stack([(targets != -1).sum(), text.sum()]), statistics)

    def features(self, tokens, top_k=None, doc=None, cache=None, pos=None):
        """-> what the head sees [B, T, D], Statistics of all layers [L, ..] (None with a cache)."""
        T, config, mask = tokens.shape[1], self.config, None
        if T > config.max_seq_len:
            raise ValueError(f"{T} tokens are longer than max_seq_len ({config.max_seq_len})")
        x, is_text = self.embed(tokens), None if doc is None else (doc >= 0).flatten()
        pos = torch.arange(T, device=x.device)[None] if pos is None else pos
        if doc is not None:
            mask = ((pos[:, None] <= pos[:, :, None]) & (doc[:, None] == doc[:, :, None]))[:, None]
        elif cache is not None and T == 1:                        # decoding; a prompt is causal
            mask = (torch.arange(cache[0][0].shape[1], device=x.device) <= pos)[:, None, None]
        cos, sin = rotary(pos, config.head_dim, config.rope_base, x.dtype)
        sums, caches = [], cache or [None] * len(self.blocks)
        for block, k, kv in zip(self.blocks, config.layer_top_k(top_k), caches):
            x, *statistics = block(x, k, cos, sin, mask, is_text, kv, pos)
            sums.append(statistics)
        return self.norm(x), None if cache else Statistics(*map(torch.stack, zip(*sums)))

    def decode(self, tokens, pos, cache, top_k=None):
        """tokens [B] at positions pos [B] -> logits of the next ones [B, V]; compiled, a CUDA graph."""
        return self.head(self.features(tokens[:, None], top_k, cache=cache, pos=pos[:, None])[0])[:, 0]

    def generate(self, tokens, max_new_tokens, *args, **kwargs):
        """Continue tokens [B, T] by sampling -> [B, T + new].  Arguments as in stream()."""
        new = self.stream(tokens, max_new_tokens, *args, **kwargs)
        return torch.cat([tokens, *(column[:, None] for column in new)], 1)

    @torch.no_grad()
    def stream(self, tokens, max_new_tokens, temperature=1.0, top_p=1.0, top_k=None, stop=(),
               generator=None, lengths=None, compiled=None):
        """Continue tokens [B, T] by sampling, until the context is full: yields the next tokens [B].

        stop         token ids that end a sequence, padded with the first from then on; ends when all have
        lengths      [B], of rows padded on the right
        compiled     compile the step (default: on CUDA)"""
        B, T = tokens.shape
        if not T:
            raise ValueError("a prompt needs at least one token")
        step, compiled = self.decode, tokens.is_cuda if compiled is None else compiled
        if compiled:
            step = torch.compile(step, mode="reduce-overhead", dynamic=False)
        done, ends = tokens.new_zeros(B, dtype=torch.bool), tokens.new_tensor(stop)
        last = tokens.new_full((B,), T - 1) if lengths is None else lengths - 1
        cache = self.kv_cache(B, T + max_new_tokens)
        x = self.features(tokens, top_k, cache=cache)[0]          # prefill
        logits = self.head(x[torch.arange(B, device=x.device), last][:, None])[:, 0]
        for left in reversed(range(min(max_new_tokens, self.config.max_seq_len + 1 - T))):
            new, last = sample(logits, temperature, top_p, generator), last + 1
            if stop:
                new = new.masked_fill(done, stop[0])
                done |= torch.isin(new, ends)
            yield new
            if not left or stop and done.all():
                return
            logits = step(new, last, cache, top_k)

    def kv_cache(self, batch, length):
        """Keys and values of each layer for `length` positions, rounded up: every capacity compiles anew."""
        capacity = min(self.config.max_seq_len, max(64, 1 << (length - 1).bit_length()))
        shape, like = (batch, capacity, self.config.n_kv_head, self.config.head_dim), self.embed.weight
        cache = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in self.blocks]
        for memory in sum(cache, ()) if like.is_cuda else ():
            torch._dynamo.mark_static_address(memory)             # lets a CUDA graph write to it
        return cache


def sample(logits, temperature=1.0, top_p=1.0, generator=None):
    """logits [B, V] -> a token for each row [B], among the most probable that together reach top_p."""
    if not (temperature >= 0 and top_p > 0):                      # neither is NaN
        raise ValueError(f"temperature must be 0 or more and top_p above 0, got {temperature} and {top_p}")
    if temperature == 0:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature           # no overflow, however cold
    prob, token = logits.softmax(-1).sort(-1, descending=True)
    prob = prob * (prob.cumsum(-1) - prob < top_p)
    return token.gather(1, torch.multinomial(prob, 1, generator=generator)).squeeze(1)


def count_parameters(config, top_k=None):
    """-> parameters: all, those that a token makes use of, and of these all but embedding and output head."""
    with torch.device("meta"):                                    # takes no memory
        sizes = {name: p.numel() for name, p in Model(config).named_parameters()}
    total, experts = sum(sizes.values()), sum(n for name, n in sizes.items() if ".experts." in name)
    embeddings = sum(n for name, n in sizes.items() if name in ("embed.weight", "head.weight"))
    active = total - experts + experts // (config.n_layer * config.n_expert) * sum(config.layer_top_k(top_k))
    return total, active, active - embeddings


def flops_per_token(config, seq_len, top_k=None):
    """FLOPs of forward and backward pass: 6 per active weight, the head included, and causal attention."""
    matrices = count_parameters(config, top_k)[2] + config.vocab_size * config.d_model
    attention = config.n_layer * config.n_head * config.head_dim * seq_len    # 2 products, half masked
    return 6 * (matrices + attention)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="model.py", description="Count a preset.")
    parser.add_argument("--preset", default="laptop", choices=PRESETS, help="which (laptop)")
    parser.add_argument("--seq_len", type=int, metavar="T", help="for the FLOPs of attention (the longest)")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="that share the state (1)")
    args = parser.parse_args(argv)
    config = PRESETS[args.preset]
    T, (total, active, core) = args.seq_len or config.max_seq_len, count_parameters(config)
    each = 18 if args.ranks == 1 else 16          # fp32 weight, gradient, two moments; alone a bf16 copy, too
    print(f"{total:,} parameters, {active:,} active per token, {core:,} without embeddings\n"
          f"{flops_per_token(config, T):.4g} FLOPs per token, forward and backward, at {T} tokens\n"
          f"{each * total // args.ranks:,} bytes of training state per rank, bf16, AdamW")


# --- Hugging Face names -----------------------------------------------------------------------------------

HF_SIZES = {"vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
            "n_kv_head": "num_key_value_heads", "head_dim": "head_dim", "d_model": "hidden_size",
            "n_expert": "num_experts", "d_expert": "moe_intermediate_size", "top_k": "num_experts_per_tok",
            "norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings",
            "max_seq_len": "max_position_embeddings"}
HF_FIXED = {"model_type": "qwen3_moe", "hidden_act": "silu", "attention_bias": False, "mlp_only_layers": [],
            "decoder_sparse_step": 1, "use_sliding_window": False}
HF_NAMES = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
            "head.weight": "lm_head.weight", "attn_norm.weight": "input_layernorm.weight",
            "attn.out.weight": "self_attn.o_proj.weight", "attn.q_norm.weight": "self_attn.q_norm.weight",
            "attn.k_norm.weight": "self_attn.k_norm.weight",
            "moe_norm.weight": "post_attention_layernorm.weight", "moe.router.weight": "mlp.gate.weight"}


def hf_config(config, top_k=None):
    """config.json of transformers' Qwen3MoeForCausalLM.  ValueError for what that model does not have."""
    top_k = config.layer_top_k(top_k)
    if len(set(top_k)) > 1 or config.gate not in ("softmax", "normalized"):
        raise ValueError("Qwen3-MoE has a softmax or normalized gate and one top_k for all layers, not "
                         f"{config.gate} and {top_k}")
    return {theirs: getattr(config, ours) for ours, theirs in HF_SIZES.items()} | HF_FIXED | {
        "architectures": ["Qwen3MoeForCausalLM"], "dtype": "float32", "num_experts_per_tok": top_k[0],
        "norm_topk_prob": config.gate == "normalized", "rope_theta": config.rope_base}


def from_hf_config(saved):
    """config.json of a Qwen3-MoE -> {field of ModelConfig: value}.  ValueError lists what we do not have."""
    saved = {"num_experts": saved.get("num_local_experts")} | saved       # its name since transformers 5
    rope = saved.get("rope_parameters") or saved.get("rope_scaling") or {}
    plain = HF_FIXED | {"quantization_config": None}
    wrong = [f"{name} {saved[name]!r}" for name, value in plain.items() if saved.get(name, value) != value]
    if wrong or rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"only a plain Qwen3-MoE can be read, not one with {', '.join(wrong) or rope}")
    return {ours: saved.get(theirs) for ours, theirs in HF_SIZES.items()} | {
        "gate": "normalized" if saved.get("norm_topk_prob") else "softmax",
        "rope_base": float(rope.get("rope_theta", saved.get("rope_theta", 10000.0)))}


def hf_views(config, name, p):
    """Our parameter p of this name -> {name in transformers' files: view of p with that tensor's layout}.
    Their experts are separate tensors that multiply from the left: transposed slices of ours."""
    prefix = ""
    if name.startswith("blocks."):
        _, layer, name = name.split(".", 2)
        prefix = f"model.layers.{layer}."
    if name == "attn.qkv.weight":
        heads = p.split([n * config.head_dim for n in (config.n_head, config.n_kv_head, config.n_kv_head)])
        return {f"{prefix}self_attn.{n}_proj.weight": view for n, view in zip("qkv", heads)}
    if ".experts." in name:
        parts = ("gate", "up") if name.endswith("w_in") else ("down",)
        return {f"{prefix}mlp.experts.{e}.{n}_proj.weight": view for e, expert in enumerate(p.mT)
                for n, view in zip(parts, expert.chunk(len(parts)))}
    if name not in HF_NAMES:
        raise ValueError(f"Qwen3-MoE has no place for the parameter {name}")
    return {prefix + HF_NAMES[name]: p}


def to_hf(model):
    """-> state dict with the names of transformers' Qwen3MoeForCausalLM on disk: one tensor per expert, no
    lm_head when tied.  ValueError for selection biases, for which there is no place."""
    if any(bias.any() for bias in model.buffers()):
        raise ValueError("Qwen3-MoE has no selection biases; --init_from with another --balance zeroes them")
    return {theirs: view.clone(memory_format=torch.contiguous_format)
            for name, p in model.named_parameters()
            for theirs, view in hf_views(model.config, name, p.detach()).items()}


@torch.no_grad()
def from_hf(state, model, put=lambda name, p, whole: p.copy_(whole)):
    """Fill a model from a mapping with transformers' names -> model; put(name, p, whole) fills a parameter.
    ValueError, before anything is changed, lists what is missing, unknown or of another shape."""
    wanted = {theirs: tuple(view.shape) for name, p in model.named_parameters()
              for theirs, view in hf_views(model.config, name, torch.empty(p.shape, device="meta")).items()}
    given = {theirs: tuple(tensor.shape) for theirs, tensor in state.items()
             if theirs != "lm_head.weight" or not model.config.tie_embeddings}
    if given != wanted:
        missing, unknown = (sorted(a.items() - b.items())[:9] for a, b in ((wanted, given), (given, wanted)))
        raise ValueError(f"these weights do not fit the model, which needs {missing}, not {unknown}")
    if len(given) < len(state) and not state["lm_head.weight"].equal(state["model.embed_tokens.weight"]):
        raise ValueError("lm_head.weight is not the embedding, though the configuration ties them")
    for name, p in model.named_parameters():
        whole = torch.empty(p.shape)
        for theirs, view in hf_views(model.config, name, whole).items():
            view.copy_(state[theirs])
        put(name, p, whole)
    return model


if __name__ == "__main__":
    main()
