"""The Ascend C kernels as operations of torch, mmfunc::norm_forward and so on, with fakes.

On CPU an operation runs in the emulator, on an NPU what `ascend_build` compiled, in a graph for NPUs it is an operation
of GE by the converters of `ge.own`. In all three it takes tensors, the number of blocks, and the tiling that the host
computed, whole numbers before real ones.
"""

import ctypes
import os
import struct
from collections import namedtuple
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfunc.kernels import emulator

NormTiling = namedtuple("NormTiling", "width rows groups tile tiles chunk chunks center residual factor shift pitch "
                        "eps plus")
GateTiling = namedtuple("GateTiling", "tile tiles last up alpha beta")
RopeTiling = namedtuple("RopeTiling", "tokens heads width pitch tile part tiles swap norm eps")
AttentionTiling = namedtuple("AttentionTiling", "batch queries keys heads groups width pitch step start left right "
                             "items bounded scale")


class Kernel(NamedTuple):
    """How a kernel is called."""

    inputs: str  # names, "?" behind what may be left out
    outputs: str  # names, "+" behind what is added to and starts at zero, "~" behind scratch
    tiling: type
    shapes: Callable  # (tiling, blocks, *inputs) -> of each output (shape, dtype), or None where the tiling lacks it

    def names(self) -> tuple[list[str], list[str], list[str]]:
        """Of the inputs, of the outputs, and how each output is written, as an Out says it."""
        outs = self.outputs.split()
        marks = ["some" if n.endswith("+") else "scratch" if n.endswith("~") else "all" for n in outs]
        return self.inputs.replace("?", "").split(), [n.rstrip("+~") for n in outs], marks


def _like(*tensors: Tensor | None) -> list:
    return [None if t is None else (t.shape, t.dtype) for t in tensors]


def _sums(t: NormTiling, blocks: int, x: Tensor, *rest: Tensor | None) -> list:
    size = (blocks + t.groups - 1, t.width), torch.float32
    return [*_like(x), *(size if on else None for on in (t.factor, t.shift))]


def _rows(t: AttentionTiling, *rest: Any) -> list:
    return [((t.batch, t.heads, t.queries), torch.float32)]


def _scores(t: AttentionTiling, blocks: int, q: Tensor, *rest: Tensor) -> list:
    space = lambda n, dtype: ((blocks, 3, 128, n), dtype)  # three steps of each
    return [*_like(q), *_rows(t), space(t.step, q.dtype), space(t.step, q.dtype), space(t.pitch, torch.float32)]


def _slopes(t: AttentionTiling, blocks: int, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> list:
    return [*((x.shape, torch.float32) for x in (q, k, v)), ((blocks, 8, 128, 128), q.dtype)]


def _turned(t: RopeTiling, blocks: int, x: Tensor, *rest: Tensor | None) -> list:
    return [*_like(x), ((blocks, t.width), torch.float32) if t.norm else None]


SEEN = "codes queries keys"  # tables of ascend_attention
KERNELS = {
    "norm_forward": Kernel("x residual? factor? shift?", "y total", NormTiling, lambda t, n, *x: _like(*x[:2])),
    "norm_backward": Kernel("x dsum? factor? dy", "dx dfactor+ dshift+", NormTiling, _sums),
    "gate_forward": Kernel("g u?", "y", GateTiling, lambda t, n, *x: _like(x[0])),
    "gate_backward": Kernel("g u? dy", "dg du", GateTiling, lambda t, n, *x: _like(*x[:2])),
    "rope_forward": Kernel("x weight? cos sin partners?", "y", RopeTiling, lambda t, n, *x: _like(x[0])),
    "rope_backward": Kernel("x weight? cos sin partners? dy", "dx dweight", RopeTiling, _turned),
    "attention_forward": Kernel(f"q k v {SEEN}", "o lse scores~ weights~ values~", AttentionTiling, _scores),
    "attention_delta": Kernel("o do", "delta", AttentionTiling, _rows),
    "attention_backward": Kernel(f"q k v do lse delta {SEEN}", "dq+ dk+ dv+ spaces~", AttentionTiling, _slopes),
}


def call(name: str, blocks: int, t: tuple, *inputs: Tensor | None) -> list[Tensor | None]:
    """What a kernel gives with a tiling, without scratch; None where the tiling lacks it."""
    whole, real = ([n for n in t if isinstance(n, kind)] for kind in (int, float))
    found = getattr(torch.ops.mmfunc, name)(*inputs, blocks, whole, real)
    shapes = KERNELS[name].shapes(t, blocks, *inputs)
    return [f if said else None for f, said in zip([found] if isinstance(found, Tensor) else found, shapes)]


def _outputs(name: str, args: tuple) -> list[tuple[Tensor | None, str]]:
    """The outputs of a call as they are before it, and how each is written."""
    k, (*inputs, blocks, whole, real) = KERNELS[name], args
    fresh = {"some": inputs[0].new_zeros, "all": inputs[0].new_empty, "scratch": inputs[0].new_empty}
    shapes = k.shapes(k.tiling(*whole, *real), blocks, *inputs)
    return [(said and fresh[how](said[0], dtype=said[1]), how) for said, how in zip(shapes, k.names()[2])]


def results(name: str, *args: Any, run: Callable | None = None) -> tuple[Tensor, ...]:
    """The outputs of an operation, empty where the tiling lacks one; run(name, args, outputs) writes them."""
    outputs = _outputs(name, args)
    if run:
        run(name, args, outputs)
    return tuple(args[0].new_empty(0) if t is None else t for t, how in outputs if how != "scratch")


def _single(found: tuple) -> Any:
    return found if len(found) > 1 else found[0]


def _run(name: str, args: tuple, outputs: list) -> None:
    *inputs, blocks, whole, real = args
    tiling, x = struct.pack(f"{len(whole)}i{len(real)}f", *whole, *real), inputs[0]
    if x.device.type == "npu":
        return _launch(name, x, blocks, tiling, *inputs, *(t for t, _ in outputs))
    source = next(s for s, kernels in emulator.KERNELS.items() if name in kernels)
    given = [None if t is None else emulator.Out(t, how) for t, how in outputs]
    return emulator.launch(emulator.build(source, x.dtype), name, blocks, tiling, *inputs, *given, None)


def _launch(name: str, x: Tensor, blocks: int, tiling: bytes, *tensors: Tensor | None) -> None:
    """On the device, on the stream that x is used on; the memory of what dies here is reused behind the kernel."""
    table = torch.frombuffer(bytearray(tiling), dtype=torch.uint8).to(x.device)
    pointers = [None if t is None else t.data_ptr() for t in (*tensors, None, table)]
    stream = ctypes.c_void_p(torch.npu.current_stream(x.device).npu_stream)
    compiled(x.dtype)[f"launch_{name}"]((ctypes.c_void_p * len(pointers))(*pointers), blocks, stream)


def home() -> Path:
    """Where ascend_build leaves what it compiles."""
    cached = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mmfunc" / "ascend" / "device"
    return Path(os.environ.get("MMFUNC_ASCEND", cached))


@cache
def compiled(dtype: torch.dtype) -> ctypes.CDLL:
    """The kernels for a type of elements, as compiled for the device."""
    library = home() / f"libmmfunc_{emulator.TYPES[dtype]}.so"
    if not library.exists():
        raise ValueError(f"there is no {library}: python -m mmfunc.kernels.ascend_build compiles the Ascend kernels")
    return ctypes.CDLL(str(library))


_library = torch.library.Library("mmfunc", "FRAGMENT")
for _name, _kernel in KERNELS.items():
    _ins, _outs, _marks = _kernel.names()
    _schema = ", ".join(f"Tensor{'?' if n + '?' in _kernel.inputs.split() else ''} {n}" for n in _ins)
    _results = ", ".join("Tensor" for how in _marks if how != "scratch")
    _library.define(f"{_name}({_schema}, int blocks, int[] whole, float[] real) -> "
                    + (f"({_results})" if "," in _results else _results), tags=torch.Tag.pt2_compliant_tag)
    _library.impl(_name, lambda *args, n=_name: _single(results(n, *args, run=_run)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"mmfunc::{_name}", lambda *args, n=_name: _single(results(n, *args)), lib=_library)


def differentiable(name: str, backward: Callable, saved: tuple[int, ...] = ()) -> None:
    """Give an operation a gradient: backward(tiling, inputs, outputs that saved counts, gradients) -> of the inputs."""
    k = KERNELS[name]

    def keep(ctx: Any, inputs: tuple, output: Any) -> None:
        *tensors, _, whole, real = inputs
        ctx.tiling = k.tiling(*whole, *real)
        ctx.save_for_backward(*tensors, *(output[i] for i in saved))

    def run(ctx: Any, *grads: Tensor) -> tuple:
        n, tensors = len(k.names()[0]), ctx.saved_tensors
        found = backward(ctx.tiling, tensors[:n], tensors[n:], [g.contiguous() for g in grads])
        return *found, None, None, None

    torch.library.register_autograd(f"mmfunc::{name}", run, setup_context=keep, lib=_library)
