"""Dense maps, embeddings, norms and MLPs. Statistics are float32; activations keep their dtype."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mmfunc import kernels, shard
from mmfunc.tree import Param, Tree, normal, ones


def Linear(d_in: int, d_out: int, axes: str = "_ -> _", *, bias: bool = True, std: float | None = None) -> Tree:
    """A dense map; axes names its input and output: "embed -> mlp"."""
    src, dst = axes.split(" -> ")
    weight = Param((d_out, d_in), f"{dst} {src}", normal(d_in**-0.5 if std is None else std))
    return {"weight": weight, "bias": Param((d_out,), dst)} if bias else {"weight": weight}


def linear(p: Tree, x: Tensor) -> Tensor:
    """[..., in] -> [..., out], plus the low-rank path when p has one."""
    y = kernels.linear(x, p["weight"], p.get("bias"), p.get("scale"))
    return y + F.linear(F.linear(x, p["lora_a"]), p["lora_b"]) * p["lora_scale"] if "lora_a" in p else y


def reduced(p: Tree, x: Tensor, axis: str) -> Tensor:
    """A linear map whose input is split on axis: sum the parts, then add the bias once."""
    y = shard.leave(linear({k: v for k, v in p.items() if k != "bias"}, x), axis)
    return y + p["bias"] if "bias" in p else y


def Embed(n: int, d: int, std: float = 0.02) -> Tree:
    """A table of n vectors of width d."""
    return {"weight": Param((n, d), "vocab embed", normal(std))}


def embed(p: Tree, ids: Tensor) -> Tensor:
    """[B, S] -> [B, S, D]; of a divided table each rank looks up what it has."""
    if not shard.parts("vocab"):
        return _rows(p, ids)
    n = len(p["weight"])
    own = ids - shard.start(n, "vocab")
    here = (own >= 0) & (own < n)
    return shard.summed(torch.where(here[..., None], _rows(p, torch.where(here, own, 0)), 0.0), "vocab")


def _rows(p: Tree, ids: Tensor) -> Tensor:
    found = F.embedding(ids, p["weight"])
    return kernels.dequantized(found, F.embedding(ids, p["scale"])) if "scale" in p else found


def LayerNorm(d: int) -> Tree:
    """Scale and shift of width d."""
    return {"weight": Param((d,), "_", ones), "bias": Param((d,), "_")}


def layernorm(p: Tree | None, x: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalise the last dimension in float32; without p there is no scale and no shift."""
    if (normed := kernels.fused("layernorm", x, *((p["weight"], p["bias"]) if p else (None, None)), eps)) is not None:
        return normed
    scale, shift = (p["weight"].float(), p["bias"].float()) if p else (None, None)
    return F.layer_norm(x.float(), x.shape[-1:], scale, shift, eps).to(x.dtype)


def RMSNorm(d: int, axis: str = "_") -> Tree:
    """Scale of width d."""
    return {"weight": Param((d,), axis, ones)}


def rmsnorm(p: Tree, x: Tensor, eps: float = 1e-6, *, axis: str | None = None) -> Tensor:
    """Divide by the root mean square over the last dimension, summed across parts when axis names it."""
    whole = axis is None or not shard.parts(axis)
    if whole and (normed := kernels.fused("rmsnorm", x, p["weight"], eps)) is not None:
        return normed
    y = x.float()
    mean = shard.mean(y.square(), axis) if axis else y.square().mean(-1, keepdim=True)
    return p["weight"] * (y * (mean + eps).rsqrt()).to(x.dtype)


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of GELU by a sigmoid."""
    return x * (1.702 * x).sigmoid()


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh fit."""
    if (fused := kernels.fused("gelu_tanh", x)) is not None:
        return fused
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    y = x.float()  # the same as a sigmoid: Inductor's tanh takes three times as long as its exp
    return (y * torch.sigmoid(math.sqrt(8 / math.pi) * (y + 0.044715 * y * y * y))).to(x.dtype)


def MLP(d: int, hidden: int, out: int | None = None, *, gated: bool = False, bias: bool = True) -> Tree:
    """One hidden layer; gated multiplies it with a second map of the input."""
    up, down = Linear(d, hidden, "embed -> mlp", bias=bias), Linear(hidden, out or d, "mlp -> embed", bias=bias)
    return {"gate": up, "up": up, "down": down} if gated else {"up": up, "down": down}


def glu(gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor] = F.silu) -> Tensor:
    """act(gate) * up, of one shape."""
    fused = kernels.fused("glu", gate, up, getattr(act, "__name__", ""))
    return act(gate) * up if fused is None else fused


def mlp(p: Tree, x: Tensor, act: Callable[[Tensor], Tensor] = F.silu) -> Tensor:
    """[B, S, D] -> [B, S, D'] through one hidden layer."""
    x = shard.enter(x, "mlp")
    h = glu(linear(p["gate"], x), linear(p["up"], x), act) if "gate" in p else act(linear(p["up"], x))
    return reduced(p["down"], h, "mlp")
