"""The adapter for lm-evaluation-harness beside the harness's own one for transformers (extras hf, eval)."""

import json
import os
import random
import re
from pathlib import Path

import pytest
import torch
from conftest import SIZES

import data
import eval as evaluation
import train
from model import Model, from_hf

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
lm_eval = pytest.importorskip("lm_eval", reason="needs the extra eval")

PARITY = (Path(train.__file__).parent / "docs/parity.md").read_text()
CHOICES, QUESTION, COMMAND = re.findall(r"```(?:yaml|json|)\n(.*?)```", PARITY, re.S)
GENERATE = """
task: my_sums
dataset_path: json
dataset_kwargs: {data_files: {test: my_questions.jsonl}}
output_type: generate_until
test_split: test
fewshot_split: test
doc_to_text: "{{question}}:"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["hia", "fab"], max_gen_toks: 30}
metric_list: [{metric: exact_match}]
"""


def sentence(rng, least, most):
    words = ["red", "sea", "of", "the", "trees", "42", "naïve", "walk", "(so)"]
    return " ".join(rng.choices(words, k=rng.randint(least, most)))


@pytest.fixture(scope="session")
def pair(corpus, tmp_path_factory):
    """-> (folder of a Qwen3-MoE of transformers with random weights, the same imported, encoding)."""
    torch.manual_seed(1)
    folder, encoding = tmp_path_factory.mktemp("random") / "qwen", data.load_encoding(corpus)
    config = transformers.Qwen3MoeConfig(
        vocab_size=encoding.n_vocab, max_position_embeddings=96, tie_word_embeddings=False, hidden_size=32,
        moe_intermediate_size=24, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True,
        initializer_range=0.3, eos_token_id=[
            encoding.encode_single_token(token) for token in ("<|endoftext|>", "<|end|>")])
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    evaluation.save_tokenizer(encoding, folder, 96)
    model = Model(evaluation.read_hf_config(folder))
    return folder, from_hf(evaluation.load_hf_weights(folder), model).requires_grad_(False), encoding


@pytest.fixture
def questions(in_folder):
    """The files of docs/parity.md, with made-up questions, in the working folder."""
    rng = random.Random(0)
    Path("my_tasks").mkdir()
    Path("my_tasks/my_questions.yaml").write_text(CHOICES)
    Path("my_tasks/my_sums.yaml").write_text(GENERATE)
    rows = [{"question": sentence(rng, 1, 80), "choices": [sentence(rng, 1, 8) for _ in range(3)],
             "answer": rng.randint(0, 2)} for _ in range(24)]
    Path("my_questions.jsonl").write_text(QUESTION + "".join(json.dumps(row) + "\n" for row in rows))


def evaluate(lm, name, shots):
    """-> the harness's results of a task."""
    from lm_eval.tasks import TaskManager
    tasks = TaskManager(include_path="my_tasks", include_defaults=False)
    return lm_eval.simple_evaluate(lm, tasks=[name], num_fewshot=shots, bootstrap_iters=0, task_manager=tasks)


@pytest.mark.parametrize("name, shots", [("my_questions", 0), ("my_sums", 2)])
def test_answers_are_those_of_the_harness_with_transformers(pair, questions, name, shots):
    """Log-likelihoods, greedy text, scores: with prompts that are cut, and batches with padding."""
    from lm_eval.models.huggingface import HFLM
    folder, model, encoding = pair
    lm = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4, max_length=96)
    theirs, ours = (evaluate(each, name, shots) for each in (lm, evaluation.adapter(model, encoding)))
    lengths = []
    for a, b in zip(theirs["samples"][name], ours["samples"][name]):
        assert a["arguments"] == b["arguments"]
        lengths += [len(encoding.encode_ordinary(arguments[0])) for arguments in a["arguments"]]
        for (x,), (y,) in zip(a["resps"], b["resps"]):
            if isinstance(x, str):
                assert x == y
            else:
                assert float(x[0]) == pytest.approx(float(y[0]), abs=1e-4) and str(x[1]) == str(y[1])
    assert theirs["results"] == ours["results"] and max(lengths) > 97 and (shots or min(lengths) < 97)
    if name == "my_sums":                                         # some ended at a stop string, some did not
        written = [len(sample["resps"][0][0]) for sample in ours["samples"][name]]
        assert min(written) < 15 and max(written) > 30


def test_one_scorer_without_the_harness(pair, questions, tmp_path, monkeypatch, capsys):
    """On the requests of the harness, its accuracies; and its tokens, also behind spaces or nothing."""
    _, model, encoding = pair
    ours = evaluate(evaluation.adapter(model, encoding), "my_questions", 1)
    with open("requests.jsonl", "w") as file:
        for sample in ours["samples"]["my_questions"]:
            arguments = list(sample["arguments"])
            print(json.dumps({"context": arguments[0][0], "choices": [choice[1:] for _, choice in arguments],
                              "answer": int(sample["target"])}), file=file)
    monkeypatch.setattr(evaluation, "load_run", lambda *args: (model, {}, None))
    monkeypatch.setattr(data, "load_encoding", lambda path: encoding)
    evaluation.main(["choices", "--ckpt", "run", "--file", "requests.jsonl", "--device", "cpu"])
    found = [float(number) for number in re.findall(r"acc\w* ([\d.]+)", capsys.readouterr().out)]
    results = ours["results"]["my_questions"]
    assert found == [round(results[name], 4) for name in ("acc,none", "acc_norm,none")]
    seen, adapter = [], evaluation.adapter(model, encoding)
    monkeypatch.setattr(evaluation, "log_likelihoods",
                        lambda model, pairs, top_k: seen.extend(pairs) or [(0,)] * 4)
    contexts = ("A:\n", "Answer:  ", "red", "")
    Path("edges.jsonl").write_text("\n".join(json.dumps(
        {"context": context, "choices": ["a dog"], "answer": 0}) for context in contexts))
    evaluation.main(["choices", "--ckpt", "run", "--file", "edges.jsonl", "--device", "cpu"])
    want = [tuple(adapter._encode_pair(context, " a dog")) for context in contexts[:-1]]
    assert seen == [*want, ([adapter.eot_token_id], encoding.encode_ordinary(" a dog"))]


def test_rolling_log_likelihood(pair):
    """Every token once, the first from the beginning of a document; also beyond the context."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    folder, model, encoding = pair
    texts = [sentence(random.Random(n), n, n) for n in (1, 30, 200)]
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    theirs = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=2, max_length=96)
    want = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    got = evaluation.adapter(model, encoding).loglikelihood_rolling(requests)
    assert got == pytest.approx(want, rel=1e-5)
    assert len(encoding.encode_ordinary(texts[2])) > 2 * 96


def test_generation_groups_what_is_asked_alike(pair):
    """Other settings between; "" stops nothing; a text ends at <|end|>, which the model is made to write."""
    from lm_eval.api.instance import Instance
    folder, model, encoding = pair
    adapter = evaluation.adapter(model, encoding)
    hows = [{"max_gen_toks": n, "temperature": 0, "until": [""]} for n in (9, 12, 9)]
    requests = [Instance("generate_until", {}, ("red sea", how), 0) for how in hows]
    short, long, again = adapter.generate_until(requests)
    assert short == again and long.startswith(short) and len(long) > len(short)
    with pytest.raises(ValueError, match="repetition_penalty is not supported"):
        adapter.generate_until([Instance("generate_until", {}, ("red", {"repetition_penalty": 2.0}), 0)])
    model.head.weight[encoding.encode_single_token("<|end|>")] = 9 * model.head.weight.abs().sum(0)
    try:
        assert adapter.generate_until(requests)[0] != short
    finally:
        model.head.weight[encoding.encode_single_token("<|end|>")] = 0


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):
    """A run with room for the questions."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train.main(["--data", str(corpus), "--out", str(out), *SIZES, "--max_seq_len", "512", "--steps", "2"])
    return out


def test_the_command_of_the_docs_runs_until_a_task_that_there_is_not(trained, questions, capsys, monkeypatch):
    monkeypatch.delattr(lm_eval, "tasks", raising=False)          # as in a new process
    argv = COMMAND.split()[2:]
    argv[argv.index("out/laptop")] = str(trained)
    argv[argv.index("my_questions")] += ",arc_chalenge"
    with pytest.raises(SystemExit) as error:
        evaluation.main([*argv, "--limit", "5", "--device", "cpu"])
    out, err = capsys.readouterr()
    assert error.value.code == 2 and err.splitlines()[-1].startswith("error: task arc_chalenge cannot be run")
    file, = trained.glob("bench-*.json")
    found = json.loads(file.read_text())
    assert found["arguments"]["limit"] == 5 and found["model"]["n_expert"] == 6
    assert found["my_questions"]["n-shot"]["my_questions"] == 2
    acc = found["my_questions"]["results"]["my_questions"]["acc,none"]
    assert float(next(line for line in out.splitlines() if "my_questions" in line).split("|")[7]) == acc


@pytest.mark.parametrize("line, message", [
    *((line, "q.jsonl, line 1 needs a context") for line in (
        '{"context": "a", "choices": ["c", "d"], "answer": 2}', '{"context": "a", "choices": ["c"]}', "{",
        "[" * 2000, "[1]", '{"context": "a", "choices": [3], "answer": 0}',
        '{"context": "a", "choices": "yes", "answer": 0}')),
    ("\n", "q.jsonl has no question"),
    (json.dumps({"context": "a", "choices": ["naïve 42 " * 200], "answer": 0}), "than max_seq_len (512)")])
def test_questions_that_are_none(trained, in_folder, refused, line, message):
    Path("q.jsonl").write_text(line)
    refused(evaluation.main, ["choices", "--ckpt", trained, "--file", "q.jsonl", "--device", "cpu"], message)
