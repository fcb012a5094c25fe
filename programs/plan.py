"""What a training step needs and takes on devices that need not be there: memory, transfers, time, MFU.

    python programs/plan.py --model wan:t2v-14b --machine h200 --mesh.fsdp 64 --remat attention
    python programs/plan.py --model qwen2vl:2.5-72b --machine 910b-376t --devices 512 --batch 512 --pixels 1008

With --devices it looks for the fastest plan that fits. Nothing runs and no weight is allocated.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from mmfunc import machines, models, picture, search, shard, tree
from mmfunc.plan import Forecast, Model, Plan, forecast

FAMILIES = "flux", "qwen2", "qwen2vl", "wan"
CAPTION = 512  # tokens


@dataclass(frozen=True)
class Args:
    model: str  # family:preset, or a hub folder, of which config.json is read
    machine: str = "h200"
    mesh: shard.Mesh = field(default_factory=shard.Mesh)  # ranks along each axis
    devices: int = 0  # look for the fastest plan on so many; 0: the plan is given
    batch: int = 0  # samples of an update for --devices; 0: one for each device
    micro: int = 1  # samples of a micro-batch on a rank
    accumulate: int = 1  # micro-batches of an update
    remat: Literal["nothing", "attention", "dots"] | None = None  # what layers keep for the backward pass; None: all
    schedule: Literal["gpipe", "1f1b", "zero-bubble"] = "1f1b"  # of the pipeline
    virtual: int = 1  # stages on a rank
    dtype: Literal["fp32", "bf16"] = "bf16"  # of the computation; parameters are kept in float32
    train: str = "."  # rule over parameter names: what is trained
    tokens: int = 8192  # of a sample of text, pictures included
    pixels: int = 0  # side of one square picture in each sample of text; 0: none
    frames: int = 81  # of a video
    height: int = 480
    width: int = 832
    svg: Path | None = None  # draw it there


def batch(module: Any, c: Any, samples: int, a: Args) -> dict:
    """An abstract micro-batch of a family's loss."""
    empty = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device="meta")
    family, count = module.__name__.rpartition(".")[2], {"num_items_in_batch": empty(dtype=torch.int64)}
    if family in ("wan", "flux"):
        frames = ((a.frames - 1) // 4 + 1,) if family == "wan" else ()
        grid = *frames, a.height // 8, a.width // 8
        made = {n: empty(samples, c.channels, *grid) for n in ("latents", "noise")} | count
        made |= {"t": empty(samples), "encoder_hidden_states": empty(samples, CAPTION, c.text)}
        if family == "flux":
            made["pooled_projections"] = empty(samples, c.pooled)
            made |= {"guidance": empty(samples)} if c.guidance else {}
        elif c.image:
            made["condition"] = empty(samples, c.condition, *grid)
            made["encoder_hidden_states_image"] = empty(samples, c.places or 257, c.image)
        return made
    ids, more = torch.zeros(samples, a.tokens, dtype=torch.int64), {}
    if family == "qwen2vl" and a.pixels:
        side = a.pixels // c.patch // c.merge * c.merge
        ids[:, 1], ids[:, 2 : 2 + side**2 // c.merge**2] = c.start_token, c.image_token
        more = {"pixel_values": torch.zeros(samples * side**2, c.channels * c.frames * c.patch**2),
                "image_grid_thw": torch.tensor([[1, side, side]] * samples)}
    made = {"input_ids": ids, "labels": ids} | more
    made = module.prepare(c, made) if family == "qwen2vl" else made
    return tree.map(lambda t: empty(*t.shape, dtype=t.dtype) if isinstance(t, torch.Tensor) else t, made) | count


def model(a: Args) -> Model:
    """What is trained."""
    module, c = models.family(Path(a.model)) if Path(a.model).is_dir() else models.get(a.model)
    if (family := module.__name__.rpartition(".")[2]) not in FAMILIES:
        raise ValueError(f"how a batch of {family} looks is not known here, but of {', '.join(FAMILIES)}")
    compute = torch.bfloat16 if a.dtype == "bf16" else None
    loss, micro = lambda p, b: module.loss(p, c, b), lambda n: batch(module, c, n, a)
    return Model(a.model, loss, module.params(c), micro, a.train, compute)


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
        f = forecast(what, Plan(a.mesh, a.micro, a.accumulate, a.remat, a.schedule, a.virtual), m)
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
