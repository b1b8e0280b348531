"""Weights and tokenizers out to transformers and in from it (extra hf)."""

import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SIZES, curve, rows, small, small_run, write_corpus
from hypothesis import example, given, settings
from hypothesis import strategies as st

import data
import eval as evaluation
import parallel
import train
from eval import hf_config, read_hf_config

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
pytest.importorskip("safetensors", reason="needs the extra hf")


@pytest.fixture(scope="session", params=[
    ["--tie_embeddings", "true"], ["--gate", "normalized", "--top_k", "3", "--tie_embeddings", "false"],
    ["--n_expert", "1"]], ids=["softmax, K 1", "normalized, K 3, untied", "dense"])
def exported(request, corpus, tmp_path_factory):
    """-> (run, its export)."""
    root = tmp_path_factory.mktemp("exported")
    train.main(["--data", str(corpus), "--out", str(root / "run"), *SIZES, "--steps", "30", "--lr", "0.01",
                *request.param])
    evaluation.main(["export", "--ckpt", str(root / "run"), "--to", str(root / "hf")])
    return root / "run", root / "hf"


# --- out --------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_transformers_computes_the_same_logits_and_text(exported):
    run, folder = exported
    ours, _, top_k = evaluation.load_run(run)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.randint(0, 300, (4, 50))
    want = ours(tokens, top_k=top_k)
    assert want.std() > 0.1 and theirs.dtype == torch.float32
    torch.testing.assert_close(theirs(tokens).logits, want, rtol=0, atol=1e-5)
    prompt = torch.randint(0, 300, (1, 7))
    assert theirs.generation_config.eos_token_id == [
        data.load_encoding(run).encode_single_token(token) for token in ("<|endoftext|>", "<|end|>")]
    text = theirs.generate(prompt, max_new_tokens=40, do_sample=False, eos_token_id=-1)
    assert torch.equal(text, evaluation.generate(ours, prompt, 40, temperature=0, k_per_layer=top_k))


def test_weights_in_many_files_are_the_same(exported, tmp_path):
    """And only the files of the index are read: an older one beside them changes nothing."""
    from safetensors.torch import save_file
    _, folder = exported
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    save_file({"model.norm.weight": torch.zeros(16)}, tmp_path / "zz_old.safetensors")
    one, many = evaluation.load_hf_weights(folder), evaluation.load_hf_weights(tmp_path)
    assert set(one) == set(many) and all(torch.equal(one[name], many[name]) for name in one)


@pytest.fixture(scope="session")
def tokenizers(corpus, tmp_path_factory):
    """-> {name: (tiktoken encoding, what AutoTokenizer makes of its export)}."""
    found = {}
    for name in ("trained", "bytes", "gpt2", "o200k_base"):
        folder = tmp_path_factory.mktemp(name)
        try:
            encoding = data.load_encoding(corpus) if name == "trained" else data.build_encoding(name, 0, ())
        except ValueError:                                        # neither in tiktoken's cache nor a network
            continue
        evaluation.save_tokenizer(encoding, folder, 64)
        (folder / "config.json").write_text(json.dumps(hf_config(small(vocab_size=encoding.n_vocab))))
        found[name] = encoding, transformers.AutoTokenizer.from_pretrained(folder)
    return found


WORDS = st.sampled_from([
    "def f(x):\n\treturn x", "    if not self.items:", "naïve café", "e\u0301\u0327", "日本語",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈",
    "can't WON'T it's", "12345678", "\r\n\r\n", "\u00a0\u2003\u3000", "\ufeff", "\0\x07\x1b", "...!!!",
    "don\u2019t", "ﬁ Ǆ ß İ ſ", "مرحبا", "हिन्दी", "\U0010ffff", "aaaa", "  "])
TEXT = st.lists(st.one_of(WORDS, st.text(max_size=8), st.builds(
    lambda c, n: c * n, st.characters(codec="utf-8"), st.integers(1, 200))), max_size=8).map("".join)


@settings(max_examples=150, deadline=None)
@given(TEXT)
@example(" " * 1000 + "a" * 1000 + "\n" * 100)
@example("'ſ 'S 's 'LL")
def test_token_ids_are_equal_on_arbitrary_text(tokenizers, text):
    if any(special in text for special in data.SPECIAL):
        return
    for name, (ours, theirs) in tokenizers.items():
        want = ours.encode_ordinary(text)
        assert theirs.encode(text) == want, name
        assert theirs.decode(want) == text


def test_the_chat_template(tokenizers):
    ours, theirs = tokenizers["trained"]
    chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "hello"}, {"role": "user", "content": "bye"}]
    want = ("<|endoftext|><|system|>be kind<|end|><|user|>hi<|end|><|assistant|>hello<|end|>"
            "<|user|>bye<|end|><|assistant|>")
    assert theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == want
    ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids == ours.encode(want, allowed_special="all")
    assert ids == data.encode_chat(ours, data.read_chat({"messages": chat}), answer=True)
    marked = theirs.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    mask = data.assistant_mask(marked["input_ids"], ours.n_vocab)
    assert marked["assistant_masks"] == mask.astype(int).tolist() and mask.any()


@torch.no_grad()
def test_mlx_computes_the_same_log_probabilities_and_text(exported):
    """An engine with code of its own, on the CPU."""
    mx = pytest.importorskip("mlx.core", reason="needs mlx[cpu] and mlx-lm")
    load = pytest.importorskip("mlx_lm.utils", reason="needs mlx[cpu] and mlx-lm").load_model
    run, folder = exported
    mx.set_default_device(mx.cpu)
    ours, _, top_k = evaluation.load_run(run)
    theirs, _ = load(folder)
    tokens = torch.randint(0, 300, (4, 12))
    text = evaluation.generate(ours, tokens, 24, temperature=0, k_per_layer=top_k)
    logits = theirs(mx.array(text.numpy()))
    found, want = torch.tensor(logits.tolist()).log_softmax(-1), ours(text, top_k=top_k).log_softmax(-1)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-4)
    assert torch.equal(found[:, 11:-1].argmax(-1), text[:, 12:])


@torch.no_grad()
def test_a_batch_of_prompts_of_different_lengths_goes_on_as_each_alone(exported):
    _, folder = exported
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompts = ["abc", "a longer one, of more tokens"]
    both = model.generate(**tokenizer(prompts, padding=True, return_tensors="pt"), max_new_tokens=8,
                          do_sample=False, eos_token_id=-1)
    for prompt, row in zip(prompts, both):
        alone = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=8, do_sample=False,
                               eos_token_id=-1)
        assert torch.equal(row[-8:], alone[0, -8:])


def test_a_field_that_a_fork_added_is_not_dropped(monkeypatch):
    @dataclasses.dataclass
    class Fork(type(small())):
        capacity: float = 1.0
    hf_config(Fork(**dataclasses.asdict(small())))
    with pytest.raises(ValueError, match="no place for capacity 2.0"):
        hf_config(Fork(**dataclasses.asdict(small()), capacity=2.0))


@pytest.mark.parametrize("more, message", [
    (["--gate", "sigmoid"], "not sigmoid and [1, 1]"), (["--balance", "loss-free"], "no selection biases"),
    (["--initial_top_k", "3", "--switch", "1"], "not softmax and [3, 1]"), ([], "is there already")])
def test_what_cannot_be_exported_is_said(corpus, tmp_path, refused, more, message):
    """Before anything is written; nothing is overwritten."""
    train.main(["--data", str(corpus), "--out", str(tmp_path / "run"), *SIZES, "--steps", "2", *more])
    to = tmp_path / "hf" if more else tmp_path / "run"
    refused(evaluation.main, ["export", "--ckpt", tmp_path / "run", "--to", to], message)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# --- in ---------------------------------------------------------------------------------------------------

SHORT = ["--seq_len", "16", "--batch_size", "8", "--log_every", "1", "--sample_tokens", "0",
         "--device", "cpu"]


def test_a_run_goes_on_from_its_own_export(ranks, exported, corpus, tmp_path):
    """Bit by bit as from the run itself; on two processes, too; and later without the folder."""
    run, folder = exported
    argv = ["--data", str(corpus), *SHORT, "--steps", "4", "--lr", "0.01", "--optimizer", "adamw"]
    for source in (run, folder):
        train.main([*argv, "--out", str(tmp_path / source.name), "--init_from", str(source)])
    assert curve(tmp_path / "run") == curve(tmp_path / "hf")
    models = [parallel.read_settings(tmp_path / name)["model"] for name in ("run", "hf")]
    assert (models[0].pop("max_seq_len"), models[1].pop("max_seq_len")) == (64, 16)    # possible, trained
    assert models[0] == models[1]
    ep = "1" if models[0]["n_expert"] == 1 else "2"
    shutil.copytree(folder, tmp_path / "copy")
    argv = [*argv, "--init_from", str(tmp_path / "copy"), "--out", str(tmp_path / "two"), "--ep"]
    assert [a.code for a in ranks(2, train.main, [*argv, ep])] == [None, None]
    for a, b in zip(rows(tmp_path / "hf"), rows(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
    shutil.rmtree(tmp_path / "copy")
    train.main([*argv, "1", "--steps", "6"])
    assert len(rows(tmp_path / "two")) == 6


def change(**changes):
    def harm(folder):
        saved = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(saved | changes))
    return harm


def cut(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])


@pytest.mark.parametrize("harm, message", [
    (change(model_type="llama"), "only a plain Qwen3-MoE can be read, not one with model_type 'llama'"),
    (change(rope_scaling={"type": "yarn"}), "yarn"),
    (change(hidden_size=None), "d_model must be a whole number"),
    (change(rms_norm_eps="1e-6"), "config.json is not that of a plain Qwen3-MoE"),
    (change(num_hidden_layers=3), "needs [('model.layers.2."),
    (change(num_hidden_layers=1), "not [('model.layers.1."),
    (change(moe_intermediate_size=16), "experts.0.down_proj.weight', (16, 16))"),
    (cut, "has missing or corrupt safetensors"),
    (lambda folder: (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../hf/model.safetensors"}}'), "its index names what is no file in it"),
    (lambda folder: evaluation.save_tokenizer(data.build_encoding("bytes"), folder, 64), "is not that of"),
    (lambda folder: (folder / "config.json").unlink(), "is not of a directory of this train.py")])
def test_a_folder_that_does_not_fit(finished, corpus, tmp_path, refused, harm, message):
    folder = tmp_path / "hf"
    evaluation.main(["export", "--ckpt", str(finished), "--to", str(folder)])
    harm(folder)
    refused(train.main, ["--data", corpus, "--out", tmp_path / "new", "--init_from", folder, *SHORT], message)


def test_a_config_survives_the_round_trip(tmp_path):
    config = small(gate="normalized", rope_base=123.0, norm_eps=1e-5, top_k=2)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(config)))
    assert read_hf_config(tmp_path) == config
    assert transformers.Qwen3MoeConfig(**hf_config(config)).num_experts_per_tok == 2


def test_a_text_is_prepared_with_a_tokenizer_of_hugging_face(tokenizers, tmp_path, capsys):
    """The ranks are those that it was exported from, and the same text gives the same tokens."""
    for name, (ours, theirs) in tokenizers.items():
        theirs.save_pretrained(tmp_path / name)
        found = data.load_encoding(tmp_path / name / "tokenizer.json")
        assert found._mergeable_ranks == ours._mergeable_ranks and found._pat_str == ours._pat_str
    if "gpt2" in tokenizers:                                      # its own file is older, and lacks two names
        saved = json.loads((tmp_path / "gpt2/tokenizer.json").read_text()) | {"normalizer": {"type": "NFC"}}
        saved["model"].pop("type")
        saved["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        (tmp_path / "gpt2/tokenizer.json").write_text(json.dumps(saved))
        assert data.load_encoding(tmp_path / "gpt2")._pat_str == data.GPT2_PATTERN
        assert "brings text to NFC, which is not done here" in capsys.readouterr().err
    texts = write_corpus(tmp_path / "text")
    data.prepare(tmp_path / "prepared", [str(texts)], tokenizer=str(tmp_path / "bytes/tokenizer.json"))
    data.prepare(tmp_path / "known", [str(texts)], tokenizer="bytes")
    assert (data.load_tokens(tmp_path / "prepared") == data.load_tokens(tmp_path / "known")).all()


@pytest.mark.parametrize("change, message", [
    (lambda saved: saved["model"].update(type="WordPiece"), "is WordPiece"),
    (lambda saved: saved["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits"}), "splits text in"),
    (lambda saved: saved.update(normalizer={"type": "NFKC"}), "changes text (NFKC)"),
    (lambda saved: saved["added_tokens"].append({"content": "  "}), "adds tokens of spaces"),
    (lambda saved: saved["model"]["merges"].reverse(), "in the order of its merges")])
def test_tokenizers_that_would_give_other_tokens_are_refused(tokenizers, tmp_path, change, message):
    evaluation.save_tokenizer(tokenizers["trained"][0], tmp_path, 64)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    change(saved)
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=re.escape(message)):
        data.load_encoding(tmp_path / "tokenizer.json")


def test_a_tokenizer_without_a_byte_is_refused(tokenizers, tmp_path):
    """tiktoken panics at it, beyond the reach of a handler."""
    data.save_encoding(tokenizers["trained"][0], tmp_path / "encoding.json")
    saved = json.loads((tmp_path / "encoding.json").read_text())
    saved["ranks"][65] = None
    (tmp_path / "encoding.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="lacks one of the 256 bytes"):
        data.load_encoding(tmp_path)


@pytest.mark.parametrize("first", [0, 200, 999])
def test_tokens_keep_their_numbers_wherever_special_tokens_are(tokenizers, tmp_path, first, monkeypatch):
    """Three special tokens of theirs from some number on; ours come last; what is saved reads back."""
    evaluation.save_tokenizer(tokenizers["trained"][0], tmp_path, 64)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    added = {token["content"] for token in saved["added_tokens"]}
    plain = {token: i for token, i in saved["model"]["vocab"].items() if token not in added}
    first = min(first, len(plain))
    special = {f"<s{i}>": first + i for i in range(3)}
    saved["model"]["vocab"] = {token: i + 3 * (i >= first) for token, i in plain.items()} | special
    saved["added_tokens"] = [saved["added_tokens"][0] | {"id": i, "content": token}
                             for token, i in special.items()]
    saved["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    ours = data.build_encoding(str(tmp_path))
    data.save_encoding(ours, tmp_path / "encoding.json")
    for found in (ours, data.load_encoding(tmp_path)):
        for text in ("def f(x):\n    return x", "naïve 日本語 🙂", "  \r\n\t12345"):
            assert found.encode_ordinary(text) == theirs.encode(text)
            assert found.decode(found.encode_ordinary(text)) == text
        assert found.encode_single_token("<|endoftext|>") == max(len(plain) + 3 * (first < len(plain)), first)
        numbers = torch.arange(found.n_vocab)[:, None]            # a model writes any, used or not
        monkeypatch.setattr(evaluation, "stream", lambda *args, numbers=numbers: numbers)
        model = SimpleNamespace(embed=torch.nn.Embedding(1, 1))
        assert " a" in "".join(evaluation.generate_text(model, found, [0], 1, None))


# --- lm-evaluation-harness --------------------------------------------------------------------------------

PAGE = (ROOT / "docs/parity.md").read_text()


def test_the_harness_scores_an_exported_folder(corpus, tmp_path):
    """The command of docs/parity.md, offline; its accuracies are those of the model's own probabilities."""
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    run = tmp_path / "run"
    train.main(small_run(corpus, run, "--steps 4 --seq_len 64"))
    evaluation.main(["export", "--ckpt", str(run), "--to", str(tmp_path / "exported")])
    blocks = re.findall(r"```(?:yaml|json|)\n([^`]*?)```", PAGE.split("## Questions of")[1])
    task, question, command = blocks
    rng = random.Random(0)
    words = "red sea of the trees 42 walk so".split()
    rows = [{"question": " ".join(rng.choices(words, k=rng.randint(1, 4))), "answer": rng.randint(0, 2),
             "choices": [" ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(3)]}
            for _ in range(12)]
    (tmp_path / "my_tasks").mkdir()
    (tmp_path / "my_tasks/my_questions.yaml").write_text(task)
    (tmp_path / "my_questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert json.loads(question).keys() == rows[0].keys()
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                        "HF_HOME": str(tmp_path / "cache")}
    argv = [sys.executable, "-m", *command.split(), "--device", "cpu", "--output_path", "results"]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next((tmp_path / "results").rglob("*.json")).read_text())["results"]["my_questions"]
    model, _, top_k = evaluation.load_run(run)
    encoding, right = data.load_encoding(run), []
    for row in rows:
        scores, context = [], f"Question: {row['question']}\nAnswer:"
        for choice in row["choices"]:
            tokens = encoding.encode_ordinary(f"{context} {choice}")
            n = len(encoding.encode_ordinary(context))            # what the choice is behind
            log_prob = model(torch.tensor([tokens[:-1]]), top_k=top_k)[0].log_softmax(-1)
            scores.append(sum(log_prob[i - 1, tokens[i]].item() for i in range(n, len(tokens))))
        norm = [score / len(choice) for score, choice in zip(scores, row["choices"])]
        right.append([np.argmax(scores) == row["answer"], np.argmax(norm) == row["answer"]])
    want = np.mean(right, 0)
    assert [found["acc,none"], found["acc_norm,none"]] == pytest.approx(want.tolist())
    assert 0 < want.min() < 1
