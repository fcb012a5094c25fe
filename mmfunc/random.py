"""Counter-based random bits: threefry2x32-20 (Salmon et al. 2011) on int32 tensors.

A key is an int32 tensor [2]. The bits of an element depend on the key and on the element's global row-major index only,
so they are equal eager or compiled, on every device, and for every way of sharding: `part` asks for a slice of the whole.
"""

import math
from math import prod

import numpy as np
import torch
from torch import Tensor

ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)


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
    """A new key from a key and an integer (also as a 0-d tensor) or a name."""
    return torch.stack(threefry(key[0], key[1], *_words(data, key.device)))


def split(key: Tensor, n: int = 2) -> Tensor:
    """n independent keys, int32 [n, 2]."""
    c = torch.arange(n, dtype=torch.int32, device=key.device)
    return torch.stack(threefry(key[0], key[1], c, torch.full_like(c, -1)), -1)


def _index(shape: tuple[int, ...], part: tuple[slice, ...] | None, device: torch.device) -> Tensor:
    """Global row-major index of each element of a part of an array of this shape, int64."""
    ranges = [s.indices(n) for s, n in zip(part or (), shape)] + [(0, n, 1) for n in shape[len(part or ()) :]]
    if part is None:
        return torch.arange(prod(shape), dtype=torch.int64, device=device).view(shape)
    index = torch.zeros((), dtype=torch.int64, device=device)
    for (start, stop, step), n in zip(ranges, shape):
        index = index[..., None] * n + torch.arange(start, stop, step, dtype=torch.int64, device=device)
    return index


def _pair(key: Tensor, shape: tuple[int, ...], part: tuple[slice, ...] | None) -> tuple[Tensor, Tensor]:
    index = _index(tuple(shape), part, key.device)
    return threefry(key[0], key[1], (index & 0xFFFFFFFF).to(torch.int32), (index >> 32).to(torch.int32))


def bits(key: Tensor, shape: tuple[int, ...], part: tuple[slice, ...] | None = None) -> Tensor:
    """32 random bits an element, as int32; with part, bits(key, shape)[part] without making the rest."""
    return _pair(key, shape, part)[0]


def _unit(b: Tensor) -> Tensor:
    return ((b >> 8) & 0xFFFFFF).float() * (1.0 / (1 << 24))


def uniform(key: Tensor, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0, part=None) -> Tensor:
    """Uniform float32 in [low, high), 24 bits of randomness."""
    return _unit(bits(key, shape, part)) * (high - low) + low


def normal(key: Tensor, shape: tuple[int, ...], part: tuple[slice, ...] | None = None) -> Tensor:
    """Standard normal float32 (Box-Muller, one counter an element)."""
    a, b = _pair(key, shape, part)
    radius = torch.sqrt(-2 * torch.log(_unit(a) + 0.5 / (1 << 24)))
    return radius * torch.cos(2 * math.pi * _unit(b))


def randint(key: Tensor, shape: tuple[int, ...], low: int, high: int, part=None) -> Tensor:
    """Integers in [low, high), int64; the bias is below (high - low) / 2**32."""
    b = bits(key, shape, part).long() & 0xFFFFFFFF
    return low + ((b * (high - low)) >> 32)
