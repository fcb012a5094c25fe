"""Trees: nested dicts, lists and tuples of tensors, and the `Param`s that declare them.

Leaves have dotted names ("blocks.0.self.q.weight"). None is an empty subtree, so the part of a tree that a rule selects
keeps its structure. Nothing is registered: dict, list and tuple are the only containers.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from mmfunc import random

Tree = Any  # a nest of dicts, lists and tuples whose leaves are tensors (parameters) or Params (their declaration)


def zeros(key: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Initialiser: zeros, float32."""
    return torch.zeros(shape, device=key.device)


def ones(key: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Initialiser: ones, float32."""
    return torch.ones(shape, device=key.device)


def normal(std: float) -> Callable[[Tensor, tuple[int, ...]], Tensor]:
    """Initialiser: independent normals with mean 0, float32."""
    return lambda key, shape: random.normal(key, shape) * std


@dataclass(frozen=True)
class Param:
    """One tensor, declared: its shape, what each dimension means, and how it starts."""

    shape: tuple[int, ...]
    axes: str  # one logical axis per dimension, "_" for none: "mlp embed"
    init: Callable[[Tensor, tuple[int, ...]], Tensor] = zeros  # (key, shape) -> float32 tensor

    def __post_init__(self):
        if len(self.axes.split()) != len(self.shape):
            raise ValueError(f"axes {self.axes!r} name {len(self.axes.split())} dimensions, shape is {self.shape}")


def map(fn: Callable, tree: Tree, *rest: Tree) -> Tree:
    """Apply fn to each leaf, and to what stands at the same place in rest.

    >>> map(lambda a, b: a + b, {"x": [1, None]}, {"x": [10, None]})
    {'x': [11, None]}
    """
    if tree is None:
        return None
    if isinstance(tree, dict):
        return {k: map(fn, v, *(r[k] for r in rest)) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)([map(fn, v, *(r[i] for r in rest)) for i, v in enumerate(tree)])
    return fn(tree, *rest)


def maps(fn: Callable[[str, dict], Tree], tree: Tree, prefix: str = "") -> Tree:
    """fn(dotted name, dict) in the place of each dict that holds a weight.

    >>> maps(lambda name, p: name, {"blocks": [{"q": {"weight": 1}, "scale": 2}]})
    {'blocks': [{'q': 'blocks.0.q', 'scale': 2}]}
    """
    name = lambda k: f"{prefix}.{k}" if prefix else str(k)
    if isinstance(tree, (list, tuple)):
        return type(tree)([maps(fn, v, name(i)) for i, v in enumerate(tree)])
    if not isinstance(tree, dict):
        return tree
    made = {k: maps(fn, v, name(k)) for k, v in tree.items()}
    return fn(prefix, made) if "weight" in made else made


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted name, in order.

    >>> flatten({"blocks": [{"q": 1}, {"q": 2}], "head": None})
    {'blocks.0.q': 1, 'blocks.1.q': 2}
    """
    if tree is None:
        return {}
    if not isinstance(tree, (dict, list, tuple)):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {k: v for name, sub in items for k, v in flatten(sub, f"{prefix}.{name}" if prefix else str(name)).items()}


def unflatten(flat: dict[str, Any], like: Tree, prefix: str = "") -> Tree:
    """The inverse of flatten, with the structure of `like`; where flat lacks a leaf there is None.

    >>> unflatten({"a.0": 5}, {"a": [1, 2]})
    {'a': [5, None]}
    """
    if isinstance(like, dict):
        return {k: unflatten(flat, v, f"{prefix}.{k}" if prefix else str(k)) for k, v in like.items()}
    if isinstance(like, (list, tuple)):
        return type(like)([unflatten(flat, v, f"{prefix}.{i}" if prefix else str(i)) for i, v in enumerate(like)])
    return flat.get(prefix)


def leaves(tree: Tree) -> list[Any]:
    """The leaves in the order of flatten."""
    return list(flatten(tree).values())


def at(tree: Tree, path: str) -> Tree:
    """The part of a tree under a dotted name: "text.blocks.3"."""
    for name in path.split("."):
        tree = tree[int(name)] if isinstance(tree, (list, tuple)) else tree[name]
    return tree


def select(tree: Tree, where: str | Callable[[str], bool]) -> Tree:
    """The leaves whose dotted name matches (re.search, or a predicate), None elsewhere; no match is an error.

    >>> select({"a": 1, "b": [2]}, "b")
    {'a': None, 'b': [2]}
    """
    match = where if callable(where) else (lambda name: re.search(where, name) is not None)
    names = flatten(tree)
    found = {k: v for k, v in names.items() if match(k)}
    if not found:
        raise ValueError(
            f"the rule {where!r} matches none of the {len(names)} parameters, such as {', '.join(list(names)[:3])}"
        )
    return unflatten(found, tree)


def without(tree: Tree, part: Tree) -> Tree:
    """The leaves of tree where `part` has none, None elsewhere."""
    taken = flatten(part)
    return unflatten({k: v for k, v in flatten(tree).items() if k not in taken}, tree)


def split(tree: Tree, where: str | Callable[[str], bool]) -> tuple[Tree, Tree]:
    """The leaves whose dotted name matches, as select has them, and the others."""
    part = select(tree, where)
    return part, without(tree, part)


def merge(a: Tree, b: Tree) -> Tree:
    """The leaves of both, two parts of one tree; where both have one, b's.

    >>> merge({"x": 1, "y": None}, {"x": None, "y": 2})
    {'x': 1, 'y': 2}
    """
    if a is None or b is None:
        return a if b is None else b
    if isinstance(a, dict) and isinstance(b, dict):
        return {k: merge(a.get(k), b.get(k)) for k in a | b}
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return type(a)([merge(i, j) for i, j in zip(a, b, strict=True)])
    return b


def init(params: Tree, key: Tensor, dtype: torch.dtype = torch.float32) -> Tree:
    """Create the tensors that params declare, on the key's device; each leaf's key is folded from its dotted name."""
    made = {k: p.init(random.fold_in(key, k), p.shape).to(dtype) for k, p in flatten(params).items()}
    return unflatten(made, params)


def abstract(params: Tree, dtype: torch.dtype = torch.float32) -> Tree:
    """Tensors on the meta device with the shapes that params declare: nothing is allocated."""
    return map(lambda p: torch.empty(p.shape, dtype=dtype, device="meta"), params)


def put(tree: Tree, device: torch.device | str) -> Tree:
    """The tree with its tensors on a device, but for those on the meta device; other leaves stay as they are."""
    return map(lambda t: t.to(device, non_blocking=True) if isinstance(t, Tensor) and not t.is_meta else t, tree)


def size(params: Tree) -> int:
    """Number of scalars, of Params or of tensors."""
    return sum(prod(p.shape) for p in leaves(params))


def nbytes(tree: Tree) -> int:
    """Bytes of the tensors."""
    return sum(t.numel() * t.element_size() for t in leaves(tree) if isinstance(t, Tensor))
