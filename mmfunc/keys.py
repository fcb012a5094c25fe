"""Names of parameters elsewhere: a table of prefixes, read in both directions.

Left are our names, right theirs: "blocks.*.self.{q,k}": "layers.*.attn.{to_q,to_k}". Braces pair in order, * is a layer
number, what follows a prefix (.weight, .bias) is kept, the longest matching rule wins. On the right may also stand
Cut (one of their tensors, of which ours are consecutive slices), View (the same numbers in another shape) and Copied (a
second name that a checkpoint may hold the same tensor under).
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from mmfunc.tree import Param


@dataclass(frozen=True)
class Cut:
    """One of their tensors, of which our names on the left are consecutive slices along dim."""

    name: str
    dim: int = 0


@dataclass(frozen=True)
class View:
    """One of their tensors, which has this shape there."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Copied:
    """One of their tensors; where `copy` is there too and is no parameter of ours, it must hold the same bits."""

    name: str
    copy: str


Table = dict[str, str | Cut | View | Copied]
Boxes = dict[str, tuple[slice, ...] | None]  # by our name, a slice of each dimension; None: nothing of it


class Place(NamedTuple):
    """Where one of our parameters lies: a slice of a tensor of theirs."""

    name: str
    dim: int  # of the slice
    start: int
    whole: bool  # the slice is all of it
    shape: tuple[int, ...] | None  # theirs, where it is another view
    copy: str | None


def expand(pattern: str) -> list[str]:
    """All readings of a pattern with braces.

    >>> expand("a.{b,c}")
    ['a.b', 'a.c']
    """
    pieces = re.split(r"\{(.*?)\}", pattern)
    return ["".join(c) for c in product(*(p.split(",") if i % 2 else [p] for i, p in enumerate(pieces)))]


def under(ours: str, table: Table, theirs: str = "") -> Table:
    """A table for a model held under a prefix: ours gets `ours.`, theirs `theirs`."""
    def moved(right):
        if isinstance(right, str):
            return theirs + right
        return type(right)(**{k: theirs + v if k in ("name", "copy") else v for k, v in vars(right).items()})

    return {f"{ours}.{left}" if ours else left: moved(right) for left, right in table.items()}


def _rules(table: Table) -> list[tuple[re.Pattern, str, str | Cut | View | Copied]]:
    rules = []
    for left, right in table.items():
        ours = expand(left)
        name = right if isinstance(right, str) else right.name
        theirs = [name] * len(ours) if isinstance(right, Cut) else expand(name)
        if len(ours) != len(theirs):
            raise ValueError(f"the key rule {left!r}: {name!r} pairs {len(ours)} names with {len(theirs)}")
        rules += [
            (re.compile(re.escape(a).replace(r"\*", r"(\d+)") + r"(\..*)?$"), b, right) for a, b in zip(ours, theirs)
        ]
    return sorted(rules, key=lambda r: -len(r[0].pattern))


def lookup(params: dict[str, Param], table: Table) -> dict[str, Place]:
    """Where each of our parameters lies: {our name: place}."""
    rules, found, used = _rules(table), {}, {}
    for name, param in params.items():
        pattern, there, right = next((r for r in rules if r[0].match(name)), (None, None, None))
        if pattern is None:
            raise ValueError(f"the key table has no rule for our parameter {name}")
        *layers, rest = pattern.match(name).groups()
        fill = lambda text, layers=layers, rest=rest: text.replace("*", "{}").format(*layers) + (rest or "")
        there = fill(there)
        cut = isinstance(right, Cut)
        dim = right.dim if cut else 0
        found[name] = Place(there, dim, used.get(there, 0), not cut, right.shape if isinstance(right, View) else None,
                            fill(right.copy) if isinstance(right, Copied) else None)
        used[there] = used.get(there, 0) + param.shape[dim] if param.shape else 1
    return found


def check(params: dict[str, Param], places: dict[str, Place], shapes: dict[str, tuple[int, ...]]) -> None:
    """Every tensor on both sides has its place and its shape, or a ValueError that names both sides."""
    claimed = {p.name for p in places.values()}
    missing = sorted({f"{n} (theirs: {p.name})" for n, p in places.items() if p.name not in shapes})
    copies = {p.copy for p in places.values() if p.copy}
    extra = sorted(set(shapes) - claimed - copies)
    if missing or extra:
        raise ValueError("the checkpoint does not fit the model: "
                         + "; ".join(f"{len(x)} tensors {what}, such as {', '.join(x[:4])}" for what, x in
                                     (("are missing", missing), ("have no place in the model", extra)) if x))
    sums: dict[str, int] = {}
    for name, place in places.items():
        shape, ours = shapes[place.name], params[name].shape
        sums[place.name] = sums.get(place.name, 0) + prod(ours)
        cut = tuple(n for i, n in enumerate(shape) if i != place.dim) == tuple(
            n for i, n in enumerate(ours) if i != place.dim
        )
        fits = shape == (place.shape or ours) if place.whole else cut
        if not fits or (not place.whole and place.start + ours[place.dim] > shape[place.dim]):
            raise ValueError(f"{name} has the shape {ours} in the model, {place.name} has {shape} in the checkpoint")
    for name, n in sums.items():
        if n != prod(shapes[name]):
            raise ValueError(f"{name} has {prod(shapes[name])} numbers in the checkpoint, the model takes {n} of them")


def load(
    params: dict[str, Param], places: dict[str, Place], read: Callable[[str], Tensor], boxes: Boxes | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor) one by one, each with storage of its own; read(name) gives what can be sliced like a tensor.
    boxes: which part of ours is wanted, if not all of it; of a View all of theirs is read. What is not wanted has a
    shape only."""
    for name, place in places.items():
        box = (boxes or {}).get(name, [slice(0, n) for n in params[name].shape])
        if box is None:
            yield name, torch.empty(params[name].shape, device="meta")
            continue
        box = [*box]
        if place.shape:
            yield name, read(place.name)[...].reshape(params[name].shape)[tuple(box)].clone()
            continue
        if not place.whole:
            at = box[place.dim]
            box[place.dim] = slice(at.start + place.start, at.stop + place.start)
        yield name, read(place.name)[tuple(box) or ...].clone()


def export(tensors: dict[str, Tensor], places: dict[str, Place]) -> Iterator[tuple[str, Tensor]]:
    """(their name, tensor) one by one, the inverse of load."""
    parts: dict[str, list[str]] = {}
    for name, place in places.items():
        parts.setdefault(place.name, []).append(name)
    for there, names in parts.items():
        place = places[names[0]]
        x = tensors[names[0]] if place.whole else torch.cat([tensors[n] for n in names], place.dim)
        yield there, x.reshape(place.shape or x.shape).contiguous()
