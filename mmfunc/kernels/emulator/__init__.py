"""Ascend C kernels on the host: g++ builds them with the emulator's kernel_operator.h, ctypes calls them on tensors.

The emulator refuses what the hardware would (machine.h says what) with a ValueError that names kernel, line and rule.
It counts bytes and operations by unit and keeps times in the order of queues and flags, which gives an estimate of
cycles on a 910B2; the rates and their sources stand in machine.h.
"""

import ctypes
import hashlib
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

HERE = Path(__file__).parent
SOURCES = HERE.parent / "csrc" / "ascend"
TYPES = {torch.bfloat16: "bfloat16_t", torch.float16: "half", torch.float32: "float"}
MIXED = ("attention_forward", "attention_backward")  # these use cube and vector cores, the others vector cores only
KERNELS = {"norm": ("norm_forward", "norm_backward"), "gate": ("gate_forward", "gate_backward"),
           "rope": ("rope_forward", "rope_backward"), "attention": ("attention_forward",),
           "attention_grad": ("attention_delta", "attention_backward")}
PIPES = ("S", "V", "M", "MTE1", "MTE2", "MTE3", "FIX")


def build(source: str, dtype: torch.dtype, folder: Path = SOURCES) -> Path:
    """The shared library of one source file for one type of elements; compiled when no cached one fits."""
    if dtype not in TYPES:
        raise ValueError(f"Ascend kernels take bfloat16, float16 and float32, not {dtype}")
    flags = ("-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", f"-DDTYPE={TYPES[dtype]}")
    entries = "".join(f"EMULATE({k}, {str(k in MIXED).lower()})\n" for k in KERNELS[source])
    files = [folder / f"{source}.cpp", *sorted(folder.glob("*.h")), *sorted(HERE.glob("*.h"))]
    parts = [*(f.read_bytes() for f in files), " ".join(flags).encode(), entries.encode()]
    cached = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mmfunc" / "ascend"
    library = cached / f"{source}-{hashlib.sha256(b''.join(parts)).hexdigest()[:16]}.so"
    if not library.exists():
        cached.mkdir(parents=True, exist_ok=True)
        part = library.with_suffix(f".{os.getpid()}")
        done = subprocess.run(["g++", *flags, "-x", "c++", "-", "-o", part, f"-I{folder}", f"-I{HERE}"],
                              input=f'#include "{source}.cpp"\n{entries}', text=True, capture_output=True)
        if done.returncode:
            raise ValueError(f"{source}.cpp does not compile for {dtype}:\n{done.stderr}")
        part.replace(library)
    return library


@cache
def loaded(library: Path) -> ctypes.CDLL:
    """A built library with the types of its functions."""
    lib = ctypes.CDLL(str(library))
    lib.emu_error.restype = ctypes.c_char_p
    lib.emu_tensor.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
    lib.emu_counts.argtypes = lib.emu_rates.argtypes = [ctypes.POINTER(ctypes.c_double)]
    return lib


class Out(NamedTuple):
    """A tensor that a kernel writes: "all" of it, "some" of it (given with values), or as "scratch"."""

    tensor: Tensor
    how: str = "all"


def launch(library: Path, kernel: str, blocks: int, tiling: bytes, *args: Tensor | Out | None) -> None:
    """Run a kernel on its arguments, its tiling last; None is a null pointer."""
    lib = loaded(library)
    lib.emu_clear()
    pointers = []
    for a in (*args, torch.frombuffer(bytearray(tiling), dtype=torch.uint8)):
        t, role = (a.tensor, {"all": 1, "some": 2, "scratch": 3}[a.how]) if isinstance(a, Out) else (a, 0)
        if t is not None and not t.is_contiguous():
            raise ValueError(f"{kernel} takes contiguous tensors, not strides {t.stride()} of shape {tuple(t.shape)}")
        if t is not None and t.numel():
            lib.emu_tensor(t.data_ptr(), t.nbytes, t.element_size(), role)
        pointers.append(None if t is None else t.data_ptr())
    if lib[f"run_{kernel}"]((ctypes.c_void_p * len(pointers))(*pointers), blocks):
        raise ValueError(lib.emu_error().decode())


class Counts(NamedTuple):
    """Of one launch, or the difference of two: what a kernel moved and issued, and its estimated cycles."""

    cycles: float  # of the slowest core, transfers at its share of the bandwidth
    hbm: float  # bytes that were not in L2
    l2: float  # bytes moved between global memory and the cores
    ops: dict[str, float]  # instructions by core and pipe: "vector V", "cube M"
    bytes: dict[str, float]  # moved or computed; floating-point operations for "cube M"
    busy: dict[str, float]  # cycles, summed over the cores

    def __sub__(self, other: "Counts") -> "Counts":
        return Counts(*(a - b if isinstance(a, float) else {k: a[k] - b[k] for k in a} for a, b in zip(self, other)))


def counts(library: Path) -> Counts:
    """What the last launch of a library did."""
    n = len(PIPES)
    out = (ctypes.c_double * (3 + 6 * n))()
    loaded(library).emu_counts(out)
    by = [{f"{core} {p}": out[3 + (3 * c + i) * n + j] for c, core in enumerate(("vector", "cube"))
           for j, p in enumerate(PIPES)} for i in range(3)]
    return Counts(out[0], out[1], out[2], *by)


def bounds(library: Path, c: Counts) -> tuple[float, float]:
    """Cycles that counts need on a whole 910B2, and those that their bytes from HBM alone would need."""
    rates = (ctypes.c_double * 5)()
    loaded(library).emu_rates(rates)
    _, _, _, hbm, l2 = rates
    return max(c.cycles, c.hbm / hbm, c.l2 / l2), c.hbm / hbm
