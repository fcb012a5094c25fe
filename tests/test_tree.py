"""Trees and random bits: laws, published vectors, independence of how a tensor is cut."""

import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfunc import keys, random, score, tree

NESTS = st.recursive(st.integers() | st.none(), lambda t: st.dictionaries(st.text("abc", min_size=1), t, max_size=3)
                     | st.lists(t, max_size=3), max_leaves=12)


@pytest.mark.parametrize("module", [tree, keys, score])
def test_examples(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


@settings(max_examples=60, deadline=None)
@given(NESTS.filter(lambda t: isinstance(t, (dict, list))))
def test_flatten_and_back(t):
    flat = tree.flatten(t)
    assert tree.unflatten(flat, t) == t
    assert tree.map(lambda x: x, t) == t
    part = tree.unflatten(dict(list(flat.items())[::2]), t)
    assert tree.flatten(tree.merge(part, tree.without(t, part))) == flat


def test_select_needs_a_match():
    t = {"a": {"w": 1}, "b": [{"w": 2}]}
    assert tree.select(t, r"^b") == {"a": {"w": None}, "b": [{"w": 2}]}
    assert tree.split(t, r"^b") == (tree.select(t, r"^b"), {"a": {"w": 1}, "b": [{"w": None}]})
    with pytest.raises(ValueError, match="'c' matches none of the 2 parameters, such as a.w, b.0.w"):
        tree.select(t, "c")


def test_init_depends_on_names_only():
    p = tree.Param((3, 5), "_ _", tree.normal(1.0))
    a = tree.init({"x": p, "y": [p]}, random.key(1))
    b = tree.init({"z": p, "y": [p], "x": p}, random.key(1))
    assert torch.equal(a["x"], b["x"]) and torch.equal(a["y"][0], b["y"][0]) and not torch.equal(a["x"], a["y"][0])
    with pytest.raises(ValueError, match="name 1 dimensions"):
        tree.Param((3, 5), "_")


def words(*xs):
    return [torch.tensor(x - (1 << 32) if x >> 31 else x, dtype=torch.int32) for x in xs]


@pytest.mark.parametrize(("key", "counter", "out"), [  # Random123's kat_vectors, threefry2x32, 20 rounds
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
])
def test_known_answers(key, counter, out):
    assert [int(x) & 0xFFFFFFFF for x in random.threefry(*words(*key), *words(*counter))] == list(out)


def test_bits_depend_on_key_and_place_only():
    k = random.key(7)
    whole = random.normal(k, (6, 5, 4))
    cut = (slice(1, 5, 2), slice(None), slice(2, 4))
    assert torch.equal(random.normal(k, (6, 5, 4), cut), whole[cut])
    far = random.bits(k, (3 << 31, 2), (slice((3 << 31) - 2, None),))
    assert far.shape == (2, 2) and far.unique().numel() == 4
    for f in (random.bits, random.uniform):
        assert torch.equal(torch.compile(f, backend="aot_eager", fullgraph=True)(k, (9, 3)), f(k, (9, 3)))


def test_compiled_bits_are_the_same():
    k = random.key(3)
    f = torch.compile(
        lambda k, i: (random.uniform(random.fold_in(k, i), (1000,)), random.normal(k, (1000,))), fullgraph=True
    )
    u, n = f(k, torch.tensor(5))
    assert torch.equal(u, random.uniform(random.fold_in(k, 5), (1000,))) and torch.allclose(
        n, random.normal(k, (1000,)), atol=2e-6
    )


def test_keys_differ_and_numbers_are_even():
    k = random.key(1 << 40)
    many = torch.cat(
        [random.split(k, 100), torch.stack([random.fold_in(k, x) for x in (0, 1, "a", "b", torch.tensor(2))])]
    )
    assert many.unique(dim=0).shape[0] == 105
    assert torch.equal(random.fold_in(k, 9), random.fold_in(k, torch.tensor(9)))
    x, u = random.normal(k, (200_000,)), random.uniform(k, (200_000,), -1, 3)
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01 and abs((x**4).mean() - 3) < 0.1
    assert u.min() >= -1 and u.max() < 3 and abs(u.mean() - 1) < 0.01
    assert random.randint(k, (10_000,), 3, 8).unique().tolist() == [3, 4, 5, 6, 7]
