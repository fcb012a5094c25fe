"""The primitive collectives: each is the transpose of one of them, so that autograd needs no rule of ours.

They act along dimension 0 of contiguous tensors, over the group of a product of mesh axes; one rank: the identity.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmfunc.shard.mesh import AXES, Net

_c10d = torch.ops._c10d_functional
Axes = tuple[str, ...]


def padded(x: Tensor, dim: int, size: int) -> Tensor:
    """Zeros behind x along a dimension, up to a size."""
    more = size - x.shape[dim]
    return pad(x, (0, 0) * (x.ndim - 1 - dim % x.ndim) + (0, more)) if more else x


def share(n: int, parts: int, unit: int = 1) -> int:
    """The length of each of equal parts of n, in whole units; the last ones may reach over the end."""
    blocks = -(-n // unit)
    return -(-blocks // parts) * unit


def number(axes: Axes, net: Net) -> int:
    """This rank's place along a product of axes, a constant of its graphs; net.index is an input of them."""
    i = 0
    for a in net.axes(axes):
        i = i * getattr(net.mesh, a) + net.at[AXES.index(a)]
    return i


def cut(x: Tensor, dim: int, axes: Axes, net: Net, unit: int = 1) -> Tensor:
    """This rank's part of a dimension, padded where it does not divide."""
    n = net.size(axes)
    if n == 1:
        return x
    size = share(x.shape[dim], n, unit)
    x = padded(x, dim, n * size).unflatten(dim, (n, size))
    return x.index_select(dim, net.index(axes)).squeeze(dim)


def gather(x: Tensor, dim: int, axes: Axes, net: Net) -> Tensor:
    """All parts of a dimension, one after the other."""
    n = net.size(axes)
    if n == 1:
        return x
    y = _c10d.all_gather_into_tensor(x.movedim(dim, 0).contiguous(), n, net.group(axes))
    return _c10d.wait_tensor(y).movedim(0, dim)


def scatter(x: Tensor, dim: int, axes: Axes, net: Net) -> Tensor:
    """The sum over ranks, of which each gets its part of a dimension."""
    n = net.size(axes)
    if n == 1:
        return x
    x = padded(x, dim, n * share(x.shape[dim], n)).movedim(dim, 0).contiguous()
    return _c10d.wait_tensor(_c10d.reduce_scatter_tensor(x, "sum", n, net.group(axes))).movedim(0, dim)


def psum(x: Tensor, axes: Axes, net: Net) -> Tensor:
    """The sum over ranks."""
    if net.size(axes) == 1:
        return x
    return _c10d.wait_tensor(_c10d.all_reduce(x.contiguous(), "sum", net.group(axes)))


def exchange(x: Tensor, split: int, join: int, axes: Axes, net: Net) -> Tensor:
    """Each rank gives a part of one dimension to every rank, and joins what it gets along another one."""
    n = net.size(axes)
    if n == 1:
        return x
    size = share(x.shape[split], n)
    x = padded(x, split, n * size).unflatten(split, (n, size)).movedim(split, 0).contiguous()
    y = _c10d.wait_tensor(_c10d.all_to_all_single(x, [1] * n, [1] * n, net.group(axes)))
    return y.movedim(0, join).flatten(join, join + 1)


def shift(x: Tensor, axis: str, net: Net) -> Tensor:
    """What the rank before has: each gives to the next one along an axis, the last one to the first."""
    n, i = getattr(net.mesh, axis), net.at[AXES.index(axis)]
    gets, gives = [0] * n, [0] * n
    gets[(i - 1) % n] = gives[(i + 1) % n] = x.numel()
    y = _c10d.all_to_all_single(x.reshape(-1).contiguous(), gets, gives, net.group((axis,)))
    return _c10d.wait_tensor(y).view(x.shape)
