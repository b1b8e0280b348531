"""The adapter for lm-evaluation-harness beside the harness's own one for transformers (extras hf, eval)."""

import gzip
import json
import os
import random

import pytest
import torch

import data
import eval as evaluation
from model import Model, ModelConfig, from_hf

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
lm_eval = pytest.importorskip("lm_eval", reason="needs the extra eval")


def random_qwen(folder, encoding, max_seq_len=96, **sizes):
    """A Qwen3-MoE of transformers with random weights and our tokenizer, and the same, imported."""
    torch.manual_seed(1)
    sizes = dict(hidden_size=32, moe_intermediate_size=24, intermediate_size=24, num_hidden_layers=2,
                 num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=8,
                 num_experts_per_tok=2, norm_topk_prob=True) | sizes
    config = transformers.Qwen3MoeConfig(vocab_size=encoding.n_vocab, max_position_embeddings=max_seq_len,
                                         tie_word_embeddings=False, initializer_range=0.3,
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
    monkeypatch.setattr(evaluation, "AT_ONCE", at_once)
    theirs, ours, their_results, our_results = both(folder, model, encoding, name, local, shots)
    assert compare(theirs, ours) < 1e-4
    for task, scores in their_results.items():
        assert {k: v for k, v in scores.items() if "stderr" not in k} == {
            k: v for k, v in our_results[task].items() if "stderr" not in k}
    if name in ("piqa", "arc_challenge"):
        lengths = [len(encoding.encode_ordinary("".join(a))) for s in ours for a in s["arguments"]]
        assert max(lengths) > 97 > min(lengths) or name != "piqa"


def shortened(generate_until):
    """With 30 new tokens at most, and stop strings that random text has."""
    def generate(requests, **kwargs):
        for request in requests:
            how = request.args[1] | {"max_gen_toks": 30, "until": ["7", "naïve"]}
            request.arguments = (request.args[0], how)
        return generate_until(requests, **kwargs)
    return generate
