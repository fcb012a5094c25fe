"""A run's log: metrics.jsonl, config.json, progress on the terminal, and speed against the machine's peak.

One JSON object a line. A step's line has "step" and its numbers (null where not finite); other lines have "event"
(restart, compile, ...) and the step after which it happened. A line torn by kill -9 is dropped when the run goes on, as
are the lines of steps that the checkpoint does not know.
"""

import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from mmfunc import shard

TIMERS = ("data_wait", "compute", "checkpoint")  # the parts of a step that a loop may time
PEAKS = {  # dense bf16 FLOP/s by a part of the device's name; the first that fits counts
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12,
    "A10G": 70e12, "4090": 165e12, "910B1": 378.9e12, "910B2": 353.9e12, "910B3": 294.9e12, "910B4": 245.8e12,
    "910_93": 353.9e12,  # one die of a 910C
}


def number(x: Any) -> Any:
    """A 0-d tensor or a float as what JSON can hold: None where it is not finite."""
    x = x.item() if isinstance(x, Tensor) and x.numel() == 1 else x
    return None if isinstance(x, float) and not math.isfinite(x) else x


def replace(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read(path: Path) -> tuple[list[dict], int]:
    """The objects of a jsonl file, and how many lines were none; a file that is missing has no lines."""
    if not path.exists():
        return [], 0
    rows, bad = [], 0
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line) if line.strip() else None
            bad += row is not None and not isinstance(row, dict)
            rows += [row] if isinstance(row, dict) else []
        except ValueError:
            bad += 1
    return rows, bad


def peak(device: torch.device | str = "cpu") -> float | None:
    """The device's dense bf16 FLOP/s, None where it is not known (any CPU: see gemm)."""
    device = torch.device(device)
    name = device_name(device)
    return None if device.type == "cpu" else next((v for k, v in PEAKS.items() if k in name), None)


def gemm(dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu", size: int = 2048,
         seconds: float = 0.5) -> float:
    """The best FLOP/s of a [size, size] matrix product, measured for a moment."""
    a, b = torch.ones(2, size, size, dtype=dtype, device=device)
    best, end = math.inf, time.perf_counter() + seconds
    while best == math.inf or time.perf_counter() < end:
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # the item waits for an asynchronous device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def device_name(device: torch.device | str = "cpu") -> str:
    """What the machine calls the device."""
    device = torch.device(device)
    if device.type != "cpu":
        return torch.get_device_module(device.type).get_device_name(device)
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def memory(device: torch.device | str = "cpu") -> dict[str, int]:
    """Bytes of this process: now and at most, and at most on the accelerator."""
    statm = Path("/proc/self/statm")
    top = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    now = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else top
    device = torch.device(device)
    if device.type in ("cpu", "meta"):
        return {"rss": now, "peak_rss": top}
    return {"rss": now, "peak_rss": top, "device": torch.get_device_module(device.type).max_memory_allocated(device)}


def versions() -> dict[str, str | None]:
    """Of Python, the packages that decide the bits, and this checkout's commit."""
    found = {"python": platform.python_version()}
    for name in ("mmfunc", "torch", "torch_npu", "numpy", "tokenizers", "pillow", "av"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return found | ({"commit": git.stdout.strip()} if git.returncode == 0 else {})


def config(flags: Any, device: torch.device | str = "cpu", **facts: Any) -> dict:
    """What config.json of a run holds: resolved flags, versions, the machine, and further facts."""
    flags = dict(flags) if isinstance(flags, dict) else vars(flags)
    machine = {"device": str(device), "name": device_name(device), "cores": os.cpu_count(), "host": platform.platform()}
    return {"flags": flags, "versions": versions(), "machine": machine, "command": " ".join(sys.argv), **facts}


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """What two resolved configs say differently, one line each: "flags.lr: 0.001 before, 0.003 now"."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [d for k in old | new for d in differences(old.get(k), new.get(k), f"{name}.{k}" if name else str(k))]
    same = json.dumps(old, default=str) == json.dumps(new, default=str)
    return [] if same else [f"{name}: {old} before, {new} now"]


def keep(path: Path, step: int | None) -> None:
    """Drop from a jsonl file torn lines and, where step is given, the lines of later steps."""
    rows, bad = read(path)
    kept = [r for r in rows if step is None or r.get("step", 0) <= step]
    if bad or len(kept) < len(rows) or path.exists() and not path.read_bytes().endswith(b"\n"):
        replace(path, "".join(json.dumps(r) + "\n" for r in kept))


class Log:
    """Writes one line a step and shows progress: a bar on a terminal, else a plain line every `every` steps.

    >>> with Log(folder, steps=100) as log:
    ...     with log.time("compute"): state, report = step(state, batch)
    ...     log(1, report, tokens=4096, samples=8, flops=1e12)
    """

    def __init__(self, folder: Path, steps: int, config: dict | None = None, *, resume: int = 0, every: int = 10,
                 device: torch.device | str = "cpu", peak: float | None = None):
        self.folder, self.steps, self.every, self.device, self.peak = Path(folder), steps, every, device, peak
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path, self.compiles, self.spent = self.folder / "metrics.jsonl", 0, dict.fromkeys(TIMERS, 0.0)
        again = self.path.exists()
        keep(self.path, resume)
        keep(self.folder / "samples.jsonl", resume)
        self.file = self.path.open("a", encoding="utf-8")
        if config is not None:
            replace(self.folder / "config.json", json.dumps(config, indent=2, default=str) + "\n")
        if again and resume:
            self.event("restart", step=resume)
        self.step, self.last, self.bar = resume, time.perf_counter(), None if shard.rank()[0] else _bar(steps, resume)

    def __enter__(self) -> "Log":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()
        self.file.close()

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Add the time of a block to a part of the current step: data_wait, compute or checkpoint."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.spent[part] += time.perf_counter() - start

    def write(self, row: dict) -> None:
        """Append one line, whole, and hand it to the system."""
        self.file.write(json.dumps(row, allow_nan=False, default=str) + "\n")
        self.file.flush()

    def event(self, kind: str, step: int | None = None, **facts: Any) -> None:
        """Write what happened beside the steps: restart, compile (graphs, shapes, seconds, cached), checkpoint ..."""
        self.compiles += kind == "compile"
        now = {"event": kind, "step": self.step if step is None else step, "time": round(time.time(), 3)}
        self.write(now | {k: number(v) for k, v in facts.items()})

    def each(self, part: str, items: Iterable) -> Iterator:
        """The items; the waiting for each is added to a part of the current step."""
        items = iter(items)
        while True:
            with self.time(part):
                item = next(items, None)
            if item is None:
                return
            yield item

    def failed(self, kind: str, error: Exception) -> None:
        """Tell of an error after which all goes on, here and on stderr."""
        self.event(kind, reason=str(error))
        print(error, file=sys.stderr)

    def __call__(self, step: int, report: dict, *, tokens: int = 0, samples: int = 0, flops: float = 0) -> dict:
        """Write the line of a step from its report of 0-d tensors, show it, and return it. tokens, samples: of this
        rank's part of the batch; others have as many."""
        tokens, samples = (n * shard.part()[1] for n in (tokens, samples))
        step, values = int(step), {k: number(v) for k, v in report.items()}
        now = time.perf_counter()
        wall, self.last, self.step = max(now - self.last, 1e-9), now, step
        finite = values.pop("finite", True)
        row = {"step": step, "time": round(time.time(), 3), **values, "skipped": int(not finite)}
        row |= {"step_ms": round(wall * 1e3, 3)}
        row |= {f"{k}_ms": round(v * 1e3, 3) for k, v in self.spent.items()}
        row |= {"tokens_per_s": round(tokens / wall, 1), "samples_per_s": round(samples / wall, 3), "flops": flops}
        row |= {"mfu": flops / wall / self.peak} if self.peak and flops else {}
        row |= {"mem": memory(self.device), "compiles": self.compiles}
        self.write(row)
        self.spent = dict.fromkeys(TIMERS, 0.0)
        self.show(row)
        return row

    def show(self, row: dict) -> None:
        """The bar's new state, or a plain line at the first, the last and each `every`-th step; of the first rank."""
        if shard.rank()[0]:
            return
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=row["step"], facts=facts(row))
        elif row["step"] % self.every == 0 or row["step"] in (1, self.steps) or row["skipped"]:
            left = (self.steps - row["step"]) * row["step_ms"] / 1e3
            print(f"step {row['step']}/{self.steps}  {facts(row)}  ETA {left:.0f} s", flush=True)


def facts(row: dict) -> str:
    """A step's line for people: loss, rate, MFU, share of waiting for data."""
    shown = lambda k, form: format(row[k], form) if row.get(k) is not None else "not finite"
    text = f"loss {shown('loss', '.4f')}" if "loss" in row else ""
    text += f"  norm {shown('grad_norm', '.3g')}" if "grad_norm" in row else ""
    text += f"  {row['tokens_per_s']:,.0f} tokens/s" if row["tokens_per_s"] else f"  {row['step_ms']:.0f} ms"
    text += f"  MFU {row['mfu']:.1%}" if "mfu" in row else ""
    text += f"  data wait {row['data_wait_ms'] / row['step_ms']:.0%}"
    return text + ("  SKIPPED" if row["skipped"] else "")


def _bar(steps: int, done: int) -> Progress | None:
    """rich's progress bar where somebody watches a terminal."""
    if not sys.stderr.isatty():
        return None
    bar = Progress(TextColumn("[progress.description]{task.description}"), BarColumn(None), TaskProgressColumn(),
                   TextColumn("{task.fields[facts]}"), TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
    bar.add_task("step", total=steps, completed=done, facts="")
    return bar
