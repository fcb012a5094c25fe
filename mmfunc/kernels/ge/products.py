"""Matrix products and convolutions of GE graphs, by their public definitions; as in `operations`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten


def matmul(a: dict, x: Tensor, y: Tensor, bias: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
    """[M, K] @ [K, N], each perhaps transposed, plus a bias [N]."""
    if a.get("offset_x") or offset is not None:
        raise ValueError("MatMulV2 with an offset")
    x, y = x.mT if a["transpose_x1"] else x, y.mT if a["transpose_x2"] else y
    if x.ndim != 2 or y.ndim != 2:
        raise ValueError(f"MatMul of {list(x.shape)} and {list(y.shape)}: it takes matrices")
    return x @ y if bias is None else x @ y + bias


def batch_matmul(a: dict, x: Tensor, y: Tensor, bias: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
    """Products of the last two dimensions."""
    return torch.matmul(x.mT if a["adj_x1"] else x, y.mT if a["adj_x2"] else y)


# ---- convolutions

ORDER = {2: "NCHW", 3: "NCDHW"}  # of the dimensions of a convolution


def _spec(a: dict, n: int) -> dict[str, Any]:
    """Arguments of aten.convolution from the attributes of a convolution over n dimensions."""
    if a["data_format"] != ORDER[n] or a["layout"] - {ORDER[n], "ND"}:
        raise ValueError(f"a convolution with data_format {a['data_format']} and layouts {a['layout']}")
    if a.get("offset_x"):
        raise ValueError("a convolution with offset_x")
    before, after = a["pads"][::2], a["pads"][1::2]
    if before != after:
        raise ValueError(f"a convolution with pads {a['pads']}")
    return {"stride": a["strides"][2:], "padding": before, "dilation": a["dilations"][2:], "groups": a["groups"]}


def conv(n: int) -> Callable:
    """A convolution over n dimensions."""
    def run(a: dict, x: Tensor, weight: Tensor, bias: Tensor | None, offset: Tensor | None) -> Tensor:
        return (F.conv2d, F.conv3d)[n - 2](x, weight, bias, **_spec(a, n))
    return run


def conv_input(n: int) -> Callable:
    """Its gradient by the input, whose size is given."""
    def run(a: dict, size: list[int], weight: Tensor, grad: Tensor) -> Tensor:
        s = _spec(a, n)
        x = grad.new_zeros(()).expand(size)
        return aten.convolution_backward(grad, x, weight, None, *[s[k] for k in ("stride", "padding", "dilation")],
                                         False, [0] * n, s["groups"], [True, False, False])[0]
    return run


def conv_filter(n: int) -> Callable:
    """Its gradient by the weight, whose size is given."""
    def run(a: dict, x: Tensor, size: list[int], grad: Tensor) -> Tensor:
        s = _spec(a, n)
        weight = grad.new_zeros(()).expand(size)
        return aten.convolution_backward(grad, x, weight, None, *[s[k] for k in ("stride", "padding", "dilation")],
                                         False, [0] * n, s["groups"], [False, True, False])[1]
    return run


def conv_transpose(n: int) -> Callable:
    """A transposed convolution; a size of zeros is worked out."""
    def run(a: dict, size: list[int], x: Tensor, weight: Tensor, bias: Tensor | None, offset: Tensor | None) -> Tensor:
        s = _spec(a, n)
        y = (F.conv_transpose2d, F.conv_transpose3d)[n - 2](
            x, weight, bias, s["stride"], s["padding"], a["output_padding"][2:], s["groups"], s["dilation"])
        if any(size) and list(y.shape) != size:
            raise ValueError(f"a transposed convolution of input_size {size} gives {list(y.shape)}")
        return y
    return run
