"""Ascend C kernels with their tiling: norms, gates and rope, forward and backward.

The sources in csrc/ascend are what CANN compiles for the device; on CPU tensors they run in the emulator. The tiling is
computed on the host in both cases. Every op has its gradient and its plain reference, which computes in float32 or, if
its inputs are, in float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mmfunc.kernels.ascend_ops import GateTiling, NormTiling, RopeTiling, call, differentiable

ACTS = {"silu": (1.0, 0.0), "quick_gelu": (1.702, 0.0), "gelu_tanh": (1.5957691216057308, 0.07135481627159999)}
UB = 192 * 1024  # bytes of a vector core's unified buffer
VECTORS = 48  # cores of a 910B2


def up_to(n: int, to: int) -> int:
    """n rounded up to a multiple."""
    return -(-n // to) * to


def share(size: int, most: int) -> int:
    """The size of a tile of at most `most`: as many tiles on every core, two at least so that transfers overlap."""
    each = max(2, -(-size // (VECTORS * most)))
    return -(-size // (VECTORS * each))


class Rows(NamedTuple):
    """How rows are cut: tile rows at a time, tiles in all; a row in `chunks` of at most `chunk` columns."""

    tile: int
    tiles: int
    chunk: int
    chunks: int
    pitch: int
    blocks: int


def tiling(width: int, rows: int, groups: int, item: int, element: int, column: int = 0, row: int = 216) -> Rows:
    """Cut groups x rows of `width` elements of `item` bytes for the vector cores.

    element, column and row are the bytes of UB that a kernel needs for each element of a tile, each column, each row.
    """
    grain, free = 32 // item, UB - 4096
    pitch = up_to(width, grain)
    most = (free - pitch * column) // (pitch * element + row)
    if most < 1 or pitch > 8192:  # in chunks, one row at a time
        chunk = min((free - 8 * row) // (element + column), 6144) // 64 * 64
        return Rows(1, groups * rows, chunk, -(-width // chunk), chunk, min(VECTORS, groups * rows))
    tile = min(share(groups * rows, min(most, 248)), rows)
    tiles = groups * -(-rows // tile)
    return Rows(tile, tiles, width, 1, pitch, min(VECTORS, tiles))


def wide(x: Tensor) -> Tensor:
    """In float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def norm_reference(x: Tensor, factor: Tensor | None = None, shift: Tensor | None = None,
                   residual: Tensor | None = None, *, center: bool = False, plus: float = 0.0,
                   eps: float = 1e-6) -> Tensor:
    """What norm computes, without the sum; shapes as there."""
    y = wide(x if residual is None else x + residual)
    y = y - y.mean(-1, keepdim=True) if center else y
    y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()
    factor, shift = (t[:, None] if t is not None and t.dim() == 2 else t for t in (factor, shift))
    y = y if factor is None else y * (plus + factor)
    return (y if shift is None else y + shift).to(x.dtype)


def _norm(x: Tensor, groups: int, residual: bool, factor: bool, shift: bool, center: bool, eps: float, plus: float,
          back: bool) -> tuple[int, NormTiling]:
    """Blocks and tiling of a norm over the last dimension of x."""
    width, item = x.shape[-1], x.element_size()
    rows = x.numel() // width // groups
    queues = 2 + residual + (back or residual)
    r = tiling(width, rows, groups, item, 2 * item * queues + 4 * (2 + back), 4 * (factor * (1 + back) + shift))
    flags = (int(on) for on in (center, residual, factor, shift))
    return r.blocks, NormTiling(width, rows, groups, r.tile, r.tiles, r.chunk, r.chunks, *flags, r.pitch, float(eps),
                                float(plus))


def norm(x: Tensor, factor: Tensor | None = None, shift: Tensor | None = None, residual: Tensor | None = None, *,
         center: bool = False, plus: float = 0.0, eps: float = 1e-6) -> tuple[Tensor, Tensor | None]:
    """x^ * (plus + factor) + shift of x + residual, and that sum. x [G, S, D] or [S, D], factor, shift [G, D] or [D].

    center: LayerNorm, else RMSNorm. plus 1 with factor and shift per sample is adaptive layer norm.
    """
    groups = factor.shape[0] if factor is not None and factor.dim() == 2 else 1
    f, s = (None if t is None else t.float().contiguous() for t in (factor, shift))
    blocks, t = _norm(x, groups, residual is not None, f is not None, s is not None, center, eps, plus, False)
    return tuple(call("norm_forward", blocks, t, x, residual, f, s))


def slots(t: NormTiling, blocks: int) -> list[tuple[int, int]]:
    """Of each group the slots that a backward kernel may write, from and to before; slot = block + group."""
    per, found = t.tiles // t.groups, []
    for g in range(t.groups):
        first, last = g * per, (g + 1) * per - 1  # tiles; block b has those from tiles * b // blocks on
        place = lambda tile: ((tile + 1) * blocks - 1) // t.tiles
        found.append((place(first) + g, place(last) + g + 1))
    return found


def norm_backward(x: Tensor, dy: Tensor, factor: Tensor | None = None, shift: bool = False,
                  dsum: Tensor | None = None, *, center: bool = False, plus: float = 0.0,
                  eps: float = 1e-6) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of norm by x (the sum, where there was a residual), factor and shift, the last two in float32."""
    groups = factor.shape[0] if factor is not None and factor.dim() == 2 else 1
    f = None if factor is None else factor.float().contiguous()
    blocks, t = _norm(x, groups, dsum is not None, f is not None, shift, center, eps, plus, True)
    dx, *found = call("norm_backward", blocks, t, x, dsum, f, dy)
    one = f is None or f.dim() == 1
    sums = lambda d: d.sum(0) if one else torch.stack([d[a:b].sum(0) for a, b in slots(t, blocks)])
    return dx, *(d if d is None else sums(d) for d in found)


def _norm_gradients(t: NormTiling, inputs: list, outputs: list, grads: list) -> tuple:
    (x, residual, factor, _), (total,) = inputs, outputs
    summed = residual is not None
    dx, df, ds = norm_backward(total if summed else x, grads[0], factor, bool(t.shift), grads[1] if summed else None,
                               center=bool(t.center), plus=t.plus, eps=t.eps)
    return dx, dx if summed else None, df, ds


differentiable("norm_forward", _norm_gradients, saved=(1,))


def gate_reference(g: Tensor, u: Tensor | None, act: str = "silu") -> Tensor:
    """What gate computes."""
    return gated(g, u, *ACTS[act])


def gated(g: Tensor, u: Tensor | None, alpha: float, beta: float) -> Tensor:
    """What gate computes with an activation's numbers."""
    x = wide(g)
    y = x * torch.sigmoid(x * (alpha + beta * x.square()))
    return (y if u is None else y * u).to(g.dtype)


def _gate(g: Tensor, act: tuple[float, float], up: bool, back: bool) -> tuple[int, GateTiling]:
    """Blocks and tiling of a gate: a flat tensor in tiles of equal size."""
    item = g.element_size()
    most = (UB - 4096) // (2 * item * (2 + up + back + back * up) + 4 * (3 + 2 * back))
    tile = up_to(share(g.numel(), most // 64 * 64), 64)
    tiles = -(-g.numel() // tile)
    return min(VECTORS, tiles), GateTiling(tile, tiles, g.numel() - (tiles - 1) * tile, int(up), *act)


def gate(g: Tensor, u: Tensor | None, act: str = "silu") -> Tensor:
    """act(g) * u, or act(g) without u; any shape."""
    if act not in ACTS:
        raise ValueError(f"a gate's activation is one of {', '.join(ACTS)}, not {act!r}")
    return call("gate_forward", *_gate(g, ACTS[act], u is not None, False), g, u)[0]


def gate_backward(g: Tensor, u: Tensor | None, dy: Tensor, act: str = "silu") -> tuple[Tensor, Tensor | None]:
    """Gradients of gate by g and u."""
    return tuple(call("gate_backward", *_gate(g, ACTS[act], u is not None, True), g, u, dy))


def _gate_gradients(t: GateTiling, inputs: list, outputs: list, grads: list) -> tuple:
    g, u = inputs
    return tuple(call("gate_backward", *_gate(g, (t.alpha, t.beta), bool(t.up), True), g, u, *grads))


differentiable("gate_forward", _gate_gradients)


def rope_reference(x: Tensor, angles: Tensor, weight: Tensor | None = None, *, halves: bool = False,
                   eps: float = 1e-6) -> Tensor:
    """What rope computes."""
    y = wide(x)
    if weight is not None:
        y = (y * (y.square().mean(-1, keepdim=True) + eps).rsqrt() * weight).to(x.dtype)
    cos, sin = angles.to(wide(x).dtype).cos()[:, None], angles.to(wide(x).dtype).sin()[:, None]
    a, b = wide(y).chunk(2, -1) if halves else wide(y).unflatten(-1, (-1, 2)).unbind(-1)
    a, b = a * cos - b * sin, b * cos + a * sin
    return (torch.cat([a, b], -1) if halves else torch.stack([a, b], -1).flatten(-2)).to(x.dtype)


def rotation(angles: Tensor, halves: bool) -> tuple[Tensor, Tensor]:
    """Tables of the rope kernels: cos and signed sin of each channel. angles [N, K/2] -> 2 x [N, K] float32."""
    cos, sin = angles.float().cos(), angles.float().sin()
    if halves:
        return torch.cat([cos, cos], -1).contiguous(), torch.cat([-sin, sin], -1).contiguous()
    return cos.repeat_interleave(2, -1).contiguous(), torch.stack([-sin, sin], -1).flatten(-2).contiguous()


HALVES, WORDS, GATHER = range(3)  # how a rope kernel finds partners, as in rope.cpp


def _rope(x: Tensor, swap: int, norm: bool, eps: float, back: bool) -> tuple[int, RopeTiling]:
    """Blocks and tiling of rope. x [N, H, K]."""
    tokens, heads, width = x.shape
    if width > 256 or width % 2:
        raise ValueError(f"rope takes heads of an even width up to 256, not {width}")
    item = x.element_size()
    pitch, project = up_to(width, 32 // item), back and norm
    element = 2 * item * (2 + project) + item + 4 * (2 + project) + (0, 2 * item, 4)[swap]
    free, row, table = UB - 4096 - 8 * pitch, pitch * element + 144, 16 * up_to(width, 8)
    part = min(heads, 248, (free - table) // row)
    tile = share(tokens, min(free // (part * row + table), 248 // part)) if part == heads else 1
    tiles = -(-tokens // tile) * -(-heads // part)
    return min(VECTORS, tiles), RopeTiling(tokens, heads, width, pitch, tile, part, tiles, swap, int(norm), float(eps))


def _partners(x: Tensor, halves: bool) -> tuple[int, Tensor | None]:
    """How partners are found, and for Gather the byte offset of each channel's in a row."""
    width, item = x.shape[-1], x.element_size()
    if halves and width % 16 == 0 or not halves and item == 2:
        return (HALVES if halves else WORDS), None
    channel = torch.arange(up_to(width, 32 // item), device=x.device)
    first, second = channel[:width].unflatten(0, (2, -1) if halves else (-1, 2)).unbind(0 if halves else 1)
    swapped = torch.stack([second, first], 0 if halves else 1).flatten()
    return GATHER, torch.cat([swapped, channel[width:]]) * 4


def _offsets(t: RopeTiling, row: Tensor | None) -> Tensor | None:
    """The byte offsets of partners in a tile, from those in a row."""
    if row is None:
        return None
    rows = torch.arange(t.tile * t.part, device=row.device)[:, None]
    return (rows * (4 * t.pitch) + row).int().flatten()


def rope(x: Tensor, angles: Tensor, weight: Tensor | None = None, *, halves: bool = False, eps: float = 1e-6) -> Tensor:
    """RMSNorm of each head if there is a weight [K], then the rotation. x [N, H, K], angles [N, K/2] -> [N, H, K]."""
    swap, row = _partners(x, halves)
    blocks, t = _rope(x, swap, weight is not None, eps, False)
    w = None if weight is None else weight.float().contiguous()
    return call("rope_forward", blocks, t, x, w, *rotation(angles, halves), _offsets(t, row))[0]


def rope_backward(x: Tensor, dy: Tensor, angles: Tensor, weight: Tensor | None = None, *, halves: bool = False,
                  eps: float = 1e-6) -> tuple[Tensor, Tensor | None]:
    """Gradients of rope by x and weight, the latter in float32."""
    w = None if weight is None else weight.float().contiguous()
    return _unturned(x, w, *rotation(angles, halves), *_partners(x, halves), eps, dy)


def _unturned(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, swap: int, row: Tensor | None, eps: float,
              dy: Tensor) -> tuple[Tensor, Tensor | None]:
    blocks, t = _rope(x, swap, weight is not None, eps, True)
    dx, dw = call("rope_backward", blocks, t, x, weight, cos, sin, _offsets(t, row), dy)
    return dx, dw if dw is None else dw.sum(0)


def _rope_gradients(t: RopeTiling, inputs: list, outputs: list, grads: list) -> tuple:
    x, weight, cos, sin, partners = inputs
    row = None if partners is None else partners[: t.pitch]
    return *_unturned(x, weight, cos, sin, t.swap, row, t.eps, *grads), None, None, None


differentiable("rope_forward", _rope_gradients)
