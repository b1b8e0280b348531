"""Schedules, the training step against a slow reference, the loop, its log, and resuming."""

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SIZES, Forked, curve, prepared, rows, small, small_run, train_until, train_with
from test_exact import make_run as make_run_of

import data
import eval as evaluation
import model as model_module
import parallel
import train
from model import Block, Model, flops_per_token
from router import active_experts, drawn_top_k, noise_floor
from train import Corpus, Settings, learning_rate, log_row, train_step

# --- schedules --------------------------------------------------------------------------------------------

def test_learning_rate_warms_up_stays_and_decays():
    s = Settings(steps=100, lr=1.0, warmup=0.1, decay=0.2)
    rates = [round(learning_rate(i, s), 3) for i in (0, 4, 9, 50, 80, 90, 99)]
    assert rates == [0.1, 0.5, 1, 1, 1, 0.5, 0.05]
    assert learning_rate(0, Settings(steps=10, lr=1.0, warmup=0, decay=0)) == 1.0


# --- one step ---------------------------------------------------------------------------------------------

def make_run(**changes):
    """A run in fp64 on random tokens, without files."""
    run = make_run_of(parallel.SINGLE_PROCESS, torch.float64, **dict(n_expert=6, seq_len=8) | changes)
    tokens = np.random.default_rng(0).integers(0, 64, 2000).astype(np.uint16)
    run.corpus = Corpus(data.Sampler(tokens, 8, 0))
    return run


def logged(run, step):
    """Do a step -> what the log says of it."""
    return log_row(run, train_step(run, step))


def slow_balance_loss(s, E, chosen, logits):
    """A layer's balance loss of all these tokens by its definition: chosen [n, K], logits [n, E]."""
    if s.balance == "top1":
        p = (logits / s.temperature).softmax(-1)
        return E * p.mean(0).square().sum() / p.amax(-1).mean()
    f = torch.bincount(chosen.flatten(), minlength=E).double() / chosen.numel()
    return E * (f * logits.softmax(-1).mean(0)).sum()


def slow_objective(run, top_k):
    """Loss of a step written down as its definition, with the statistics of the micro-batches so far:

    mean cross-entropy + coef * sum over micro-batches m and layers of (share of the step up to m) * the
    balance loss of all tokens up to m, of which only those of m have a gradient."""
    s, model, E = run.settings, run.model, run.config.n_expert
    x, y = run.corpus.train.rows(0, s.batch_size)
    total, before = 0.0, [(torch.zeros(0, k, dtype=torch.int64), torch.zeros(0, E)) for k in top_k]
    for tokens, targets in zip(x.chunk(s.accumulate), y.chunk(s.accumulate)):
        gates = []
        hooks = [b.moe.router.register_forward_pre_hook(lambda m, a, z=gates: z.append(a[0] @ m.weight.T))
                 for b in model.blocks]
        logits = model(tokens, top_k=top_k)
        for hook in hooks:
            hook.remove()
        total = total + F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / y.numel()
        for layer, (z, k) in enumerate(zip(gates, top_k)):
            chosen = z.topk(k).indices
            if s.lbl_scope == "global":
                chosen, seen = (torch.cat(pair) for pair in zip(before[layer], (chosen, z)))
                before[layer] = chosen, seen.detach()
            else:
                seen = z
            if s.balance in ("lbl", "top1"):
                share = s.lbl_coef * len(seen) / y.numel()
                total = total + share * slow_balance_loss(s, E, chosen, seen)
            total = total + s.z_coef * z.logsumexp(-1).square().sum() / y.numel()
    return total


@pytest.mark.parametrize("changes", [
    dict(), dict(accumulate=3), dict(accumulate=3, lbl_scope="micro"), dict(balance="none"), dict(z_coef=0.3),
    dict(accumulate=4, initial_top_k=[3, 2], z_coef=0.1), dict(gate="normalized"),
    dict(gate="sigmoid", accumulate=2), dict(balance="top1", temperature=0.3),
    dict(balance="top1", accumulate=3),
    dict(balance="top1", accumulate=2, lbl_scope="micro", temperature=2.0),
    dict(balance="loss-free", accumulate=2)],
    ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()) or "plain")
def test_a_step_has_the_gradient_of_its_definition(changes, monkeypatch):
    run = make_run(lbl_coef=0.5, clip=1e9, **changes)
    top_k = active_experts(0, 10, run.settings.initial_top_k, 1, 0.9, 2)
    want = torch.autograd.grad(slow_objective(run, top_k), list(run.model.parameters()))
    got = []
    monkeypatch.setattr(run.optimizer, "step", lambda: got.extend(
        p.grad.clone() for p in run.model.parameters()))
    row = logged(run, 0)
    torch.testing.assert_close(got, list(want), rtol=1e-9, atol=1e-13)
    norm = torch.stack([w.norm() for w in want]).norm().item()
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-9)


def test_what_is_reported_is_of_the_whole_step():
    """Every figure of a step in four parts, against its definition on all tokens at once."""
    run, E, N = make_run(balance="top1", lbl_coef=0.0, accumulate=4, temperature=0.5), 6, 96
    x, y = run.corpus.train.rows(0, 12)
    gates = []
    for block in run.model.blocks:
        block.moe.router.register_forward_hook(lambda m, a, _: gates.append(a[0] @ m.weight.T))
    with torch.no_grad():
        out = run.model(x, y, 1)
    seen = gates[:2]
    row = logged(run, 0)
    assert row["loss"] == pytest.approx(out.loss.item() / N, rel=1e-12)
    for layer, z in enumerate(seen):
        p, load = z.softmax(-1), torch.bincount(z.argmax(-1), minlength=E)
        want = {
            "load_max": load.max() * E / N - 1, "load_min": load.min() * E / N - 1,
            "lbl_layer": E * (load / N * p.mean(0)).sum(), "top_prob": p.amax(-1).mean(),
            "gate_entropy": -(p * p.log()).sum(-1).mean(), "noise_max": noise_floor(N, E, 1)[0]}
        for name, value in want.items():
            assert row[name][layer] == pytest.approx(float(value), rel=1e-6), name
    assert row["lbl"] == pytest.approx(sum(row["lbl_layer"]) / 2)


def worst_load(**balance):
    """The largest load after forty steps on random tokens with a favourite expert."""
    run = make_run(lbl_coef=0.3, n_expert=12, **balance)
    run.settings.steps = 40
    with torch.no_grad():
        for block in run.model.blocks:
            block.moe.router.weight[0] += 0.5
    return np.mean([max(logged(run, i)["load_max"]) for i in range(40)][-10:])


def test_every_method_balances():
    none = worst_load(balance="none")
    for balance in (dict(balance="lbl"), dict(balance="top1", temperature=0.3), dict(balance="quantile"),
                    dict(balance="loss-free", bias_rate=0.01)):
        assert worst_load(**balance) < 0.6 * none, balance


def test_biases_move_once_per_step_by_the_load_of_the_whole_step():
    run = make_run(balance="loss-free", bias_rate=0.25, accumulate=3)
    load = train_step(run, 0).statistics.load
    for block, counts in zip(run.model.blocks, load.tolist()):
        want = [0.25 * ((n < 16) - (n > 16)) for n in counts]     # 96 tokens over 6 experts
        assert block.moe.router.bias.tolist() == want


def test_every_layer_draws_its_k_from_the_choices():
    """A pure function of seed and step; validation and what is saved use the model's own K."""
    run = make_run(top_k_choices=[1, 2, 4], accumulate=2)
    drawn = [train_step(run, step).top_k for step in range(10)]
    again = make_run(top_k_choices=[1, 2, 4], accumulate=2)
    assert drawn[7] == train_step(again, 7).top_k and {k for ks in drawn for k in ks} == {1, 2, 4}
    assert any(a != b for a, b in drawn) and make_run(seed=1).settings.top_k_choices == []
    assert train.top_k_at(7, run.settings, run.config) == [1, 1]
    assert [drawn_top_k(step, 1, [1, 2, 4], 2) for step in range(10)] != drawn


# --- the loop ---------------------------------------------------------------------------------------------

def test_a_run_explains_itself(finished, corpus):
    (header, *lines), saved = evaluation.read_log(finished), parallel.read_settings(finished)
    assert header["settings"]["steps"] == 12 and header["settings"]["out"] == str(finished)
    assert {name: header[name] for name in ("settings", "model")}.items() <= saved.items()
    assert {"python", "torch"} <= set(header["versions"]) and "cpu" in header["device"]
    assert [r["step"] for r in lines] == list(range(1, 13))
    for r in lines:
        assert {"loss", "lbl", "lr", "grad_norm", "tokens_per_s", "mfu", "top_k", "load_max",
                "load_min"} <= set(r)
        assert r["mfu"] is None and r["top_k"] == [1, 1]
        assert len(r["load_max"]) == len(r["lbl_layer"]) == 2
        assert -1 <= min(r["load_min"]) <= 0 <= max(r["load_max"]) <= 5
    assert [r["step"] for r in lines if "val_loss" in r] == [12]
    assert all(1 <= rank <= 8 for rank in lines[-1]["stable_rank"])
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert parallel.checkpoints(finished) == [9, 12]
    assert data.load_encoding(finished).n_vocab == data.load_meta(corpus)["vocab_size"]
    assert saved["model"]["vocab_size"] == 320  # 300 of the data, rounded up to a multiple of 64


@pytest.mark.parametrize("changes", [
    "", "--dtype bfloat16", "--initial_top_k 3,2 --switch 0.6", "--balance loss-free --bias_rate 0.1",
    "--balance quantile --initial_top_k 6,2", "--top_k_choices 1,2,6", "--optimizer muon --dtype bfloat16",
    "--balance top1 --temperature 0.2 --accumulate 2",
    pytest.param("--device cuda --deterministic true", id="gpu", marks=pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a GPU"))])
def test_a_resumed_run_is_bit_identical(corpus, tmp_path, changes):
    whole, cut = (small_run(corpus, tmp_path / name, f"--steps 8 --save_every 2 {changes}")
                  for name in ("whole", "cut"))
    train.main(whole)

    def crash(real, run, step, stop):
        if step == 5:
            raise KeyError
        return real(run, step, stop)
    with pytest.raises(KeyError):                                 # after step 5; the checkpoint is of step 4
        train_with(cut, crash)
    assert parallel.checkpoints(tmp_path / "cut") == [2, 4] and rows(tmp_path / "cut")[-1]["step"] == 5
    train.main(["--out", str(tmp_path / "cut")])                  # everything else comes from the run
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_a_complete_run_is_left_alone(finished, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")                               # left behind; one process speaks anyway
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    train.main(["--out", str(finished), "--lr", "0.5"])           # nothing trains with it
    assert "complete" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()} == before


def test_a_resumed_run_says_with_what_and_is_one_run_at_wandb(finished, corpus, tmp_path):
    out = shutil.copytree(finished, tmp_path / "finished")
    train.main(["--out", str(out), "--steps", "14"])
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    again, = [line for line in lines[1:] if "resumed" in line]
    assert again["step"] == 12 and again["resumed"].keys() <= lines[0].keys()
    assert [row["step"] for row in rows(out)] == list(range(1, 15))
    prepared(*small_run(corpus, tmp_path / "other/finished"))     # a run of the same name
    same, resumed, other = (parallel.read_settings(each)["wandb_id"]
                            for each in (finished, out, tmp_path / "other/finished"))
    assert same == resumed != other and len(other) == 32


class DropoutBlock(Block):
    """A fork with dropout."""

    def __init__(self, config):
        super().__init__(config)
        self.dropout = torch.nn.Dropout(0.3)

    def forward(self, x, *args, **kwargs):
        y, *statistics = super().forward(x, *args, **kwargs)
        return x + self.dropout(y - x), *statistics


def test_dropout_is_drawn_by_the_step_and_not_at_all_in_validation(corpus, tmp_path, monkeypatch):
    """The same held-out loss twice; resumed bit for bit; recomputed as not recomputed."""
    monkeypatch.setattr(model_module, "Block", DropoutBlock)
    how = "--steps 4 --save_every 2 --eval_every 2"
    for name, more in (("whole", ""), ("recomputed", "--activation_checkpointing true")):
        train.main(small_run(corpus, tmp_path / name, f"{how} {more}"))
    assert curve(tmp_path / "whole") == curve(tmp_path / "recomputed")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/step-4")
    train.main(["--out", str(tmp_path / "cut")])
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    twice = [evaluation.compare_losses([tmp_path / "whole"])[0][-1][1] for _ in range(2)]
    assert twice[0] == twice[1] == pytest.approx(rows(tmp_path / "whole")[-1]["val_loss"], rel=1e-6)


class ScaleBlock(Block):
    """A fork with another parameter, and with a frozen matrix."""

    def __init__(self, config):
        super().__init__(config)
        self.scale_norm = model_module.RMSNorm(config.d_model)
        self.moe.experts.w_in.requires_grad_(False)


def test_new_and_frozen_parameters_of_a_fork_start_from_a_run(finished, corpus, tmp_path, monkeypatch, capsys,
                                                              refused):
    argv = ["--data", corpus, "--init_from", finished, "--steps", "2", "--dtype", "bfloat16", "--out"]
    with monkeypatch.context() as patch:
        patch.setattr(model_module, "Block", ScaleBlock)
        train.main(list(map(str, [*argv, tmp_path / "fork"])))
        said = "lacks model.blocks.0.scale_norm.weight, model.blocks.1.scale_norm.weight: they keep their"
        assert said in capsys.readouterr().out
    argv[3] = tmp_path / "fork"
    refused(train.main, [*argv, tmp_path / "back"], "holds model.blocks.0.scale_norm.weight, .., which this")


def test_the_commit_is_that_of_this_code(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text("x = 1\n")
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))

    def git(*args):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=b", *args], cwd=tmp_path, check=True,
                       capture_output=True)
    assert train.commit() is None
    git("init")
    assert train.commit() is None                                 # a repository of something else
    git("add", "train.py")
    git("commit", "-m", "x")
    assert re.fullmatch(r"[0-9a-f]{40}", train.commit())
    (tmp_path / "train.py").write_text("x = 2\n")
    assert train.commit().endswith(" + changes")


@pytest.mark.parametrize("dtype, error", [("float32", 1e-4), ("bfloat16", 0.02)])
def test_a_continued_model_computes_what_it_computed(corpus, tmp_path, capsys, dtype, error):
    """Before a switch, under quantile balancing, by a run with another balance: the same held-out loss."""
    first = "--steps 8 --save_every 4 --eval_every 4 --initial_top_k 3,2 --switch 0.9 --balance quantile"
    train.main(small_run(corpus, tmp_path / "first", first))
    before = rows(tmp_path / "first")[3]["val_loss"]
    train.main(["--init_from", str(tmp_path / "first/step-4"), "--balance", "lbl", "--steps", "1", "--out",
                str(tmp_path / "next"), "--data", str(corpus), "--dtype", dtype])
    shown = capsys.readouterr().out
    start = float(re.findall(r"step 0: held out ([\d.]+)", shown)[-1])
    assert start == pytest.approx(before, abs=error)
    assert "the selection biases stay as they are: balance lbl" in shown


def test_keep_and_convert_start_from_the_same_weights(corpus, tmp_path):
    """The paper's Table 3: two runs continue one checkpoint, one with the K that it has, one with another."""
    first, free, starts = tmp_path / "first", "--steps 4 --balance loss-free --bias_rate 0.1", []
    train.main(small_run(corpus, first, f"{free} --initial_top_k 3,2 --switch 0.9 --save_every 3"))
    for name, changes, top_k in (("keep", "", [3, 2]), ("convert", "--initial_top_k 1", [1, 1])):
        run = prepared(*small_run(corpus, tmp_path / name, f"{free} {changes} --init_from {first}/step-3"))
        starts.append([t.clone() for t in parallel.training_state(run.masters).values()])
        assert run.step == 0 and train_step(run, 0).top_k == top_k
    saved = list(evaluation.load_run(first / "step-3")[0].buffers())
    torch.testing.assert_close(*starts, rtol=0, atol=0)
    torch.testing.assert_close(starts[0][-2:], saved, rtol=0, atol=0)
    assert all(bias.any() for bias in saved)


@pytest.mark.parametrize("gate, kept", [("normalized", True), ("softmax", False)])
def test_experts_grow_and_keep_the_function(corpus, tmp_path, gate, kept, capsys):
    """Copies with their router rows: with a normalized gate the loss stays; a dense run is upcycled."""
    dense, base = tmp_path / "dense", f"--gate {gate} --sample_tokens 0"
    train.main(small_run(corpus, dense, f"{base} --steps 4 --n_expert 1"))
    before = rows(dense)[-1]["val_loss"]
    grown = small_run(corpus, tmp_path / "sparse", f"{base} --steps 1 --growth_noise 0")
    train.main([*grown, "--init_from", str(dense)])
    after = float(re.findall(r"step 0: held out ([\d.]+)", capsys.readouterr().out)[-1])
    assert (after == pytest.approx(before, abs=1e-4)) == kept


def test_layers_and_experts_grow_in_place():
    """l1 l1 l2 l2, and experts likewise; only copies get noise."""
    old, config = small(n_layer=2, n_expert=3), small(n_layer=4, n_expert=6)
    weights = dict(Model(old, 0).named_parameters())
    for name, p in Model(config, 1).named_parameters():
        exact, noisy, again = (train.grown(name, config, old, weights, noise, 0) for noise in (0, 0.01, 0.01))
        first, _, rest = name.removeprefix("blocks.").partition(".")
        source, is_copy = weights.get(name), torch.zeros(len(p), dtype=torch.bool)
        if name.startswith("blocks."):
            source, is_copy = weights[f"blocks.{int(first) // 2}.{rest}"], is_copy | int(first) % 2
            if len(source) != len(p):
                source, is_copy = source.repeat_interleave(2, 0), is_copy | torch.arange(len(p)) % 2
        assert torch.equal(exact, source) and torch.equal(noisy, again)
        if p.dim() > 1:                                           # norms are all 1: no spread
            assert torch.equal((noisy != exact).flatten(1).any(1), is_copy > 0)
            change = (noisy - exact)[is_copy > 0].square().mean().sqrt() / source.std()
            assert not is_copy.any() or 0.009 < change < 0.011


def test_a_token_file_alone_is_enough_to_train(corpus, tmp_path):
    (tmp_path / "alone.bin").write_bytes((corpus / "train.bin").read_bytes())
    train.main(small_run(tmp_path / "alone.bin", tmp_path / "run", "--steps 2"))
    assert len(rows(tmp_path / "run")) == 2 and "val_loss" not in rows(tmp_path / "run")[-1]


def test_conversations_from_the_beginning_and_too_little_to_hold_out(in_folder, capsys):
    """No run to tune: the preset's own steps and rate; a foreign train.bin in the folder is not looked at."""
    Path("train.bin").write_bytes(b"of nanoGPT")
    Path("a.jsonl").write_text("".join(json.dumps(
        {"instruction": f"say {i}", "output": f"{i}"}) + "\n" for i in range(6)))
    data.main(["--chats", "--source", "a.jsonl", "--tokenizer", "bytes", "--name", "a"])
    plan = train.make_plan(["--data", "data/a", *SIZES, "--out", "run"], 1)
    assert (plan.settings.steps, plan.settings.lr) == (800, train.TRAINING["laptop"]["lr"])
    train.main(["--data", "data/a", *SIZES, "--seq_len", "32", "--out", "run", "--steps", "2"])
    assert "nothing is held out" in capsys.readouterr().out and len(rows("run")) == 2


def test_validation_takes_no_more_rows_than_a_micro_batch(corpus, tmp_path, monkeypatch):
    seen, real = [], Model.forward
    monkeypatch.setattr(Model, "forward", lambda self, tokens, *args: seen.append(len(tokens)) or real(
        self, tokens, *args))
    train.main(small_run(corpus, tmp_path / "run", "--steps 1 --accumulate 4 --sample_tokens 0"))
    assert max(seen) == 2


@pytest.mark.parametrize("balance, temperature", [("top1", 0.3), ("lbl", 1.0)])
def test_settings_reach_the_optimizer_and_the_routers(corpus, tmp_path, balance, temperature):
    """.. if the balance loss uses a temperature."""
    typed = f"--beta1 0.7 --beta2 0.8 --weight_decay 0.3 --balance {balance} --temperature 0.3"
    run = prepared(*small_run(corpus, tmp_path / "run", typed))
    matrices, others = run.optimizer.param_groups
    assert matrices["betas"] == (0.7, 0.8)
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert {block.moe.router.temperature for block in run.model.blocks} == {temperature}


def test_a_presets_list_is_cut_to_the_layers_and_experts(in_folder):
    settings, config, *_ = train.resolve({"preset": "sigma-moe-tiny", "n_layer": 3, "n_expert": 6})
    assert settings.initial_top_k == [6, 6, 6] and config.n_layer == 3
    settings, *_ = train.resolve({"preset": "sigma-moe-tiny", "top_k_choices": [1, 2]})
    assert settings.initial_top_k == []                           # typed choices replace its schedule


def test_a_typed_k_takes_the_place_of_what_a_run_had(finished, in_folder):
    shutil.copytree(finished, "base")
    content = json.loads(Path("base/settings.json").read_text())
    content["settings"] |= {"top_k_choices": [1, 2], "switch_fraction": 1.0}
    Path("base/settings.json").write_text(json.dumps(content))
    for more, want in ([], ([], [1, 2], 1.0)), (["--top_k", "2"], ([], [], 0.9)), (
            ["--initial_top_k", "4,2"], ([4, 2], [], 0.9)):
        s, *_ = train.resolve(train.parse(["--init_from", "base", *more]))
        assert (s.initial_top_k, s.top_k_choices, s.switch_fraction) == want


def test_utilisation_counts_the_experts_of_this_step(monkeypatch):
    run = make_run()
    run.dtype = torch.bfloat16
    assert train.utilisation(run, [1, 1], 1e6) is None            # a CPU has no published peak
    for name in ("NVIDIA RTX A1000 Laptop GPU", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 D"):
        monkeypatch.setattr(train, "device_name", lambda _, name=name: name)
        assert train.utilisation(run, [1, 1], 1e6) is None        # nor have these in the table
    monkeypatch.setattr(train, "device_name", lambda _: "NVIDIA H100 80GB HBM3")
    for top_k in ([1, 1], [3, 1]):
        want = flops_per_token(run.config, 8, top_k) * 1e6 / 989e12
        assert train.utilisation(run, top_k, 1e6) == pytest.approx(want, rel=1e-12)


def test_two_processes_cannot_train_the_same_run(finished, tmp_path, refused):
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "step-12/manifest.json").write_text("being written, by the other one")
    with open(out / "log.jsonl", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        refused(train.main, ["--out", out, "--steps", "20"], "in use by another process")
    assert parallel.read_settings(out)["settings"]["steps"] == 12
    assert (out / "step-12").exists()                             # not set aside: it is not ours


def test_what_is_shown_and_what_a_checkpoint_was_trained_with(corpus, tmp_path, capsys):
    """More --steps move the switch behind step 4: that step is still one of K = 1, and the change is said."""
    out = tmp_path / "run"
    train.main(small_run(corpus, out, "--steps 4 --initial_top_k 3,2 --switch 0.5 --eval_every 1"))
    shown = capsys.readouterr().out
    assert len(re.findall(r"held out \d", shown)) >= 4 and "step 0: held out" in shown
    assert len(re.findall(r"step \d/4: loss [\d.]+, lr .* tokens/s, [\d.]+ minutes left", shown)) == 4
    for part in ("layer 0", "layer 1", "sample:", "log.jsonl", "step-4", "try next", "eval.py loss"):
        assert part in shown
    train.main(["--out", str(out), "--steps", "12", "--save_every", "6", "--keep", "9"])
    shown = capsys.readouterr().out
    assert "resuming from step 4\nexperts per layer: [1, 1] so far, [3, 2] from here on" in shown
    assert parallel.read_settings(out)["settings"]["steps"] == 12
    assert [row["step"] for row in rows(out)] == list(range(1, 13))
    assert [evaluation.load_run(out / f"step-{step}")[2] for step in (4, 6, 12)] == [[1, 1], [3, 2], [1, 1]]


def test_groups_keep_a_factor_of_their_own():
    run = make_run()
    run.optimizer.param_groups[1]["lr_factor"] = 0.1
    train_step(run, 8)
    a, b = (group["lr"] for group in run.optimizer.param_groups)
    assert b == pytest.approx(0.1 * a) and a == learning_rate(8, run.settings)


def test_an_ignored_hangup_stays_ignored():
    """As under nohup."""
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with contextlib.ExitStack() as stack:
        stop = train.stop_on_signals(stack)
        os.kill(os.getpid(), signal.SIGHUP)
    assert signal.signal(signal.SIGHUP, old) is signal.SIG_IGN and not stop.requested


def save_slowly(argv):
    real = parallel.checksums
    parallel.checksums = lambda *args: print("writing") or time.sleep(60) or real(*args)
    train.main(argv)


def test_the_second_interrupt_ends_at_once(corpus, tmp_path):
    """.. also while a checkpoint is written, which SIGTERM and the first one wait for."""
    run = Forked(tmp_path, save_slowly, small_run(corpus, tmp_path / "run", "--steps 99 --save_every 5"))
    run.wait_for("writing")
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(run.pid, number)
        assert run.end(0.5)[0] is None
    os.kill(run.pid, signal.SIGINT)
    code, err = run.end()
    assert code == -signal.SIGINT and "Traceback" not in err and parallel.checkpoints(tmp_path / "run") == []


def test_the_log_is_also_shown_elsewhere(corpus, tmp_path, monkeypatch, capsys):
    """The same numbers; without the package one line says what is missing, and no directory is made."""
    argv, sent = small_run(corpus, tmp_path / "run", "--steps 2 --wandb true"), []
    wandb = SimpleNamespace(init=lambda id, **_: contextlib.nullcontext(
        SimpleNamespace(log=lambda row, step: sent.append((id, step, row["loss"], row["load_max"])))))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train.main(argv)
    id = parallel.read_settings(tmp_path / "run")["wandb_id"]
    assert sent == [(id, row["step"], row["loss"], row["load_max"]) for row in rows(tmp_path / "run")]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit):
        train.main([*argv, "--out", str(tmp_path / "none")])
    assert "pip install -e '.[log]'" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_numbers_that_are_not_finite_are_null_in_the_log_and_no_text(tmp_path):
    run = make_run()
    row = {"step": 1, "loss": math.nan, "norms": [-math.inf, 0.5], "out": "out/NaN-1"}
    with open(tmp_path / "log.jsonl", "a+b", buffering=0) as run.log:
        train.write_row(run, row)
    assert json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=pytest.fail) == {
        "step": 1, "loss": None, "norms": [None, 0.5], "out": "out/NaN-1"}
    with torch.no_grad():
        for p in run.masters.named.values():
            p.fill_(float("nan"))
    assert all(map(math.isnan, train.stable_ranks(run.masters)))
    with pytest.raises(ValueError, match="not finite"):
        evaluation.generate(run.model, torch.zeros(1, 2, dtype=torch.int64), 3)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_saves_and_the_run_goes_on_later(corpus, tmp_path, capsys, name):
    """Ctrl-C under torchrun: test_faults.py."""
    number, out = getattr(signal, name), tmp_path / "run"
    before = signal.getsignal(number)
    train_until(small_run(corpus, out, "--steps 9 --save_every 9"), 4, number)
    assert "stopped and saved after step 4" in capsys.readouterr().out and parallel.checkpoints(out) == [4]
    assert signal.getsignal(number) is before
    train.main(["--out", str(out)])
    assert [row["step"] for row in rows(out)] == list(range(1, 10))


# --- devices ---------------------------------------------------------------------------------------------

def test_a_device_without_bf16_trains_in_fp32_unless_asked_and_nothing_else_compiles(monkeypatch):
    for native, asked, dtype in ((False, "auto", torch.float32), (False, "bfloat16", torch.bfloat16),
                                 (True, "float32", torch.float32), (True, "auto", torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation, native=native: native or including_emulation)
        assert train.precision(Settings(dtype=asked), small(n_expert=1), "cuda") == (
            dtype, dtype == torch.bfloat16)
    assert train.precision(Settings(), small(d_expert=12), "cuda") == (torch.bfloat16, False)
    with pytest.raises(ValueError, match="other widths: in bfloat16 widths must be multiples of 8"):
        train.precision(Settings(dtype="bfloat16", compile="true"), small(d_expert=12), "cpu")
    assert train.precision(Settings(), small(n_expert=1), "cpu") == (torch.float32, False)
    assert train.precision(Settings(dtype="bfloat16"), small(n_expert=1), "cpu") == (torch.bfloat16, False)


@pytest.mark.parametrize("width, dtype, said", [
    (8, "float32", ""), (6, "float32", "the experts run one after the other"),
    (6, "float32", "widths must be multiples of 4"), (12, "bfloat16", "widths must be multiples of 8")])
def test_widths_that_grouped_mm_refuses_are_said(capsys, width, dtype, said):
    train.precision(Settings(dtype=dtype), small(d_expert=width), "cpu")
    out = capsys.readouterr().out
    assert said in out and bool(said) == bool(out)


def test_validation_needs_no_float64_on_the_device(monkeypatch):
    """MPS has none: what becomes float64 was fetched with cpu() before."""
    fetched, cpu, double = [], torch.Tensor.cpu, torch.Tensor.double
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: fetched.append(cpu(t).clone()) or fetched[-1])

    def to_float64(t):
        assert any(t is each for each in fetched), "Cannot convert a MPS Tensor to float64"
        return double(t)
    monkeypatch.setattr(torch.Tensor, "double", to_float64)
    tokens = np.random.default_rng(0).integers(0, 64, 200).astype(np.uint16)
    evaluation.validate(Model(small()), data.Sampler(tokens, 16, 0), 1, rows=3)


# --- compiled blocks --------------------------------------------------------------------------------------

@contextlib.contextmanager
def cheap_compiler():
    """--compile true with a backend that only captures graphs -> dynamo's counters."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    real = parallel.compile_and_recompute
    try:
        parallel.compile_and_recompute = lambda *args: real(*args, backend="aot_eager")
        yield torch._dynamo.utils.counters
    finally:
        parallel.compile_and_recompute = real
        torch._dynamo.reset()


def graphs_of(argv):
    """train.main -> how many graphs dynamo captured, and where it broke."""
    with cheap_compiler() as counters:
        train.main(argv)
        return counters["stats"]["unique_graphs"], dict(counters["graph_break"])


COMPILED = ("--dtype bfloat16 --d_expert 16 --seq_len 64 --steps 4 --eval_every 2 --eval_tokens 512 "
            "--initial_top_k 3 --switch 0.5 --balance top1 --activation_checkpointing true --accumulate 2")


@pytest.fixture(scope="module")
def not_compiled(tmp_path_factory):
    """A run on packed conversations, and their folder."""
    root = tmp_path_factory.mktemp("eager")
    records = ({"instruction": f"say {i}", "output": "word " * (1 + i % 9)} for i in range(200))
    (root / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    data.prepare(root / "chats", [str(root / "a.jsonl")], "bytes", chats=True)
    assert graphs_of(small_run(root / "chats", root / "run", COMPILED)) == (0, {})    # auto: not on a CPU
    return root


@pytest.mark.parametrize("world, layout", [(1, ""), (2, "--ep 2")])
def test_a_compiled_run_has_few_graphs_and_the_numbers_of_an_eager_one(
        ranks, tmp_path, not_compiled, world, layout):
    """With recomputation, validations, a switch of K and any padding, no graph breaks.

    One process: two blocks share 4 graphs (K = 3 and 1, with gradients and without), the loss of a chunk has
    2, and the addition of gradients one for each shape.  Many: attention and the loss with gradients and
    without, routers for each K, experts for any number of rows."""
    argv = small_run(not_compiled / "chats", tmp_path / "run", f"{COMPILED} --compile true {layout}")
    for answer in ranks(world, graphs_of, argv, limit=300):
        n, breaks = answer.value
        assert not breaks and 4 <= n <= 12                        # 8 micro-batches, 2 validations
    for a, b in zip(rows(tmp_path / "run"), rows(not_compiled / "run"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3 if layout else 1e-3)
        assert a.get("val_loss", 0) == pytest.approx(b.get("val_loss", 0), rel=2e-3 if layout else 1e-3)
