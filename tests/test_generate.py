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

from mmfunc import generate


def prompts(name):
    b = {k: v for k, v in batch(name, left=True).items() if k != "labels"}
    if name.startswith("qwen2:"):
        four = {k: torch.cat([v, v[:1].roll(3, 1)]) for k, v in b.items()}
        four["attention_mask"][3] = 1
        return four
    return b


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


def test_the_same_without_a_cache():
    module, c = config("qwen2:tiny")
    p, b = ours("qwen2:tiny")[0], prompts("qwen2:tiny")
    found = generate.generate(module, p, c, b, new=24)
    ids, mask = b["input_ids"], b["attention_mask"]
    for i in range(24):
        place = (mask.cumsum(1) - 1).clamp(min=0)
        token = module.forward(p, c, {"input_ids": ids, "attention_mask": mask, "position_ids": place})[:, -1].argmax(
            -1
        )
        assert token.tolist() == [row[i] for row in found]
        ids, mask = torch.cat([ids, token[:, None]], 1), torch.cat([mask, torch.ones_like(token)[:, None]], 1)


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
