"""Features kept across the calls of a sampling loop: exact where all is computed, else as written out by hand."""

import re
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from meshes import draw, redrawn

from mmfunc import models, nn, pipeline, sampler, teacache, tree

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
NAMES = "wan:tiny", "flux:tiny"
GUIDED = {"wan:tiny": {"guidance": 3.0}, "flux:tiny": {"true_guidance": 2.0}}


@cache
def piped(name, **small):
    family, c = models.get(name)
    c = replace(c, **small)
    kind, said = ("WanPipeline", sampler.to_config("unipc", **FLOW)) if name.startswith("wan") else (
        "FluxPipeline", sampler.to_config("flow_euler", shift=3.0))
    return pipeline.Pipeline(None, kind, pipeline.Part(family, c, redrawn(family.params(c))), None, (), None, said)


def given(name, n=1):
    """(noise, cond, uncond)."""
    c = piped(name).transformer.config
    conds = [{"encoder_hidden_states": draw(seed, n, 5, c.text)} for seed in (1, 2)]
    if name.startswith("flux"):
        conds = [x | {"pooled_projections": draw(3, n, c.pooled)} for x in conds]
    return draw(4, n, c.channels, *((2, 4, 6) if name.startswith("wan") else (8, 12))), *conds


def drawn(name, n=1, **how):
    """(latents, calls computed, calls reused) of classifier-free guidance in one batch."""
    noise, cond, uncond = given(name, n)
    count = {}
    z = pipeline.sample(piped(name), cond, uncond, noise, count=count, **GUIDED[name] | {"steps": 8} | how)
    return z, count["computed"], count["reused"]


def predicted(name):
    """(p, x, time, cond) -> velocity."""
    part = piped(name).transformer
    more = lambda x: {"guidance": x.new_full((len(x),), 3.5)} if name.startswith("flux") else {}
    return lambda p, x, time, cond: part.family.predict(p, part.config, x, time, cond | more(x))


def looped(fn, threshold, table, noise, *rest):
    """(latents, state) by step's own interface."""
    made, states = teacache.parts(fn), [teacache.init()]

    def call(x, time):
        n = states[-1]["computed"] + states[-1]["reused"] + 1
        out, new = teacache.step(made, threshold, states[-1], (x, time, *rest), compute=n == len(table))
        states.append(new)
        return out

    return sampler.sample(call, table, noise), states[-1]


@pytest.mark.parametrize("two_calls", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_computed_is_the_model_to_the_bit(name, two_calls):
    """Threshold 0, and one that nothing stays below; guidance in one batch and in two calls."""
    noise, cond, uncond = given(name, 2)
    p, predict, table = piped(name).transformer.params, predicted(name), sampler.table("unipc", 4, **FLOW)
    fn = lambda x, time, cond, uncond: sampler.guided(partial(predict, p), x, time, cond, uncond, 3.0,
                                                      two_calls=two_calls)
    plain = sampler.sample(lambda x, time: fn(x, time, cond, uncond), table, noise)
    for threshold in (0, 1e-9):
        z, state = looped(fn, threshold, table, noise, cond, uncond)
        assert torch.equal(z, plain) and (state["computed"], state["reused"]) == (4, 0)
        assert len(state["kept"]) == 1 + two_calls
    if not two_calls:
        assert torch.equal(drawn(name, reuse=1e-9)[0], drawn(name)[0])
    if two_calls:  # each call has what it kept itself
        one = lambda x, time, cond, uncond: sampler.guided(partial(predict, p), x, time, cond, uncond, 3.0)
        (a, s), (b, t) = looped(fn, 9.0, table, noise, cond, uncond), looped(one, 9.0, table, noise, cond, uncond)
        assert s["reused"] == t["reused"] == 2 and (a - b).abs().max() < 1e-5 and (a - plain).abs().max() > 1e-3


def by_hand(name, p, c, batch, rest):
    """(output, what all blocks but the first added) of a Chain; rest: what they are to add, in place of running them."""
    chain, (first, *more) = piped(name).transformer.family.forward, p.get("blocks") or p["double"]
    x, ctx = chain.embed(p, c, batch)
    if name.startswith("wan"):
        block = chain.stacks[0][1]
        base = x = block(first, c, x, ctx)
        for layer in more:
            x = block(layer, c, x, ctx)
    else:
        double, single = chain.stacks[0][1], chain.stacks[2][1]
        x = double(first, c, x, ctx)
        base = torch.cat(x, 1)
        for layer in more:
            x = double(layer, c, x, ctx)
        x = torch.cat(x, 1)
        for layer in p["single"]:
            x = single(layer, c, x, ctx)
    return chain.head(p, c, x if rest is None else base + rest, ctx), x - base


@pytest.mark.parametrize("solver", [None, "flow_heun"])
@pytest.mark.parametrize("name", NAMES)
def test_all_between_the_first_and_the_last_call_reused(name, solver):
    """Heun has two calls a step, each with its own time; what the first call of all kept serves them."""
    calls = 8 if solver is None else 15
    z, computed, reused = drawn(name, 2, reuse=1e9, solver=solver)
    assert (computed, reused) == (2, calls - 2)
    noise, cond, uncond = given(name, 2)
    plan = pipeline.plan(piped(name), noise.shape, steps=8, solver=solver, **GUIDED[name])
    assert len(plan.table) == calls
    kept, seen = [None], []

    def runner(chain, p, c, batch, cache):
        seen.append(1)
        out, rest = by_hand(name, p, c, batch, kept[0] if 1 < len(seen) < calls else None)
        kept[0] = rest if len(seen) == 1 else kept[0]
        return out

    with nn.running(runner):
        wanted = pipeline.sample(piped(name), cond, uncond, noise, made=plan)
    assert torch.equal(z, wanted) and len(seen) == calls
    assert (z - drawn(name, 2, solver=solver)[0]).abs().max() > 1e-2


def test_fewer_calls_are_computed_as_the_threshold_rises():
    for name in NAMES:
        found = [drawn(name, steps=20, reuse=t)[1:] for t in (0.0, 0.1, 0.4, 0.8, 1.6, 3.2, 1e9)]
        counts = [n for n, _ in found]
        assert counts == sorted(counts, reverse=True) and counts[0] == 20 and counts[-1] == 2
        assert len(set(counts)) > 3 and {sum(f) for f in found} == {20}


@pytest.mark.parametrize("name", NAMES)
def test_bf16(name):
    """Of a model in bfloat16, as programs/sample.py loads it: the same calls are computed as in float32, fewer than all,
    and what is off by the dtype is about as much with features kept as without."""
    noise, cond, uncond = given(name, 2)
    part, low = piped(name).transformer, lambda t: tree.map(lambda x: x.bfloat16(), t)
    wide = getattr(part.family, "WIDE", r"^$")
    flat = {n: t if re.search(wide, n) else t.bfloat16() for n, t in tree.flatten(part.params).items()}
    half = replace(piped(name), transformer=replace(part, params=tree.unflatten(flat, part.params)))

    def sampled(reuse):
        count = {}
        z = pipeline.sample(half, low(cond), low(uncond), noise, count=count, **GUIDED[name], steps=20, reuse=reuse)
        return z.float(), count.get("computed")

    plain = sampled(0.0)[0]
    assert torch.equal(sampled(1e-9)[0], plain)
    off = (plain - drawn(name, 2, steps=20)[0]).abs().mean()
    for threshold in (0.8, 1.6):
        (z, computed), (exact, wanted, _) = sampled(threshold), drawn(name, 2, steps=20, reuse=threshold)
        assert computed == wanted < 20 and (z - exact).abs().mean() < 2 * off


def test_a_batch_is_decided_as_a_whole():
    """By the sample that changes most: so neighbours may make a sample computed more often, never less."""
    p, predict, table = piped("wan:tiny").transformer.params, predicted("wan:tiny"), sampler.table("unipc", 12, **FLOW)
    noise, cond, _ = given("wan:tiny", 3)
    counts = [looped(partial(predict, p), 0.8, table, noise[i], {k: v[i] for k, v in cond.items()})[1]["computed"]
              for i in (slice(3), slice(1), slice(1, 2), slice(2, 3))]
    assert counts[0] >= min(counts[1:]) and 2 < counts[0] < 12
    made = teacache.parts(partial(predict, p))
    sums = []
    for i in (slice(2), slice(1), slice(1, 2)):
        state = teacache.init()
        for time in (0.9, 0.8, 0.7):
            args = noise[i] * time, torch.full((len(noise[i]),), time), {k: v[i] for k, v in cond.items()}
            _, state = teacache.step(made, 1e9, state, args)
        sums.append(state["kept"][0]["change"])
    assert sums[0].shape == (2,) and sums[0].min() > 0.01 and (sums[0] - torch.cat(sums[1:])).abs().max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_compiled_is_eager(name):
    pipe = piped(name, **({"layers": 1, "single": 1} if name.startswith("flux") else {}))
    how = {"reuse": 1.0, "steps": 8, "true_guidance" if name.startswith("flux") else "guidance": 1.0}
    noise, cond, _ = given(name)
    plans = [pipeline.plan(pipe, noise.shape, backend=b, **how) for b in ("eager", "aot_eager")]
    counts = {}, {}
    wanted, z = (pipeline.sample(pipe, cond, None, noise, made=m, count=n) for m, n in zip(plans, counts))
    assert (z - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert counts[0] == counts[1] and min(counts[0].values()) > 1
    assert (len(plans[1].call.first.entries), len(plans[1].call.rest.entries)) == (2, 1)  # graphs


def test_what_cannot_be_reused_is_told():
    for bad in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="reuse is .*; it must be 0 .off. or more, such as 0.08"):
            drawn("wan:tiny", reuse=bad)
    p = {"blocks": [{"w": torch.ones(3)}]}
    chain = nn.Chain(lambda p, c, x: (x, {}), (("blocks", lambda p, c, x, ctx: x * p["w"]),), lambda p, c, x, ctx: x)
    with pytest.raises(ValueError, match="the Chain has 1 block.s., it must have 2 or more"):
        teacache.step(teacache.parts(lambda x: chain(p, None, x)), 0.1, teacache.init(), (torch.ones(1, 3),))
    with pytest.raises(ValueError, match="the Chain has a cache"):
        teacache.step(teacache.parts(lambda x: chain(p, None, x, {})), 0.1, teacache.init(), (torch.ones(1, 3),))
    with pytest.raises(ValueError, match="calls no Chain"):
        teacache.step(teacache.parts(lambda x: x), 0.1, teacache.init(), (torch.ones(1, 3),))
    assert chain(p, None, torch.ones(1, 3)).sum() == 3  # the runner is as it was
    zero = tree.map(torch.zeros_like, p["blocks"][0])
    two = {"blocks": [zero, zero]}
    add = nn.Chain(chain.embed, (("blocks", lambda p, c, x, ctx: x + p["w"]),), chain.head)
    made, state = teacache.parts(lambda x: add(two, None, x)), teacache.init()
    for _ in range(3):  # a first block that adds nothing tells nothing
        _, state = teacache.step(made, 9.0, state, (torch.ones(1, 3),))
    assert state["computed"] == 3
