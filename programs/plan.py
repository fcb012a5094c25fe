"""What a training step needs and takes on devices that need not be there: memory, transfers, time, MFU.

    python programs/plan.py --model wan:t2v-14b --machine h200 --mesh.fsdp 64 --remat attention
    python programs/plan.py --model qwen2vl:2.5-72b --machine 910b-376t --devices 512 --batch 512 --size.height 1008

With --devices it looks for the fastest plan that fits. Nothing runs and no weight is allocated.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from mmfunc import example, machines, models, picture, search, shard
from mmfunc.plan import Forecast, Model, Plan, forecast


@dataclass(frozen=True)
class Args:
    model: str  # family:preset, or a hub folder, of which config.json is read
    machine: str = "h200"
    mesh: shard.Mesh = field(default_factory=shard.Mesh)  # ranks along each axis
    devices: int = 0  # look for the fastest plan on so many; 0: the plan is given
    batch: int = 0  # samples of an update for --devices; 0: one for each device
    size: example.Sizes = example.Sizes(tokens=8192)  # of a micro-batch on a rank
    accumulate: int = 1  # micro-batches of an update
    remat: Literal["nothing", "attention", "dots"] | None = None  # what layers keep for the backward pass; None: all
    schedule: Literal["gpipe", "1f1b", "zero-bubble"] = "1f1b"  # of the pipeline
    virtual: int = 1  # stages on a rank
    dtype: Literal["fp32", "bf16"] = "bf16"  # of the computation; parameters are kept in float32
    eager: bool = False  # operations run one by one, as with --backend eager
    train: str = "."  # rule over parameter names: what is trained
    svg: Path | None = None  # draw it there


def model(a: Args) -> Model:
    """What is trained."""
    family, c = models.family(Path(a.model)) if Path(a.model).is_dir() else models.get(a.model)
    micro = lambda n: example.abstract(a.model, family, c, replace(a.size, batch=n))
    compute = torch.bfloat16 if a.dtype == "bf16" else None
    return Model(a.model, example.loss(family, c), family.params(c), micro, a.train, compute, a.eager)


def report(f: Forecast) -> str:
    """A forecast in words."""
    lines = [f"{f.plan}: {f.plan.batch} samples an update on {f.plan.mesh.world} devices", "",
             "memory of a device    " + ", ".join(f"{n} {b / 2**30:.2f}" for n, b in f.memory.items()) + " GiB",
             f"FLOPs of a device     {f.flops / 1e12:.1f} TFLOP an update"]
    for axes, kinds in f.sent.items():
        lines += [f"sent along {axes:11}{kind:16}{v['bytes'] / 1e9:10.3f} GB in {v['calls']:.0f} calls"
                  for kind, v in kinds.items()]
    parts = ", ".join(f"{n} {s:.3f}" for n, s in f.seconds.items())
    lines += [f"time of an update     {parts} = {f.total:.3f} s",
              f"samples a second      {f.plan.batch / f.total:.3f}", f"MFU                   {100 * f.mfu:.1f} %", ""]
    return "\n".join(lines)


def main(a: Args) -> int:
    m, what = machines.get(a.machine), model(a)
    if a.devices:
        f = search.fastest(what, a.devices, a.batch or a.devices, m)
    else:
        f = forecast(what, Plan(a.mesh, a.size.batch, a.accumulate, a.remat, a.schedule, a.virtual), m)
    print(report(f))
    print(picture.text(what, f, m.memory))
    if a.svg:
        a.svg.write_text(picture.svg(what, f, m.memory))
    if (short := f.memory["peak"] - m.memory) > 0:
        raise ValueError(f"this plan does not fit: {short / 2**30:.2f} GiB more than {a.machine} has; "
                         f"--devices {a.mesh.world} looks for one that does")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args)))
    except (ValueError, FileNotFoundError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(3)
