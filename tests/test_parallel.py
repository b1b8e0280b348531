"""Masters and copies, clipping, checkpoints."""

import errno
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import small

import parallel
from model import Model
from parallel import (
    Masters,
    adamw,
    checkpoints,
    clip_gradients,
    load_checkpoint,
    save_checkpoint,
    training_state,
)


def build(dtype=torch.float32, seed=0, **changes):
    model = Model(small(**changes), seed=seed)
    masters = Masters(model, dtype)
    return model, masters, adamw(masters, 1e-2, (0.9, 0.95), 1e-8, 0.1)


def backward(model, seed, scale=1.0):
    tokens = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(seed))
    (model(tokens, tokens).loss * scale / tokens.numel()).backward()


def step(model, masters, optimizer, seed=0):
    backward(model, seed)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    masters.refresh()


# --- precision --------------------------------------------------------------------------------------------

def test_in_fp32_the_masters_are_the_model():
    model, masters, _ = build()
    assert all(masters.named[name] is p for name, p in model.named_parameters()) and not masters.copies


@pytest.mark.parametrize("tied", [True, False])
def test_bf16_copies_follow_fp32_masters(tied):
    model, masters, optimizer = build(torch.bfloat16, tie_embeddings=tied)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert kinds["blocks.0.moe.experts.w_in"] == kinds["embed.weight"] == torch.bfloat16
    assert kinds["blocks.0.moe.router.weight"] == kinds["norm.weight"] == torch.float32
    assert all(p.dtype == torch.float32 for p in masters.named.values())
    before = {name: p.detach().clone() for name, p in masters.named.items()}
    for i in range(3):
        step(model, masters, optimizer, i)
    for name, p in model.named_parameters():
        assert not torch.equal(masters.named[name], before[name])
        assert torch.equal(p, masters.named[name].to(p.dtype)), name


def test_bf16_gradients_accumulate_in_fp32():
    """1,000 small micro-batch gradients: bf16 would stop growing at 256 of them."""
    model, masters, _ = build(torch.bfloat16)
    copy, master = masters.copies[0]
    for _ in range(1000):
        (copy.float().sum() * 1.0).backward()
    assert copy.grad is None and master.grad.dtype == torch.float32
    assert (master.grad == 1000).all()


def test_gradients_have_the_same_memory_in_every_step():
    """.. and nothing of the step before is left in it."""
    model, masters, optimizer = build(torch.bfloat16)
    copy, master = masters.copies[0]
    places = set()
    for factor in (3.0, 5.0):
        for _ in range(2):
            (copy.float().sum() * factor).backward()
        assert (master.grad == 2 * factor).all()
        places.add(master.grad.data_ptr())
        optimizer.zero_grad(set_to_none=True)
    assert len(places) == 1


def test_bf16_training_learns_like_fp32():
    losses = {}
    tokens = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        model, masters, optimizer = build(dtype)
        for _ in range(40):
            step(model, masters, optimizer)
        losses[dtype] = model(tokens, tokens).loss.item() / tokens.numel()
    assert losses[torch.float32] < 2
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.1)


def test_decay_is_on_matrices_only():
    _, masters, optimizer = build()
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {decays[id(p)] for p in masters.named.values() if p.dim() > 1} == {0.1}
    assert {decays[id(p)] for p in masters.named.values() if p.dim() == 1} == {0.0}


@pytest.mark.parametrize("max_norm", [0.05, 1e9])
def test_clipping_equals_torch(max_norm):
    (a, masters, _), (b, _, _) = build(), build()
    backward(a, 0)
    backward(b, 0)
    total, norms = clip_gradients(masters, max_norm)
    want = torch.nn.utils.clip_grad_norm_(b.parameters(), max_norm)
    torch.testing.assert_close(total, want)
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p.grad, q.grad)
    assert torch.stack(list(norms.values())).norm().item() == pytest.approx(total.item())  # before scaling


# --- checkpoints ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_run_goes_on_like_the_saved_one(tmp_path, dtype):
    a, b = build(dtype), build(dtype, seed=1)
    for i in range(3):
        step(*a, i)
    save_checkpoint(tmp_path, 3, training_state(a[1], a[2]), keep=2)
    load_checkpoint(tmp_path / "step-3", training_state(b[1], b[2]))
    b[1].refresh()
    for i in range(3, 5):
        step(*a, i)
        step(*b, i)
    for name, p in a[1].named.items():
        assert torch.equal(p, b[1].named[name]), name
        assert p.dtype == torch.float32


def test_newest_are_kept(tmp_path):
    _, masters, _ = build()
    for i in (5, 10, 100):
        save_checkpoint(tmp_path, i, training_state(masters), keep=2)
        (tmp_path / f"step-{i + 1}.tmp").mkdir()                  # as a crash leaves it
    assert checkpoints(tmp_path) == [10, 100]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-10", "step-100", "step-101.tmp"]


def largest(path):
    return max(path.glob("*.distcp"), key=lambda f: f.stat().st_size)


def flip(file):
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize("harm", [
    lambda path: largest(path).write_bytes(largest(path).read_bytes()[:-10]),
    lambda path: flip(largest(path)),
    lambda path: largest(path).unlink(),
    lambda path: flip(path / ".metadata"),
    lambda path: (path / "manifest.json").unlink(),
    lambda path: (path / "manifest.json").write_text("{"),
    lambda path: (path / "manifest.json").write_text("[1]")],
    ids=["cut", "flipped", "missing", "metadata", "no manifest", "broken manifest", "foreign manifest"])
def test_damage_is_called_corrupt(tmp_path, harm):
    _, masters, _ = build()
    save_checkpoint(tmp_path, 1, training_state(masters), keep=1)
    before = {name: p.detach().clone() for name, p in masters.named.items()}
    harm(tmp_path / "step-1")
    with pytest.raises(ValueError, match="corrupt"):
        load_checkpoint(tmp_path / "step-1", training_state(masters))
    assert all(torch.equal(before[name], p) for name, p in masters.named.items())


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    _, masters, _ = build()
    save_checkpoint(tmp_path, 1, training_state(masters), keep=1)
    with pytest.raises(ValueError, match="step-1"):
        load_checkpoint(tmp_path / "step-1", training_state(build(n_layer=3)[1]))
    with pytest.raises(ValueError, match="step-1"):
        load_checkpoint(tmp_path / "step-1", training_state(build(d_model=32)[1]))


@pytest.mark.parametrize("where", ["writing", "renaming"])
def test_a_save_that_fails_leaves_the_old_one_whole(tmp_path, monkeypatch, where):
    _, masters, _ = build()
    save_checkpoint(tmp_path, 1, training_state(masters), keep=1)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(*((parallel.dcp, "save") if where == "writing" else (parallel.os, "rename")), full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 2, training_state(masters), keep=1)
    monkeypatch.undo()
    assert checkpoints(tmp_path) == [1]
    load_checkpoint(tmp_path / "step-1", training_state(masters))
    shutil.rmtree(tmp_path / "step-2.tmp", ignore_errors=True)
    save_checkpoint(tmp_path, 2, training_state(masters), keep=1)                # and the next one works
    assert checkpoints(tmp_path) == [2]


def test_the_old_one_is_deleted_last(tmp_path, monkeypatch):
    """At every moment there is a whole checkpoint."""
    _, masters, _ = build()
    save_checkpoint(tmp_path, 1, training_state(masters), keep=1)
    real, seen = parallel.shutil.rmtree, []

    def rmtree(path, **kwargs):
        seen.append((path.name, checkpoints(tmp_path)))
        real(path, **kwargs)
    monkeypatch.setattr(parallel.shutil, "rmtree", rmtree)
    save_checkpoint(tmp_path, 2, training_state(masters), keep=1)
    assert seen[-1] == ("step-1", [1, 2]) and checkpoints(tmp_path) == [2]


def test_everything_is_durable_before_it_has_its_name(tmp_path, monkeypatch):
    _, masters, _ = build()
    real, seen = parallel.os.fsync, []
    monkeypatch.setattr(parallel.os, "fsync", lambda fd: seen.append("sync") or real(fd))
    rename = parallel.os.rename
    monkeypatch.setattr(parallel.os, "rename", lambda a, b: seen.append(str(b)) or rename(a, b))
    save_checkpoint(tmp_path, 1, training_state(masters), keep=1)
    place = next(i for i, what in enumerate(seen) if what.endswith("step-1"))
    assert seen[place - 2:place] == ["sync", "sync"] and seen[place + 1:] == ["sync"]  # manifest, folder; run


def test_checkpoints_are_those_of_torch(tmp_path):
    """Read back without this project's code."""
    _, masters, _ = build()
    save_checkpoint(tmp_path, 1, training_state(masters), keep=1)
    state = {"model.norm.weight": torch.zeros(16)}
    dcp.load(state, checkpoint_id=tmp_path / "step-1", no_dist=True)
    assert torch.equal(state["model.norm.weight"], torch.ones(16))
