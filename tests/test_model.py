"""The model against slow references and against transformers."""

import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import small
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import model as M
from model import (
    PRESETS,
    ChunkedCrossEntropy,
    Experts,
    KVCache,
    Model,
    count_parameters,
    flops_per_token,
    from_hf,
    grouped_product,
    looped_product,
    sample,
    to_hf,
)
from parallel import Masters
from router import GATES, differentiate_at, load_balancing_loss


def randomised(config, seed=1):
    """A model whose norms matter."""
    model = Model(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.normal_(1.0, 0.2, generator=generator)
    return model


# --- parts ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("load", [[3, 0, 5, 1], [0, 0, 9, 0], [0, 0, 0, 0]])
def test_grouped_product_equals_the_loop(load):
    """Forward and backward, with empty experts, and with no row at all."""
    results = []
    for product in (grouped_product, looped_product):
        torch.manual_seed(0)
        rows = torch.randn(sum(load), 8, requires_grad=True)
        weights = torch.randn(4, 8, 12, requires_grad=True)
        out = product(rows, weights, torch.tensor(load).cumsum(0).int())
        (out * torch.randn(out.shape)).sum().backward()
        results.append((out, rows.grad, weights.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert (results[0][2][torch.tensor(load) == 0] == 0).all()


@pytest.mark.parametrize("dtype, d_in, grouped", [(torch.float32, 8, True), (torch.bfloat16, 8, True),
                                                  (torch.float64, 8, False), (torch.float32, 6, False)])
def test_what_grouped_mm_refuses_goes_to_the_loop(monkeypatch, dtype, d_in, grouped):
    calls = []
    real = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    rows, weights = torch.randn(5, d_in).to(dtype), torch.randn(2, d_in, 8).to(dtype)
    out = grouped_product(rows, weights, torch.tensor([2, 5], dtype=torch.int32))
    assert out.dtype == dtype and bool(calls) == grouped
    torch.testing.assert_close(out[:2], rows[:2] @ weights[0])


@pytest.mark.parametrize("rows, looped", [(5, True), (6, False)])
def test_few_rows_visit_their_experts_alone(monkeypatch, rows, looped):
    """Without gradients and with fewer rows than experts: the same result, without grouped_mm."""
    calls, weights = [], torch.randn(6, 8, 8)
    real, x = F.grouped_mm, torch.randn(rows, 8)
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    ends = torch.tensor([0, 0, 3, 3, rows, rows], dtype=torch.int32)
    want = grouped_product(x.requires_grad_(), weights, ends)
    assert calls == [1]
    with torch.no_grad():
        torch.testing.assert_close(grouped_product(x, weights, ends), want)
    assert calls == [1] * (1 if looped else 2)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("K", [1, 3])
def test_moe_equals_one_token_at_a_time(gate, K):
    """Output and every gradient, in fp64: routing, sorting, experts, and the way back."""
    moe = randomised(small(gate=gate)).double().blocks[0].moe
    moe.router.weight.data *= 5
    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 9, 16, dtype=torch.float64)
    out, statistics = moe(x, K)
    got = torch.autograd.grad((out * upstream).sum(), [x, *moe.parameters()])
    rows = []
    for token in x.view(-1, 16):
        routing = moe.router(token[None], K)
        y = 0
        for weight, e in zip(routing.weights[0], routing.experts[0]):
            gate_, up = (token @ moe.experts.w_in[e]).chunk(2)
            y = y + weight * ((F.silu(gate_) * up) @ moe.experts.w_out[e])
        rows.append(y)
    slow = torch.stack(rows).view_as(x)
    want = torch.autograd.grad((slow * upstream).sum(), [x, *moe.parameters()])
    torch.testing.assert_close(out, slow, rtol=1e-12, atol=1e-12)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert statistics.load.sum() == 18 * K


@pytest.mark.parametrize("K", [1, 3])
def test_filled_up_groups_change_nothing(monkeypatch, K):
    """Rows that fill up a group to a multiple have no output and no gradient, whatever is in them."""
    moe = randomised(small()).double().blocks[0].moe
    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    upstream, real, seen = torch.randn_like(x), M.sort_by_expert, []

    def run(multiple):
        def sort(experts, load, _):
            source, place, sizes = real(experts, load, multiple)
            seen.append((sizes.tolist(), load.tolist(), len(source)))
            return source, place, sizes
        monkeypatch.setattr(M, "sort_by_expert", sort)
        out = moe(x, K)[0]
        return out, *torch.autograd.grad(out, [x, *moe.parameters()], upstream)
    for a, b in zip(run(5), run(1)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    (sizes, load, rows), (exact, _, fewer) = seen
    assert sizes == [-(-n // 5) * 5 for n in load] and exact == load and rows == sum(sizes) > fewer == 18 * K


def test_sums_of_several_rows_round_once():
    """In bf16 the output of K = 8 experts, and the gradient of what they share, have one rounding's error."""
    rows, weights = torch.randn(800, 64).bfloat16(), torch.rand(100, 8).bfloat16()
    place = torch.randperm(800).view(100, 8)
    out = M.Combine.apply(rows, place, weights)
    want = (rows.double()[place] * weights.double()[:, :, None]).bfloat16().double().sum(1)
    assert (out.double() - want).norm() / want.norm() < 0.0025
    h = torch.zeros(100, 64, dtype=torch.bfloat16, requires_grad=True)
    source = torch.empty(800, dtype=torch.int64).scatter_(0, place.flatten(), torch.arange(800) // 8)
    M.Dispatch.apply(h, source, place).backward(rows)
    want = rows.double()[place].sum(1)
    assert (h.grad.double() - want).norm() / want.norm() < 0.0025


@pytest.mark.parametrize("dtype, multiple", [(torch.bfloat16, 16), (torch.float32, 1)])
def test_groups_are_filled_up_in_bf16(monkeypatch, dtype, multiple):
    model, seen = Model(small(d_expert=16)), []
    Masters(model, dtype)
    real = model.blocks[0].moe.experts.forward
    monkeypatch.setattr(model.blocks[0].moe.experts, "forward",
                        lambda rows, load: seen.append((len(rows), load)) or real(rows, load))
    model(torch.randint(0, 64, (2, 30)))
    rows, load = seen[0]
    assert rows == load.sum() and (load % multiple == 0).all() and (rows == 60) == (multiple == 1)
    with torch.no_grad():                                         # a generated token: one row, and it alone
        model(torch.randint(0, 64, (1, 1)))
    assert seen[1][0] == 1


@pytest.mark.parametrize("chunk", [128, 1000])
def test_chunked_cross_entropy_equals_torch(monkeypatch, chunk):
    monkeypatch.setattr(ChunkedCrossEntropy, "ROWS", chunk)   # of 300: the last chunk is shorter
    x = torch.randn(300, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(-1, 11, (300,))
    want = F.cross_entropy(x @ w.T, targets, ignore_index=-1, reduction="sum")
    got = ChunkedCrossEntropy.apply(x, w, targets, True)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(got * 0.3, [x, w]), torch.autograd.grad(want * 0.3, [x, w])):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_chunks_add_up_in_fp32(monkeypatch):
    """The head's gradient is a sum over chunks: in bf16 it would lose the small ones."""
    x, w, targets = torch.randn(128 * 60, 8), torch.randn(5, 8), torch.randint(0, 5, (128 * 60,))
    monkeypatch.setattr(ChunkedCrossEntropy, "ROWS", 128)
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        a, b = x.bfloat16().to(dtype).requires_grad_(), w.bfloat16().to(dtype).requires_grad_()
        ChunkedCrossEntropy.apply(a, b, targets, True).backward()
        grads.append(b.grad.double())
    assert (grads[0] - grads[1]).norm() / grads[1].norm() < 0.005


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for t in out if isinstance(out, (tuple, list)) else [out]:
            self.numel = max(self.numel, t.numel() if torch.is_tensor(t) else 0)
        return out


def test_logits_of_all_tokens_never_exist_in_training():
    """Forward and backward, the largest tensor is that of 256 tokens, of 1,024."""
    model, tokens = Model(small(vocab_size=4096)), torch.randint(0, 4096, (64, 16))
    with Largest() as largest:
        model(tokens, tokens).loss.backward()
    assert largest.numel == 256 * 4096


def test_cross_entropy_of_bf16_logits_is_computed_in_fp32():
    x, w = torch.randn(500, 8).bfloat16(), torch.randn(70, 8).bfloat16()
    targets = torch.randint(0, 70, (500,))
    want = F.cross_entropy((x @ w.T).float(), targets, reduction="sum")
    got = ChunkedCrossEntropy.apply(x, w, targets, False)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_attention_equals_its_definition():
    """Grouped queries, normalised queries and keys, rotary positions, causality: written out with loops."""
    config = small()
    attention = randomised(config).double().blocks[0].attn
    x = torch.randn(1, 7, 16, dtype=torch.float64)
    cos, sin = M.rotary(torch.arange(7), 8, config.rope_base, torch.float64)
    qkv = (x[0] @ attention.qkv.weight.T).view(7, 8, 8)           # 4 query, 2 key, 2 value heads of 8

    def turn(v, norm, t):
        v = v / (v.square().mean() + 1e-6).sqrt() * norm.weight
        out = v.clone()
        for i in range(4):
            angle = t * config.rope_base ** (-i / 4)
            out[i] = v[i] * math.cos(angle) - v[i + 4] * math.sin(angle)
            out[i + 4] = v[i + 4] * math.cos(angle) + v[i] * math.sin(angle)
        return out
    want = torch.zeros(7, 4, 8, dtype=torch.float64)
    for t in range(7):
        for h in range(4):
            q = turn(qkv[t, h], attention.q_norm, t)
            keys = [turn(qkv[s, 4 + h // 2], attention.k_norm, s) for s in range(t + 1)]
            score = torch.stack([q @ k for k in keys]) / 8 ** 0.5
            want[t, h] = score.softmax(0) @ qkv[:t + 1, 6 + h // 2]
    want = want.view(7, 32) @ attention.out.weight.T
    torch.testing.assert_close(attention(x, cos, sin)[0], want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("T, heads", [(1, (4, 2)), (64, (2, 2)), (65, (4, 1)), (150, (6, 2))])
def test_chunked_attention_equals_torch(T, heads):
    """Output and gradients; the last chunk is shorter; queries that share keys are one product."""
    q, k, v = (torch.randn(2, n, T, 8, dtype=torch.float64, requires_grad=True) for n in (*heads, heads[1]))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    same_with_gradients(M.chunked_attention(q, k, v), want, [q, k, v])


def same_with_gradients(got, want, inputs):
    upstream = torch.randn_like(want)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    slow = torch.autograd.grad(want, inputs, upstream)
    for a, b in zip(torch.autograd.grad(got, inputs, upstream), slow):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("T, chunked", [(1, False), (2, True), (1024, True), (1025, False)])
def test_which_attention_runs(monkeypatch, T, chunked):
    """Plain products where they are faster and small; a mask and long sequences are torch's."""
    attention, calls = Model(small(n_head=1, n_kv_head=1)).blocks[0].attn, []
    real = M.chunked_attention
    monkeypatch.setattr(M, "chunked_attention", lambda *args: calls.append(1) or real(*args))
    x, angles = torch.randn(1, T, 16), M.rotary(torch.arange(T), 8, 1e4, torch.float32)
    y = attention(x, *angles)
    assert bool(calls) == chunked
    calls.clear()
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    torch.testing.assert_close(attention(x, *angles, mask), y, rtol=1e-4, atol=1e-5)
    assert not calls


def test_fast_norm_equals_torch():
    x = (torch.randn(3, 5, 16, dtype=torch.float64) * 3).requires_grad_()
    weight = torch.randn(16, dtype=torch.float64, requires_grad=True)
    want = F.rms_norm(x, (16,), weight, 0.1)
    same_with_gradients(M.RootMeanSquare.apply(x, weight, 0.1), want, [x, weight])


def test_fast_rotation_and_swiglu_equal_their_definitions():
    x = torch.randn(2, 7, 3, 8, dtype=torch.float64, requires_grad=True)
    angles = M.rotary(torch.arange(7), 8, 100.0, torch.float64)
    same_with_gradients(M.Rotate.apply(x, *angles), M.rotate(x, *angles), [x])
    (a, b), angle = x.chunk(2, -1), torch.arange(7)[:, None, None] * 100.0 ** (-torch.arange(4) / 4).double()
    turned = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
    torch.testing.assert_close(M.rotate(x, *angles), turned, rtol=1e-12, atol=1e-12)
    gate, up = x.chunk(2, -1)
    same_with_gradients(M.SwiGLU.apply(x), F.silu(gate) * up, [x])


def test_norms_and_angles_do_not_round_to_bf16():
    norm = M.RMSNorm(64, 1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(50, 64).bfloat16()
    assert torch.equal(norm(x), F.rms_norm(x.float(), (64,), norm.weight, 1e-6).bfloat16())
    cos, _ = M.rotary(torch.arange(1001), 8, 10000.0, torch.bfloat16)        # 1001 is no bf16 number
    want = torch.tensor([math.cos(1000 * 10000 ** (-i / 4)) for i in range(4)])
    torch.testing.assert_close(cos[1000, 0, :4].float(), want, rtol=0, atol=4e-3)


# --- the whole model --------------------------------------------------------------------------------------

def test_the_future_is_not_seen():
    model = Model(small()).double()
    tokens = torch.randint(0, 64, (2, 12))
    changed = tokens.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 64
    a, b = model(tokens), model(changed)
    torch.testing.assert_close(a[:, :8], b[:, :8], rtol=1e-12, atol=1e-12)
    assert (a[:, 8:] - b[:, 8:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("K", [1, 2])
def test_packed_documents_equal_one_by_one(tied, K):
    """Loss, statistics and every gradient; padding is neither routed nor counted."""
    documents = [torch.randint(0, 64, (n + 1,)) for n in (5, 9, 3)]
    packed = torch.cat([d[:-1] for d in documents] + [torch.zeros(4, dtype=torch.int64)])[None]
    targets = torch.cat([d[1:] for d in documents] + [torch.full((4,), 7)])[None]
    doc = torch.tensor([[0] * 5 + [1] * 9 + [2] * 3 + [-1] * 4])
    config = small(top_k=K, tie_embeddings=tied)
    together, apart = randomised(config).double(), randomised(config).double()
    one = together(packed, targets, doc=doc)
    many = [apart(d[None, :-1], d[None, 1:]) for d in documents]
    assert one.n_tokens == one.n_targets == 17 == sum(o.n_tokens for o in many)
    assert torch.equal(one.load, sum(o.load for o in many)) and (one.load.sum(-1) == 17 * K).all()
    sums = map(sum, zip(*((o.loss, *o.statistics) for o in many)))
    for got, want in zip((one.loss, *one.statistics), sums):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    one.loss.backward()
    sum(o.loss for o in many).backward()
    for (name, a), b in zip(together.named_parameters(), apart.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12, msg=name)


def test_recomputation_counts_once():
    """Under activation checkpointing a block runs twice; loads, losses and gradients are those of once."""
    once, twice = randomised(small()).double(), randomised(small()).double()
    tokens = torch.randint(0, 64, (3, 10))
    calls = []
    for block in twice.blocks:
        block.moe.router.register_forward_hook(lambda *_: calls.append(1))
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    for model in (once, twice):
        out = model(tokens, tokens)
        assert out.load.sum(-1).tolist() == [30, 30]
        (out.loss + differentiate_at(lambda p, load=out.load: load_balancing_loss(load, p, 30),
                                     [out.prob_sum], [out.prob_sum])[1]).backward()
    assert len(calls) == 4                                        # it did run twice
    for (name, a), b in zip(once.named_parameters(), twice.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("control", [False, True])
def test_the_control_routes_on_the_token_alone(control):
    """In layer 0 every occurrence of a token goes to the same expert, and only there."""
    model = randomised(small(token_router=control), 3)
    for block in model.blocks:
        block.attn.out.weight.data *= 20                          # so that context matters
        block.moe.router.weight.data *= 5
    tokens, chosen = torch.randint(0, 5, (8, 30)), []
    for block in model.blocks:
        block.moe.router.register_forward_hook(lambda m, a, out: chosen.append(out.experts[:, 0]))
    model(tokens)
    experts_of_a_token = [max(len(set(experts[tokens.flatten() == t].tolist())) for t in range(5))
                          for experts in chosen]
    assert (experts_of_a_token[0] == 1) == control and experts_of_a_token[1] > 1
    assert [block.token_router for block in model.blocks] == [control, False]


def test_targets_of_minus_one_are_not_counted():
    model = Model(small()).double()
    tokens = torch.randint(0, 64, (2, 10))
    targets = torch.randint(0, 64, (2, 10))
    targets[:, ::2] = -1
    out = model(tokens, targets)
    want = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
    assert out.n_targets == 10 and out.n_tokens == 20
    torch.testing.assert_close(out.loss, want)


def test_each_layer_can_have_its_own_top_k():
    model = Model(small())
    tokens = torch.randint(0, 64, (2, 10))
    assert model(tokens, tokens, top_k=[4, 1]).load.sum(-1).tolist() == [80, 20]
    for wrong in ([1], [1, 7], [0, 1], 7):
        with pytest.raises(ValueError, match="top_k"):
            model(tokens, top_k=wrong)


@pytest.mark.parametrize("config", [PRESETS["laptop"], small(), small(tie_embeddings=True),
                                    small(gate="normalized"), small(n_expert=1)],
                         ids=["laptop", "untied", "tied", "normalized", "dense"])
def test_loss_at_init_is_that_of_a_uniform_guess(config):
    tokens = torch.randint(0, config.vocab_size, (4, 65))
    with torch.no_grad():
        out = Model(config)(tokens[:, :-1], tokens[:, 1:]) if config.max_seq_len >= 64 else None
    assert out.loss.item() / out.n_targets == pytest.approx(math.log(config.vocab_size), rel=0.05)


@pytest.mark.parametrize("gate", GATES)
def test_one_batch_can_be_overfitted(gate):
    model = Model(small(gate=gate, d_model=32, d_expert=32, tie_embeddings=True))
    tokens = torch.randint(0, 64, (4, 17))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for _ in range(150):
        out = model(tokens[:, :-1], tokens[:, 1:])
        (out.loss / out.n_targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert out.loss.item() / out.n_targets < 0.1


def test_init_is_drawn_by_name_and_seed():
    a, b, other = Model(small(), seed=5), Model(small(n_layer=3), seed=5), Model(small(), seed=6)
    assert torch.equal(a.blocks[1].moe.experts.w_in, b.blocks[1].moe.experts.w_in)  # w_out depends on n_layer
    assert not torch.equal(a.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)
    assert not torch.equal(a.blocks[0].attn.qkv.weight, a.blocks[1].attn.qkv.weight)
    big = Model(PRESETS["laptop"], seed=0)
    D, L = big.config.d_model, big.config.n_layer
    for p, std in ((big.embed.weight, 0.5 / D ** 0.5),
                   (big.blocks[0].moe.experts.w_out, 0.5 / D ** 0.5 / (2 * L) ** 0.5),
                   (big.blocks[0].moe.router.weight, (1 / 3 / D) ** 0.5)):
        assert p.std().item() == pytest.approx(std, rel=0.05)


BF16_MODULES = {
    "embed": lambda model, x, tokens, angles: model.embed(tokens),
    "norm": lambda model, x, tokens, angles: model.norm(x),
    "attention": lambda model, x, tokens, angles: model.blocks[0].attn(x, *angles),
    "moe": lambda model, x, tokens, angles: model.blocks[0].moe(x, 2)[0],
    "block": lambda model, x, tokens, angles: model.blocks[0](x, 1, *angles)[0],
    "head": lambda model, x, tokens, angles: ChunkedCrossEntropy.apply(
        x.flatten(0, 1), model.head.weight, tokens.flatten(), True),
    "model": lambda model, x, tokens, angles: model(tokens, tokens).loss}


@pytest.mark.parametrize("module", BF16_MODULES)
def test_bf16_equals_fp32_module_by_module(module):
    """The same weights and the same input: outputs and gradients point the same way."""
    config = small(n_expert=4, d_model=64, d_expert=64, vocab_size=256)
    x, tokens, found = torch.randn(2, 40, 64).bfloat16(), torch.randint(0, 256, (2, 40)), []
    for dtype in torch.float32, torch.bfloat16:
        model = randomised(config)
        for p in model.parameters():
            p.data = p.data.bfloat16().float()                    # what both can hold
        masters, given = Masters(model, dtype), x.to(dtype).requires_grad_()
        assert model.head.weight.dtype == dtype
        angles = [angle.to(dtype) for angle in M.rotary(torch.arange(40), 8, 1e4, torch.float32)]
        y = BF16_MODULES[module](model, given, tokens, angles)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
        found.append({"output": y.detach(), "input": given.grad}
                     | {name: p.grad for name, p in masters.named.items()})
    there = [name for name, value in found[0].items() if value is not None and value.any()]
    assert len(there) > 1
    for name in there:
        a, b = (values[name].flatten().double() for values in found)
        assert F.cosine_similarity(a, b, dim=0) > 0.999, name


# --- generation -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prompt, new", [(1, 30), (10, 40), (64, 5), (70, 90)])
def test_greedy_text_with_cache_equals_without(prompt, new):
    """Also across the end of the context (64), where the older half is forgotten."""
    model = randomised(small()).double()
    tokens = torch.randint(0, 64, (3, prompt))
    a = model.generate(tokens, new, temperature=0)
    assert a.shape == (3, prompt + new) and torch.equal(a[:, :prompt], tokens)
    assert torch.equal(a, model.generate(tokens, new, temperature=0, use_cache=False))


def test_rows_of_different_lengths_are_generated_together():
    """Padding in front changes nothing: each row is what it is alone."""
    model = randomised(small()).double()
    prompts = [torch.randint(0, 64, (n,)) for n in (3, 17, 9, 1)]
    padding = torch.tensor([17 - len(p) for p in prompts])
    tokens = torch.stack([torch.cat([torch.full((int(n),), 5), p]) for n, p in zip(padding, prompts)])
    together = model.generate(tokens, 40, temperature=0, padding=padding)
    for row, prompt in zip(together, prompts):
        assert torch.equal(row[17 - len(prompt):], model.generate(prompt[None], 40, temperature=0)[0])
    with pytest.raises(ValueError, match="max_seq_len"):
        model.generate(tokens, 60, padding=padding)


def watch_lengths(model, seen, monkeypatch):
    """Note how many tokens each forward pass is given."""
    real = model.embed.forward
    monkeypatch.setattr(model.embed, "forward", lambda tokens: seen.append(tokens.shape[1]) or real(tokens))


def test_a_cached_token_costs_one_token(monkeypatch):
    """With the cache every pass after the first one sees a single token, so its cost does not grow by
    recomputation."""
    model, seen = Model(small()), []
    watch_lengths(model, seen, monkeypatch)
    model.generate(torch.zeros(1, 5, dtype=torch.int64), 20)
    assert seen == [5] + [1] * 19


def test_generation_counts_nothing(monkeypatch):
    """The sums for losses and logs are left out where nobody reads them."""
    model, calls = Model(small()), []
    real = type(model.blocks[0].moe.router).statistics
    monkeypatch.setattr(type(model.blocks[0].moe.router), "statistics",
                        lambda *args: calls.append(1) or real(*args))
    model.generate(torch.zeros(1, 5, dtype=torch.int64), 3)
    assert not calls
    model(torch.zeros(1, 5, dtype=torch.int64), torch.zeros(1, 5, dtype=torch.int64))
    assert len(calls) == 2


def test_a_full_context_keeps_its_newer_half(monkeypatch):
    model, seen = Model(small(max_seq_len=10)), []
    watch_lengths(model, seen, monkeypatch)
    model.generate(torch.zeros(1, 8, dtype=torch.int64), 10, use_cache=False)
    assert seen == [8, 9, 10, 5, 6, 7, 8, 9, 10, 5]


@torch.no_grad()
def test_cache_accepts_several_tokens_at_once():
    model = randomised(small()).double()
    tokens = torch.randint(0, 64, (2, 20))
    cache = KVCache(model.config, 2, 20, torch.float64, "cpu")
    model(tokens[:, :7], cache=cache)
    got = model(tokens[:, 7:], cache=cache)
    assert got.shape == (2, 1, 64) and cache.length == 20
    torch.testing.assert_close(got[:, -1], model(tokens)[:, -1], rtol=1e-10, atol=1e-10)


def test_top_p_keeps_the_most_probable_tokens_that_reach_it():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(2000, 4)
    counts = torch.bincount(sample(logits, top_p=0.7), minlength=4)
    assert counts[2] == counts[3] == 0 and counts[0] / 2000 == pytest.approx(0.5 / 0.8, abs=0.05)
    assert torch.bincount(sample(logits, top_p=1.0), minlength=4)[3] > 0
    assert (sample(logits, temperature=0) == 0).all() and (sample(logits, top_p=1e-9) == 0).all()
    hot = torch.bincount(sample(logits, temperature=5.0), minlength=4)
    assert hot[3] > 2 * torch.bincount(sample(logits), minlength=4)[3]


def test_generation_stops_and_repeats_with_its_seed():
    model = Model(small())
    tokens = torch.randint(0, 64, (2, 3))
    a, b = (model.generate(tokens, 20, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(a, b)
    stop = int(a[0, 5])
    out = model.generate(tokens, 20, stop=stop, generator=torch.Generator().manual_seed(4))
    assert (out[0, 5:] == stop).all() and torch.equal(out[0, :6], a[0, :6])
    alone = model.generate(tokens[:1], 20, temperature=0)
    assert model.generate(tokens[:1], 20, temperature=0, stop=int(alone[0, 5])).shape[1] <= 6     # ends early


# --- counting ---------------------------------------------------------------------------------------------

def test_parameters_of_sigma_moe_tiny():
    """The published 20B and 0.5B, and 0.65B before the switch."""
    config = PRESETS["sigma-moe-tiny"]
    total, _, core = count_parameters(config)
    assert round(total / 1e9, 2) == 19.98 and round(core / 1e9, 3) == 0.537
    before = count_parameters(config, [8, 8, 6, 6, 4, 4, 2, 2] + [1] * 48)[2]
    assert round(before / 1e9, 3) == 0.650


def test_gpu_preset_fits_24_GB():
    total, active, _ = count_parameters(PRESETS["gpu"])
    assert total > 1e9 and active == pytest.approx(100e6, rel=0.1) and M.state_bytes(PRESETS["gpu"]) < 20e9


@pytest.mark.parametrize("tied", [True, False])
def test_counts_are_those_of_a_real_model(tied):
    config = small(tie_embeddings=tied, top_k=2)
    model = Model(config)
    total, active, core = count_parameters(config)
    assert total == sum(p.numel() for p in model.parameters())
    expert = 3 * 16 * 12
    assert active == total - 2 * (6 - 2) * expert and core == active - 64 * 16 * (1 if tied else 2)
    assert count_parameters(config, [3, 1])[1] == active
    # 6 per weight of a product: attention, router, experts, head; norms multiply no matrix
    matrices = 2 * (16 * 64 + 32 * 16 + 16 * 6 + 2 * expert) + 64 * 16
    assert flops_per_token(config, 40) == pytest.approx(6 * (matrices + 2 * 4 * 8 * 40), rel=0.02)


# --- transformers -----------------------------------------------------------------------------------------

def hf_folder(model, path):
    """A folder as transformers reads it: config.json and one safetensors file with our exported names."""
    safetensors = pytest.importorskip("safetensors.torch", reason="needs the extra hf")
    c = model.config
    (path / "config.json").write_text(json.dumps(dict(
        architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", vocab_size=c.vocab_size,
        hidden_size=c.d_model, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head, head_dim=c.head_dim, num_experts=c.n_expert,
        num_experts_per_tok=c.top_k, moe_intermediate_size=c.d_expert, intermediate_size=c.d_expert,
        norm_topk_prob=c.gate == "normalized", decoder_sparse_step=1, mlp_only_layers=[],
        rms_norm_eps=c.norm_eps, rope_theta=c.rope_base, max_position_embeddings=c.max_seq_len,
        tie_word_embeddings=c.tie_embeddings)))
    safetensors.save_file(to_hf(model), path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("gate", ["softmax", "normalized"])
@pytest.mark.parametrize("K", [1, 8])
def test_logits_equal_transformers(tmp_path, K, gate, tied):
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    model = randomised(small(n_expert=16, top_k=K, gate=gate, tie_embeddings=tied))
    for block in model.blocks:
        block.moe.router.weight.data *= 3
    theirs = transformers.Qwen3MoeForCausalLM.from_pretrained(hf_folder(model, tmp_path), dtype=torch.float32)
    tokens = torch.randint(0, 64, (3, 50))
    with torch.no_grad():
        want, got = theirs(tokens).logits, model(tokens)
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_hf_names_round_trip(tied):
    a, b = randomised(small(tie_embeddings=tied), 1), Model(small(tie_embeddings=tied), seed=2)
    state = to_hf(a)
    assert ("lm_head.weight" in state) != tied
    assert state["model.layers.1.mlp.experts.3.gate_proj.weight"].shape == (12, 16)
    torch.testing.assert_close(state["model.layers.1.mlp.experts.3.up_proj.weight"],
                               a.blocks[1].moe.experts.w_in[3, :, 12:].T)
    from_hf(state, b)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    if tied:
        from_hf(state | {"lm_head.weight": state["model.embed_tokens.weight"]}, b)       # some files have it
    for tensor in state.values():                                 # a copy: the model does not change with it
        tensor.zero_()
    assert all(torch.equal(p, q) and p.any() for p, q in zip(a.parameters(), b.parameters()))
    b.blocks[1].moe.router.bias[2] = 0.1                          # the file format has no place for it
    with pytest.raises(ValueError, match="selection biases"):
        to_hf(b)
    from_hf(to_hf(a), b)
    assert not any(bias.any() for bias in b.buffers())
    if not tied:
        assert not torch.equal(b.head.weight, b.embed.weight)


def test_from_hf_lists_everything_that_does_not_fit():
    model = Model(small())
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = to_hf(Model(small(), seed=9))
    del state["model.norm.weight"]
    state["model.layers.0.mlp.gate.weight"] = torch.zeros(5, 16)
    state["nonsense"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        from_hf(state, model)
    for part in ("model.norm.weight is missing", "mlp.gate.weight is (5, 16), should be (6, 16)",
                 "nonsense is unknown"):
        assert part in str(error.value)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_experts_are_a_seam():
    """Expert parallelism replaces Experts.forward; everything goes through it, rows sorted by expert."""
    model, seen = Model(small(top_k=2)), []
    real = Experts.forward

    def spy(rows, load, experts=model.blocks[0].moe.experts):
        seen.append((rows.shape, load.clone()))
        return real(experts, rows, load)
    model.blocks[0].moe.experts.forward = spy
    tokens = torch.randint(0, 64, (2, 10))
    out = model(tokens, tokens)
    assert seen[0][0] == (40, 16) and torch.equal(seen[0][1], out.load[0])


def test_model_program_prints_the_counts(capsys):
    M.main(["--preset", "sigma-moe-tiny"])
    out = capsys.readouterr().out
    assert "19,978,702,848" in out and "536,924,160" in out and f"{18 * 19_978_702_848:,}" in out
    M.main(["--preset", "sigma-moe-tiny", "--ranks", "64", "--ep", "8"])
    assert f"{16 * 19_978_702_848 // 64:,}" in capsys.readouterr().out


def test_bytes_that_pass_through_a_process():
    """Against sizes of the parameters of a model: two layers and the tables gathered, gradients of all."""
    config = small(n_expert=12, tie_embeddings=True)
    sizes = {name: p.numel() for name, p in Model(config).named_parameters()}
    experts = sum(n for name, n in sizes.items() if ".experts." in name)
    others = sum(sizes.values()) - experts
    assert M.passing_bytes(config, 8, 2, 4, bf16=False) == (
        4 * (experts // 4 + others), 4 * (experts // 4 + others - sum(sizes.values()) // 4))
    assert M.passing_bytes(config, 1) == (0, 0)
