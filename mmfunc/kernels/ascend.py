"""Ascend C kernels with their tiling: norms, gates and rope, forward and backward, on CPU tensors.

The sources in csrc/ascend are what CANN compiles for the device; here they run in the emulator. The tiling is computed
on the host, as it is for the device. Every op has its plain reference, computed in float32 or in float64 if its inputs
are.
"""

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from mmfunc.kernels.emulator import Out, build, launch

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
          back: bool) -> tuple[Rows, bytes]:
    """The tiling of a norm over the last dimension of x."""
    width, item = x.shape[-1], x.element_size()
    rows = x.numel() // width // groups
    queues = 2 + residual + (back or residual)
    r = tiling(width, rows, groups, item, 2 * item * queues + 4 * (2 + back), 4 * (factor * (1 + back) + shift))
    fields = (width, rows, groups, r.tile, r.tiles, r.chunk, r.chunks, center, residual, factor, shift, r.pitch)
    return r, struct.pack("12i2f", *fields, eps, plus)


def norm(x: Tensor, factor: Tensor | None = None, shift: Tensor | None = None, residual: Tensor | None = None, *,
         center: bool = False, plus: float = 0.0, eps: float = 1e-6) -> tuple[Tensor, Tensor | None]:
    """x^ * (plus + factor) + shift of x + residual, and that sum. x [G, S, D] or [S, D], factor, shift [G, D] or [D].

    center: LayerNorm, else RMSNorm. plus 1 with factor and shift per sample is adaptive layer norm.
    """
    groups = factor.shape[0] if factor is not None and factor.dim() == 2 else 1
    y, total = torch.empty_like(x), None if residual is None else torch.empty_like(x)
    f, s = (None if t is None else t.float().contiguous() for t in (factor, shift))
    r, table = _norm(x, groups, residual is not None, f is not None, s is not None, center, eps, plus, False)
    library = build("norm", x.dtype)
    launch(library, "norm_forward", r.blocks, table, x, residual, f, s, Out(y), total if total is None else Out(total))
    return y, total


def slots(r: Rows, groups: int) -> Tensor:
    """The group of each slot that a backward kernel may write: slot = block + group, in the order of the tiles."""
    per = r.tiles // groups
    of = torch.zeros(r.blocks + groups - 1, dtype=torch.long)
    for b in range(r.blocks):
        for g in range(r.tiles * b // r.blocks // per, (r.tiles * (b + 1) // r.blocks - 1) // per + 1):
            of[b + g] = g
    return of


def norm_backward(x: Tensor, dy: Tensor, factor: Tensor | None = None, shift: bool = False,
                  dsum: Tensor | None = None, *, center: bool = False, plus: float = 0.0,
                  eps: float = 1e-6) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of norm by x (the sum, where there was a residual), factor and shift, the last two in float32."""
    groups = factor.shape[0] if factor is not None and factor.dim() == 2 else 1
    r, table = _norm(x, groups, dsum is not None, factor is not None, shift, center, eps, plus, True)
    dx, size = torch.empty_like(x), (r.blocks + groups - 1, x.shape[-1])
    df, ds = (torch.zeros(size) if on else None for on in (factor is not None, shift))
    f = None if factor is None else factor.float().contiguous()
    launch(build("norm", x.dtype), "norm_backward", r.blocks, table, x, dsum, f, dy, Out(dx),
           *(None if t is None else Out(t, "some") for t in (df, ds)))
    of = slots(r, groups)
    sums = (None if t is None else torch.stack([t[of == g].sum(0) for g in range(groups)]) for t in (df, ds))
    one = factor is None or factor.dim() == 1
    return dx, *(s[0] if s is not None and one else s for s in sums)


def gate_reference(g: Tensor, u: Tensor | None, act: str = "silu") -> Tensor:
    """What gate computes."""
    alpha, beta = ACTS[act]
    x = wide(g)
    y = x * torch.sigmoid(x * (alpha + beta * x.square()))
    return (y if u is None else y * u).to(g.dtype)


def _gate(g: Tensor, act: str, up: bool, back: bool) -> tuple[int, bytes]:
    """The tiling of a gate: a flat tensor in tiles of equal size."""
    if act not in ACTS:
        raise ValueError(f"a gate's activation is one of {', '.join(ACTS)}, not {act!r}")
    item = g.element_size()
    most = (UB - 4096) // (2 * item * (2 + up + back + back * up) + 4 * (3 + 2 * back))
    tile = up_to(share(g.numel(), most // 64 * 64), 64)
    tiles = -(-g.numel() // tile)
    return min(VECTORS, tiles), struct.pack("q3i2f4x", g.numel(), tile, tiles, up, *ACTS[act])


def gate(g: Tensor, u: Tensor | None, act: str = "silu") -> Tensor:
    """act(g) * u, or act(g) without u; any shape."""
    y = torch.empty_like(g)
    blocks, table = _gate(g, act, u is not None, False)
    launch(build("gate", g.dtype), "gate_forward", blocks, table, g, u, Out(y))
    return y


def gate_backward(g: Tensor, u: Tensor | None, dy: Tensor, act: str = "silu") -> tuple[Tensor, Tensor | None]:
    """Gradients of gate by g and u."""
    dg, du = torch.empty_like(g), None if u is None else torch.empty_like(u)
    blocks, table = _gate(g, act, u is not None, True)
    launch(build("gate", g.dtype), "gate_backward", blocks, table, g, u, dy, Out(dg), du if du is None else Out(du))
    return dg, du


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


def _rope(x: Tensor, halves: bool, norm: bool, eps: float, back: bool) -> tuple[int, Tensor | None, bytes]:
    """The tiling of rope, and the byte offsets of each channel's partner where Gather needs them. x [N, H, K]."""
    tokens, heads, width = x.shape
    if width > 256 or width % 2:
        raise ValueError(f"rope takes heads of an even width up to 256, not {width}")
    item = x.element_size()
    swap = 0 if halves and width % 16 == 0 else 1 if not halves and item == 2 else 2
    pitch, project = up_to(width, 32 // item), back and norm
    element = 2 * item * (2 + project) + item + 4 * (2 + project) + (0, 2 * item, 4)[swap]
    free, row, table = UB - 4096 - 8 * pitch, pitch * element + 144, 16 * up_to(width, 8)
    part = min(heads, 248, (free - table) // row)
    tile = share(tokens, min(free // (part * row + table), 248 // part)) if part == heads else 1
    tiles = -(-tokens // tile) * -(-heads // part)
    partners = None
    if swap == 2:
        channel = torch.arange(pitch)
        partner = (channel + width // 2) % width if halves else channel ^ 1
        partner = torch.where(channel < width, partner, channel)
        partners = ((torch.arange(tile * part)[:, None] * pitch + partner) * 4).int().flatten()
    fields = (tokens, heads, width, pitch, tile, part, tiles, swap, norm)
    return min(VECTORS, tiles), partners, struct.pack("9if", *fields, eps)


def rope(x: Tensor, angles: Tensor, weight: Tensor | None = None, *, halves: bool = False, eps: float = 1e-6) -> Tensor:
    """RMSNorm of each head if there is a weight [K], then the rotation. x [N, H, K], angles [N, K/2] -> [N, H, K]."""
    y, (cos, sin) = torch.empty_like(x), rotation(angles, halves)
    blocks, partners, table = _rope(x, halves, weight is not None, eps, False)
    w = None if weight is None else weight.float().contiguous()
    launch(build("rope", x.dtype), "rope_forward", blocks, table, x, w, cos, sin, partners, Out(y))
    return y


def rope_backward(x: Tensor, dy: Tensor, angles: Tensor, weight: Tensor | None = None, *, halves: bool = False,
                  eps: float = 1e-6) -> tuple[Tensor, Tensor | None]:
    """Gradients of rope by x and weight, the latter in float32."""
    dx, (cos, sin) = torch.empty_like(x), rotation(angles, halves)
    blocks, partners, table = _rope(x, halves, weight is not None, eps, True)
    w = None if weight is None else weight.float().contiguous()
    dw = None if weight is None else torch.zeros(blocks, x.shape[-1])
    launch(build("rope", x.dtype), "rope_backward", blocks, table, x, w, cos, sin, partners, dy, Out(dx),
           dw if dw is None else Out(dw))
    return dx, dw if dw is None else dw.sum(0)
