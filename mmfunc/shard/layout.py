"""How tensors lie on a mesh: `P` names the axes that divide each dimension, `relayout` brings a tensor from one layout
to another, and rules give every parameter its layouts from the logical axes that it is declared with.

An axis of a declaration may have a unit, "heads/64": its parts are whole multiples of 64. What does not divide is
padded with zeros, which stay zero: a padded head or hidden channel meets zero weights on both sides.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfunc.shard.collectives import Axes, cut, exchange, gather, padded, psum, scatter, share
from mmfunc.shard.mesh import AXES, Net
from mmfunc.tree import Param

COMPUTE = {"heads": "tp", "kv": "tp", "mlp": "tp", "vocab": "tp", "expert": "ep"}  # logical axis: what divides it


class Layout(NamedTuple):
    """The mesh axes that divide each dimension, the slowest first, and those over which a sum is still to be taken."""

    dims: tuple[Axes, ...]
    partial: Axes = ()

    @property
    def axes(self) -> Axes:
        return tuple(a for d in self.dims for a in d)


def P(*dims: str | Axes | None, partial: Axes = ()) -> Layout:
    """A layout: for each dimension an axis of the mesh, several, or None."""
    return Layout(tuple(() if d is None else (d,) if isinstance(d, str) else tuple(d) for d in dims), tuple(partial))


def relayout(x: Tensor, src: Layout, dst: Layout, net: Net) -> Tensor:
    """This rank's part of a tensor in another layout, by a collective for each dimension that changes.

    Sums are taken first (scattered where dst has the axis), then axes move from one dimension to another, then are
    gathered; last, whole dimensions are cut. What is cut or exchanged is padded to divide.
    """
    src, dst = (Layout(tuple(tuple(a for a in d if net.size((a,)) > 1) for d in l.dims), l.partial) for l in (src, dst))
    now = list(src.dims)
    for i, want in enumerate(dst.dims):
        axes = tuple(a for a in want if a in src.partial)
        x, now[i] = scatter(x, i, axes, net), now[i] + axes
    x = psum(x, tuple(a for a in src.partial if a not in dst.axes + dst.partial), net)
    for i, want in enumerate(dst.dims):
        keep = sum(now[i][: n + 1] == want[: n + 1] for n in range(len(now[i])))
        gone, now[i] = now[i][keep:], now[i][:keep]
        to = [j for j, d in enumerate(dst.dims) if gone and j != i and d == now[j] + gone]
        x = exchange(x, to[0], i, gone, net) if to else gather(x, i, gone, net)
        now = [d + gone if j in to else d for j, d in enumerate(now)]
    for i, want in enumerate(dst.dims):
        x = cut(x, i, want[len(now[i]):], net)
    return x


class Spec(NamedTuple):
    """A parameter on a mesh: its whole shape, and its layouts where it is stored, used, and optimized."""

    shape: tuple[int, ...]
    units: tuple[int, ...]
    names: tuple[str, ...]  # logical axes
    store: Layout
    compute: Layout
    optimize: Layout


def spec(p: Param, net: Net) -> Spec:
    """The layouts of a parameter."""
    names = tuple(a.partition("/")[0] for a in p.axes.split())
    units = tuple(int(a.partition("/")[2] or 1) for a in p.axes.split())
    dims = []
    for n, size, unit in zip(names, p.shape, units):
        axes = net.axes((COMPUTE[n],)) if n in COMPUTE else ()
        # key heads that do not divide stay whole, and each rank takes those of its queries
        dims.append(() if n == "kv" and size // unit % net.size(axes) else axes)
    compute = Layout(tuple(dims))
    free = [i for i, d in enumerate(dims) if not d] or [*range(len(dims))]
    widest = max(free, key=lambda i: p.shape[i], default=None)
    wide = Layout(tuple(d + net.axes(("fsdp",)) if i == widest else d for i, d in enumerate(dims)))
    return Spec(p.shape, units, names, wide if net.mesh.zero > 1 else compute, compute, wide)


def lengths(s: Spec, dim: int, axes: Axes, net: Net) -> list[int]:
    """A dimension's length when it is whole, and after each of the axes has divided it."""
    out = [s.shape[dim]]
    for a in axes:
        out.append(share(out[-1], net.size((a,)), _unit(s, dim, a)))
    return out


def _unit(s: Spec, dim: int, axis: str) -> int:
    return 1 if axis == "fsdp" else s.units[dim]  # what fsdp divides is whole again before it is used


def place(x: Tensor, s: Spec, layout: Layout, net: Net) -> Tensor:
    """This rank's part of a whole tensor."""
    for dim, axes in enumerate(layout.dims):
        for a in axes:
            x = cut(x, dim, (a,), net, _unit(s, dim, a))
    return x


def filled(x: Tensor, s: Spec, layout: Layout, net: Net) -> Tensor:
    """This rank's part, from what it has of the whole tensor without padding."""
    for dim, axes in enumerate(layout.dims):
        x = padded(x, dim, lengths(s, dim, axes, net)[-1])
    return x


def whole(x: Tensor, s: Spec, layout: Layout, net: Net) -> Tensor:
    """The tensor that ranks have in parts."""
    for dim, axes in enumerate(layout.dims):
        for a, n in reversed(list(zip(axes, lengths(s, dim, axes, net)))):
            x = gather(x, dim, (a,), net).narrow(dim, 0, n)
    return x


class Piece(NamedTuple):
    """What a rank has of a leaf: the box `size` at `start` of the whole one, without padding."""

    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]
    copies: int  # ranks that have the same
    copy: int  # which of them this one is


def piece(s: Spec, layout: Layout, net: Net) -> Piece:
    """What this rank has of a parameter."""
    boxes = [_box(s, dim, axes, net) for dim, axes in enumerate(layout.dims)]
    n, i = _copies(layout.axes, net)
    return Piece(s.shape, tuple(a for a, _ in boxes), tuple(b - a for a, b in boxes), n, i)


def _box(s: Spec, dim: int, axes: Axes, net: Net) -> tuple[int, int]:
    start, end = 0, s.shape[dim]
    for a, size in zip(axes, lengths(s, dim, axes, net)[1:]):
        start += net.at[AXES.index(a)] * size
        end = min(end, start + size)
    return min(start, end), end


def _copies(axes: Axes, net: Net) -> tuple[int, int]:
    n, i = 1, 0
    for a, at in zip(AXES, net.at):
        if a not in axes and a != "pp":  # a stage has its own parameters
            n, i = n * net.size((a,)), i * net.size((a,)) + at
    return n, i


# ---- many leaves, one collective

def _by(keys: dict[str, object]) -> list[list[str]]:
    """Names by equal keys."""
    found: dict[object, list[str]] = {}
    for name, key in keys.items():
        found.setdefault(key, []).append(name)
    return list(found.values())


def _divided(src: Layout, dst: Layout) -> int | None:
    """The dimension that fsdp divides in src only."""
    return next((i for i, (a, b) in enumerate(zip(src.dims, dst.dims)) if a != b), None)


def gathered(flat: dict[str, Tensor], layouts: dict[str, tuple[Spec, Layout, Layout]], net: Net) -> dict[str, Tensor]:
    """Leaves from the layout they have to one in which fsdp does not divide them; layouts: (spec, from, to).

    What is trained and what is frozen goes apart: a gradient of one must not ask for the other's.
    """
    dims = {n: _divided(*layouts[n][1:]) for n in flat}
    out = {n: t for n, t in flat.items() if dims[n] is None}
    for names in _by({n: (t.dtype, t.requires_grad) for n, t in flat.items() if n not in out}):
        parts = [flat[n].movedim(dims[n], 0) for n in names]
        row = torch.cat([t.reshape(-1) for t in parts])[None]
        fsdp, wider = ("fsdp",), row.requires_grad and wide(row, net)
        rows = torch.ops.mmfunc.gather(row, net.size(fsdp), net.group(fsdp)) if wider else gather(row, 0, fsdp, net)
        for n, t, y in zip(names, parts, rows.split([t.numel() for t in parts], 1)):
            s, src, _ = layouts[n]
            size = lengths(s, dims[n], src.dims[dims[n]], net)[-2]
            out[n] = y.reshape(-1, *t.shape[1:])[:size].movedim(0, dims[n])
    return {n: out[n] for n in flat}


def wide(x: Tensor, net: Net) -> bool:
    """Whether gradients like x are cast to float32 before they are summed over ranks."""
    return net.mesh.reduce == "fp32" and x.is_floating_point() and x.element_size() < 4


class _Gather(torch.autograd.Function):
    """What n ranks of a group have; gradients are summed in float32, and rounded once."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, n: int, group: str) -> Tensor:
        ctx.group = n, group
        return _c10d.wait_tensor(_c10d.all_gather_into_tensor(row, n, group))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        total = _c10d.reduce_scatter_tensor(g.float().contiguous(), "sum", *ctx.group)
        return _c10d.wait_tensor(total).to(g.dtype), None, None


# an operation made of others: what a graph records of a Function itself, a remat policy does not find in it again
_c10d, _lib = torch.ops._c10d_functional, torch.library.Library("mmfunc", "FRAGMENT")
_lib.define("gather(Tensor row, int n, str group) -> Tensor")
_lib.impl("gather", lambda *how: _Gather.apply(*how), "CompositeImplicitAutograd")


def scattered(flat: dict[str, Tensor], layouts: dict[str, tuple[Spec, Layout, Layout]], net: Net) -> dict[str, Tensor]:
    """The sum over fsdp of leaves that it does not divide, each rank's part in the layout in which it does."""
    dims = {n: _divided(*layouts[n][1:]) for n in flat}
    out = {n: t for n, t in flat.items() if dims[n] is None}
    n = net.size(("fsdp",))
    for names in _by({k: t.dtype for k, t in flat.items() if k not in out}):
        parts = [_rows(flat[k], dims[k], n) for k in names]
        rows = torch.cat([t.flatten(1) for t in parts], 1)
        row = scatter(rows, 0, ("fsdp",), net)[0]
        for k, t, y in zip(names, parts, row.split([t[0].numel() for t in parts])):
            out[k] = y.reshape(t.shape[1:]).movedim(0, dims[k])
    return {k: out[k] for k in flat}


def _rows(x: Tensor, dim: int, n: int) -> Tensor:
    """A dimension in n parts, the parts first: [n, size, ...]."""
    size = share(x.shape[dim], n)
    return torch.nn.functional.pad(x.movedim(dim, 0).reshape(x.shape[dim], -1), (0, 0, 0, n * size - x.shape[dim])
                                   ).view(n, size, *x.movedim(dim, 0).shape[1:])


def summed(flat: dict[str, Tensor], axes: dict[str, Axes], net: Net) -> dict[str, Tensor]:
    """The sum of each leaf over its axes: one collective for those of the same axes and dtype."""
    out = {}
    for names in _by({n: (axes[n], t.dtype) for n, t in flat.items()}):
        if not axes[names[0]]:
            out |= {n: flat[n] for n in names}
            continue
        row = psum(torch.cat([flat[n].reshape(-1) for n in names]), axes[names[0]], net)
        out |= {n: y.view(flat[n].shape) for n, y in zip(names, row.split([flat[n].numel() for n in names]))}
    return {n: out[n] for n in flat}
