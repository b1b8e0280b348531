"""The model against slow references."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import small
from torch.utils._python_dispatch import TorchDispatchMode

import eval as evaluation
import model as M
from eval import from_hf, generate, sample, to_hf
from model import PRESETS, ChunkedCrossEntropy, Model, count_parameters
from parallel import SINGLE_PROCESS, MasterWeights, build_model
from router import GATES


def randomised(config, seed=1):
    """A model whose norms matter."""
    model = Model(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.normal_(1.0, 0.2, generator=generator)
    return model


SHARED = torch.nn.Parameter(torch.zeros(16, 32, device="meta"))   # by the blocks of a fork


# --- parts ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, d_in, grouped", [(torch.float32, 8, True), (torch.bfloat16, 8, True),
                                                  (torch.float64, 8, False), (torch.float32, 6, False)])
@pytest.mark.parametrize("load", [[3, 0, 5, 1], [0, 0, 9, 0], [0, 0, 0, 0]])
def test_grouped_product_equals_a_loop(monkeypatch, load, dtype, d_in, grouped):
    """Forward and backward, with empty experts, and with no row at all; grouped_mm where it can."""
    calls, results, real = [], [], F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))

    def loop(rows, weights, ends):
        return torch.cat([part @ w for part, w in zip(rows.split(load), weights)])
    for product, wide in (M.grouped_product, dtype), (loop, torch.float64):
        torch.manual_seed(0)
        rows = torch.randn(sum(load), d_in).to(dtype).to(wide).requires_grad_()
        weights = torch.randn(4, d_in, 16).to(dtype).to(wide).requires_grad_()
        out = product(rows, weights, torch.tensor(load).cumsum(0).int())
        out.backward(torch.ones_like(out))
        results.append([t.double() for t in (out, rows.grad, weights.grad)])
    assert bool(calls) == grouped
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("K", [1, 3])
def test_moe_equals_one_token_at_a_time(gate, K):
    """Output and every gradient, in fp64: routing, sorting, experts, and the way back."""
    moe = randomised(small(gate=gate)).double().blocks[0].moe
    moe.router.weight.data *= 5
    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    out, statistics = moe(x, K)
    rows = []
    for token in x.view(-1, 16):
        weights, experts, *_ = moe.router(token[None], K)
        y = 0
        for weight, e in zip(weights[0], experts[0]):
            a, b = (token @ moe.experts.w_in[e]).chunk(2)
            y = y + weight * ((F.silu(a) * b) @ moe.experts.w_out[e])
        rows.append(y)
    slow = torch.stack(rows).view_as(x)
    torch.testing.assert_close(out, slow, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(x)
    got, want = (torch.autograd.grad((y * upstream).sum(), [x, *moe.parameters()]) for y in (out, slow))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    assert statistics.load.sum() == 18 * K


@pytest.mark.parametrize("N", [256, 300, 700])
def test_chunked_cross_entropy_equals_torch(N):
    """Rows are taken 256 at a time: the last chunk is shorter."""
    x = torch.randn(N, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(-1, 11, (N,))
    want = F.cross_entropy(x @ w.T, targets, ignore_index=-1, reduction="sum")
    got = ChunkedCrossEntropy.apply(x, w, targets, M.cross_entropy, True)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    frozen = ChunkedCrossEntropy.apply(x.detach(), w, targets, M.cross_entropy, True)     # all but the head
    got = [*torch.autograd.grad(got * 0.3, [x, w]), *torch.autograd.grad(frozen * 0.3, [w])]
    grad_x, grad_w = torch.autograd.grad(want * 0.3, [x, w])
    torch.testing.assert_close(got, [grad_x, grad_w, grad_w], rtol=1e-11, atol=1e-12)


def test_cross_entropy_of_bf16_adds_up_in_fp32():
    """The loss of rounded logits, and the head's gradient, a sum over 60 chunks."""
    x, w = (torch.randn(n, 8).bfloat16().requires_grad_() for n in (256 * 60, 70))
    targets = torch.randint(0, 70, (len(x),))
    loss = ChunkedCrossEntropy.apply(x, w, targets, M.cross_entropy, True)
    want = F.cross_entropy((x @ w.T).float(), targets, reduction="sum")
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    loss.backward()
    exact = w.detach().double().requires_grad_()
    F.cross_entropy(x.detach().double() @ exact.T, targets, reduction="sum").backward()
    assert (w.grad - exact.grad).norm() / exact.grad.norm() < 0.005


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


def test_attention_equals_its_definition():
    """Grouped queries, normalised queries and keys, rotary positions as complex numbers, causality; and the
    gradients of all weights."""
    config = small()
    attention = randomised(config).double().blocks[0].attn
    x = torch.randn(1, 7, 16, dtype=torch.float64)
    qkv = (x[0] @ attention.qkv.weight.T).view(7, 8, 8)           # 4 query, 2 key, 2 value heads of 8

    def turn(v, norm, t):
        v = v / (v.square().mean() + 1e-6).sqrt() * norm.weight
        angle = t * config.rope_base ** (-torch.arange(4, dtype=torch.float64) / 4)
        turned = torch.complex(v[:4], v[4:]) * torch.polar(torch.ones(4, dtype=torch.float64), angle)
        return torch.cat([turned.real, turned.imag])
    want = torch.zeros(7, 4, 8, dtype=torch.float64)
    for t in range(7):
        for h in range(4):
            q = turn(qkv[t, h], attention.q_norm, t)
            score = [q @ turn(qkv[s, 4 + h // 2], attention.k_norm, s) / 8 ** 0.5 for s in range(t + 1)]
            want[t, h] = torch.stack(score).softmax(0) @ qkv[:t + 1, 6 + h // 2]
    got = attention(x, *M.rotary(torch.arange(7), 8, config.rope_base, torch.float64))[0]
    want = want.view(7, 32) @ attention.out.weight.T
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(out.pow(3).sum(), list(attention.parameters())) for out in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_norms_and_angles_do_not_round_to_bf16():
    norm = M.RMSNorm(64, 1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(50, 64).bfloat16()
    assert torch.equal(norm(x), F.rms_norm(x.float(), (64,), norm.weight, 1e-6).bfloat16())
    cos, _ = M.rotary(torch.arange(1001), 8, 10000.0, torch.bfloat16)        # 1001 is no bf16 number
    want = torch.tensor([math.cos(1000 * 10000 ** (-i / 4)) for i in range(4)])
    torch.testing.assert_close(cos[1000, 0, :4].float(), want, rtol=0, atol=4e-3)


# --- the whole model --------------------------------------------------------------------------------------

def test_each_layer_can_have_its_own_top_k():
    model, tokens = Model(small()), torch.randint(0, 64, (2, 10))
    assert model(tokens, tokens, top_k=[4, 1]).load.sum(-1).tolist() == [80, 20]
    for wrong in ([1], [1, 7], [0, 1], 7):
        with pytest.raises(ValueError, match="top_k"):
            model(tokens, top_k=wrong)


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


@pytest.mark.parametrize("change, words", [
    (lambda block: block.register_parameter("scale", torch.nn.Parameter(torch.zeros(3))),
     "blocks.0.scale has no initial values: add a rule"),
    (lambda block: block.register_buffer("scale", torch.arange(3.0)), "blocks.0.scale has no initial values"),
    (lambda block: setattr(block.attn.out, "weight", SHARED), "share them again in Model.tie")],
    ids=["parameter", "buffer", "shared"])
def test_a_fork_must_say_how_its_tensors_are_initialised_and_shared(monkeypatch, change, words):
    """A constructor's values, and what it shares, would be lost where memory is taken."""
    class Fork(M.Block):
        def __init__(self, config):
            super().__init__(config)
            change(self)
    monkeypatch.setattr(M, "Block", Fork)
    with pytest.raises(ValueError, match=words):
        build_model(small(), SINGLE_PROCESS, "cpu", torch.float32, 0)
    if "rule" in words:
        with pytest.raises(ValueError, match=words):
            Model(small())


def test_bf16_equals_fp32():
    """The same weights: every gradient points the same way."""
    tokens, found = torch.randint(0, 256, (2, 40)), []
    for dtype in torch.float32, torch.bfloat16:
        model = randomised(small(n_expert=4, d_model=64, d_expert=64, vocab_size=256))
        for p in model.parameters():
            p.data = p.data.bfloat16().float()                    # what both can hold
        masters = MasterWeights(model, dtype)
        out = model(tokens, tokens)
        out.loss.backward()
        assert model.head.weight.dtype == dtype and out.loss.dtype == torch.float32
        found.append({"loss": out.loss} | {name: p.grad for name, p in masters.named.items()})
    for name in found[0]:
        a, b = (values[name].flatten().double() for values in found)
        assert F.cosine_similarity(a, b, dim=0) > 0.999, name


# --- generation -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prompt, new", [(1, 30), (10, 40), (60, 90), (64, 5)])
@pytest.mark.parametrize("K", [1, 3])
def test_greedy_text_with_cache_equals_without(prompt, new, K):
    """Up to the end of the context (64), whose last token is still followed by one."""
    model = randomised(small(top_k=K, n_expert=12)).double()
    tokens = torch.randint(0, 64, (3, prompt))
    want = tokens
    for _ in range(min(new, 65 - prompt)):                        # the slow reference
        want = torch.cat([want, model(want)[:, -1:].argmax(-1)], 1)
    assert torch.equal(generate(model, tokens, new, temperature=0), want)


def test_a_compiled_step_writes_the_same_text(monkeypatch):
    """One graph, without data-dependent shapes or graph breaks, for every position."""
    model, tokens = randomised(small()).double(), torch.randint(0, 64, (3, 10))
    want = generate(model, tokens, 20, temperature=0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(evaluation.decode, backend="aot_eager", dynamic=False, fullgraph=True)
    monkeypatch.setattr(evaluation, "decode", compiled)
    assert torch.equal(generate(model, tokens, 20, temperature=0), want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_cached_token_costs_one_token(monkeypatch):
    """After the prompt every pass sees a single token, gathers its expert, and nobody counts for losses."""
    model, seen, products = Model(small(n_layer=1)), [], []
    real = M.grouped_product
    monkeypatch.setattr(M, "grouped_product", lambda *args: products.append(1) or real(*args))
    model.blocks[0].moe.router.register_forward_hook(
        lambda m, args, routing: seen.append((len(args[0]), routing.statistics)))
    generate(model, torch.zeros(1, 5, dtype=torch.int64), 20)
    assert seen == [(n, None) for n in [5] + [1] * 19] and len(products) <= 2


def test_top_p_keeps_the_most_probable_tokens_that_reach_it():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(2000, 4)
    counts = torch.bincount(sample(logits, top_p=0.7), minlength=4)
    assert counts[2] == counts[3] == 0 and counts[0] / 2000 == pytest.approx(0.5 / 0.8, abs=0.05)
    assert torch.bincount(sample(logits, top_p=1.0), minlength=4)[3] > 0
    for wrong in ({"temperature": math.nan}, {"top_p": math.nan}, {"temperature": -1.0}):
        with pytest.raises(ValueError, match="temperature must be"):
            sample(logits, **wrong)
    assert (sample(logits, temperature=0) == 0).all() and (sample(logits, top_p=1e-9) == 0).all()
    with pytest.raises(TypeError, match="experts per token are k_per_layer here"):
        generate(Model(small()), torch.zeros(1, 1, dtype=torch.int64), 1, top_k=5)
    hot = torch.bincount(sample(logits, temperature=5.0), minlength=4)
    assert hot[3] > 2 * torch.bincount(sample(logits), minlength=4)[3]


def test_generation_repeats_with_its_seed():
    model, tokens = Model(small()), torch.randint(0, 64, (2, 3))
    a, b = (generate(model, tokens, 20, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(a, b)


# --- counting ---------------------------------------------------------------------------------------------

def test_parameters_of_sigma_moe_tiny():
    """The published 20B and 0.5B, and 0.65B before the switch."""
    total, _, core = count_parameters(PRESETS["sigma-moe-tiny"])
    assert (total, core) == (19_978_702_848, 536_924_160)
    before = count_parameters(PRESETS["sigma-moe-tiny"], [8, 8, 6, 6, 4, 4, 2, 2] + [1] * 48)[2]
    assert round(before / 1e9, 3) == 0.650


@pytest.mark.parametrize("tied", [True, False])
def test_counts_are_those_of_a_real_model(tied):
    config = small(tie_embeddings=tied, top_k=2)
    total, active, core = count_parameters(config)
    assert total == sum(p.numel() for p in Model(config).parameters())
    expert = 3 * 16 * 12
    assert active == total - 2 * (6 - 2) * expert and core == active - 64 * 16 * (1 if tied else 2)
    assert count_parameters(config, [3, 1])[1] == active
    # 6 per weight of a product: attention, router, experts, head; norms multiply no matrix
    matrices = 2 * (16 * 64 + 32 * 16 + 16 * 6 + 2 * expert) + 64 * 16
    assert M.flops_per_token(config, 40) == pytest.approx(6 * (matrices + 2 * 4 * 8 * 40), rel=0.02)


# --- seams ------------------------------------------------------------------------------------------------

def test_what_hugging_faces_format_holds_and_what_it_does_not():
    """A fork's shared expert is not dropped in silence, nor an output matrix that is not the embedding."""
    a, b = (Model(small(tie_embeddings=True), seed) for seed in (1, 2))
    state = to_hf(a)
    from_hf(state | {"lm_head.weight": state["model.embed_tokens.weight"]}, b)        # some files have it
    for tensor in state.values():                                 # a copy: the model does not change with it
        tensor.zero_()
    assert all(torch.equal(p, q) and p.any() for p, q in zip(a.parameters(), b.parameters()))
    state = to_hf(a)
    with pytest.raises(ValueError, match="not the embedding, though"):
        from_hf(state | {"lm_head.weight": 2 * state["model.embed_tokens.weight"]}, b)
    a.blocks[0].moe.shared = torch.nn.Linear(16, 16)
    with pytest.raises(ValueError, match="no place for the parameter moe.shared.weight"):
        to_hf(a)
