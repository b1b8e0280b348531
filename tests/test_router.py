"""Gates, losses and the schedule against slow references."""

import math

import pytest
import torch
from conftest import small

import router as router_module
from model import Model
from router import (
    GATES,
    Router,
    active_experts,
    load_balancing_loss,
    noise_floor,
    quantile_bias,
    top1_balancing_loss,
    update_bias,
    zipf_bound,
)


def make_router(gate, E=7, D=5, dtype=torch.float64):
    router = Router(D, E, gate).to(dtype)
    torch.nn.init.normal_(router.weight)
    return router


def slow_route(router, h, K):
    """One token at a time, in plain Python numbers -> weights, experts, {name: sum}."""
    weight, bias, E = router.weight.tolist(), router.bias.tolist(), len(router.weight)
    weights, experts = [], []
    sums = {"load": [0] * E, "prob_sum": [0.0] * E, "sharp_sum": [0.0] * E, "sharp_top_sum": 0.0,
            "z_sum": 0.0, "top_sum": 0.0, "entropy_sum": 0.0}
    for token in h.tolist():
        z = [sum(a * b for a, b in zip(row, token)) for row in weight]
        prob, sharp = ([math.exp(x / t) / sum(math.exp(y / t) for y in z) for x in z]
                       for t in (1.0, router.temperature))
        score = [1 / (1 + math.exp(-x)) for x in z] if router.gate == "sigmoid" else prob
        chosen = sorted(range(E), key=lambda e: -score[e] - bias[e])[:K]
        scale = sum(score[e] for e in chosen) if router.gate == "normalized" else 1.0
        experts.append(chosen)
        weights.append([score[e] / scale for e in chosen])
        for e in chosen:
            sums["load"][e] += 1
        for name, p in (("prob_sum", prob), ("sharp_sum", sharp)):
            sums[name] = [a + b for a, b in zip(sums[name], p)]
        sums["sharp_top_sum"] += max(sharp)
        sums["top_sum"] += max(prob)
        sums["z_sum"] += math.log(sum(math.exp(x) for x in z)) ** 2
        sums["entropy_sum"] -= sum(p * math.log(p) for p in prob)
    return weights, experts, sums


@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "normalized"])
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("bias", [[0.0] * 7, [0.3, 0, -0.2, 0, 0.1, 0, 0]], ids=["", "bias"])
def test_routing_equals_one_token_at_a_time(gate, K, bias):
    router, h = make_router(gate), torch.randn(40, 5, dtype=torch.float64)
    router.bias.copy_(torch.tensor(bias))
    router.temperature = 0.7
    got = router(h, K)
    weights, experts, sums = slow_route(router, h, K)
    assert got.experts.tolist() == experts
    torch.testing.assert_close(got.weights, torch.tensor(weights, dtype=torch.float64),
                               rtol=1e-12, atol=1e-12)
    assert got.statistics.load.dtype == torch.int64
    for name, want in sums.items():
        torch.testing.assert_close(getattr(got.statistics, name).double(),
                                   torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12, msg=name)


def test_router_computes_in_fp32_whatever_the_model_computes_in():
    router, h = make_router("softmax", dtype=torch.float32), torch.randn(9, 5).bfloat16()
    got = router(h, 2)
    assert got.weights.dtype == got.statistics.prob_sum.dtype == torch.float32
    torch.testing.assert_close(got.weights, router(h.float(), 2).weights, rtol=0, atol=0)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("K", [1, 2])
def test_language_model_loss_alone_teaches_the_router(gate, K):
    """At K = 1 a weight renormalised over the chosen experts is the constant 1 and has no gradient."""
    model = Model(small(gate=gate, top_k=K)).double()
    tokens = torch.randint(0, 64, (4, 20))
    (model(tokens, tokens).loss / tokens.numel()).backward()
    for name, p in model.named_parameters():
        if "router" in name:
            assert p.grad.norm() > 1e-6, name


@pytest.mark.parametrize("K", [1, 3, 6])
def test_normalized_weights_sum_to_one_and_have_the_gradient_of_log_p(K):
    router, h = make_router("normalized"), torch.randn(1, 5, dtype=torch.float64)
    weights = router(h, K).weights
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, dtype=torch.float64))
    (got,) = torch.autograd.grad(weights.sum(), router.weight)
    prob = torch.softmax(h @ router.weight.T, -1)
    chosen = prob.topk(K, -1).values
    share = chosen.detach() / chosen.sum().detach()
    (want,) = torch.autograd.grad((share * chosen.log()).sum(), router.weight)
    torch.testing.assert_close(got, want)


def test_balance_losses_equal_their_definitions_per_layer():
    L, E, N = 3, 5, 50
    prob = torch.randn(L, N, E, dtype=torch.float64).softmax(-1)
    chosen = torch.randint(0, E, (L, N, 2))
    load = torch.stack([torch.bincount(c.flatten(), minlength=E) for c in chosen])
    lbl = load_balancing_loss(load, prob.sum(1), N)
    top1 = top1_balancing_loss(prob.sum(1), prob.amax(-1).sum(-1), N)
    for layer in range(L):
        tokens = prob[layer].tolist()
        f = [sum(row.count(i) for row in chosen[layer].tolist()) / (2 * N) for i in range(E)]
        p = [sum(row[i] for row in tokens) / N for i in range(E)]
        top = sum(max(row) for row in tokens) / N
        assert lbl[layer].item() == pytest.approx(E * sum(a * b for a, b in zip(f, p)), rel=1e-12)
        assert top1[layer].item() == pytest.approx(E * sum(a * a for a in p) / top, rel=1e-12)
    assert load_balancing_loss(torch.zeros(L, E), torch.zeros(L, E), 1).tolist() == [0] * L       # no tokens


def test_a_loss_without_a_gradient_is_an_error(monkeypatch):
    """As of a fork that takes a statistic for the log."""
    monkeypatch.setitem(router_module.BALANCE, "entropy", (lambda entropy, n: -entropy / n, ("entropy_sum",)))
    sums = make_router("softmax")(torch.randn(9, 5, dtype=torch.float64), 1).statistics
    with pytest.raises(RuntimeError, match="grad"):
        router_module.balance_objective("entropy", sums, 9, sums)


def test_bias_moves_towards_the_starved_and_never_into_the_weights():
    load = torch.tensor([[4, 0, 8, 4], [0, 16, 0, 0]])
    bias = torch.zeros(2, 4)
    update_bias(bias, load, 0.25)
    update_bias(bias, load, 0.25)
    assert bias.tolist() == [[0, 0.5, -0.5, 0], [0.5, -0.5, 0.5, 0.5]]
    router, h = make_router("softmax"), torch.randn(1, 5, dtype=torch.float64)
    router.bias[3] = 2.0                                                          # beyond any probability
    got = router(h, 1)
    assert got.experts.item() == 3
    assert got.weights.item() == pytest.approx((h @ router.weight.T).softmax(-1)[0, 3].item(), rel=1e-12)
    assert not router.bias.requires_grad and "bias" not in dict(router.named_parameters())


@pytest.mark.parametrize("n_tokens, E, K, error", [
    (8192, 96, 1, 0.07), (4096, 96, 1, 0.08), (4096, 96, 8, 0.07), (300, 96, 1, 0.17), (1000, 2, 1, 0.05),
    (64, 6, 5, 0.06)])
def test_noise_floor_is_near_a_simulation(n_tokens, E, K, error):
    """A load is nearly normal only where experts get many tokens: three each are too few."""
    generator, high, low, draws = torch.Generator().manual_seed(1), 0.0, 0.0, 60 if E == 96 else 2000
    for _ in range(draws):
        chosen = torch.rand(n_tokens, E, generator=generator).topk(K).indices
        load = chosen.flatten().bincount(minlength=E) * E / (n_tokens * K) - 1
        high, low = high + load.max().item() / draws, low + load.min().item() / draws
    got = noise_floor(n_tokens, E, K)
    assert got == pytest.approx((high, low), rel=error)


def test_corner_cases_of_the_baselines():
    assert noise_floor(100, 1, 1) == noise_floor(100, 6, 6) == (0.0, 0.0)
    high, low = noise_floor(1 << 22, 96, 1)                       # sqrt(E/N) = 0.0048
    assert 0.01 < high < 0.014 and -0.014 < low < -0.01 and noise_floor(3, 96, 1)[1] == -1.0
    assert zipf_bound(0.03, 96, 1) == pytest.approx(1.88) and zipf_bound(0.03, 96, 8) == 0.0


@pytest.mark.parametrize("step, steps, initial, target, switch, n_layer, want", [
    (0, 100, [8, 4], 1, 0.9, 4, [8, 4, 1, 1]),
    (89, 100, [8, 4], 1, 0.9, 4, [8, 4, 1, 1]),
    (90, 100, [8, 4], 1, 0.9, 4, [1, 1, 1, 1]),
    (28, 100, [8], 2, 0.29, 2, [8, 2]),                           # 0.29 * 100 is 28.999999999999996
    (29, 100, [8], 2, 0.29, 2, [2, 2]),
    (100, 100, [8], 1, 1.0, 2, [8, 1]),                           # never, not even after the last step
    (0, 100, [8, 8, 6, 6], 1, 0.9, 2, [8, 8]),
    (0, 100, [], 3, 0.9, 2, [3, 3]),
    (0, 100, None, 1, 0.9, 2, [1, 1]),
])
def test_schedule_of_active_experts(step, steps, initial, target, switch, n_layer, want):
    assert active_experts(step, steps, initial, target, switch, n_layer) == want


# --- quantile balancing -----------------------------------------------------------------------------------

@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("gate", GATES)
def test_quantile_biases_are_quantiles(K, gate):
    """Against torch.quantile of all margins, to the width of a bin; parts of the tokens add up."""
    router = Router(16, 12, gate)
    torch.nn.init.normal_(router.weight)
    router.bias.copy_(torch.linspace(-0.01, 0.01, 12))
    router.collect_margins = True
    h, mask = torch.randn(4000, 16), torch.rand(4000) < 0.9
    margins = router(h, K, mask).statistics.margins
    assert torch.equal(margins, sum(router(*part).statistics.margins for part in zip(
        h.chunk(7), [K] * 7, mask.chunk(7))))
    assert margins.sum(-1).tolist() == [int(mask.sum())] * 12
    logits = h[mask] @ router.weight.T
    score = logits.sigmoid() if gate == "sigmoid" else logits.softmax(-1)      # and that of your gate
    limit = (score + router.bias).sort(-1, descending=True).values[:, K:K + 1]
    want = torch.quantile((limit - score).double(), K / 12, dim=0)
    torch.testing.assert_close(quantile_bias(margins, K), (want - want.mean()).float(), rtol=0.03, atol=2e-3)
    worst = []
    for _ in range(40):                                           # again and again: the load becomes even
        statistics = router(h, K, mask).statistics
        worst.append((statistics.load / statistics.load.double().mean() - 1).abs().max())
        router.bias.copy_(quantile_bias(statistics.margins, K))
    assert worst[-1] < 0.1 < 0.5 * worst[0]
