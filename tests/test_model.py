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


@pytest.mark.parametrize("K", [1, 3])
def test_few_rows_gather_their_experts(monkeypatch, K):
    """A generated token: the same result as sorted rows, without a grouped product."""
    moe, x = randomised(small(n_expert=12)).double().blocks[0].moe, torch.randn(2, 2, 16, dtype=torch.float64)
    want = moe(x, K)[0]
    monkeypatch.setattr(M, "grouped_product", None)
    with torch.no_grad():
        torch.testing.assert_close(moe(x, K, with_stats=False)[0], want)


def test_a_permutation_is_undone_by_its_gradient():
    """.. which is gathered: equal to autograd's own, and differentiable once more."""
    order, inverse = M.sort_by_expert(torch.randint(0, 5, (30,)))
    rows = torch.randn(30, 4, dtype=torch.float64, requires_grad=True)
    assert torch.equal(M.Permute.apply(rows, order, inverse), rows[order])
    assert torch.autograd.gradcheck(M.Permute.apply, (rows, order, inverse))


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


def test_the_output_of_several_experts_rounds_once():
    """In bf16, K = 8 experts of a token have one rounding's error; weights in fp32."""
    moe, x = randomised(small(n_expert=12, d_expert=16)).blocks[0].moe, torch.randn(4, 25, 16).bfloat16()
    moe.experts.forward = lambda rows, load: rows.sin()
    out = moe(x, 8)[0]
    routing = moe.router(x.flatten(0, 1), 8)
    want = x.flatten(0, 1).sin().double() * routing.weights.double().sum(-1, keepdim=True)
    assert out.dtype == torch.bfloat16
    assert (out.view(100, 16) == want.bfloat16()).float().mean() > 0.99


@pytest.mark.parametrize("N", [256, 300, 700])
def test_chunked_cross_entropy_equals_torch(N):
    """Rows are taken 256 at a time: the last chunk is shorter."""
    x = torch.randn(N, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(-1, 11, (N,))
    want = F.cross_entropy(x @ w.T, targets, ignore_index=-1, reduction="sum")
    got = ChunkedCrossEntropy.apply(x, w, targets, M.cross_entropy)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(got * 0.3, [x, w]), torch.autograd.grad(want * 0.3, [x, w])):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_chunks_add_up_in_fp32():
    """The head's gradient is a sum over chunks: in bf16 it would lose the small ones."""
    x, w, targets = torch.randn(256 * 60, 8), torch.randn(5, 8), torch.randint(0, 5, (256 * 60,))
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        a, b = x.bfloat16().to(dtype).requires_grad_(), w.bfloat16().to(dtype).requires_grad_()
        ChunkedCrossEntropy.apply(a, b, targets, M.cross_entropy).backward()
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
    got = ChunkedCrossEntropy.apply(x, w, targets, M.cross_entropy)
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


def test_rotation_equals_its_definition():
    x = torch.randn(2, 7, 3, 8, dtype=torch.float64)
    angle = torch.arange(7)[:, None, None] * 100.0 ** (-torch.arange(4) / 4).double()
    pairs = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    want = torch.cat([pairs.real, pairs.imag], -1)
    torch.testing.assert_close(M.rotate(x, *M.rotary(torch.arange(7), 8, 100.0, torch.float64)), want)


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
        x.flatten(0, 1), model.head.weight, tokens.flatten(), M.cross_entropy),
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

@torch.no_grad()
def recomputed(model, tokens, new):
    """Greedy text without a cache: the slow reference.  A full context keeps its newer half."""
    window, text = model.config.max_seq_len, tokens[:, -model.config.max_seq_len:]
    for _ in range(new):
        text = text[:, -(window // 2):] if text.shape[1] > window else text
        best = model(text)[:, -1:].argmax(-1)
        text, tokens = torch.cat([text, best], 1), torch.cat([tokens, best], 1)
    return tokens


@pytest.mark.parametrize("prompt, new", [(1, 30), (10, 40), (64, 5), (70, 90)])
@pytest.mark.parametrize("K", [1, 3])
def test_greedy_text_with_cache_equals_without(prompt, new, K):
    """Also across the end of the context (64)."""
    model = randomised(small(top_k=K)).double()
    tokens = torch.randint(0, 64, (3, prompt))
    a = model.generate(tokens, new, temperature=0)
    assert a.shape == (3, prompt + new) and torch.equal(a[:, :prompt], tokens)
    assert torch.equal(a, recomputed(model, tokens, new))


def test_a_compiled_step_writes_the_same_text():
    """One graph, without data-dependent shapes or graph breaks, for every position."""
    model, tokens = randomised(small()).double(), torch.randint(0, 64, (3, 10))
    want = model.generate(tokens, 20, temperature=0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.decode = torch.compile(model.decode, backend="aot_eager", dynamic=False, fullgraph=True)
    assert torch.equal(model.generate(tokens, 20, temperature=0, compiled=False), want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_texts_of_similar_length_share_a_compiled_step():
    """The cache's capacity is rounded up, within the context."""
    model = Model(small(max_seq_len=300))
    found = [model.kv_cache(2, length)[0][0].shape[1] for length in (3, 64, 65, 128, 129, 290, 300)]
    assert found == [64, 64, 128, 128, 256, 300, 300]


def test_rows_of_different_lengths_are_generated_together():
    """Each row is what it is alone, whatever the padding behind it."""
    model = randomised(small()).double()
    prompts = [torch.randint(0, 64, (n,)) for n in (3, 17, 9, 1)]
    tokens = torch.stack([F.pad(p, (0, 17 - len(p)), value=5) for p in prompts])
    lengths = torch.tensor([len(p) for p in prompts])
    together = model.generate(tokens, 40, temperature=0, lengths=lengths)
    for row, prompt in zip(together, prompts):
        assert torch.equal(row[17:], model.generate(prompt[None], 40, temperature=0)[0, len(prompt):])
    with pytest.raises(ValueError, match="max_seq_len"):
        model.generate(tokens, 60, lengths=lengths)


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
    out = model.generate(tokens, 20, stop=(stop,), generator=torch.Generator().manual_seed(4))
    assert (out[0, 5:] == stop).all() and torch.equal(out[0, :6], a[0, :6])
    alone = model.generate(tokens[:1], 20, temperature=0)
    assert model.generate(tokens[:1], 20, temperature=0, stop=(63, int(alone[0, 5]))).shape[1] <= 6    # early


# --- counting ---------------------------------------------------------------------------------------------

def test_parameters_of_sigma_moe_tiny():
    """The published 20B and 0.5B, and 0.65B before the switch."""
    config = PRESETS["sigma-moe-tiny"]
    total, _, core = count_parameters(config)
    assert round(total / 1e9, 2) == 19.98 and round(core / 1e9, 3) == 0.537
    before = count_parameters(config, [8, 8, 6, 6, 4, 4, 2, 2] + [1] * 48)[2]
    assert round(before / 1e9, 3) == 0.650


@pytest.mark.parametrize("preset, total, active, state", [("gpu", 0.3e9, 13e6, 6e9),
                                                          ("gpu-1b", 1.1e9, 100e6, 20e9)])
def test_sizes_of_the_gpu_presets(preset, total, active, state):
    """Quick experiments on 8 GB, and what one large card can train."""
    counts = count_parameters(PRESETS[preset])
    assert counts[0] == pytest.approx(total, rel=0.1) and counts[1] == pytest.approx(active, rel=0.1)
    assert M.state_bytes(PRESETS[preset]) < state


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


def test_what_the_file_format_cannot_hold_is_refused():
    """A fork's shared expert is not dropped in silence, nor an output matrix that is not the embedding."""
    model = Model(small())
    model.blocks[0].moe.shared = torch.nn.Linear(16, 16)
    with pytest.raises(ValueError, match="no place for the parameter moe.shared.weight"):
        to_hf(model)
    with pytest.raises(ValueError, match="no own gate"):
        config = small()
        config.gate = "own"
        M.hf_config(config)
    tied = Model(small(tie_embeddings=True))
    with pytest.raises(ValueError, match="lm_head.weight is not the embedding"):
        from_hf(to_hf(tied) | {"lm_head.weight": torch.zeros(64, 16)}, tied)


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
    M.main(["--preset", "sigma-moe-tiny", "--ranks", "64"])
    assert f"{16 * 19_978_702_848 // 64:,}" in capsys.readouterr().out
