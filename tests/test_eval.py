"""Validation, baselines, text, routing and its pictures."""

import math
import shutil
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import small, small_run, write_corpus

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
    two = Counter(gram[1:] for gram in three)
    one = Counter(gram[1:] for gram in two)

    def table(grams):
        ones = max(1, sum(n == 1 for n in grams.values()))
        twos = sum(n == 2 for n in grams.values())
        total, distinct = defaultdict(int), defaultdict(int)
        for gram, n in grams.items():
            total[gram[:-1]] += n
            distinct[gram[:-1]] += 1
        return grams, ones / (ones + 2 * twos), total, distinct
    tables = [table(one), table(two), table(three)]

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
    train, slow = np.array(tokens, np.uint16), slow_kneser_ney(tokens, 9)
    want = [slow(*asked[i:i + 3].tolist()) for i in range(298)]
    np.testing.assert_allclose(evaluation.trigram(train, asked, np.arange(2, 300), 9), want, rtol=1e-12)
    for context in ([0, 0], [3, 5], [8, 8]):
        total = sum(evaluation.trigram(train, np.array([*context, c]), np.array([2]), 9)[0] for c in range(9))
        assert total == pytest.approx(1.0, rel=1e-12)


def test_loss_command_prints_all_models_on_the_same_text(finished, corpus, tmp_path, capsys):
    """A run's row is the last validation of its log; bits per byte is the loss over the bytes of the text."""
    dense = tmp_path / "dense"
    train.main(small_run(corpus, dense, "--steps 6 --n_expert 1"))
    capsys.readouterr()
    evaluation.main(["loss", "--ckpt", str(finished), str(dense)])
    rows = {line[:32].strip(): line.split() for line in capsys.readouterr().out.splitlines()[2:]}
    assert len(rows) == 4 and "interpolated trigram" in rows
    assert float(rows["uniform over the vocabulary"][-3]) == pytest.approx(math.log(300), abs=1e-3)
    val, encoding = np.array(data.load_tokens(corpus / "val.bin")), data.load_encoding(corpus)
    text = val[2:(len(val) - 1) // 16 * 16 + 1]
    n_bytes = len(encoding.decode_bytes(text[text < 295].tolist()))
    table, n, _ = evaluation.compare_losses([finished])
    last = [r["val_loss"] for r in evaluation.read_log(finished)[1:] if "val_loss" in r][-1]
    assert table[2][1] == pytest.approx(last, rel=1e-6) and n == len(text)
    assert table[2][3] == pytest.approx(last * n / math.log(2) / n_bytes, rel=1e-6)


def test_an_average_of_checkpoints_is_the_mean_of_their_weights(corpus, tmp_path, capsys, refused):
    out, mean = tmp_path / "run", tmp_path / "mean"
    train.main(small_run(corpus, out, "--steps 6 --save_every 2 --keep 3 --balance loss-free"))
    paths = [str(out / f"step-{step}") for step in (2, 4, 6)]
    evaluation.main(["average", "--ckpt", *paths, "--to", str(mean)])
    states = [evaluation.load_run(path)[0].state_dict() for path in (*paths, mean)]
    for name, t in states.pop().items():
        torch.testing.assert_close(t, sum(state[name] for state in states) / 3, msg=name)
    evaluation.main(["loss", "--ckpt", str(mean)])
    train.main(small_run(corpus, tmp_path / "next", f"--steps 1 --init_from {mean} --batch_size 8"))
    refused(train.main, small_run(corpus, mean, "--steps 9"), "of another model")
    refused(evaluation.main, ["average", "--ckpt", mean, out, "--to", tmp_path / "no"], "of one run")


def test_a_run_and_data_that_may_not_belong_together_are_noted(finished, corpus, tmp_path, capsys):
    other = tmp_path / "other"
    data.prepare(other, [str(write_corpus(tmp_path / "text", seed=1))], tokenizer=str(finished))
    evaluation.load_run(finished, folder=other)
    assert "may have trained on text that" in capsys.readouterr().err
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "encoding.json").unlink()
    evaluation.load_run(out, folder=corpus)
    assert capsys.readouterr().err == f"note: {out} has no tokenizer; its own must be that of {corpus}\n"
    shutil.copy(finished / "encoding.json", out)
    settings = (out / "settings.json").read_text().replace('"init_from": ""', '"init_from": "base"')
    (out / "settings.json").write_text(settings)
    evaluation.load_run(out, folder=corpus)
    assert "run, or what it began with, may have trained on text that" in capsys.readouterr().err


def test_a_row_for_each_top_k(finished, capsys):
    evaluation.main(["loss", "--ckpt", str(finished), "--top_k", "1,2,6"])
    rows = capsys.readouterr().out.splitlines()[4:]
    assert [row.split(", ")[1].split()[:2] for row in rows] == [["K", "1"], ["K", "2"], ["K", "6"]]
    assert len({row.split()[-3] for row in rows}) == 3


def test_sample_command_writes_the_prompt_and_more(finished, capsys):
    options = ["--prompt", "abc", "--tokens", "20", "--seed", "3"]
    evaluation.main(["sample", "--ckpt", str(finished), *options])
    first = capsys.readouterr().out
    assert first.startswith("abc") and len(first) > 10
    evaluation.main(["sample", "--ckpt", str(finished / "step-12"), *options])
    assert capsys.readouterr().out == first                       # the same seed, the same text


@pytest.mark.parametrize("end", ["<|endoftext|>", "<|end|>"])
def test_a_text_ends_where_the_model_ends_it(end, monkeypatch):
    """A character may be cut in two; other special tokens and unused ids are no text."""
    encoding, at = data.build_encoding("bytes", 0, ()), iter(range(99))
    model = Model(small(vocab_size=264))
    text = [*b"ab", 257, 263, 0xC3, 0xA9, encoding.encode_single_token(end), 99]
    monkeypatch.setattr(evaluation, "sample", lambda *args: torch.tensor([text[next(at)]]))
    assert list(evaluation.generate_text(model, encoding, [0, 1], 12, 1)) == [*"ab", "", "", "", "é", ""]
    assert next(at) == 7                                          # nothing was drawn after its end


def test_load_drawing_fits_80_columns_and_shows_every_expert():
    load = torch.tensor([[10] * 96, [0] * 95 + [960]])
    lines = evaluation.draw_load(load).splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) == 4
    assert lines[0].count("▄") == 48 and lines[1].count("▄") == 48 and "+0%" in lines[0]
    assert lines[3].endswith("█") and "+9500%" in lines[2] and "-100%" in lines[2]


# --- routing ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def switched(corpus, tmp_path_factory):
    """A run that switches to fewer experts at its half."""
    out = tmp_path_factory.mktemp("runs") / "switched"
    train.main(small_run(corpus, out, "--steps 12 --initial_top_k 3 --switch 0.5 --eval_every 2 --keep 9 "
                                      "--save_every 3"))
    return out


@pytest.mark.parametrize("step", ["step-6", "step-12"])
def test_held_out_routing_equals_routing_one_window_at_a_time(switched, corpus, step):
    """Every token of the held-out text, its expert in every layer, the sums; K is 3, then 1, in layer 0."""
    run = evaluation.route_held_out(switched / step)
    assert run.top_k == ([3, 1] if step == "step-6" else [1, 1])
    assert run.rows[-1]["step"] == int(step[5:])
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


def test_the_report_counts_tokens_and_context(switched):
    """Of ids seen more than once, the share that is not with most of its id; the bound where it is one."""
    run = evaluation.route_held_out(shutil.copytree(switched / "step-12", switched / "step-12-kept"))
    run.tokens = torch.tensor([97, 97, 97, 97, 98, 98, 99, 100])
    run.experts = torch.tensor([[5, 5, 5, 3, 3, 3, 1, 0], [2] * 8])
    lines = evaluation.describe_routing(run).splitlines()
    table = lines[lines.index(next(line for line in lines if line.startswith("layer   K"))) + 1:][:2]
    assert [line.split()[-2] for line in table] == ["17", "0"]
    names = [repr(run.encoding.decode([token])) for token in (97, 98)]
    assert f"  expert 3   37.5 %  {names[1]} 67 % {names[0]} 33 %" in lines
    assert f"  expert 5   37.5 %  {names[0]} 100 %" in lines and max(map(len, lines)) <= 80
    most = 6 * run.statistics.load[0].max().item() / run.statistics.load[0].sum().item() - 1
    for beyond, said in (-0.01, True), (0.01, False):             # a load below it disproves its premise
        run.top_share = (most + beyond + 1) / 6
        assert (f"token alone: max {most + beyond:+.0%} or" in evaluation.describe_routing(run)) == said


def test_routing_command_reports_and_draws_every_run(switched, corpus, tmp_path, capsys):
    """Also a dense one, with more layers, and one without a validation."""
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    train.main(small_run(corpus, tmp_path / "dense", "--steps 1 --n_expert 1 --n_layer 3"))
    capsys.readouterr()
    evaluation.main(["routing", str(switched), str(tmp_path / "dense"), "--png", str(tmp_path / "pictures")])
    out = capsys.readouterr().out
    for part in ("/switched: held-out", "/dense: held-out", "layer 1, its three", "max    +0% min   +0%"):
        assert part in out
    assert max(len(line) for line in out.splitlines() if "drawn" not in line) <= 80
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [p.name for p in pictures] == ["load.png", "tokens.png"]
    assert all(p.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for p in pictures)


def test_pictures_show_what_was_logged_and_routed(switched, finished):
    """Curves are the numbers of the log and of the held-out text; a token has the colour of its expert."""
    Figure = pytest.importorskip("matplotlib.figure", reason="needs the extra plot").Figure
    runs = [evaluation.route_held_out(switched), evaluation.route_held_out(finished)]
    log, sums = evaluation.read_log(switched)[1:], runs[0].statistics
    axes = evaluation.draw_curves(Figure, runs).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in [*axes[0].lines, *axes[3].lines]}
    for name, side in ("most", "load_max"), ("least", "load_min"):
        assert lines[f"{runs[0].name}, {name} used expert"] == [100 * row[side][0] for row in log]
    load, order = sums.load[1].sort(descending=True)
    for name, x in ("load", load), ("p", sums.prob_sum[1, order]):
        assert lines[f"{runs[0].name}, {name}"] == pytest.approx(100 * (x / x.double().mean() - 1), abs=1e-3)
    page = evaluation.draw_tokens(Figure, runs[:1], rows=9, columns=30)
    want = runs[0].encoding.decode(runs[0].tokens[:60].tolist()).replace(" ", "·").replace("\n", "↵")
    for layer, axis in enumerate(page.axes):
        text, colors = "".join(t.get_text() for t in axis.texts), {}
        assert text.startswith(want[:60]) and max(t.get_position()[1] for t in axis.texts) == 8
        n = 0
        for token, expert in zip(runs[0].tokens.tolist(), runs[0].experts[layer].tolist()):
            if n == len(axis.texts) or "\n" in runs[0].encoding.decode([token]):
                break                                             # a token of more than one piece
            colors.setdefault(expert, set()).add(axis.texts[n].get_bbox_patch().get_facecolor())
            n += 1
        assert n > 9 and len(set.union(*colors.values())) == len(colors) > 1
