"""The adapter for lm-evaluation-harness beside the harness's own one for transformers (extras hf, eval)."""

import gzip
import json
import os
import random
import shutil

import pytest
import torch
from conftest import SIZES

import data
import eval as evaluation
import train
from model import Model, ModelConfig, from_hf

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
lm_eval = pytest.importorskip("lm_eval", reason="needs the extra eval")


def random_qwen(folder, encoding, max_seq_len=96, **sizes):
    """A Qwen3-MoE of transformers with random weights and our tokenizer, and the same, imported."""
    torch.manual_seed(1)
    sizes = dict(hidden_size=32, moe_intermediate_size=24, intermediate_size=24, num_hidden_layers=2,
                 num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=8,
                 num_experts_per_tok=2, norm_topk_prob=True, initializer_range=0.3) | sizes
    config = transformers.Qwen3MoeConfig(vocab_size=encoding.n_vocab, max_position_embeddings=max_seq_len,
                                         tie_word_embeddings=False,
                                         eos_token_id=encoding.encode_single_token("<|endoftext|>"), **sizes)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    evaluation.save_tokenizer(encoding, folder, max_seq_len)
    model = Model(ModelConfig(**evaluation.read_hf_config(folder)))
    return from_hf(evaluation.Weights(folder), model).requires_grad_(False)


def both(folder, model, encoding, name, source, shots, limit=None):
    """-> (their samples, our samples, their results, our results) of a task over local files."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    theirs = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4,
                  max_length=model.config.max_seq_len)
    found = []
    for lm in (theirs, evaluation.adapter(model, encoding)):
        lm.generate_until = shortened(lm.generate_until)
        with evaluation.local_tasks(name, source) as where:
            manager = TaskManager(include_path=where, include_defaults=False)
            found.append(lm_eval.simple_evaluate(lm, tasks=[name], num_fewshot=shots, task_manager=manager,
                                                 limit=limit, bootstrap_iters=0))
    samples = [[sample for task in sorted(each["samples"]) for sample in each["samples"][task]]
               for each in found]
    return *samples, *(each["results"] for each in found)


def compare(theirs, ours):
    """-> the largest difference of a log-likelihood; what else there is must be equal."""
    assert len(theirs) == len(ours) > 0
    worst = 0.0
    for a, b in zip(theirs, ours):
        assert a["arguments"] == b["arguments"]
        for (x,), (y,) in zip(a["resps"], b["resps"]):
            if isinstance(x, str):
                assert x == y
            else:
                worst = max(worst, abs(float(x[0]) - float(y[0])))
                assert str(x[1]) == str(y[1])
    return worst


def sentence(rng, n):
    words = ["red", "sea", "of", "the", "trees", "42", "naïve", "walk", "(so)"]
    return " ".join(rng.choice(words) for _ in range(n))


@pytest.fixture(scope="session")
def local(tmp_path_factory):
    """Made-up questions in the files that --local reads."""
    root, rng = tmp_path_factory.mktemp("local"), random.Random(0)

    def write(name, rows):
        (root / name).parent.mkdir(exist_ok=True)
        opened = gzip.open(root / name, "wt") if name.endswith(".gz") else open(root / name, "w")
        with opened as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    write("piqa/validation.jsonl", [{
        "goal": sentence(rng, rng.randint(1, 80)), "sol1": sentence(rng, rng.randint(1, 20)),
        "sol2": sentence(rng, rng.randint(1, 20)), "label": rng.randint(0, 1)} for _ in range(25)])
    for split, n in (("test", 12), ("train", 9)):
        write(f"arc_challenge/{split}.jsonl", [{
            "question": sentence(rng, 6), "choices": [sentence(rng, rng.randint(1, 5)) for _ in range(4)],
            "answer": rng.randint(0, 3)} for _ in range(n)])
        write(f"gsm8k/{split}.jsonl", [{
            "question": sentence(rng, rng.randint(3, 9)),
            "answer": f"{sentence(rng, 3)}\n#### {rng.randint(0, 99)}"} for _ in range(n)])
    write("hellaswag/validation.jsonl.gz", [{
        "query": sentence(rng, 8), "choices": [sentence(rng, rng.randint(1, 5)) for _ in range(4)],
        "gold": rng.randint(0, 3)} for _ in range(12)])
    for split, n in (("test", 5), ("dev", 5)):
        write(f"mmlu/{split}.jsonl", [{
            "subject": subject, "question": sentence(rng, 6), "choices": [sentence(rng, 2) for _ in range(4)],
            "answer": rng.randint(0, 3)} for subject in ("anatomy", "virology") for _ in range(n)])
    return root


@pytest.fixture(scope="session")
def pair(corpus, tmp_path_factory):
    """-> (folder of transformers, the same model imported, encoding)."""
    folder, encoding = tmp_path_factory.mktemp("random") / "qwen", data.load_encoding(corpus)
    return folder, random_qwen(folder, encoding), encoding


@pytest.mark.parametrize("at_once", [1 << 14, 200])
@pytest.mark.parametrize("name, shots", [("piqa", 0), ("arc_challenge", 5), ("hellaswag", 2), ("mmlu", 3),
                                         ("gsm8k", 2)])
def test_answers_are_those_of_the_harness_with_transformers(pair, local, monkeypatch, name, shots, at_once):
    """Log-likelihoods, greedy text, scores: with prompts that are cut, and batches with padding."""
    folder, model, encoding = pair
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", at_once)
    theirs, ours, their_results, our_results = both(folder, model, encoding, name, local, shots)
    assert compare(theirs, ours) < 1e-4
    for task, scores in their_results.items():
        assert {k: v for k, v in scores.items() if "stderr" not in k} == {
            k: v for k, v in our_results[task].items() if "stderr" not in k}
    if name == "gsm8k":                                           # some ended at a stop string, some did not
        lengths = [len(s["resps"][0][0]) for s in ours]
        assert min(lengths) < 15 and max(lengths) > 30
    if name in ("piqa", "arc_challenge"):
        lengths = [len(encoding.encode_ordinary("".join(a))) for s in ours for a in s["arguments"]]
        assert max(lengths) > 97 > min(lengths) or name != "piqa"


def shortened(generate_until):
    """With 30 new tokens at most, and stop strings that random text has."""
    def generate(requests, **kwargs):
        for request in requests:
            how = request.args[1] | {"max_gen_toks": 30, "until": ["hia", "fab"]}
            request.arguments = (request.args[0], how)
        return generate_until(requests, **kwargs)
    return generate


def bench(*argv):
    evaluation.main(["bench", *argv, "--device", "cpu"])


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):
    """A run with room for the questions."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train.main(["--data", str(corpus), "--out", str(out), *SIZES, "--max_seq_len", "256", "--steps", "2"])
    return out


def test_the_command_shows_and_writes_everything(trained, local, tmp_path, capsys):
    bench("--ckpt", str(trained), "--tasks", "piqa,mmlu", "--local", str(local), "--limit", "3", "--shots",
          "1", "--json", str(tmp_path / "found.json"))
    shown = capsys.readouterr().out.splitlines()
    assert any(line.split()[:3] == ["piqa", "1", "acc"] and line.endswith("82.05 (0 shots)")
               for line in shown)
    assert any(line.split()[:3] == ["mmlu", "1", "acc"] and line.split()[4] == "6" for line in shown)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["settings"]["limit"] == 3 and found["settings"]["model"]["n_expert"] == 6
    assert found["tasks"]["piqa"]["n-shot"]["piqa"] == 1 and set(found["tasks"]) == {"piqa", "mmlu"}


def test_results_are_numbered_and_never_overwritten(trained, local, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for _ in range(2):
        bench("--ckpt", str(run), "--tasks", "piqa", "--local", str(local), "--limit", "1")
    assert (run / "bench-1.json").exists() and (run / "bench-2.json").exists()
    with pytest.raises(SystemExit) as error:
        bench("--ckpt", str(run), "--tasks", "piqa", "--local", str(local), "--json",
              str(run / "bench-1.json"))
    assert error.value.code == 2 and "is there already" in capsys.readouterr().err


def test_one_scorer_without_the_harness(pair, local, tmp_path):
    """On the requests of the harness, its accuracies."""
    folder, model, encoding = pair
    for name, shots in (("arc_challenge", 3), ("piqa", 0), ("hellaswag", 1)):
        *_, samples, _, results = both(folder, model, encoding, name, local, shots)
        questions = []
        for sample in samples:
            arguments = list(sample["arguments"])
            contexts = {context for context, _ in arguments}
            assert len(contexts) == 1 and all(choice[0] == " " for _, choice in arguments)
            questions.append({"context": contexts.pop(), "choices": [choice[1:] for _, choice in arguments],
                              "answer": int(sample["target"])})
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(question) + "\n" for question in questions))
        rows = evaluation.read_lines(file, ("context", "choices", "answer"))
        acc, acc_norm, n = evaluation.multiple_choice(model, encoding, rows)
        assert n == len(samples)
        assert (acc, acc_norm) == (results[name]["acc,none"], results[name]["acc_norm,none"])


@pytest.mark.parametrize("context", ["red sea", "red sea  ", "red\n\n", "the trees \n", "a"])
def test_a_pair_is_split_where_the_harness_splits_it(pair, context):
    _, model, encoding = pair
    for continuation in (" walk", "walk", " "):
        assert evaluation.encode_pair(encoding, context, continuation) == evaluation.adapter(
            model, encoding)._encode_pair(context, continuation)


def test_rolling_log_likelihood(pair):
    """Every token once, the first from the beginning of a document; also beyond the context."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    folder, model, encoding = pair
    texts = [sentence(random.Random(i), n) for i, n in enumerate((1, 30, 200))]
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    theirs = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=2, max_length=96)
    want = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    got = evaluation.adapter(model, encoding).loglikelihood_rolling(requests)
    assert got == pytest.approx(want, rel=1e-5)
    assert len(encoding.encode_ordinary(texts[2])) > 2 * 96


@pytest.mark.parametrize("argv, message", [
    (["--tasks", "piqqa", "--local", "LOCAL"], "task 'piqqa' is unknown from local files; there are arc_"),
    (["--tasks", "arc_chalenge"], "task 'arc_chalenge' is unknown"),
    (["--tasks", "gsm8k", "--local", "EMPTY"], "gsm8k/test.jsonl (or .gz) is missing: task gsm8k needs it"),
    (["--tasks", "piqa", "--local", "BROKEN"], "piqa/validation.jsonl, line 2: Unterminated"),
    (["--tasks", "hellaswag", "--local", "BROKEN"],
     "hellaswag/validation.jsonl, line 1: it lacks choices, gold"),
    (["--tasks", "piqa", "--local", "LOCAL"], "a continuation must have from 1 to 64 tokens (max_seq_len)"),
    (["--tasks", "piqa", "--limit", "1"], "without a network, --local FOLDER reads files"),
    (["--tasks", "humaneval", "--limit", "1"], "task humaneval cannot be run")])
def test_mistakes_are_one_line(finished, local, tmp_path, capsys, argv, message):
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa/validation.jsonl").write_text(
        '{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}\n{"goal": "a", "so')
    (tmp_path / "hellaswag").mkdir()
    (tmp_path / "hellaswag/validation.jsonl").write_text('{"query": "a"}\n')
    folders = {"LOCAL": local, "EMPTY": tmp_path / "empty", "BROKEN": tmp_path}
    with pytest.raises(SystemExit) as error:
        bench("--ckpt", str(finished), *(str(folders.get(word, word)) for word in argv))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert error.value.code == 2 and len(lines) == 1 and message in lines[0]


def test_one_task_that_fails_does_not_end_the_others(trained, local, tmp_path, capsys):
    folder = tmp_path / "local"
    shutil.copytree(local, folder)
    (folder / "gsm8k/train.jsonl").unlink()
    with pytest.raises(SystemExit) as error:
        bench("--ckpt", str(trained), "--tasks", "gsm8k, piqa", "--local", str(folder), "--limit", "2",
              "--json", str(tmp_path / "found.json"))
    shown = capsys.readouterr()
    assert error.value.code == 2 and "gsm8k/train.jsonl (or .gz) is missing" in shown.err
    assert "piqa" in shown.out and "piqa" in json.loads((tmp_path / "found.json").read_text())["tasks"]


def test_code_is_only_run_when_asked_and_shots_are_the_papers(trained, tmp_path, monkeypatch):
    """What reaches the harness from the command line; the flag is its own, and off."""
    seen, found = [], {"results": {}, "groups": {}, "n-shot": {}, "n-samples": {}}
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda *args, **how: seen.append(how) or found)
    for flag in ([], ["--confirm_run_unsafe_code"]):
        bench("--ckpt", str(trained), "--tasks", "humaneval,arc_challenge", *flag, "--json",
              str(tmp_path / f"{len(seen)}.json"))
    assert [how["confirm_run_unsafe_code"] for how in seen] == [False, False, True, True]
    assert [how["num_fewshot"] for how in seen] == [0, 25, 0, 25]


@pytest.mark.parametrize("line, message", [
    ('{"context": null, "choices": ["a"], "answer": 0}', "question 1: context must be a text"),
    ('{"context": "a", "choices": [1, 2], "answer": 0}', "question 1: context must be a text"),
    ('{"context": "a", "choices": "cd", "answer": 0}', "question 1: context must be a text"),
    ('{"context": "a", "choices": ["c", "d"], "answer": 2}', "answer (2) the number of one"),
    ('"context choices answer"', "line 1: it is no object"), ("", "is empty"), ("\xff", "line 1: "),
    ("GZIP", "is cut short or damaged")])
def test_questions_that_are_none(trained, tmp_path, capsys, line, message):
    file = tmp_path / ("q.jsonl.gz" if line == "GZIP" else "q.jsonl")
    file.write_bytes(gzip.compress(b"x" * 1000)[:-9] if line == "GZIP" else line.encode("latin-1") + b"\n\n")
    with pytest.raises(SystemExit) as error:
        evaluation.main(["choices", "--ckpt", str(trained), "--file", str(file), "--device", "cpu"])
    (line,) = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and message in line


@pytest.mark.parametrize("task, row, message", [
    ("piqa", dict(goal="a", sol1=None, sol2="b", label=0), "question 1: there must be choices"),
    ("piqa", dict(goal="a", sol1="c", sol2="b", label="A"), "'A' the number of one of them"),
    ("arc_challenge", dict(question="a", choices=["b", "c"], answer="A"), "'A' the number of one of them"),
    ("mmlu", dict(subject="anatomy", question="a", choices=["b", "c"], answer=0), "there must be choices"),
    ("mmlu", dict(subject=None, question="a", choices=list("abcd"), answer=0), "the question is no text")])
def test_local_questions_that_are_none(trained, tmp_path, capsys, task, row, message):
    (tmp_path / task).mkdir()
    for split in ("test", "train", "dev", "validation"):
        (tmp_path / task / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit) as error:
        bench("--ckpt", str(trained), "--tasks", task, "--local", str(tmp_path), "--json",
              str(tmp_path / "found.json"))
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_generation_groups_what_is_asked_alike(pair):
    """Settings that are equal though written differently, with others between; "" stops nothing."""
    from lm_eval.api.instance import Instance
    folder, model, encoding = pair
    hows = [{"max_gen_toks": n, "temperature": t, "until": [""]} for n, t in ((9, 0), (12, 0), (9, 0.0))]
    requests = [Instance("generate_until", {}, ("red sea", how), 0) for how in hows]
    short, long, again = evaluation.adapter(model, encoding).generate_until(requests)
    assert short == again and long.startswith(short) and len(long) > len(short)


def test_a_perplexity_is_no_percentage():
    found = {"results": {"x": {"word_perplexity,none": 25.0, "acc,none": 0.5}}, "groups": None,
             "n-shot": {"x": 0}, "n-samples": {"x": {"effective": 3}}}
    lines = evaluation.table_lines("x", found)
    assert lines[0].split()[2:4] == ["word_perplexity", "25.00"] and lines[1].split()[2:4] == ["acc", "50.00"]
