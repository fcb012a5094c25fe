"""Checkpoints under faults: flips, truncations, kills, full disks; hub folders and adapters; hostile files."""

import json
import os
import random as rng
import resource
import signal
import time

import mesh_ranks
import mesh_saves
import meshes
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from references import config, ours, reference
from safetensors.torch import save_file

from mmfunc import checkpoint, keys, lora, models, optim, shard, tree
from mmfunc.models import qwen2


def state(n=0):
    g = torch.Generator().manual_seed(n)
    return {"params": {"a": torch.randn(40, 30, generator=g), "b": [torch.randn(7, generator=g).bfloat16(), None]},
            "opt": {"a": [None, {"m": torch.randn(40, 30, generator=g)}]}, "step": torch.tensor(n)}


def same(a, b):
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


def test_round_trip_and_pruning(tmp_path):
    saver = checkpoint.Saver(tmp_path, keep=2)
    for n in range(5):
        s = state(n)
        saver(n, s, {"n": n})
        s["params"]["a"].zero_()  # what is changed after the call is not what is saved
    saver.close()
    assert checkpoint.steps(tmp_path) == [3, 4]
    found, meta, wrong = checkpoint.restore(tmp_path, state())
    assert same(found, state(4)) and meta == {"n": 4} and not wrong
    assert checkpoint.restore(tmp_path / "none", state()) is None


def test_every_flip_and_truncation_is_found(tmp_path):
    for n in (1, 2):
        checkpoint.save(tmp_path, n, state(n), {})
    r = rng.Random(0)
    for trial in range(200):
        file = r.choice(sorted(checkpoint.place(tmp_path, 2).iterdir()))
        good = file.read_bytes()
        bad = bytearray(good)
        at = r.randrange(len(bad))
        if trial % 4:
            bad[at] ^= 1 << r.randrange(8)
        file.write_bytes(bad if trial % 4 else bad[:at])
        if file.name == "manifest.json" and trial % 4 and _same_json(good, bad):
            file.write_bytes(good)
            continue  # white space of the manifest
        found, _, wrong = checkpoint.restore(tmp_path, state())
        assert same(found, state(1)) and len(wrong) == 1 and "step-00000002" in wrong[0], (file, at)
        file.write_bytes(good)
    assert same(checkpoint.restore(tmp_path, state())[0], state(2))


def _same_json(a, b):
    try:
        return json.loads(a) == json.loads(bytes(b))
    except ValueError:
        return False


def test_missing_and_swapped_files(tmp_path):
    for n in (1, 2, 3):
        checkpoint.save(tmp_path, n, state(n), {})
    (checkpoint.place(tmp_path, 3) / "state-0.safetensors").unlink()
    os.replace(
        checkpoint.place(tmp_path, 1) / "state-0.safetensors", checkpoint.place(tmp_path, 2) / "state-0.safetensors"
    )
    with pytest.raises(ValueError, match="no checkpoint is whole: .*step-00000003.*step-00000002.*step-00000001"):
        checkpoint.restore(tmp_path, state())


def test_kills_lose_nothing_acknowledged(tmp_path):
    """25 processes that save as fast as they can, each killed at a random time."""
    r, told = rng.Random(1), tmp_path / "told"
    for _ in range(25):
        begun = checkpoint.restore(tmp_path / "c", state())
        at = int(begun[0]["step"]) if begun else 0
        assert not begun or same(begun[0], state(at))
        assert at >= (int(told.read_text()) if told.exists() else 0)
        pid = os.fork()
        if not pid:
            for n in range(at + 1, at + 1000):
                checkpoint.save(tmp_path / "c", n, state(n), {})
                told.with_suffix(".new").write_text(str(n))
                os.replace(told.with_suffix(".new"), told)
            os._exit(0)
        time.sleep(r.uniform(0.01, 0.12))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert int(told.read_text()) > 25 and not [
        p for p in (tmp_path / "c").glob(".tmp*") if checkpoint.restore(tmp_path / "c", state()) is None
    ]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, broken):
    checkpoint.save(tmp_path, 1, state(1), {})
    def full(*a):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(os, broken, full)
        saver = checkpoint.Saver(tmp_path)
        saver(2, state(2), {})
        with pytest.raises(checkpoint.SaveError, match="step 2 .*No space left"):
            saver(3, state(3), {})
        with pytest.raises(checkpoint.SaveError):
            saver.close()
        told = []  # all goes on, but for the last save of a run that is stopped
        for strict in (False, True):
            saver = checkpoint.Saver(tmp_path, failed=told.append)
            assert isinstance(saver(2, state(2), {}).exception(), checkpoint.SaveError)
            if strict:
                with pytest.raises(checkpoint.SaveError):
                    saver.close(strict=True)
            else:
                saver.close()
        assert len(told) == 1 and "step 2" in str(told[0])
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert same(checkpoint.restore(tmp_path, state())[0], state(1))


def test_a_file_size_limit(tmp_path):
    was = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, was[1]))
        with pytest.raises(checkpoint.SaveError):
            checkpoint.save(tmp_path, 1, state(1), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, was)
        signal.signal(signal.SIGXFSZ, old)
    assert not list(tmp_path.iterdir())


def test_another_structure_and_other_settings_are_named(tmp_path):
    checkpoint.save(tmp_path, 1, state(1), {})
    other = state() | {"more": torch.zeros(2)}
    with pytest.raises(ValueError, match="it lacks more"):
        checkpoint.restore(tmp_path, other)
    with pytest.raises(ValueError, match=r"params.a is torch.float32 \(40, 30\)"):
        checkpoint.restore(tmp_path, state() | {"params": {"a": torch.zeros(40, 31), "b": [torch.zeros(7).bfloat16()]}})
    with pytest.raises(ValueError, match="lr: 0.1 then, 0.2 now"):
        checkpoint.same({"lr": 0.1, "n": 1}, {"lr": 0.2, "n": 1})


def folder(tmp_path, name="qwen2:tiny"):
    reference(name).save_pretrained(tmp_path)
    return tmp_path, config(name)


def test_a_folder_that_does_not_fit_names_both_sides(tmp_path):
    path, (module, c) = folder(tmp_path)
    from safetensors.torch import load_file
    good = load_file(path / "model.safetensors")

    def saved(change):
        tensors = dict(good)
        change(tensors)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError) as e:
            models.load(path)
        return str(e.value)

    said = saved(lambda t: t.pop("model.norm.weight"))
    assert "norm.weight (theirs: model.norm.weight)" in said
    assert "model.extra" in saved(lambda t: t.update({"model.extra": torch.zeros(1)}))
    said = saved(lambda t: t.update({"model.norm.weight": torch.zeros(65)}))
    assert "norm.weight has the shape (64,)" in said and "model.norm.weight has (65,)" in said
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:500])
    with pytest.raises(ValueError, match="is broken"):
        models.load(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no weights.*say so explicitly"):
        models.load(path)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match="points outside"):
        models.load(path)


def test_old_files_are_tensors_or_refused(tmp_path):
    path, (module, c) = folder(tmp_path)
    from safetensors.torch import load_file
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    assert same(models.load(path)[2], ours("qwen2:tiny")[0])

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    torch.save({"model.norm.weight": Hostile()}, path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read as plain tensors"):
        models.load(path)
    assert not (tmp_path / "owned").exists()


def test_a_tied_copy_must_be_equal(tmp_path):
    path, (module, c) = folder(tmp_path, "qwen2:tied")
    from safetensors.torch import load_file
    good = load_file(path / "model.safetensors")
    for copy, fits in (
        (good["model.embed_tokens.weight"].clone(), True),
        (good["model.embed_tokens.weight"] + 1, False),
    ):
        save_file(good | {"lm_head.weight": copy}, path / "model.safetensors", {"format": "pt"})
        if fits:
            models.load(path)
        else:
            with pytest.raises(ValueError, match="differs from model.embed_tokens.weight"):
                models.load(path)


def test_key_tables():
    P = lambda *s: tree.Param(s, " ".join("_" * len(s)))
    flat = {"blocks.0.q.w": P(2, 3), "blocks.0.k.w": P(4, 3), "conv": P(2, 12), "blocks.0.n": P(3)}
    table = {"blocks.*.{q,k}": keys.Cut("l.*.qk"), "conv": keys.View("c", (2, 3, 2, 2)), "blocks.*": "l.*"}
    places = keys.lookup(flat, table)
    theirs = {"l.0.qk.w": torch.randn(6, 3), "c": torch.randn(2, 3, 2, 2), "l.0.n": torch.randn(3)}
    keys.check(flat, places, {k: tuple(v.shape) for k, v in theirs.items()})
    mine = dict(keys.load(flat, places, theirs.__getitem__))
    assert torch.equal(mine["blocks.0.k.w"], theirs["l.0.qk.w"][2:])
    back = dict(keys.export(mine, places))
    assert back.keys() == theirs.keys() and all(torch.equal(back[k], theirs[k]) for k in theirs)
    with pytest.raises(ValueError, match="no rule for our parameter other"):
        keys.lookup({"other": P(1)}, table)
    with pytest.raises(ValueError, match="the model takes 18"):
        keys.check(flat, places, {"l.0.qk.w": (7, 3), "c": (2, 3, 2, 2), "l.0.n": (3,)})


def test_adapters_of_peft_both_ways(tmp_path):
    name = "qwen2:tiny"
    ref, (module, c) = reference(name), config(name)
    ref.save_pretrained(tmp_path / "base")
    base = type(ref).from_pretrained(tmp_path / "base", dtype=torch.float32)
    made = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"]))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for n, p in made.named_parameters():
            if "lora_" in n:
                p.copy_(torch.randn(p.shape, generator=g) * 0.2)
    made.eval().save_pretrained(tmp_path / "theirs")
    ids = torch.randint(0, c.vocab, (2, 11), generator=g)
    want = made(ids).logits
    declared, p = lora.load(tmp_path / "theirs", module.params(c), ours(name)[0], module.KEYS)
    assert (module.forward(p, c, {"input_ids": ids}) - want).abs().max() < 1e-5
    assert (module.forward(lora.merge(p), c, {"input_ids": ids}) - want).abs().max() < 1e-5
    lora.export(tmp_path / "ours", p, module.KEYS)
    plain = type(ref).from_pretrained(tmp_path / "base", dtype=torch.float32)
    again = PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
    assert (again(ids).logits - want).abs().max() < 1e-5
    assert set(tree.flatten(lora.base(p))) == set(tree.flatten(ours(name)[0]))


def test_lora_rules(tmp_path):
    declared = qwen2.params(qwen2.PRESETS["tiny"])
    with pytest.raises(ValueError, match="'nothing' matches none of the 14 dense maps"):
        lora.LoRA(declared, 4, "nothing")
    module, c = config("qwen2vl:tiny")
    wide = lora.LoRA(module.params(c), 2, r"vision\.blocks\.0\.self\.q$")
    p = tree.map(lambda x: torch.zeros(x.shape), wide)
    with pytest.raises(ValueError, match="part of visual.blocks.0.attn.qkv.weight"):
        lora.export(tmp_path, p, module.KEYS(c))


def _spoil(trial, newest, older, r):
    """Damage a checkpoint in one of six ways; what makes it whole again."""
    files = sorted(newest.iterdir())
    shards = [f for f in files if f.name != "manifest.json"]
    file = newest / "manifest.json" if trial % 6 == 4 else r.choice(files if trial % 6 < 2 else shards)
    good = file.read_bytes()
    at = r.randrange(len(good))
    if trial % 6 == 0:
        bad = bytearray(good)
        bad[at] ^= 1 << r.randrange(8)
        file.write_bytes(bad)
        if file.name == "manifest.json" and _same_json(good, bad):
            bad[at] = 0  # it was white space
            file.write_bytes(bad)
    elif trial % 6 == 1:
        file.write_bytes(good[:at])
    elif trial % 6 == 2:
        file.unlink()
    elif trial % 6 < 5:  # a file, or the manifest, of another step
        file.write_bytes((older / file.name).read_bytes())
    else:  # a file of another rank
        file.write_bytes(r.choice([f for f in shards if f != file]).read_bytes())
    return lambda: file.write_bytes(good)


def _spoiled(rank, world, root, name, trials):
    """(trials that went unnoticed, what was said of the last one) by ranks that each read their part."""
    mesh, r, unnoticed = meshes.PLANS["fsdp2 tp2"], rng.Random(0), []
    with shard.use(shard.connect(mesh), meshes.declared(name)):
        def made(step):
            params = tree.map(lambda t: t + step, meshes.divided(name)[0])
            return optim.init(mesh_saves.TX, shard.place(params), None) | {"step": torch.tensor(step)}

        for step in (1, 2):
            checkpoint.save(root, step, made(step), {})
        shard.everyone("saved")
        for trial in range(trials):
            heal = _spoil(trial, *(checkpoint.place(root, n) for n in (2, 1)), r) if not rank else None
            shard.everyone("spoiled")
            found, _, wrong = checkpoint.restore(root, made(0))
            if not (same(found, made(1)) and len(wrong) == 1 and "step-00000002" in wrong[0]):
                unnoticed.append(trial)
            shard.everyone("seen")
            if not rank:
                heal()
            shard.everyone("healed")
        whole = same(checkpoint.restore(root, made(0))[0], made(2))
    return unnoticed, whole, wrong


@pytest.mark.parametrize("trials", [36, pytest.param(200, marks=pytest.mark.deep)])
def test_every_corruption_of_a_sharded_checkpoint_is_found(tmp_path, trials):
    """Bits, truncations, a missing file of a rank, a file of another step or rank, a stale manifest: by all ranks."""
    meshes.case("qwen2 odd")
    for unnoticed, whole, wrong in mesh_ranks.run(_spoiled, 4, tmp_path, "qwen2 odd", trials):
        assert not unnoticed and whole and "is damaged" in wrong[0]
