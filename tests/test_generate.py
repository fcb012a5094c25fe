"""Generation: transformers' tokens, with and without a cache, in chunks, compiled; sampling filters as transformers
has them."""

import pytest
import torch
from references import batch, config, hub_batch, ours, prepared, reference
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mmfunc import generate, nn


def prompts(name):
    """Four prompts of different lengths, left padded; for VLMs with images, a video, and one of text only."""
    b = {k: v for k, v in batch(name, left=True).items() if k != "labels"}
    c, size = config(name)[1], b["input_ids"].shape[1]
    g = torch.Generator().manual_seed(3)
    said = torch.randint(0, 140, (12,), generator=g)
    if not name.startswith("qwen2:"):
        said[3:9] = torch.tensor([c.start_token, *[c.image_token] * 4, c.end_token])
        b["pixel_values"] = torch.cat([b["pixel_values"], torch.randn(16, 3 * 2 * c.patch**2, generator=g)])
        b["image_grid_thw"] = torch.cat([b["image_grid_thw"], torch.tensor([[1, 8, 2]])])
    row = torch.nn.functional.pad(said, (size - 12, 0))[None]
    mask = (torch.arange(size) >= size - 12).long()[None]
    return b | {"input_ids": torch.cat([b["input_ids"], row]), "attention_mask": torch.cat([b["attention_mask"], mask])}


@pytest.mark.parametrize("name", ["qwen2:tiny", "qwen2:tied", "qwen2vl:tiny", "qwen2vl:tiny-2"])
def test_greedy_is_transformers_token_for_token(name):
    b, (module, c), p = prompts(name), config(name), ours(name)[0]
    ref = reference(name)
    want = ref.generate(**hub_batch(name, b), max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0,
                        repetition_penalty=1.0)[:, b["input_ids"].shape[1]:].tolist()
    ready = prepared(name, b)
    for how in ({}, {"chunk": 7}, {"slots": 300}, {"call": generate.stepper(module.step, c, backend="aot_eager")}):
        assert generate.generate(module, p, c, ready, new=64, **how) == want
    stop = want[0][10]
    cut = generate.generate(module, p, c, ready, new=64, stops=[stop])
    assert cut == [row[: row.index(stop) + 1] if stop in row else row for row in want]


@pytest.mark.parametrize("name", ["qwen2:tiny", "qwen2vl:tiny"])
def test_the_same_without_a_cache(name):
    module, c = config(name)
    p, b = ours(name)[0], prompts(name)
    ready = prepared(name, b)
    found = generate.generate(module, p, c, ready, new=24)
    x, mask = module.embeds(p, c, ready), b["attention_mask"]
    place = ready["position_ids"] if "position_ids" in ready else (mask.cumsum(1) - 1).clamp(min=0)
    for i in range(24):
        token = module.step(p, c, {"inputs_embeds": x, "attention_mask": mask, "position_ids": place})[:, -1].argmax(-1)
        assert token.tolist() == [row[i] for row in found]
        x = torch.cat([x, nn.embed(p["embed"], token[:, None])], 1)
        mask, place = torch.nn.functional.pad(mask, (0, 1), value=1), torch.cat([place, place[..., -1:] + 1], -1)


def test_a_new_cache_compiles_nothing_again():
    module, c = config("qwen2:tiny")
    p, b = ours("qwen2:tiny")[0], prompts("qwen2:tiny")
    call = generate.stepper(module.step, c, backend="aot_eager")
    made = []
    for _ in range(3):
        generate.generate(module, p, c, b, new=3, call=call)
        made.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert made[0] == made[2] and len(call.entries) == 2


def test_filters_are_transformers():
    g = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(5, 50, generator=g) * 3, torch.randint(0, 50, (5, 9), generator=g)
    theirs = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.3),
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(20),
            TopPLogitsWarper(0.8),
        ]
    )
    seen = torch.zeros(5, 50, dtype=torch.bool).scatter(1, ids, True)
    mine = generate.top_p(generate.top_k(generate.penalised(logits, seen, 1.3) / 0.7, 20), 0.8)
    assert torch.equal(mine, theirs(ids, logits.clone()))


def test_sampling_follows_the_distribution_and_its_key():
    logits = torch.tensor([[2.0, 1.0, 0.0, -3.0]]).expand(20_000, 4)
    from mmfunc import random
    how = generate.Sampling(temperature=1.0, top_k=3)
    a = generate.choose(logits, how, None, random.key(1))
    share = torch.bincount(a, minlength=4) / 20_000
    assert (share - torch.tensor([2.0, 1.0, 0.0, -torch.inf]).softmax(0)).abs().max() < 0.02 and share[3] == 0
    assert torch.equal(a, generate.choose(logits, how, None, random.key(1))) and not torch.equal(
        a, generate.choose(logits, how, None, random.key(2))
    )
