"""Counter-based random bits: threefry2x32-20 (Salmon et al. 2011) on int32 tensors.

A key is an int32 tensor [2]. The bits of an element depend on the key and on the element's global row-major index
only, so they are equal eager or compiled, on every device, and for every way of sharding: `part` asks for a slice of
the whole. Normals are made of additions and products alone, which IEEE 754 fixes, and not of a library's log, cosine
and square root: eager and compiled give the same floats too (a device that fuses a product with an addition may differ
in the last place).
"""

import math
from collections.abc import Callable
from math import prod

import numpy as np
import torch
from torch import Tensor

ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
PIECE = 1 << 15  # elements drawn at once in eager mode
# Minimax fits: log(1 + x) / x on [0.7 - 1, 1.41 - 1]; cos(2 pi x) and sin(2 pi x) / x in x * x on [0, 1/64].
LOG = (0.08722348511219025, -0.14366839826107025, 0.14952267706394196, -0.16562393307685852, 0.19956833124160767,
       -0.25002074241638184, 0.3333418667316437, -0.49999988079071045, 1.0)
COS = (59.202796936035156, -85.44229888916016, 64.9393081665039, -19.739208221435547, 1.0)
SIN = (-75.39356231689453, 81.59235382080078, -41.3416633605957, 6.2831854820251465)


def _rotl(x: Tensor, r: int) -> Tensor:
    return (x << r) | ((x >> (32 - r)) & ((1 << r) - 1))


def threefry(k0: Tensor, k1: Tensor, c0: Tensor, c1: Tensor) -> tuple[Tensor, Tensor]:
    """Twenty rounds of threefry2x32 on int32 key and counter words, elementwise."""
    ks = k0, k1, k0 ^ k1 ^ 0x1BD11BDA
    x0, x1 = c0 + k0, c1 + k1
    for i in range(5):
        for r in ROTATIONS[i % 2]:
            x0 = x0 + x1
            x1 = _rotl(x1, r) ^ x0
        x0 = x0 + ks[(i + 1) % 3]
        x1 = x1 + ks[(i + 2) % 3] + (i + 1)
    return x0, x1


def key(seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The key of a seed, a 64-bit integer. int32 [2]."""
    words = np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF], np.uint32).view(np.int32)
    return torch.tensor(words.tolist(), dtype=torch.int32, device=device)


def _words(data: int | str | Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    if isinstance(data, str):  # FNV-1a, 64 bits: the same on every machine
        h = 0xCBF29CE484222325
        for byte in data.encode():
            h = (h ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
        data = h
    if isinstance(data, int):
        return tuple(key(data, device).unbind())
    return data.to(torch.int32), (data.long() >> 32).to(torch.int32)


def fold_in(key: Tensor, data: int | str | Tensor) -> Tensor:
    """A new key from a key and an integer (also as a tensor) or a name. [..., 2] and data [...] -> [..., 2]."""
    return torch.stack(torch.broadcast_tensors(*threefry(key[..., 0], key[..., 1], *_words(data, key.device))), -1)


def split(key: Tensor, n: int = 2) -> Tensor:
    """n independent keys of a key [..., 2], int32 [..., n, 2]."""
    c = torch.arange(n, dtype=torch.int32, device=key.device)
    return torch.stack(threefry(key[..., 0, None], key[..., 1, None], c, torch.full_like(c, -1)), -1)


def _index(shape: tuple[int, ...], part: tuple[slice, ...] | None, device: torch.device) -> Tensor:
    """Global row-major index of each element of a part of an array of this shape; int32 where that is enough."""
    dtype = torch.int32 if prod(shape) < 1 << 31 else torch.int64
    if part is None:
        return torch.arange(prod(shape), dtype=dtype, device=device).view(shape)
    ranges = [s.indices(n) for s, n in zip(part, shape)] + [(0, n, 1) for n in shape[len(part) :]]
    index = torch.zeros((), dtype=dtype, device=device)
    for (start, stop, step), n in zip(ranges, shape):
        index = index[..., None] * n + torch.arange(start, stop, step, dtype=dtype, device=device)
    return index


def _draw(fn: Callable, key: Tensor, shape: tuple[int, ...], part: tuple[slice, ...] | None) -> Tensor:
    """fn of the two random words of each element; in eager mode piece by piece, so that a piece stays in the cache.

    Keys [..., 2] give an array each: [..., *shape].
    """
    index = _index(tuple(shape), part, key.device)
    rows = key.shape[:-1]

    def piece(index: Tensor) -> Tensor:
        high = (index >> 32).to(torch.int32) if index.dtype == torch.int64 else torch.zeros_like(index)
        k0, k1 = (k.view(*rows, *[1] * index.ndim) for k in key.unbind(-1))
        return fn(*threefry(k0, k1, (index & 0xFFFFFFFF).to(torch.int32), high))

    size = PIECE // max(prod(rows), 1) + 1
    if torch.compiler.is_compiling() or index.numel() <= size:
        return piece(index)
    return torch.cat([piece(i) for i in index.flatten().split(size)], -1).view(*rows, *index.shape)


def bits(key: Tensor, shape: tuple[int, ...], part: tuple[slice, ...] | None = None) -> Tensor:
    """32 random bits an element, as int32; with part, bits(key, shape)[part] without making the rest; with keys
    [..., 2] an array for each."""
    return _draw(lambda a, b: a, key, shape, part)


def uniform(key: Tensor, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0, part=None) -> Tensor:
    """Uniform float32 in [low, high), 24 bits of randomness."""
    return _draw(lambda a, b: _top(a).float() * (1 / (1 << 24)) * (high - low) + low, key, shape, part)


def normal(key: Tensor, shape: tuple[int, ...], part: tuple[slice, ...] | None = None) -> Tensor:
    """Standard normal float32 (Box-Muller, one counter an element)."""
    return _draw(lambda a, b: _sqrt(-2 * _log(_top(a))) * _cosine(_top(b)), key, shape, part)


def _top(word: Tensor) -> Tensor:
    return (word >> 8) & 0xFFFFFF


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    y = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        y = y * x + c
    return y


def _log(n: Tensor) -> Tensor:
    """log((n + 1/2) / 2**24) of an int32 n below 2**24: its exponent, and a polynomial of its mantissa."""
    word = (n.float() + 0.5).view(torch.int32)
    exponent = (word - 0x3F3504F3) >> 23
    x = (word - (exponent << 23)).view(torch.float32) - 1
    return (exponent - 24).float() * math.log(2) + x * _horner(x, LOG)


def _sqrt(x: Tensor) -> Tensor:
    """The square root of a float32, by Newton's iterations towards 1 / sqrt(x)."""
    y = (0x5F3759DF - (x.view(torch.int32) >> 1)).view(torch.float32)
    for _ in range(3):
        y = y * (1.5 - 0.5 * x * y * y)
    root = x * y
    return root + 0.5 * y * (x - root * root)


def _cosine(n: Tensor) -> Tensor:
    """cos(2 pi n / 2**24): the nearest quarter turn, and polynomials of what remains."""
    quarter = (n + (1 << 21)) >> 22
    x = (n - (quarter << 22)).float() * (1 / (1 << 24))
    y = torch.where((quarter & 1) == 0, _horner(x * x, COS), -x * _horner(x * x, SIN))
    return torch.where((quarter & 2) == 0, y, -y)


def randint(key: Tensor, shape: tuple[int, ...], low: int, high: int, part=None) -> Tensor:
    """Integers in [low, high), int64; the bias is below (high - low) / 2**32."""
    b = bits(key, shape, part).long() & 0xFFFFFFFF
    return low + ((b * (high - low)) >> 32)
