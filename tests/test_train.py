"""Schedules, the training step against a slow reference, the loop, its log, and resuming."""

import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ENV, ROOT, curve, prepared, rows, small, small_run, train_until, train_with
from test_exact import make_run as make_run_of

import data
import eval as evaluation
import parallel
import train
from model import Model, flops_per_token
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


@pytest.mark.parametrize("balance", [dict(balance="lbl"), dict(balance="top1", temperature=0.3),
                                     dict(balance="loss-free", bias_rate=0.01), dict(balance="quantile")],
                         ids=lambda b: b["balance"])
def test_every_method_balances(balance):
    """Forty steps on random tokens: the worst expert is far less loaded than without it."""
    worst = []
    for changes in (balance, dict(balance="none")):
        run = make_run(lbl_coef=0.3, n_expert=12, **changes)
        run.settings.steps = 40
        with torch.no_grad():
            for block in run.model.blocks:
                block.moe.router.weight[0] += 0.5                 # a favourite expert
        rows = [logged(run, i) for i in range(40)]
        worst.append(np.mean([max(row["load_max"]) for row in rows[-10:]]))
    assert worst[0] < 0.6 * worst[1]


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
    whole, cut = (small_run(corpus, tmp_path / name, f"--steps 12 {changes}") for name in ("whole", "cut"))
    train.main(whole)

    def crash(real, run, step, stop):
        if step == 8:
            raise KeyError
        return real(run, step, stop)
    with pytest.raises(KeyError):                                 # after step 8; the checkpoint is of step 6
        train_with(cut, crash)
    assert parallel.checkpoints(tmp_path / "cut") == [3, 6] and rows(tmp_path / "cut")[-1]["step"] == 8
    train.main(["--out", str(tmp_path / "cut")])                  # everything else comes from the run
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_a_complete_run_is_left_alone(finished, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")                               # left behind; one process speaks anyway
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    train.main(["--out", str(finished)])
    assert "complete" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()} == before


def test_state_of_another_optimizer_is_refused(finished, tmp_path, refused):
    """A fork's optimizer would begin without its momentum, in silence."""
    out = shutil.copytree(finished, tmp_path / "run")
    saved = (out / "settings.json").read_text().replace('"steps": 12', '"steps": 14')
    (out / "settings.json").write_text(saved.replace('"adamw"', '"muon"'))
    refused(train.main, ["--out", out], "exp_avg.blocks.0.attn.out.weight, .., which this code's")


def test_what_is_shown(corpus, tmp_path, capsys):
    train.main(small_run(corpus, tmp_path / "run", "--steps 4 --eval_every 1"))
    out = capsys.readouterr().out
    assert len(re.findall(r"held out \d", out)) >= 4 and "step 0: held out" in out
    assert len(re.findall(r"step \d/4: loss [\d.]+, lr .* tokens/s, [\d.]+ minutes left", out)) == 4
    for part in ("layer 0", "layer 1", "sample:", "log.jsonl", "step-4", "try next", "eval.py loss"):
        assert part in out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_init_from_starts_with_the_weights_of_another_run(finished, corpus, tmp_path, dtype, capsys):
    train.main(["--data", str(corpus), "--out", str(tmp_path / "next"), "--init_from", str(finished),
                "--steps", "1", "--seq_len", "16", "--sample_tokens", "0", "--dtype", dtype])
    start = float(re.search(r"step 0: held out ([\d.]+)", capsys.readouterr().out)[1])
    assert start == pytest.approx(rows(finished)[-1]["val_loss"], abs=1e-4 if dtype == "float32" else 0.02)


def test_keep_and_convert_start_from_the_same_weights(corpus, tmp_path, capsys):
    """The paper's Table 3: two runs continue one checkpoint, one with the K that it has, one with another.

    Selection biases are kept, also where a balance loss takes over and they do not move again."""
    first, free, starts = tmp_path / "first", "--steps 4 --balance loss-free --bias_rate 0.1", []
    train.main(small_run(corpus, first, f"{free} --initial_top_k 3,2 --switch 0.9 --save_every 3"))
    for name, changes in (("keep", free), ("convert", f"{free} --initial_top_k 1"), ("lbl", "--balance lbl")):
        run = prepared(*small_run(corpus, tmp_path / name, changes), "--init_from", f"{first}/step-3")
        assert run.step == 0
        starts.append([t.clone() for t in parallel.training_state(run.masters).values()])
        assert train_step(run, 0).top_k == ([1, 1] if name == "convert" else [3, 2])
    kept, converted, balanced = starts
    saved = list(evaluation.load_run(first / "step-3")[0].buffers())
    torch.testing.assert_close(kept, converted, rtol=0, atol=0)
    torch.testing.assert_close(kept[-2:], saved, rtol=0, atol=0)
    torch.testing.assert_close(kept, balanced, rtol=0, atol=0)
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
    old, config = small(n_layer=2, n_expert=3), small(n_layer=4, n_expert=6)
    weights = dict(Model(old, 0).named_parameters())
    for name, p in Model(config, 1).named_parameters():
        exact = train.grown(name, config, old, weights, 0.0, 0)
        noisy = train.grown(name, config, old, weights, 0.01, 0)
        assert exact.shape == p.shape == noisy.shape
        if not name.startswith("blocks."):
            assert torch.equal(exact, weights[name]) and torch.equal(noisy, exact)
            continue
        _, layer, rest = name.split(".", 2)
        source = weights[f"blocks.{int(layer) // 2}.{rest}"]      # l1 l1 l2 l2
        each = range(len(p))
        grows = len(p) != len(source)
        for i in each:
            first = int(layer) % 2 == 0 and (i % 2 == 0 or not grows)
            assert torch.equal(exact[i], source[i // 2 if grows else i])
            assert torch.equal(noisy[i], exact[i]) == first or p.dim() == 1      # norms are all 1: no spread
        assert torch.equal(noisy, train.grown(name, config, old, weights, 0.01, 0))
        if p.dim() > 1:
            change = (noisy - exact).square().mean().sqrt() / source.std()
            assert 0.005 < change < 0.011 or int(layer) % 2 == 0


def test_a_token_file_alone_is_enough_to_train(corpus, tmp_path):
    (tmp_path / "alone.bin").write_bytes((corpus / "train.bin").read_bytes())
    train.main(small_run(tmp_path / "alone.bin", tmp_path / "run", "--steps 2"))
    assert len(rows(tmp_path / "run")) == 2 and "val_loss" not in rows(tmp_path / "run")[-1]


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


def test_what_a_checkpoint_was_trained_with_stays_its_own(corpus, tmp_path, capsys):
    """More --steps move the switch behind step 4: that step is still one of K = 1, and the change is said."""
    out = tmp_path / "run"
    train.main(small_run(corpus, out, "--steps 4 --initial_top_k 3,2 --switch 0.5"))
    train.main(["--out", str(out), "--steps", "12", "--save_every", "6", "--keep", "9"])
    shown = capsys.readouterr().out
    assert "resuming from step 4\nexperts activated per layer: [1, 1] so far, [3, 2] from here on" in shown
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
    try:
        with train.Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)


SLOW_TO_SAVE = """
import time
import parallel, train
real = parallel.publish
parallel.publish = lambda *args: print("writing", flush=True) or time.sleep(60) or real(*args)
train.main()
"""


def test_the_second_interrupt_ends_at_once(corpus, tmp_path):
    """.. also while a checkpoint is written, which SIGTERM and the first one wait for."""
    (tmp_path / "slow.py").write_text(SLOW_TO_SAVE)
    argv = small_run(corpus, tmp_path / "run", "--steps 100000 --save_every 5")
    with subprocess.Popen([sys.executable, tmp_path / "slow.py", *argv], env=ENV, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while "writing" not in process.stdout.readline():
            assert process.poll() is None
        for number in (signal.SIGTERM, signal.SIGINT):
            process.send_signal(number)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in err and parallel.checkpoints(tmp_path / "run") == []


def test_the_log_is_also_shown_elsewhere(corpus, tmp_path, monkeypatch, capsys):
    """The same numbers; without the package one line says what is missing, and no directory is made."""
    argv = small_run(corpus, tmp_path / "run", "--steps 2 --wandb true")
    wandb = pytest.importorskip("wandb", reason="needs the extra log")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    sent, real = [], wandb.sdk.wandb_run.Run.log
    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log",
                        lambda self, row, step: sent.append(row) or real(self, row, step=step))
    train.main(argv)
    assert len(sent) == 2 and sent[1]["loss"] == rows(tmp_path / "run")[1]["loss"]
    assert sent[1]["load_max"] == rows(tmp_path / "run")[1]["load_max"]
    assert list((tmp_path / "run/wandb").glob("offline-run-*"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit):
        train.main([*argv, "--out", str(tmp_path / "none")])
    assert "pip install -e '.[log]'" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_numbers_that_are_not_finite_are_null_in_the_log(tmp_path):
    run = make_run()
    row = {"step": 1, "loss": math.nan, "norms": [math.inf, 0.5]}
    with open(tmp_path / "log.jsonl", "a+b", buffering=0) as run.log:
        train.write_row(run, row)
    assert json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=pytest.fail) == {
        "step": 1, "loss": None, "norms": [None, 0.5]}


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


def test_a_full_disk_ends_in_one_line_and_what_was_saved_stays(corpus, tmp_path):
    """On a real file system of its own, where one can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs privileges")
    try:
        argv = small_run(corpus, disk / "run", "--steps 150 --save_every 1 --keep 99")
        command = [sys.executable, ROOT / "train.py", *argv]
        done = subprocess.run(command, env=ENV, capture_output=True, text=True)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 2 and last.startswith("error: could not write"), done.stderr
        assert "MB are free" in last and "Traceback" not in done.stderr
        kept = parallel.checkpoints(disk / "run")
        assert kept and kept == list(range(1, len(kept) + 1))
        for step in kept:
            parallel.verify(disk / "run" / f"step-{step}")
    finally:
        subprocess.run(["umount", disk], check=True)


# --- devices that cannot do what is asked for -------------------------------------------------------------

def test_a_device_without_bf16_trains_in_fp32_unless_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    for asked, dtype in (("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        assert train.compute_dtype(Settings(dtype=asked), small(n_expert=1), "cuda") == dtype
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    found = [train.compute_dtype(Settings(), small(n_expert=1), device) for device in ("cuda", "cpu")]
    assert found == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("width, dtype, said", [
    ("8", "float32", None), ("6", "float32", "widths must be multiples of 4"),
    ("12", "bfloat16", "widths must be multiples of 8")])
def test_widths_that_grouped_mm_refuses_are_said_once(corpus, tmp_path, capsys, width, dtype, said):
    train.main(small_run(corpus, tmp_path / "run", f"--steps 2 --d_expert {width} --dtype {dtype}"))
    out = capsys.readouterr().out
    assert out.count("the experts run one after the other") == bool(said) and (not said or said in out)


# --- compiled blocks --------------------------------------------------------------------------------------

@pytest.fixture
def cheap_compiler(monkeypatch):
    """--compile true with a backend that only captures graphs -> dynamo's counters."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    real = parallel.compile_and_recompute
    monkeypatch.setattr(parallel, "compile_and_recompute",
                        lambda *args: real(*args, backend="aot_eager"))
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def test_blocks_compile_once_for_each_k_shape_and_grad_mode(corpus, tmp_path, cheap_compiler):
    """A run with recomputation, validations and a switch: no graph breaks, and the numbers of the eager run.

    Two blocks share 4 graphs (K = 3 and 1, with gradients and without); the loss of a chunk has 2, and the
    addition of gradients one for each shape."""
    how = ("--dtype bfloat16 --d_expert 16 --steps 4 --eval_every 2 --eval_tokens 512 --sample_tokens 0 "
           "--initial_top_k 3 --switch 0.5 --balance top1 --activation_checkpointing true --accumulate 2")
    train.main(small_run(corpus, tmp_path / "compiled", f"{how} --compile true"))
    compiled = cheap_compiler["stats"]["unique_graphs"]
    assert not cheap_compiler["graph_break"]
    assert 4 <= compiled <= 4 + 2 + 5
    train.main(small_run(corpus, tmp_path / "eager", how))
    assert cheap_compiler["stats"]["unique_graphs"] == compiled                       # auto: not on a CPU
    for a, b in zip(rows(tmp_path / "compiled"), rows(tmp_path / "eager"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a.get("val_loss", 0) == pytest.approx(b.get("val_loss", 0), rel=1e-3)


def test_packed_rows_with_padding_compile_once(cheap_compiler):
    """Whatever the documents and however much padding: shapes do not change."""
    model = Model(small(d_expert=16, d_model=64, vocab_size=256))
    masters = parallel.MasterWeights(model, torch.bfloat16)
    parallel.compile_and_recompute(model, masters, True, False)
    graphs = []
    for seed in range(4):
        doc = torch.randint(-1, 3, (4, 16), generator=torch.Generator().manual_seed(seed)).sort(-1).values
        tokens = torch.randint(0, 256, (4, 16))
        out = model(tokens, tokens, doc=doc.flip(-1))
        (out.loss / 64).backward()
        assert out.n_tokens == int((doc >= 0).sum()) == int(out.load[0].sum())
        graphs.append(cheap_compiler["stats"]["unique_graphs"])
    assert not cheap_compiler["graph_break"] and graphs[1] == graphs[3]


def test_what_cannot_be_compiled_is_said(corpus, tmp_path, refused):
    argv = small_run(corpus, tmp_path / "run", "--compile true --dtype float32")
    refused(train.main, argv, "compile (true) needs --dtype bfloat16")


def run_with_cheap_compiler(argv):
    """train.main on this rank -> what dynamo counted."""
    real = parallel.compile_and_recompute
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        parallel.compile_and_recompute = lambda *args: real(*args, backend="aot_eager")
        train.main(argv)
    finally:
        parallel.compile_and_recompute = real
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], dict(counters["graph_break"])


@pytest.mark.parametrize("layout", ["--ep 2", "--replicate 2"])
def test_many_processes_compile_what_lies_between_the_hooks(ranks, corpus, tmp_path, layout):
    """With recomputation, validations and a switch of K: no breaks, few graphs, the numbers of the eager run.

    Attention: with gradients and without; routers: each K; experts: any number of rows; the loss."""
    how = (f"--dtype bfloat16 --d_expert 16 --eval_every 2 --eval_tokens 512 --initial_top_k 3 --switch 0.5 "
           f"--activation_checkpointing true --accumulate 2 {layout}")
    found = []
    for name, more in (("compiled", "true"), ("eager", "false")):
        argv = small_run(corpus, tmp_path / name, f"{how} --steps 10 --compile {more}")
        found.append([a.value for a in ranks(2, run_with_cheap_compiler, argv)])
    compiled, eager = found
    assert not any(breaks for _, breaks in compiled) and {n for n, _ in eager} == {0}
    assert all(5 <= n <= 16 for n, _ in compiled)                 # .. of 20 micro-batches and 5 validations
    for a, b in zip(rows(tmp_path / "compiled")[:4], rows(tmp_path / "eager")):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)
        assert a.get("val_loss", 0) == pytest.approx(b.get("val_loss", 0), rel=2e-3)


def test_what_is_compiled_without_being_asked():
    """On CUDA, in bf16."""
    where = (("cuda", torch.bfloat16), ("cuda", torch.float32), ("cpu", torch.bfloat16))
    found = [train.compiles(Settings(), *each) for each in where]
    assert found == [True, False, False]


@pytest.mark.parametrize("K", [1, 3])
def test_recomputation_routes_as_before(K):
    """With selection biases and padding: torch raises CheckpointError if a second forward pass differs."""
    grads = []
    for recomputed in (False, True):
        model = Model(small(top_k=K), seed=0)
        for block in model.blocks:
            block.moe.router.bias.copy_(torch.linspace(-0.05, 0.05, 6))
        if recomputed:
            model.recompute = True
        tokens = torch.arange(48).view(3, 16)
        out = model(tokens, tokens, doc=torch.tensor([0] * 9 + [1] * 4 + [-1] * 3).expand(3, 16))
        (out.loss + out.prob_sum.square().sum()).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*grads)


def test_a_batch_cut_ahead_is_only_taken_for_its_step(corpus, tmp_path):
    """The next step takes what was cut while the device computed; any other cuts its own."""
    run = prepared(*small_run(corpus, tmp_path / "run", "--steps 9"))
    cut, real = [], run.corpus.train.rows
    run.corpus.train.rows = lambda first, *rest: cut.append(first) or real(first, *rest)
    for step in (0, 1, 4):
        train_step(run, step)
    assert cut == [0, 8, 16, 32, 40]
