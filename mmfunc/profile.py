"""Traces of training steps: what ran when, on the host and on the device."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch


def traced(items: Iterable, span: tuple[int, int] | None, folder: Path, device: str = "cpu") -> Iterator:
    """The items; the work on those from number span[0] to span[1] - 1 of this run is traced into folder.

    The trace of a CPU or of CUDA is `trace.json` (chrome://tracing, Perfetto) with sums by operation in `ops.txt`; that
    of an NPU is a folder for MindStudio Insight. Compilation takes place in the first items: begin behind them. A span
    that the run does not reach to its end gives a trace of what there was.
    """
    if span and not 0 <= span[0] < span[1]:
        raise ValueError(f"--profile {span[0]} {span[1]}: a span is two numbers, the first less than the second")
    running = None
    try:
        for i, item in enumerate(items):
            if span and i == span[0]:
                running = _npu(folder) if device.startswith("npu") else _torch(device)
                running.start()
            elif span and i == span[1]:
                _write(running, folder)
                running = None
            yield item
    finally:
        if running:
            _write(running, folder)


def _torch(device: str) -> Any:
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] * device.startswith("cuda")
    return torch.profiler.profile(activities=kinds, record_shapes=True, profile_memory=True)


def _npu(folder: Path) -> Any:
    """The profiler of torch_npu, with what the units of the device do in each kernel."""
    from torch_npu import profiler as npu

    more = npu._ExperimentalConfig(profiler_level=npu.ProfilerLevel.Level1, aic_metrics=npu.AiCMetrics.PipeUtilization)
    kinds = [npu.ProfilerActivity.CPU, npu.ProfilerActivity.NPU]
    return npu.profile(activities=kinds, record_shapes=True, profile_memory=True, experimental_config=more,
                       on_trace_ready=npu.tensorboard_trace_handler(str(folder)))


def _write(running: Any, folder: Path) -> None:
    """End the trace; torch_npu's writes itself."""
    running.stop()
    if isinstance(running, torch.profiler.profile):
        folder.mkdir(parents=True, exist_ok=True)
        running.export_chrome_trace(str(folder / "trace.json"))
        sums = running.key_averages(group_by_input_shape=True)
        (folder / "ops.txt").write_text(sums.table(sort_by="self_cpu_time_total", row_limit=100) + "\n")
