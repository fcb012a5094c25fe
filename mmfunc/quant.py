"""int8 weights for inference: symmetric, to nearest, a scale for each group of a row; activations stay as they are.

A dense map becomes {"weight": int8 [N, K], "scale": [N, G], "bias"}, where a row is G groups of ceil(K / G) numbers
(the last may have fewer). Scales keep the dtype that the weight had: it is that of the results.
"""

import re

import torch
from torch import Tensor

from mmfunc import kernels, tree
from mmfunc.tree import Tree

DECODER = r"^blocks\.\d+\.(self|mlp)\.\w+$|^(embed|head)$"  # the dense maps and the tables of a language model
ROWS = 4096  # at once, so that float32 copies stay small


def quantize(p: Tree, pattern: str, group: int = 64) -> Tree:
    """The tree with int8 weights in the maps whose dotted name (without .weight) matches, in equal groups of at most
    `group` numbers.

    A ValueError where nothing matches, or what matches is no dense map of floats, has an adapter, or is not finite.
    """
    if group < 1:
        raise ValueError(f"a group has {group} weights; it needs 1 or more")
    names: dict[str, bool] = {}

    def one(name: str, m: Tree) -> Tree:
        names[name] = re.search(pattern, name) is not None
        return _map(name, m, group) if names[name] else m

    made = tree.maps(one, p)
    if not any(names.values()):
        few = ", ".join([*names][:3])
        raise ValueError(f"the rule {pattern!r} matches none of the {len(names)} maps, such as {few}")
    return made


def _map(name: str, m: Tree, group: int) -> Tree:
    w = m["weight"]
    if "lora_a" in m:
        raise ValueError(f"{name} has an adapter: merge it first (mmfunc.lora.merge), then quantize")
    if w.ndim != 2 or not w.is_floating_point():
        raise ValueError(f"{name} is no dense map of floats but {w.dtype} {list(w.shape)}: leave it out of the rule")
    parts = zip(*(_rounded(rows, min(group, w.shape[1])) for rows in w.split(ROWS)))
    weight, scale = map(torch.cat, parts)
    if not scale.isfinite().all():
        raise ValueError(f"{name} has weights that are not finite")
    return {**m, "weight": weight, "scale": scale}


def _rounded(w: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """[N, K] -> int8 [N, K], scale [N, G]. The weights are rounded by the scale as its dtype has it."""
    k = w.shape[1]
    count = -(-k // most)
    size = -(-k // count)
    groups = torch.nn.functional.pad(w.float(), (0, count * size - k)).view(len(w), count, size)
    scale = (groups.abs().amax(-1) / 127).to(w.dtype)
    q = (groups / torch.where(scale == 0, 1, scale)[..., None].float()).round().clamp(-127, 127)
    return q.to(torch.int8).flatten(1)[:, :k].contiguous(), scale


def dequantized(p: Tree) -> Tree:
    """The tree with float weights again."""
    def one(name: str, m: Tree) -> Tree:
        if "scale" not in m:
            return m
        return {k: v for k, v in m.items() if k != "scale"} | {"weight": kernels.dequantized(m["weight"], m["scale"])}

    return tree.maps(one, p)


def errors(p: Tree, quantized: Tree) -> dict[str, float]:
    """By the name of each map of int8 weights, the root mean square of what they are off, over that of the weights."""
    found: dict[str, float] = {}

    def one(name: str, m: Tree) -> Tree:
        if "scale" in m:
            w = tree.at(p, name)["weight"].float()
            near = kernels.dequantized(m["weight"], m["scale"].float())
            found[name] = ((near - w).norm() / w.norm().clamp(min=1e-30)).item()
        return m

    tree.maps(one, quantized)
    return found
