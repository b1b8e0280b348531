"""Validation, baselines, text, drawings."""

import json
import math
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
    loss, load, windows = evaluation.validate(model, tokens, 16, 1, rows=3)
    want = [F.cross_entropy(model(torch.from_numpy(tokens[i:i + 16].astype(np.int64))[None])[0],
                            torch.from_numpy(tokens[i + 1:i + 17].astype(np.int64)))
            for i in range(0, 160, 16)]
    assert loss == pytest.approx(torch.stack(want).mean().item(), rel=1e-10)
    assert windows.tolist() == list(range(10)) and load.sum(-1).tolist() == [160, 160]
    assert evaluation.validate(model, tokens, 16, 1, limit=50)[2].tolist() == [0, 4, 9]


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
        (tmp_path / name / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
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
