"""The C++ kernels for CPUs, csrc/cpu_*, compiled for this machine when the first of them is used; and csrc/torch_ops,
by which PyTorch calls those that take no longer than Python's way to them."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch

SOURCES = sorted((Path(__file__).parent / "csrc").glob("cpu_*"))
MACROS = {"avx2": "__AVX2__", "avx512": "__AVX512VL__", "avx512_vnni": "__AVX512VNNI__", "amx_tile": "__AMX_TILE__"}
OPERATIONS = Path(__file__).parent / "csrc" / "torch_ops.cpp"
FLAGS = ("-std=c++17", "-fPIC", "-shared")


def compiler() -> str | None:
    """The C++ compiler, the one that Inductor takes."""
    return next((found for name in (os.environ.get("CXX"), "g++", "clang++") if name and (found := shutil.which(name))),
                None)


def folder() -> Path:
    """Where compiled kernels are kept."""
    beside = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    return Path(beside).parent / "mmfunc" if beside else Path.home() / ".cache" / "mmfunc"


@cache
def defined(cxx: str, *flags: str) -> bytes:
    """What the compiler predefines: its version, and the instructions that it may take."""
    return subprocess.run([cxx, *flags, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, check=True).stdout


def vectors() -> dict[str, bool]:
    """Inductor's option that the compiler has the vector instructions of this CPU, where it says so; else Inductor
    compiles and runs a program for each kind of them, which takes up to 15 s before anything else is compiled."""
    from torch._inductor.cpu_vec_isa import x86_isa_checker

    cxx, here = compiler(), x86_isa_checker()
    try:
        known = defined(cxx, "-march=native") if cxx and here else b""
    except (subprocess.CalledProcessError, OSError):
        known = b""
    return {"cpp.vec_isa_ok": True} if known and all(k in MACROS and MACROS[k].encode() in known for k in here) else {}


def build(cxx: str, machine: str = "native", *without: str) -> Path:
    """The kernels compiled for a machine (-march), without some of its instructions."""
    flags = *FLAGS, "-O3", "-fopenmp", f"-march={machine}", *(f"-mno-{w}" for w in without)
    return _built(cxx, "kernels", SOURCES, *flags)


def _built(cxx: str, name: str, sources: list[Path], *flags: str) -> Path:
    """A library; kept under the hash of source, flags, compiler and its machine."""
    facts = [cxx.encode(), *map(str.encode, flags), defined(cxx, *(f for f in flags if f[1] in "mO"))]
    key = hashlib.sha256(b"\0".join([*facts, *(s.read_bytes() for s in sources)]))
    path = folder() / f"{name}-{key.hexdigest()[:24]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as part:  # several processes may build at once
            made = Path(part) / path.name
            given = [str(s) for s in sources if s.suffix == ".cpp"]
            subprocess.run([cxx, *given, *flags, "-o", str(made)], capture_output=True, check=True, text=True)
            made.replace(path)
    return path


def register(cxx: str, kernels: ctypes.CDLL) -> None:
    """Make the operations of torch_ops.cpp known to PyTorch, through its stable ABI; they call these kernels."""
    at, version = Path(torch.__file__).parent, f"-DTORCH={torch.__version__}"
    flags = *FLAGS, "-O2", version, "-isystem", f"{at}/include", f"-L{at}/lib", "-ltorch_cpu", f"-Wl,-rpath,{at}/lib"
    library = ctypes.CDLL(str(_built(cxx, "operations", [OPERATIONS], *flags)))
    library.use(kernels.matvec, kernels.matvec_int8, kernels.attention_few)


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; without a compiler None, and a warning that says why, once."""
    cxx = compiler()
    why = "there is no C++ compiler (g++, clang++ or CXX)"
    if cxx is not None:
        try:
            found = ctypes.CDLL(str(build(cxx)))
            found = found if found.attention_allowed() else ctypes.CDLL(str(build(cxx, "native", "amx-bf16")))
            register(cxx, found)
            return found
        except (subprocess.CalledProcessError, OSError) as e:
            why = f"{e} {getattr(e, 'stderr', '')[-1000:]}"
    warnings.warn(f"attention and decoding on CPU run in PyTorch's operations, some times slower: {why}", stacklevel=2)
    return None


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether there are compiled kernels; the first call compiles them."""
    return library() is not None
