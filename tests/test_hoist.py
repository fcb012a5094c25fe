"""Partial evaluation: both parts together are the whole, what is known is computed once, and nothing of it is stale."""

import re

import pytest
import torch
from meshes import draw, redrawn
from test_reuse import GUIDED, given, piped

from mmfunc import hoist, jit, lower, models, pipeline, sampler, tree

NAMES = "wan:tiny", "wan:tiny-i2v", "flux:tiny"


def called(name, n=2, **how):
    """(plan, arguments of its call)."""
    if name == "wan:tiny-i2v":
        family, c = models.get(name)
        part = pipeline.Part(family, c, redrawn(family.params(c)))
        said = sampler.to_config("unipc", use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
        pipe = pipeline.Pipeline(None, "WanImageToVideoPipeline", part, None, (), None, said)
        noise, *conds = given("wan:tiny", n)
        seen = {"condition": draw(5, n, 20, *noise.shape[2:]), "encoder_hidden_states_image": draw(6, n, 7, c.image)}
        conds = [x | seen for x in conds]
    else:
        pipe, (noise, *conds) = piped(name), given(name, n)
        conds = [x | ({"guidance": torch.full((n,), 3.5)} if name.startswith("flux") else {}) for x in conds]
    made = pipeline.plan(pipe, noise.shape, **how)
    return made, [pipe.transformer.params, noise, torch.full((n,), 0.7), *conds, 2.0]


def low(args):
    return [tree.map(lambda t: t.bfloat16(), a) if isinstance(a, (dict, torch.Tensor)) else a for a in args]


def off(x, y):
    return ((x.float() - y.float()).abs().max() / y.float().abs().max()).item()


def products(part):
    return [n for n in lower.calls(part.graph) if re.match(r"aten[.](addmm|mm|bmm)", str(n.target))]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", NAMES)
def test_known_and_rest_are_the_whole(name, backend):
    """Over steps, and with other conditions: those of one call do not outlive it."""
    made, args = called(name, backend=backend)
    whole = jit.jit(made.call.fn, backend=backend, buckets=2)
    for cond in (args[3], tree.map(lambda t: t + 1, args[3])):
        args[3] = cond
        kept = made.call.known(*args)
        assert kept.values
        for x, time in ((args[1], 0.7), (args[1] * 2, 0.2)):
            args[1:3] = x, torch.full((2,), time)
            want = whole(*args)
            assert off(made.call.rest(kept, *args[1:3]), want) < 1e-5
    assert len(made.call.entries) == len(whole.entries) == 1
    args[3] = tree.map(lambda t: t + 1, args[3])
    assert off(made.call(*args), want) > 1e-3 < off(whole(*args), want)


@pytest.mark.parametrize("name", NAMES)
def test_bf16(name):
    made, args = called(name, backend="aot_eager")
    args = low(args)
    want = jit.jit(made.call.fn, backend="aot_eager")(*args)
    kept = made.call.known(*args)
    assert off(made.call.rest(kept, *args[1:3]), want) < 1e-2
    wide = [t for t in kept.values if t.dtype == torch.float32]  # angles, frequencies, and FLUX's text, normed
    assert sum(t.ndim > 2 for t in wide) == (name == "flux:tiny") and len(wide) < len(kept.values)


def test_text_is_multiplied_in_the_known_part_only():
    """Wan: two maps of the text and keys and values of each block, of image tokens as well; FLUX: the text's map and
    two each of guidance and pooled text. All products are in one part or the other."""
    for name, n in (("wan:tiny", 2 + 2 * 2), ("wan:tiny-i2v", 2 + 2 * 2 + 2 + 2 * 2), ("flux:tiny", 1 + 2 + 2)):
        made, args = called(name)
        known, rest = made.call.parts(*args)
        whole = made.call.lower(*args)
        assert len(products(known)) == n and len(products(rest)) == len(products(whole)) - n
        assert known.cost()["flops"] + rest.cost()["flops"] == whole.cost()["flops"]
        reads = {t.shape for t in rest.inputs}
        assert args[3]["encoder_hidden_states"].shape not in reads and args[1].shape in reads


def test_what_is_kept():
    """What products, or no argument, led to, once each; not what only moves or casts an argument."""
    def fn(p, x, cond):
        table = torch.arange(4.0)
        angles = [(table * 2).cos(), (table * 2).cos()]  # as each block makes them anew
        weight = p["w"].to(torch.float64).t().contiguous()
        heads = (cond @ p["w"]).unflatten(-1, (2, 2)).transpose(0, 1)
        return (x.double() @ weight).float() * angles[0] + angles[1] + heads.flatten() + p["w"][0]

    made = hoist.partial_eval(fn, (1,), "aot_eager")
    args = {"w": draw(0, 4, 4)}, draw(1, 3, 4), draw(2, 1, 4)
    kept = made.known(*args)
    assert sorted(tuple(t.shape) for t in kept.values) == [(1, 4), (4,)]
    assert off(made.rest(kept, args[1]), fn(*args)) < 1e-6


def test_nothing_is_known_or_nothing_changes():
    for fn, kept in ((lambda x, y: x * 2 + y, 0), (lambda x, y: y.flip(0), 0), (lambda x, y: y @ y, 1)):
        made, y = hoist.partial_eval(fn, (0,), "aot_eager"), draw(1, 3, 3)
        found = made.known(torch.ones(3, 3), y)
        assert len(found.values) == kept
        for x in (torch.ones(3, 3), torch.zeros(3, 3)):
            assert torch.equal(made.rest(found, x), fn(x, y))
    both = hoist.partial_eval(lambda x, y: {"a": (x + y, None), "n": 3}, (0, 1), "aot_eager")
    x = torch.ones(2)
    assert both.known(x, x).values == [] and both(x, x)["a"][0].sum() == 4 and both(x, x)["n"] == 3


def test_eager_computes_nothing_ahead():
    calls = []
    made = hoist.partial_eval(lambda p, x: calls.append(1) or p @ x, (1,), "eager")
    kept = made.known(torch.eye(2), torch.ones(2))
    assert not calls and made.rest(kept, torch.ones(2)).sum() == 2 and made.rest(kept, torch.ones(3, 2).t()).sum() == 6


def test_random_numbers_and_writes_are_of_each_call():
    def fn(p, x):
        return x + torch.rand(3) * (p @ p)[0]

    made = hoist.partial_eval(fn, (1,), "aot_eager")
    kept = made.known(torch.eye(3), torch.zeros(3))
    assert len(kept.values) == 1
    assert not torch.equal(made.rest(kept, torch.zeros(3)), made.rest(kept, torch.zeros(3)))


def test_what_does_not_fit_is_told():
    made = hoist.partial_eval(lambda p, x, k: p["w"] @ x * k, (1,), "aot_eager", buckets=1)
    p = {"w": torch.eye(3)}
    kept = made.known(p, torch.ones(3), 2)
    with pytest.raises(jit.CompileError, match=r"goes on with argument 1 float32\[3, 2\], compiled are 1 float32\[3\]: "):
        made.rest(kept, torch.ones(3, 2))
    with pytest.raises(jit.CompileError, match=r"argument 1 float32\[3, 2\], compiled are 1 float32\[3\].*buckets=2"):
        made.known(p, torch.ones(3, 2), 2)
    with pytest.raises(jit.CompileError, match="2 = 3, compiled are 2 = 2"):
        made.known(p, torch.ones(3), 3)
    with pytest.raises(jit.CompileError, match="cannot be compiled as one graph"):
        hoist.partial_eval(lambda p, x: x if x.sum() > 0 else p, (1,), "aot_eager").known(torch.ones(1), torch.ones(1))


def test_the_same_tensor_twice_is_no_constant():
    made, x, y = hoist.partial_eval(lambda p, x, y: p @ p + x * y, (1, 2), "aot_eager"), torch.ones(2, 2), draw(1, 2, 2)
    kept = made.known(x, x, x)
    assert torch.equal(made.rest(kept, x, y), x @ x + y) and torch.equal(made.rest(kept, y, y), x @ x + y * y)


@pytest.mark.parametrize("name", ["wan:tiny", "flux:tiny"])
def test_sampling_computes_the_known_part_once(name, monkeypatch):
    """In a call of sample, and again in the next; a plan is compiled once."""
    noise, cond, uncond = given(name)
    made = pipeline.plan(piped(name), noise.shape, steps=3, backend="aot_eager", **GUIDED[name])
    seen, real = [], hoist.Partial.known
    monkeypatch.setattr(hoist.Partial, "known", lambda *args: seen.append(real(*args)) or seen[-1])
    for text in (cond, uncond, cond):
        z = pipeline.sample(piped(name), text, cond, noise, made=made)
        want = pipeline.sample(piped(name), text, cond, noise, steps=3, **GUIDED[name])
        assert off(z, want) < 1e-4
    assert len(made.call.entries) == 1 and len(seen) == 3 + 3  # op by op too
