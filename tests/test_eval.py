"""Validation, baselines, text, routing and its pictures."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import small, small_run

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
        ones, twos = sum(n == 1 for n in grams.values()), sum(n == 2 for n in grams.values())
        total, distinct = defaultdict(int), defaultdict(int)
        for gram, n in grams.items():
            total[gram[:-1]] += n
            distinct[gram[:-1]] += 1
        return grams, ones / max(1, ones + 2 * twos), total, distinct
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
    np.testing.assert_allclose(evaluation.trigram(train, asked, 9), want, rtol=1e-12)
    for context in ([0, 0], [3, 5], [8, 8]):
        total = sum(evaluation.trigram(train, np.array([*context, c]), 9)[0] for c in range(9))
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
    """In a batch, too: rows after their end are empty; other special tokens and unused ids are no text."""
    encoding = data.build_encoding("bytes", 0, ())
    model, text = Model(small(vocab_size=264)), [*b"ab", 257, 263, 0xC3, 0xA9]
    text.append(encoding.encode_single_token(end))

    def scripted(model, tokens, at, cache, top_k):
        """Continues by the script, a row per prompt; the second never ends."""
        step = int(at[0]) - 1
        return F.one_hot(torch.tensor([(text + [99] * 9)[step], 120]), 264)[:len(tokens)].float()
    monkeypatch.setattr(evaluation, "decode", scripted)
    model.head = torch.nn.Identity()
    model.features = lambda tokens, *args, **kwargs: (F.one_hot(
        torch.tensor([[[text[0]]], [[120]]])[:len(tokens)].expand(-1, tokens.shape[1], 1).squeeze(-1),
        264).float(), None)
    both = list(evaluation.generate_text(model, encoding, [[0, 1], [0, 1]], 12, 1, temperature=0))
    assert ["".join(pieces) for pieces in zip(*both)] == ["abé", "x" * 12]
    alone = list(evaluation.generate_text(model, encoding, [[0, 1]], 12, 1, temperature=0))
    assert len(alone) == len(text) + 1 and "".join(piece for piece, in alone) == "abé"


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
    train.main(small_run(corpus, out, "--steps 12 --initial_top_k 3 --switch 0.5 --eval_every 2 --keep 9"))
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
    """Of ids seen more than once, the share that is not with most of its id."""
    run = evaluation.route_held_out(switched)
    run.tokens = torch.tensor([97, 97, 97, 97, 98, 98, 99, 100])
    run.experts = torch.tensor([[5, 5, 5, 3, 3, 3, 1, 0], [2] * 8])
    lines = evaluation.describe_routing(run).splitlines()
    table = lines[lines.index(next(line for line in lines if line.startswith("layer   K"))) + 1:][:2]
    assert [line.split()[-2] for line in table] == ["17", "0"]
    names = [repr(run.encoding.decode([token])) for token in (97, 98)]
    assert f"  expert 3   37.5 %  {names[1]} 67 % {names[0]} 33 %" in lines
    assert f"  expert 5   37.5 %  {names[0]} 100 %" in lines


def test_routing_command_reports_and_draws_every_run(switched, finished, corpus, tmp_path, capsys):
    """Also a dense one, with more layers, and one without a validation."""
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    train.main(small_run(corpus, tmp_path / "dense", "--steps 1 --n_expert 1 --n_layer 3"))
    runs = [str(switched), str(finished), str(tmp_path / "dense")]
    evaluation.main(["routing", *runs, "--png", str(tmp_path / "pictures")])
    out = capsys.readouterr().out
    for part in ("/switched: held-out", "/finished: held-out", "layer 1, its three", "max    +0% min   +0%"):
        assert part in out
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [p.name for p in pictures] == ["deviation.png", "gate.png", "load.png"]
    assert all(p.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for p in pictures)


def test_pictures_show_what_was_logged(switched, finished):
    """The lines of the deviation and of the loss are the numbers of the log; f and p those of the text."""
    Figure = pytest.importorskip("matplotlib.figure", reason="needs the extra plot").Figure
    runs = [evaluation.route_held_out(switched), evaluation.route_held_out(finished)]
    log = evaluation.read_log(switched)[1:]
    left = evaluation.draw_deviation(Figure, runs).axes[0]
    for line, name in zip(left.lines, ("load_max", "load_min")):
        assert list(line.get_ydata()) == [100 * row[name][0] for row in log]
    heat = evaluation.draw_load_map(Figure, runs).axes[0].images[0].get_array()
    load = runs[0].statistics.load
    np.testing.assert_allclose(heat, 6 * load / load.sum(-1, keepdim=True), rtol=1e-6)
    gate = evaluation.draw_gate(Figure, runs).axes[1]             # the last layer of the first run
    f, p = (line.get_ydata() for line in gate.lines[:2])
    assert sum(f) == pytest.approx(1) and sum(p) == pytest.approx(1, rel=1e-5)
    assert 6 * sum(f * p) == pytest.approx(float(gate.get_title().split()[-1]), abs=0.01)

