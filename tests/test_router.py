"""Gates, losses and the schedule against slow references."""

import math

import pytest
import torch
from conftest import small

from model import Model
from router import GATES, Router, active_experts, differentiate_at, load_balancing_loss, router_z_loss


def make_router(gate, E=7, D=5, dtype=torch.float64):
    router = Router(D, E, gate).to(dtype)
    torch.nn.init.normal_(router.weight)
    return router


def slow_route(weight, h, K, gate):
    """One token at a time, in plain Python numbers."""
    E = len(weight)
    weights, experts, load, prob_sum, z_sum = [], [], [0] * E, [0.0] * E, 0.0
    for token in h.tolist():
        z = [sum(a * b for a, b in zip(row, token)) for row in weight.tolist()]
        total = sum(math.exp(x) for x in z)
        prob = [math.exp(x) / total for x in z]
        score = [1 / (1 + math.exp(-x)) for x in z] if gate == "sigmoid" else prob
        chosen = sorted(range(E), key=lambda e: -score[e])[:K]
        scale = sum(score[e] for e in chosen) if gate == "normalized" else 1.0
        experts.append(chosen)
        weights.append([score[e] / scale for e in chosen])
        for e in chosen:
            load[e] += 1
        prob_sum = [a + b for a, b in zip(prob_sum, prob)]
        z_sum += math.log(total) ** 2
    return weights, experts, load, prob_sum, z_sum


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("K", [1, 3])
def test_routing_equals_one_token_at_a_time(gate, K):
    router, h = make_router(gate), torch.randn(40, 5, dtype=torch.float64)
    got = router(h, K)
    weights, experts, load, prob_sum, z_sum = slow_route(router.weight, h, K, gate)
    assert got.experts.tolist() == experts
    assert got.load.tolist() == load and got.load.dtype == torch.int64
    torch.testing.assert_close(got.weights, torch.tensor(weights, dtype=torch.float64),
                               rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.prob_sum, torch.tensor(prob_sum, dtype=torch.float64),
                               rtol=1e-12, atol=1e-12)
    assert got.z_sum.item() == pytest.approx(z_sum, rel=1e-12)


def test_router_computes_in_fp32_whatever_the_model_computes_in():
    router, h = make_router("softmax", dtype=torch.float32), torch.randn(9, 5).bfloat16()
    got = router(h, 2)
    assert got.weights.dtype == got.prob_sum.dtype == torch.float32
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


@pytest.mark.parametrize("K", [1, 2, 8])
def test_balance_loss_is_one_when_balanced_and_E_when_collapsed(K):
    E, N = 96, 96 * 4
    even = torch.full((E,), N * K // E)
    assert load_balancing_loss(even, torch.full((E,), N / E), N) == pytest.approx(1.0, abs=1e-6)
    one = torch.zeros(E, dtype=torch.int64)
    one[5] = N
    assert load_balancing_loss(one, one.float(), N).item() == E                 # K = 1, all on one expert


def test_balance_loss_of_no_tokens_is_zero():
    assert load_balancing_loss(torch.zeros(2, 5), torch.zeros(2, 5), 1).tolist() == [0, 0]


def test_balance_loss_equals_its_definition_per_layer():
    L, E, N = 3, 5, 50
    prob = torch.rand(L, N, E, dtype=torch.float64).softmax(-1)
    chosen = torch.randint(0, E, (L, N, 2))
    load = torch.stack([torch.bincount(c.flatten(), minlength=E) for c in chosen])
    got = load_balancing_loss(load, prob.sum(1), N)
    for layer in range(L):
        f = [sum(int(e == i) for row in chosen[layer].tolist() for e in row) / (2 * N) for i in range(E)]
        p = [sum(row[i] for row in prob[layer].tolist()) / N for i in range(E)]
        assert got[layer].item() == pytest.approx(E * sum(a * b for a, b in zip(f, p)), rel=1e-12)


def test_flat_probabilities_are_a_shortcut():
    """The paper's point (Figure 2): scaling the logits towards 0 leaves every choice, hence f, and drives
    LBL to 1."""
    router, h = make_router("softmax", E=24), torch.randn(200, 5, dtype=torch.float64)
    router.weight.data *= 2
    before = router(h, 1)
    uneven = before.load.max() / before.load.sum() * 24
    losses = []
    for _ in range(4):
        got = router(h, 1)
        assert torch.equal(got.load, before.load)
        losses.append(load_balancing_loss(got.load, got.prob_sum, 200).item())
        router.weight.data *= 0.1
    assert uneven > 1.5 and losses[0] > 1.2 and losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize("loss", ["lbl", "nonlinear"])
def test_parts_of_a_batch_have_the_gradient_of_the_whole(loss):
    """Decision: a balance loss is differentiated at global sums and multiplied into local ones."""
    torch.manual_seed(3)
    weight = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    h = torch.randn(3, 20, 5, dtype=torch.float64)                                # 3 parts, different data
    prob = (h @ weight.T).softmax(-1)                                             # [3, 20, 7]
    load = torch.bincount(prob.argmax(-1).flatten(), minlength=7)

    def value(p):
        if loss == "lbl":
            return load_balancing_loss(load, p, 60)
        return (p.square().sum(-1) / p.amax(-1)).exp()
    (want,) = torch.autograd.grad(value(prob.sum((0, 1))), weight, retain_graph=True)
    total, got = prob.sum((0, 1)), 0
    for part in range(3):
        at, local = differentiate_at(value, total, prob[part].sum(0))
        assert at.item() == pytest.approx(value(total).item(), rel=1e-14) and not at.requires_grad
        got = got + torch.autograd.grad(local, weight, retain_graph=True)[0]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_z_loss_is_the_mean_squared_logsumexp():
    router, h = make_router("softmax"), torch.randn(30, 5, dtype=torch.float64)
    want = (h @ router.weight.T).exp().sum(-1).log().square().mean()
    assert router_z_loss(router(h, 1).z_sum, 30).item() == pytest.approx(want.item(), rel=1e-12)


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
