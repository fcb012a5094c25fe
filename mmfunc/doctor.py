"""What an Ascend machine has and lacks, and whether it computes what a CPU does.

    python -m mmfunc.doctor [report.txt]

Nothing of torch is imported before what it needs was looked at. On a device the Ascend C kernels are compiled and
compared with their references, and training steps of two small models with the CPU; elsewhere it says what is missing,
and what was shown without it.
"""

import os
import platform
import shutil
import sys
import traceback
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import mmfunc

PAIRS = {"2.13": "2.13"}  # torch: torch_npu, which converters were written against
CANN = "ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"
DRIVER = Path("/usr/local/Ascend/driver/version.info")
SETTINGS = {"HCCL_DETERMINISTIC": "true: the same sums in each run", "HCCL_SOCKET_IFNAME": "the NIC that ranks meet on",
            "HCCL_CONNECT_TIMEOUT": "seconds, for large worlds", "ASCEND_RT_VISIBLE_DEVICES": "devices to use"}
ROOM = 20  # GiB for compiled graphs and checkpoints of a small run
MODELS = "qwen2vl:tiny", "wan:tiny"

Fact = tuple[str, str]  # (ok | warn | lacks, a sentence)


def version(package: str) -> str | None:
    """The installed version, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def software() -> Iterator[Fact]:
    """Versions, and pairs that do not fit."""
    yield "ok", f"Python {platform.python_version()}, {platform.machine()}, {platform.platform()}"
    torch, npu = version("torch"), version("torch_npu")
    yield "ok" if torch else "lacks", f"torch {torch or 'is not installed'}"
    if npu is None:
        yield "lacks", "torch_npu is not installed: pip install torch_npu in the version of torch"
    elif torch and npu.split(".")[:2] != torch.split(".")[:2]:
        yield "lacks", f"torch {torch} and torch_npu {npu} do not fit: the first two numbers must be equal"
    elif torch and torch.rpartition(".")[0] not in PAIRS:
        yield "warn", f"torch_npu {npu}: the converters were checked with {', '.join(PAIRS.values())}"
    else:
        yield "ok", f"torch_npu {npu}"


def device() -> Iterator[Fact]:
    """Driver, CANN and what it needs."""
    cards = sorted(Path("/dev").glob("davinci[0-9]*"))
    yield ("ok", f"{len(cards)} devices") if cards else ("lacks", "no NPU: there is no /dev/davinci*")
    driver = DRIVER.read_text().splitlines()[0] if DRIVER.exists() else None
    yield ("ok", f"driver: {driver}") if driver else ("lacks", f"no driver: there is no {DRIVER}")
    home = next((os.environ[n] for n in CANN if n in os.environ), None)
    yield ("ok", f"CANN at {home}") if home else ("lacks", f"no {CANN[0]}: source CANN's set_env.sh")
    for library in mmfunc.lacking():
        yield "lacks", f"{library} is not found: torch_npu would not load"
    for tool, what in (("bisheng", "compiles the Ascend C kernels"), ("npu-smi", "shows the devices")):
        yield ("ok", tool) if shutil.which(tool) else ("warn", f"no {tool}, which {what}")


def surroundings() -> Iterator[Fact]:
    """Settings of HCCL, NICs, room."""
    for name, what in SETTINGS.items():
        yield ("ok", f"{name}={os.environ[name]}") if name in os.environ else ("warn", f"{name} is not set ({what})")
    nics = sorted(p.name for p in Path("/sys/class/net").glob("*") if p.name != "lo")
    yield "ok" if nics else "warn", f"NICs: {', '.join(nics) or 'none'}"
    free = shutil.disk_usage(".").free / 2**30
    yield "ok" if free > ROOM else "warn", f"{free:.0f} GiB free here"


def trial(name: str) -> Fact:
    """A training step's loss and gradients on the NPU against the CPU."""
    from mmfunc import example, jit, models, random, tree

    family, c = models.get(name)
    params, batch = tree.init(family.params(c), random.key(0)), example.batch(name, family, c, example.Sizes())
    step = lambda p, b: jit.value_and_grad(example.loss(family, c))(p, b)
    want = tree.flatten(step(params, batch))
    got = tree.flatten(jit.jit(step, backend="npu")(*tree.map(lambda t: t.to("npu"), (params, batch))))
    floor = 1e-4 * max(v.norm() for v in want.values())
    off = max(((got[k].cpu() - v).norm() / v.norm().clamp(min=floor)).item() for k, v in want.items())
    return ("ok" if off < 1e-3 else "lacks"), f"a training step of {name}: off by {off:.1e} at most"


def kernel(name: str, dtype: str, device: str = "npu") -> Fact:
    """An Ascend C kernel and its gradients on small inputs against its reference in float64."""
    import torch

    from mmfunc.kernels import ascend, ascend_attention

    ramp = lambda n, k: torch.linspace(-3, 3, n * k).view(n, k)
    ids = torch.tensor([[1] * 90 + [2] * 130 + [0] * 10])
    run, reference, *shapes = {
        "norm": (lambda *t: ascend.norm(*t, center=True, plus=1.0)[0],
                 lambda *t: ascend.norm_reference(*t, center=True, plus=1.0), (2, 33, 500), (2, 500), (2, 500)),
        "gate": (ascend.gate, ascend.gate_reference, (7, 1000), (7, 1000)),
        "rope": (lambda x: ascend.rope(x, ramp(50, 64).to(x.device), halves=True),
                 lambda x: ascend.rope_reference(x, ramp(50, 64), halves=True), (50, 3, 128)),
        "attention": (lambda *t: ascend_attention.attention(*t, causal=True, segments=ids.to(t[0].device))[0],
                      lambda *t: ascend_attention.attention_reference(*t, causal=True, segments=ids),
                      (1, 230, 4, 72), (1, 230, 2, 72), (1, 230, 2, 72)),
    }[name]
    kind, seed = getattr(torch, dtype), torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=seed).to(kind) for shape in shapes]

    def results(fn: Any, tensors: list) -> list:
        leaves = [t.requires_grad_() for t in tensors]
        y = fn(*leaves)
        slope = torch.linspace(-1, 1, y.numel()).view(y.shape).to(kind).to(y)
        return [t.detach().cpu().double() for t in (y, *torch.autograd.grad(y, leaves, slope))]

    truth, own = results(reference, [t.double() for t in given]), results(reference, [t.clone() for t in given])
    got = results(run, [t.clone().to(device) for t in given])
    errors = [[((a - b).norm() / b.norm()).item() for a, b in zip(found, truth)] for found in (got, own)]
    fits = all(a <= 2 * max(b, torch.finfo(kind).eps) for a, b in zip(*errors))
    off, least = map(max, errors)
    return "ok" if fits else "lacks", f"{name} in {dtype}: off by {off:.1e}, its reference by {least:.1e}"


def built() -> Fact:
    """The Ascend C kernels, compiled here."""
    from mmfunc.kernels import ascend_build, ascend_ops

    ascend_build.write(ascend_ops.home())
    found = ascend_build.build(ascend_ops.home(), "libraries")
    return "ok", f"compiled: {', '.join(p.name for p in found)}"


def trials() -> Iterator[Fact]:
    """Each kernel and each small model; what fails is told and the next one tried."""
    tries = [("the Ascend C kernels", built)]
    tries += [(f"{k} in {t}", partial(kernel, k, t)) for k in ("norm", "gate", "rope", "attention")
              for t in ("bfloat16", "float16", "float32") if (k, t) != ("attention", "float32")]
    for name, attempt in tries + [(f"a training step of {m}", partial(trial, m)) for m in MODELS]:
        try:
            yield attempt()
        except Exception:  # a report is to be sent back whatever happens
            yield "lacks", f"{name}: {traceback.format_exc()}"


def usable() -> bool:
    """Whether torch_npu loads here, with CANN and not with stand-ins for it, and finds a device."""
    if version("torch_npu") is None or mmfunc.lacking() or not any(n in os.environ for n in CANN):
        return False
    import torch
    import torch_npu  # noqa: F401

    return torch.npu.is_available()


def main(report: str | None = None) -> None:
    """Print all facts, and write them to a file."""
    facts = [*software(), *device(), *surroundings()]
    proofs = "no step was run; what was shown without a device is in docs/ascend.md, make test-ascend shows it again"
    facts += trials() if usable() else [("lacks", proofs)]
    text = "\n".join(f"{mark:6}{said}" for mark, said in facts)
    print(text)
    if report:
        Path(report).write_text(text + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:2])
