"""Validation, baselines, text, drawings."""

import json
import math
import re
import shutil
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SIZES, small

import data
import eval as evaluation
import train
from model import Model


def test_validation_is_cross_entropy_over_all_windows():
    model = Model(small(vocab_size=300)).double()
    tokens = np.random.default_rng(0).integers(0, 300, 16 * 10 + 5).astype(np.uint16)
    loss, sums, windows = evaluation.validate(model, data.Sampler(tokens, 16, 0), 1, rows=3)
    want = [F.cross_entropy(model(torch.from_numpy(tokens[i:i + 16].astype(np.int64))[None])[0],
                            torch.from_numpy(tokens[i + 1:i + 17].astype(np.int64)))
            for i in range(0, 160, 16)]
    assert loss == pytest.approx(torch.stack(want).mean().item(), rel=1e-10)
    assert windows.tolist() == list(range(10)) and sums.load.sum(-1).tolist() == [160, 160]
    assert evaluation.validate(model, data.Sampler(tokens, 16, 0), 1, limit=50)[2].tolist() == [0, 4, 9]


def slow_kneser_ney(tokens, V):
    """Chen and Goodman's interpolated Kneser-Ney with dictionaries."""
    three = Counter(zip(tokens, tokens[1:], tokens[2:]))
    two, one = Counter((b, c) for _, b, c in three), Counter()
    for _, c in two:
        one[c] += 1

    def table(grams):
        ones, twos = sum(n == 1 for n in grams.values()), sum(n == 2 for n in grams.values())
        total, distinct = defaultdict(int), defaultdict(int)
        for gram, n in grams.items():
            total[gram[:-1]] += n
            distinct[gram[:-1]] += 1
        return grams, ones / max(1, ones + 2 * twos), total, distinct
    tables = [table({(c,): n for c, n in one.items()}), table(two), table(three)]

    def prob(a, b, c):
        p = 1 / V
        for (grams, d, total, distinct), gram in zip(tables, [(c,), (b, c), (a, b, c)]):
            n = total[gram[:-1]]
            if n:
                p = (max(grams.get(gram, 0) - d, 0) + d * distinct[gram[:-1]] * p) / n
        return p
    return prob


def test_trigram_equals_its_definition():
    rng = np.random.default_rng(1)
    tokens = (rng.integers(0, 6, 400) * rng.integers(0, 2, 400)).tolist()
    asked = rng.integers(0, 9, 300)                               # tokens that were never seen, too
    trigram, slow = evaluation.Trigram(np.array(tokens, np.uint16), 9), slow_kneser_ney(tokens, 9)
    want = [slow(*asked[i:i + 3].tolist()) for i in range(298)]
    np.testing.assert_allclose(trigram.prob(asked), want, rtol=1e-12)
    for context in ([0, 0], [3, 5], [8, 8]):
        total = sum(trigram.prob(np.array([*context, c]))[0] for c in range(9))
        assert total == pytest.approx(1.0, rel=1e-12)


def test_token_bytes_add_up_to_the_text():
    text = "naïve text 日本 " * 20
    encoding = data.build_encoding("bpe", 290, [text])
    sizes = evaluation.token_bytes(encoding)
    assert sizes[encoding.encode_ordinary(text)].sum() == len(text.encode())
    assert (sizes[-5:] == 0).all() and len(sizes) == encoding.n_vocab


def test_loss_command_prints_all_models_on_the_same_text(finished, corpus, tmp_path, capsys):
    dense = tmp_path / "dense"
    train.main(["--data", str(corpus), "--out", str(dense), "--steps", "6", *SIZES, "--n_expert", "1"])
    capsys.readouterr()
    evaluation.main(["loss", "--ckpt", str(finished), str(dense)])
    out = capsys.readouterr().out
    rows = {line[:32].strip(): line.split() for line in out.splitlines()[2:-1]}
    assert float(rows["uniform over the vocabulary"][-3]) == pytest.approx(math.log(300), abs=1e-3)
    assert "interpolated trigram" in rows and "steps" in out.splitlines()[-1]
    assert len(rows) == 4
    for row in rows.values():
        loss, perplexity, bits = map(float, row[-3:])
        assert perplexity == pytest.approx(math.exp(loss), rel=1e-2)
    # the model's own row is the last validation of its log,
    # and bits per byte is the loss of the text per byte
    last = [r["val_loss"] for r in evaluation.read_log(finished)[1:] if "val_loss" in r][-1]
    table, n, _ = evaluation.compare_losses([finished])
    assert table[2][1] == pytest.approx(last, rel=1e-6)
    val, encoding = data.load_tokens(corpus / "val.bin"), data.load_encoding(corpus)
    windows = (len(val) - 1) // 16
    text_bytes = evaluation.token_bytes(encoding)[np.array(val)[2:windows * 16 + 1]].sum()
    assert table[2][3] == pytest.approx(last * n / math.log(2) / text_bytes, rel=1e-6)


@pytest.mark.parametrize("a, b, words", [
    ([(2, 5.0), (4, 3.0), (6, 2.0)], [(3, 4.0), (6, 3.0)], "after 4 of its 6"),
    ([(2, 5.0), (4, 4.5)], [(4, 4.0)], "did not reach")])
def test_steps_to_another_runs_loss(tmp_path, a, b, words):
    for name, rows in (("a", a), ("b", b)):
        (tmp_path / name).mkdir()
        lines = [{"settings": {}}] + [{"step": s, "loss": 9.0, "val_loss": v} for s, v in rows]
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert words in evaluation.first_below(tmp_path / "a", tmp_path / "b")


def test_sample_command_writes_the_prompt_and_more(finished, capsys):
    options = ["--prompt", "abc", "--tokens", "20", "--n", "2", "--seed", "3"]
    evaluation.main(["sample", "--ckpt", str(finished), *options])
    first = capsys.readouterr().out
    assert first.count("abc") >= 2 and "-" * 80 in first
    evaluation.main(["sample", "--ckpt", str(finished / "step-12"), *options])
    assert capsys.readouterr().out == first                       # the same seed, the same text


def test_load_drawing_fits_80_columns_and_shows_every_expert():
    load = torch.tensor([[10] * 96, [0] * 95 + [960]])
    lines = evaluation.draw_load(load).splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) == 4
    assert lines[0].count("▄") == 48 and lines[1].count("▄") == 48 and "+0%" in lines[0]
    assert lines[3].endswith("█") and "+9500%" in lines[2] and "-100%" in lines[2]


def test_a_run_is_found_by_its_directory_or_a_step(finished):
    model, saved, top_k = evaluation.load_run(finished)
    assert saved["model"]["n_expert"] == 6 and top_k == [1, 1]
    again, _, _ = evaluation.load_run(finished / "step-12")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


# --- routing ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def switched(corpus, tmp_path_factory):
    """A run that switches to fewer experts at its half."""
    out = tmp_path_factory.mktemp("runs") / "switched"
    train.main(["--data", str(corpus), "--out", str(out), "--steps", "12", *SIZES, "--initial_top_k", "3",
                "--switch", "0.5", "--eval_every", "2", "--keep", "9"])
    return out


@pytest.mark.parametrize("step", ["step-6", "step-12"])
def test_a_look_equals_routing_one_window_at_a_time(switched, corpus, step):
    """Every token of the held-out text, its expert in every layer, the sums; K is 3, then 1, in layer 0."""
    run = evaluation.look(switched / step)
    assert run.top_k == ([3, 1] if step == "step-6" else [1, 1])
    model, _, _ = evaluation.load_run(switched / step)
    val = torch.from_numpy(np.array(data.load_tokens(corpus / "val.bin")).astype(np.int64))
    n = (len(val) - 1) // 16 * 16
    assert torch.equal(run.tokens, val[:n])
    logits = [[], []]
    for layer, block in enumerate(model.blocks):
        block.moe.router.register_forward_hook(
            lambda m, x, _, layer=layer: logits[layer].append(x[0] @ m.weight.T))
    for window in val[:n].view(-1, 1, 16):
        model(window, top_k=run.top_k)
    for layer in (0, 1):
        prob = torch.cat(logits[layer]).softmax(-1)
        assert torch.equal(run.experts[layer], prob.argmax(-1))
        load = prob.topk(run.top_k[layer]).indices.flatten().bincount(minlength=6)
        assert torch.equal(run.statistics.load[layer], load)
        torch.testing.assert_close(run.statistics.prob_sum[layer], prob.sum(0), rtol=1e-4, atol=1e-4)
        assert run.statistics.top_sum[layer].item() == pytest.approx(prob.amax(-1).sum().item(), rel=1e-4)


def test_share_by_context_is_what_a_router_by_token_id_lacks():
    tokens = torch.tensor([0, 0, 0, 0, 1, 1, 2, 4])
    experts = torch.tensor([5, 5, 5, 3, 3, 3, 1, 0])
    counts = evaluation.token_experts(tokens, experts, 6)
    assert counts.shape == (5, 6) and counts[0].tolist() == [0, 0, 0, 1, 0, 3] and counts.sum() == 8
    assert evaluation.share_by_context(counts) == pytest.approx(1 / 6)          # 2 and 4 were seen once
    assert evaluation.share_by_context(counts[1:]) == 0 == evaluation.share_by_context(counts[2:])


def test_co_activation_is_1_for_one_choice_and_0_for_independent_ones():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 8, (2, 20_000), generator=generator)
    half = torch.where(torch.rand(20_000, generator=generator) < 0.5, a, b)     # a, every second time
    share = evaluation.co_activation(torch.stack([a, (a + 3) % 8, b, half]), 8)
    assert torch.equal(share, share.T) and share[0, 1] == pytest.approx(1, abs=0.01)
    assert share[0, 2] == pytest.approx(0, abs=1e-3)
    same, other = 0.5 + 0.5 / 8, 0.5 / 8                          # of the 8 values of half, given a
    told = math.log(8) + same * math.log(same) + 7 * other * math.log(other)
    assert share[0, 3].item() == pytest.approx(told / math.log(8), abs=0.01)
    assert evaluation.co_activation(torch.zeros(2, 10, dtype=torch.int64), 1)[0, 1] == 0
    for n in (200, 2000):                                         # few tokens
        c, d = torch.randint(0, 8, (2, n), generator=generator)
        share = evaluation.co_activation(torch.stack([c, d, c]), 8)
        assert share[0, 1] < 0.05 and share[0, 2] == pytest.approx(1, abs=1e-6)


def test_routing_command_compares_runs_in_80_columns(switched, finished, capsys):
    evaluation.main(["routing", str(switched), str(finished)])
    out = capsys.readouterr().out
    paths = ("before the switch", f"{finished.parent}")           # as long as they are
    wide = [line for line in out.splitlines() if len(line) > 80 and not any(p in line for p in paths)]
    assert not wide
    for part in ("layer 1", "expert depends on context", "co-activation", "uniform", "most and two least"):
        assert part in out
    log = evaluation.read_log(switched)[1:]
    line = next(line for line in out.splitlines() if "before the switch" in line)
    losses = {row["step"]: row["val_loss"] for row in log if "val_loss" in row}
    for step in (6, 8, 12):                                       # the switch is after 6 of 12 steps
        assert f"{losses[step]:.4f} (step {step})" in line
    table = out[out.index("from a fair share"):].splitlines()
    compared = next(line for line in table if "switched" in line)
    end = [row for row in log if row["step"] > 0.9 * 12]
    want = 100 * np.mean([row["load_max"][0] for row in end])
    assert f"{want:+.0f}/" in compared


def test_a_dense_run_has_nothing_to_route(corpus, tmp_path, capsys):
    train.main(["--data", str(corpus), "--out", str(tmp_path / "dense"), "--steps", "1", *SIZES, "--n_expert",
                "1"])
    evaluation.main(["routing", str(tmp_path / "dense")])
    assert "max    +0% min   +0%" in capsys.readouterr().out


def test_routing_draws_every_picture(switched, finished, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    folder = tmp_path / "pictures"
    evaluation.main(["routing", str(switched), str(finished), "--png", str(folder)])
    names = ["coactivation.png", "deviation.png", "gate.png", "load.png", "switch.png"]
    assert sorted(p.name for p in folder.iterdir()) == names
    for path in folder.iterdir():
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(path.read_bytes()[16:20], "big") <= 1000                       # pixels
    assert capsys.readouterr().out.count("drawn: ") == 5


def test_a_folder_that_cannot_be_is_refused_before_the_work(finished, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    (tmp_path / "taken").touch()
    with pytest.raises(SystemExit) as end:
        evaluation.main(["routing", str(finished), "--png", str(tmp_path / "taken")])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and "File exists" in err and not out


def test_pictures_show_what_was_logged(switched, finished):
    """The lines of the deviation and of the loss are the numbers of the log; f and p those of the text."""
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    pyplot = evaluation.load_pyplot()
    runs = [evaluation.look(switched), evaluation.look(finished)]
    left = evaluation.draw_deviation(pyplot, runs).axes[0]
    log = evaluation.read_log(switched)[1:]
    want = [[100 * row[name][0] for row in log] for name in ("load_max", "window_max", "load_min")]
    drawn = [list(line.get_ydata()) for line in left.lines]
    assert [drawn[i] for i in (0, 1, 2)] == want
    gate = evaluation.draw_gate(pyplot, runs).axes[1]             # the last layer of the first run
    f, p = (line.get_ydata() for line in gate.lines[:2])
    assert sum(f) == pytest.approx(1) and sum(p) == pytest.approx(1, rel=1e-5)
    assert 6 * sum(f * p) == pytest.approx(float(gate.get_title().split()[-1]), abs=0.01)
    switch = evaluation.draw_switch(pyplot, runs).axes[0]
    assert [list(line.get_xdata()) for line in switch.lines if line.get_linestyle() == "--"] == [[6, 6]]
    pyplot.close("all")


def test_pictures_of_unequal_runs(switched, corpus, tmp_path):
    """Other numbers of experts and layers, no validation, a loss that is no number: nothing is cut."""
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    pyplot, out = evaluation.load_pyplot(), tmp_path / "wide"
    train.main(["--data", str(corpus), "--out", str(out), "--steps", "2", *SIZES, "--n_expert", "9",
                "--n_layer", "3"])
    wide, run = evaluation.look(out), evaluation.look(switched / "step-6")
    heat = evaluation.draw_heat(pyplot, [wide, run])
    assert [axis.get_xlim() for axis in heat.axes[:2]] == [(-0.5, 8.5), (-0.5, 5.5)]
    assert evaluation.draw_deviation(pyplot, [wide, run]).axes[1].get_title() == "layer 1 / layer 2"
    for axis in evaluation.draw_gate(pyplot, [wide, run]).axes:
        assert max(max(line.get_ydata()) for line in axis.lines) < axis.get_ylim()[1]
    nan, never = wide._replace(rows=[wide.rows[0] | {"val_loss": float("nan")}]), wide._replace(rows=[])
    assert len(evaluation.draw_switch(pyplot, [nan, never, run]).axes[0].lines) == 1
    assert evaluation.draw_switch(pyplot, [nan]) is None
    pyplot.close("all")


def test_a_look_at_a_step_ends_with_it(switched):
    early, late = evaluation.look(switched / "step-6"), evaluation.look(switched)
    assert early.rows[-1]["step"] == 6 and late.rows[-1]["step"] == 12
    assert (early.switch, late.switch) == (None, 6)
    assert evaluation.between(late, 0.5, 0.75, "load_max") == pytest.approx(
        np.mean([row["load_max"] for row in late.rows if row["step"] in (7, 8, 9)], 0))
    assert evaluation.between(early, 0.9, 1, "load_max") is None


def test_routes_without_a_tokenizer_are_shown_by_number(corpus, tmp_path, capsys):
    (tmp_path / "plain").mkdir()
    for split in ("train", "val"):
        (tmp_path / "plain" / f"{split}.bin").write_bytes((corpus / f"{split}.bin").read_bytes())
    train.main(["--data", str(tmp_path / "plain"), "--out", str(tmp_path / "run"), "--steps", "1", *SIZES])
    evaluation.main(["routing", str(tmp_path / "run")])
    assert re.search(r"expert \d+ +[\d.]+ %  \d+ \d+ %", capsys.readouterr().out)


def test_a_line_that_is_being_written_is_left_out(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    with open(tmp_path / "run" / "log.jsonl", "a") as log:
        log.write('{"step": 13, "lo')
    assert evaluation.read_log(tmp_path / "run") == evaluation.read_log(finished)


def test_names_are_cut_to_what_differs(in_folder):
    assert evaluation.short_names(["out/a/x", "out/b/x"]) == ["a/x", "b/x"] == evaluation.short_names(
        ["out/a/x", str(in_folder / "out" / "b" / "x")])
    assert evaluation.short_names(["a/run", "b/run"]) == ["a/run", "b/run"]
    assert evaluation.short_names(["out/a", "out/b"]) == ["a", "b"]
    assert evaluation.short_names(["out/a/step-5"]) == ["step-5"] and evaluation.short_names(["a"]) == ["a"]
