"""What every family must pass: equal to its reference in outputs, loss and gradients, in eager and in every mode."""

import json

import pytest
import torch
from references import CASES, batch, config, hub_batch, ours, prepared, published, reference

from mmfunc import hub, jit, keys, lora, models, random, tree

SIZES = {"qwen2:2.5-0.5b": 494_032_768, "qwen2:2.5-7b": 7_615_616_512, "qwen2:2.5-72b": 72_706_203_648,
         "qwen2vl:2b": 2_208_985_600, "qwen2vl:7b": 8_291_375_616, "qwen2vl:72b": 73_405_560_320,
         "qwen2vl:2.5-3b": 3_754_622_976, "qwen2vl:2.5-7b": 8_292_166_656, "qwen2vl:2.5-32b": 33_452_718_336,
         "qwen2vl:2.5-72b": 73_410_777_344}


def worst(a: dict, b: dict) -> tuple[float, str]:
    """Largest relative difference of two sets of tensors; what is below 1e-5 of the largest gradient counts as zero."""
    floor = 1e-5 * max(v.abs().max().item() for v in b.values())
    return max((((a[k] - v).abs().max() / v.abs().max().clamp(min=floor)).item(), k) for k, v in b.items())


def theirs(name, b):
    ref = reference(name)
    ref.zero_grad()
    out = ref(**hub_batch(name, b))
    out.loss.backward()
    return out.logits.detach(), out.loss.detach(), {k: p.grad.clone() for k, p in published(name).items()}


def value_and_grads(name, b, places, p, **how):
    module, c = config(name)
    f = jit.jit(lambda p, b: jit.value_and_grad(lambda p, b: module.loss(p, c, b))(p, b), **how)
    loss, grads = f(p, b)
    return loss, dict(keys.export(tree.flatten(grads), places))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name, left):
    """float32 against float32: 1e-5 of the largest logit, 1e-6 of the loss, 1e-4 of each gradient's largest element."""
    b = batch(name, left)
    logits, loss, grads = theirs(name, b)
    p, places = ours(name)
    module, c = config(name)
    valid = b["attention_mask"].bool()
    for how in ({}, {"patches": 240, "row": 80}) if "vl" in name else ({},):
        ready = prepared(name, b, **how)
        mine = module.forward(p, c, ready)
        assert (mine - logits)[valid].abs().max() < 1e-5 * logits.abs().max()
        value, found = value_and_grads(name, ready, places, p, backend="eager")
        assert abs(value - loss) < 1e-6 * loss
        assert worst(found, grads)[0] < 1e-4


@pytest.mark.parametrize("name", ["qwen2:tied", "qwen2vl:tiny"])
@pytest.mark.parametrize("mode", ["whole", "split", "block"])
def test_modes_and_policies_agree(name, mode):
    p, places = ours(name)
    b = prepared(name, batch(name), **({"patches": 240, "row": 80} if "vl" in name else {}))
    loss, grads = value_and_grads(name, b, places, p, backend="eager")
    for policy in (None, "nothing", "attention", "dots"):
        value, found = value_and_grads(name, b, places, p, backend="aot_eager", mode=mode, remat=policy)
        assert abs(value - loss) < 1e-6 * loss
        assert worst(found, grads)[0] < 1e-5


@pytest.mark.parametrize("mode", ["whole", "split", "block"])
def test_inductor_equals_the_reference(mode):
    name = "qwen2vl:tiny"
    b = batch(name)
    _, loss, grads = theirs(name, b)
    p, places = ours(name)
    value, found = value_and_grads(name, prepared(name, b, patches=240, row=80), places, p, mode=mode,
                                   remat="attention" if mode == "split" else None)
    assert abs(value - loss) < 2e-6 * loss
    assert worst(found, grads)[0] < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_hub_round_trip(name, tmp_path):
    """transformers' folder -> ours -> a folder that transformers loads: the same bits."""
    ref, (module, c) = reference(name), config(name)
    ref.save_pretrained(tmp_path / "a")
    found, cc, p = models.load(tmp_path / "a")
    assert (found, cc) == (module, c)
    models.export(tmp_path / "b", module, c, p)
    again = type(ref).from_pretrained(tmp_path / "b", dtype=torch.float32).state_dict()
    assert all(torch.equal(v, again[k]) for k, v in ref.state_dict().items())
    hub.write(tmp_path / "c", p, module.params(c), models.table(module, c), module.hub(c), shard=100_000)
    assert len(hub.files(tmp_path / "c")) > 1
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(p), tree.leaves(models.load(tmp_path / "c")[2])))
    assert module.config(json.loads((tmp_path / "b" / "config.json").read_text())) == c


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    module, c = models.get(name)
    assert tree.size(module.params(c)) == SIZES[name]


@pytest.mark.parametrize("name", ["qwen2:tiny", "qwen2vl:tiny"])
def test_packed_equals_unpacked(name):
    """Two samples in one row, apart by segment ids, have the logits they have alone."""
    module, c = config(name)
    p, _ = ours(name)
    b = batch(name)
    n = b["attention_mask"].sum(1).tolist()
    alone = module.forward(p, c, prepared(name, b))
    order = [0, 1] if "vl" in name else [2, 0]
    row = torch.cat([b["input_ids"][i, : n[i]] for i in order])[None]
    mask = torch.cat([torch.full((n[i],), k + 1) for k, i in enumerate(order)])[None]
    packed = {k: v for k, v in b.items() if k not in ("labels", "input_ids", "attention_mask")}
    packed |= {"input_ids": row, "attention_mask": mask}
    if "vl" not in name:
        packed["position_ids"] = torch.cat([torch.arange(n[i]) for i in order])[None]
    both = module.forward(p, c, prepared(name, packed))[0].split([n[i] for i in order])
    for i, found in zip(order, both):
        assert (found - alone[i, : n[i]]).abs().max() < 1e-5 * alone.abs().max()


def test_text_and_pictures_share_one_graph():
    name = "qwen2vl:tiny"
    module, c = config(name)
    p, _ = ours(name)
    full = prepared(name, batch(name), patches=240, row=80)
    plain = {k: v for k, v in batch(name).items() if k in ("input_ids", "attention_mask", "labels")}
    plain["input_ids"] = plain["input_ids"] % 140
    empty = prepared(name, plain, patches=240, row=80)
    assert {k: v.shape for k, v in tree.flatten(full).items()} == {k: v.shape for k, v in tree.flatten(empty).items()}
    f = jit.jit(lambda p, b: module.loss(p, c, b), backend="aot_eager")
    assert f(p, full).isfinite() and f(p, empty).isfinite() and len(f.entries) == 1
    assert torch.allclose(f(p, empty), module.loss(p, c, plain), rtol=1e-6)


def test_a_frozen_tower_gets_no_gradient():
    name = "qwen2vl:tiny"
    module, c = config(name)
    p, _ = ours(name)
    trained = tree.select(p, "^(?!vision)")
    frozen = tree.without(p, trained)
    b = prepared(name, batch(name))
    whole = jit.value_and_grad(lambda p, b: module.loss(p, c, b))(p, b)[1]
    part = jit.value_and_grad(lambda q, b: module.loss(tree.merge(q, frozen), c, b))(trained, b)[1]
    assert not any(k.startswith("vision") for k in tree.flatten(part))
    assert all(torch.allclose(g, tree.at(whole, k), rtol=1e-5, atol=1e-7) for k, g in tree.flatten(part).items())
    cost = lambda params, rest: jit.jit(lambda q, r, b: jit.value_and_grad(
        lambda q: module.loss(tree.merge(q, r), c, b))(q)).lower(params, rest, b).cost()["flops"]
    tower = jit.jit(lambda p, b: module.embeds(p, c, b)).lower(p, b).cost()["flops"]
    assert cost(p, None) - cost(trained, frozen) > 1.9 * tower  # the backward pass of the tower is not there


def test_position_rules():
    """Behind a video the rules differ: 4.51 goes on behind the largest position, 5.23 behind the larger side."""
    module, c = config("qwen2vl:tiny")
    b = batch("qwen2vl:tiny")
    old, new = module.positions(c, b), module.positions(c, b, "5.23")
    ref = reference("qwen2vl:tiny").model.get_rope_index(
        b["input_ids"], hub_batch("qwen2vl:tiny", b)["mm_token_type_ids"], b["image_grid_thw"], b["video_grid_thw"],
        b["second_per_grid_ts"], b["attention_mask"])[0]
    valid = b["attention_mask"].bool()
    assert torch.equal(new[:, valid], ref[:, valid])
    assert torch.equal(old[:, 0], new[:, 0]) and not torch.equal(old[:, 1], new[:, 1])
    # row 1: 3 tokens of text, a video of 3 frames 3.0 positions apart and 3 x 2 tokens, then text
    assert (
        old[0, 1, 3:21].unique().tolist() == [3, 6, 9]
        and old[:, 1, 21].tolist() == [10] * 3
        and new[:, 1, 21].tolist() == [6] * 3
    )
    with pytest.raises(ValueError, match="4.51, 5.23"):
        module.prepare(c, b, rule="4.52")


@pytest.mark.parametrize("name", ["qwen2:tiny", "qwen2vl:tiny"])
def test_lora_starts_as_the_identity_and_bf16_is_finite(name):
    module, c = config(name)
    p, _ = ours(name)
    b = prepared(name, batch(name))
    declared = lora.LoRA(module.params(c), 4, r"^blocks\..*\.(q|v|down)$", 8)
    wide = tree.merge(p, tree.init(tree.select(declared, r"\.lora_"), random.key(0)))
    assert torch.equal(module.loss(wide, c, b), module.loss(p, c, b))
    half = tree.map(lambda t: t.bfloat16(), p)
    low, high = module.forward(half, c, b), module.forward(p, c, b)
    assert (
        low.isfinite().all() and (low.float() - high)[b["attention_mask"].bool()].abs().max() < 0.1 * high.abs().max()
    )


def test_batches_that_do_not_fit():
    module, c = config("qwen2vl:tiny")
    b = batch("qwen2vl:tiny")
    for change, message in (({"patches": 100}, "192 patches, the buffer is declared with 100"),
                            ({"patches": 240, "row": 8}, "60 patches, more than the 8")):
        with pytest.raises(ValueError, match=message):
            module.prepare(c, b, **change)
    with pytest.raises(ValueError, match="30 image tokens for 0 image features"):
        module.prepare(c, {"input_ids": b["input_ids"], "attention_mask": b["attention_mask"]})
    with pytest.raises(ValueError, match="token 160 is outside the vocabulary of 160"):
        module.prepare(c, {"input_ids": torch.full((1, 3), 160)})
    p, _ = ours("qwen2vl:tiny")
    with pytest.raises(jit.CompileError, match="prepare"):
        jit.jit(lambda p, b: module.loss(p, c, b), backend="aot_eager")(p, b)


def test_unknown_names_say_what_there_is(tmp_path):
    with pytest.raises(ValueError, match="qwen2, qwen2vl"):
        models.get("qwen3:tiny")
    with pytest.raises(ValueError, match="2.5-7b"):
        models.get("qwen2vl:huge")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        models.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no config.json"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="'gpt2'; known are qwen2"):
        models.load(tmp_path)
