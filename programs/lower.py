"""What torchair makes of a model for Ascend NPUs: on any Linux machine, without NPU and CANN.

    python programs/lower.py qwen2:tiny
    python programs/lower.py wan:t2v-1.3b --what forward --layers 2 --out runs/lowered
    python programs/lower.py qwen2:2.5-7b --mode block --mesh.fsdp 8 --mesh.tp 8   # one rank's part, Hcom operations
    python programs/lower.py qwen2:tiny --mesh.pp 2 --mesh.tp 2 --stage 1          # one stage of a pipeline

Prints operations lowered and failed (with the line of the family), GE operations with FLOPs, bytes and a roofline time
on a 910B. Nothing of the model is allocated. The first run builds the environment .venv-ascend, in a minute.
"""
# ruff: noqa: E402  the environment is entered before torch is imported

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".venv-ascend"


def enter() -> None:
    """Go on in the environment with torch_npu and the stand-ins for CANN's libraries, which is built if need be."""
    python, stubs = HOME / "bin" / "python", str(HOME / "stubs")
    if Path(sys.prefix) == HOME and stubs in os.environ.get("LD_LIBRARY_PATH", ""):
        return
    subprocess.run(["make", "-s", "-C", str(ROOT), ".venv-ascend/ready"], check=True)
    where = ":".join(filter(None, (stubs, os.environ.get("LD_LIBRARY_PATH"))))
    more = {"LD_LIBRARY_PATH": where, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    os.execve(python, [str(python), *sys.argv], os.environ | more)


if __name__ == "__main__":
    enter()

import torch
import tyro
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mmfunc import example, jit, models, parts, relay, shard, stages, tree
from mmfunc.kernels import npu
from mmfunc.kernels.ge import cost, lowering

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Args:
    model: tyro.conf.Positional[str]  # family:preset
    what: Literal["train", "forward"] = "train"  # loss and gradients, or the loss alone
    dtype: Literal["fp32", "bf16"] = "bf16"  # of parameters
    size: example.Sizes = example.Sizes()  # of a rank's batch
    mode: jit.Mode = "whole"
    kernels: npu.Own = "torch_npu"  # "mmfunc": ours in Ascend C where they fit
    mesh: shard.Mesh = field(default_factory=shard.Mesh)  # ranks along each axis; they need not exist
    stages: relay.Plan = field(default_factory=relay.Plan)  # of layers along --mesh.pp
    stage: int = 0  # of those: the one that is lowered, for one micro-batch
    layers: int = 0  # of each stack at most; 0: all
    out: Path | None = None  # folder for the graphs, as text and as protobuf


def shallow(c: Any, layers: int) -> Any:
    """A Config with at most so many layers in each stack."""
    if not layers:
        return c
    less = {f.name: min(getattr(c, f.name), layers) for f in fields(c) if f.name in ("layers", "single")}
    return replace(c, **less, **({"text": shallow(c.text, layers)} if hasattr(getattr(c, "text", 0), "layers") else {}))


def program(family: Any, c: Any, a: Args) -> Callable:
    """(parameters, batch) -> what is lowered."""
    loss = example.loss(family, c)
    if a.mesh.pp > 1:
        return partial(pass_stage, a, lambda p, b: shard.share(loss(p, shard.counted(b))))

    def forward(p: tree.Tree, batch: tree.Tree) -> Tensor:
        return shard.share(loss(shard.ready(p), batch))

    def train(p: tree.Tree, batch: tree.Tree) -> tuple[Tensor, dict[str, Tensor]]:
        value, grads = jit.value_and_grad(forward)(p, shard.counted(batch))
        return shard.total(value), shard.sync(tree.flatten(grads))

    return jit.jit(train if a.what == "train" else forward, a.mode, "npu")


def pass_stage(a: Args, loss: Callable, params: tree.Tree, batch: tree.Tree) -> None:
    """One micro-batch through one stage of a pipeline, forth and (for training) back."""
    params = shard.ready(params)
    pipe = relay.pipeline(loss, params, {}, batch, a.mesh.pp, a.stages, backend="npu")
    if not 0 <= a.stage < len(pipe.place):
        raise ValueError(f"--stage {a.stage}: the stages are 0 to {len(pipe.place) - 1}")
    stage = pipe.stage(a.stage, batch)
    given = stages.given(params, batch)
    env = {(1, n): stage.come.tensors[n] for n in stage.come.live}
    for kind in stage.pieces if a.what == "train" else ["forward"]:
        stage.run(kind, env, given)
        env |= {(3, n): stage.go.tensors[n] for n in stage.go.back}


def lower(a: Args) -> tuple[lowering.Record, cost.Cost]:
    """The graphs of a model and what they cost; nothing is allocated."""
    family, c = models.get(a.model)
    c, total = shallow(c, a.layers), cost.Cost()
    relay.check(a.mesh.pp, a.stages, a.mode)
    batch = example.abstract(a.model, family, c, a.size)

    known: dict[str, tuple] = {}

    def run(graph: Any, inputs: list[Tensor]) -> list[Tensor]:
        if graph.name not in known:
            known[graph.name] = cost.cost(graph, inputs, record)
        found, results = known[graph.name]
        total.add(found)
        return [torch.empty(t.shape, dtype=t.dtype, device="npu:0") for t in results]

    declared, put = family.params(c), lambda shape, dtype: torch.empty(shape, dtype=dtype, device="npu:0")
    with lowering.rank(a.mesh) if a.mesh.world > 1 else nullcontext() as net, shard.use(net, declared), \
            npu.using(a.kernels), lowering.offline(run) as record, FakeTensorMode(allow_non_fake_inputs=True), \
            nullcontext() if a.mode == "whole" else lowering.Singly(record, partial(jit.jit, backend="npu")):
        specs = shard.using().layers[""].specs if net else {}
        shape = lambda n, p: parts.local(specs[n], specs[n].store, net) if net else p.shape
        flat = {n: put(shape(n, p), DTYPES[a.dtype]) for n, p in tree.flatten(declared).items()}
        params = tree.unflatten(flat, declared)
        program(family, c, a)(params, tree.map(lambda t: put(t.shape, t.dtype), batch))
    return record, total


def report(record: lowering.Record, total: cost.Cost) -> str:
    """What is printed."""
    rows = [f"{'GE operation':28}{'count':>7}{'GFLOP':>12}{'MB':>12}{'ms':>10}"]
    for kind, n in sorted(total.count.items(), key=lambda kn: -total.seconds[kn[0]]):
        own = "  ours" if kind in cost.OURS else ""
        rows.append(f"{kind:28}{n:7}{total.flops[kind] / 1e9:12.2f}{total.bytes[kind] / 1e6:12.1f}"
                    f"{total.seconds[kind] * 1e3:10.3f}{own}")
    sums = [sum(part.values()) for part in (total.count, total.flops, total.bytes, total.seconds)]
    rows.append(f"{'all':28}{sums[0]:7}{sums[1] / 1e9:12.2f}{sums[2] / 1e6:12.1f}{sums[3] * 1e3:10.3f}  by roofline "
                "on a 910B2, each operation by itself")
    if total.undeclared:
        rows.append(f"dtypes that torchair's table lacks, to look up in CANN's: {', '.join(sorted(total.undeclared))}")
    done, lost = sum(record.converted.values()), sum(map(len, record.failed.values()))
    single = f", {record.single} of them one operation outside of what is compiled" if record.single else ""
    rows.append(f"{len(record.graphs)} graphs{single}; {done} operations of FX lowered, {lost} failed")
    for op, places in record.failed.items():
        for (where, why), n in Counter(places).items():
            rows.append(f"  failed: {op} x{n} at {where}: {why}")
    return "\n".join(rows)


def main(a: Args) -> None:
    record, total = lower(a)
    print(report(record, total))
    if a.out:
        a.out.mkdir(parents=True, exist_ok=True)
        for i, (graph, text) in enumerate(zip(record.graphs, record.texts())):
            (a.out / f"graph_{i}.pbtxt").write_text(text)
            (a.out / f"graph_{i}.pb").write_bytes(graph.SerializeToString())
        print(f"{len(record.graphs)} graphs written to {a.out}")
    sys.exit(1 if record.failed else 0)


if __name__ == "__main__":
    main(tyro.cli(Args))
