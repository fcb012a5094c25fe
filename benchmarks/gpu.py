"""Training steps of blocks of full width on one GPU, ours and peers: the workloads G1 to G3 of make bench.

    python benchmarks/gpu.py G1                 # all sides of a workload, on CUDA; prints what was found
    python benchmarks/gpu.py G1 mmfunc 4 cuda   # one side of so many layers: the process that the line above starts
    python benchmarks/gpu.py tiny-G1 eager 1 cpu    # the same code at tiny sizes, on CPU

Each side is a process that ends before the next one starts, as three models do not fit beside each other; two rounds
of these take turns. First each runs one and two layers: float32 losses of the first must be equal to 1e-4, and the
peaks of memory say how many layers fit. All sides run as many as fit for each of them; ours also as many as fit for it.

G3 is the decoder of Qwen2.5-VL-7B on one packed row, each segment with an image behind a frozen tower of full depth.
The peer gets positions that start anew and no mask: of these transformers makes a block-diagonal mask for SDPA. It
does so for text positions apart, in front of the three of Qwen2.5-VL, and without a cache only, which it would make by
default: segments would see each other. (With flash-attn it could do without the mask.)
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import workloads
from workloads import draw, packed, row

from mmfunc import jit, tree
from mmfunc.grad import value_and_grad
from mmfunc.machines import MACHINES
from mmfunc.models import flux, qwen2vl, wan

SIDES = "mmfunc", "eager", "compiled"
SHARE = 0.85  # of the free memory is planned for: the rest is for fragments and the libraries' own
HALF = torch.bfloat16


class Spec(NamedTuple):
    """A workload."""

    what: str
    family: Any
    c: Any  # Config of the whole model
    size: tuple[int, ...]  # of the latents, in time, rows and columns; G3: segments, tokens of each, patches of a side
    text: int = 512  # tokens beside the latents
    backend: str = "inductor"  # of ours

    @property
    def rule(self) -> str:
        """Which parameters are trained."""
        return "^(?!vision)" if self.family is qwen2vl else "."

    @property
    def layers(self) -> int:
        """Of the whole model, as cut() counts them."""
        return self.c.text.layers if self.family is qwen2vl else self.c.layers


SPECS = {
    "G1": Spec("Wan2.1-14B, 480p: 32,760 tokens, 512 of text", wan, wan.PRESETS["t2v-14b"], (21, 60, 104)),
    "G2": Spec("FLUX.1-dev, 1024 x 1024: 4,096 tokens, 512 of text; a layer: one of two streams, two of one", flux,
               flux.PRESETS["dev"], (128, 128)),
    "G3": Spec("Qwen2.5-VL-7B, packed: 16 segments of 512 tokens, each with a 336 x 336 image (tower frozen)", qwen2vl,
               qwen2vl.PRESETS["2.5-7b"], (16, 512, 24)),
    "tiny-G1": Spec("tiny Wan", wan, replace(wan.PRESETS["tiny"], layers=3), (2, 4, 6), 8),
    "tiny-G2": Spec("tiny FLUX", flux, replace(flux.PRESETS["tiny"], layers=3, single=6), (8, 8), 8),
    "tiny-G3": Spec("tiny Qwen2.5-VL", qwen2vl, qwen2vl.PRESETS["tiny"], (3, 16, 4)),
}


def here() -> tuple[str, ...]:
    """The workloads that this machine can run."""
    return tuple(n for n in SPECS if n.startswith("G")) if torch.cuda.is_available() else ()


def cut(s: Spec, n: int) -> Any:
    """The Config with n layers; of FLUX, layers of one stream in proportion."""
    if s.family is qwen2vl:
        return replace(s.c, text=replace(s.c.text, layers=n))
    return replace(s.c, layers=n, **({"single": n * s.c.single // s.c.layers} if s.family is flux else {}))


# ---- batches, on the host, in float32

def row_of_segments(c: qwen2vl.Config, segments: int, tokens: int, side: int) -> tuple[dict, dict, dict]:
    """Segments with an image of side x side patches each, in one row: for ours, for the peer; and as rows of a batch,
    on which the model has the same work."""
    g, count = torch.Generator().manual_seed(0), (side // c.merge) ** 2
    ids = torch.randint(0, c.start_token, (segments, tokens), generator=g)
    ids[:, 1], ids[:, 2 : 2 + count] = c.start_token, c.image_token
    place = torch.arange(tokens).expand(segments, -1)
    pixels = torch.randn(segments * side**2, c.channels * c.frames * c.patch**2, generator=g)
    rows = {"input_ids": ids, "labels": torch.where(place < 2 + count, -100, ids), "pixel_values": pixels,
            "image_grid_thw": torch.tensor([[1, side, side]] * segments)}
    one = rows | {n: rows[n].view(1, -1) for n in ("input_ids", "labels")}
    number = torch.arange(1, segments + 1).repeat_interleave(tokens)[None]
    at = qwen2vl.positions(c, one | {"attention_mask": number}, "5.23")
    mine = qwen2vl.prepare(c, one | {"attention_mask": number, "position_ids": at})
    return mine, one | {"position_ids": torch.cat([place.reshape(1, 1, -1), at])}, qwen2vl.prepare(c, rows, rule="5.23")


def batches(s: Spec) -> tuple[dict, dict, dict]:
    """Of a step of ours, of the peer's, and one of the same work whose FLOPs a graph tells."""
    if s.family is qwen2vl:
        return row_of_segments(s.c, *s.size)
    x = 1, s.c.channels, *s.size
    batch = {"latents": draw(*x), "noise": draw(*x, seed=1), "t": torch.tensor([0.5]),
             "encoder_hidden_states": draw(1, s.text, s.c.text, seed=2)}
    if s.family is flux:
        batch |= {"guidance": torch.ones(1), "pooled_projections": draw(1, s.c.pooled, seed=3)}
    return batch, batch, batch


def halved(batch: dict) -> dict:
    """Numbers in bfloat16, but for those of a sample, such as its noise level."""
    return tree.map(lambda t: t.to(HALF) if t.is_floating_point() and t.ndim > 1 else t, batch)


def flops(s: Spec, layers: int) -> float:
    """FLOPs of the loss and its gradients, by the graph of one layer and of two on abstract tensors: nothing is
    recomputed; attention is of pairs that see each other; its scores, which the backward kernel makes again, count
    once."""
    return line((1, traced(s, 1)), (2, traced(s, 2)), layers)


@cache
def traced(s: Spec, n: int) -> float:
    """flops() by the graph of n layers; of the backward kernel's five products one makes the scores again."""
    batch, c = tree.map(lambda t: t.to("meta"), halved(batches(s)[2])), cut(s, n)
    live, frozen = tree.split(tree.abstract(s.family.params(c), HALF), s.rule)
    grad = lambda p, frozen, b: value_and_grad(lambda q: s.family.loss(tree.merge(q, frozen), c, b))(p)
    by_op = jit.jit(grad).lower(live, frozen, batch).cost()["flops_by_op"].items()
    return sum(f * (0.8 if "attention" in op and "backward" in op else 1) for op, f in by_op)


# ---- one side, in a process of its own

def run(s: Spec, ref: Any, b: dict) -> torch.Tensor:
    """A peer's loss."""
    if s.family is qwen2vl:
        return ref(**b, use_cache=False).loss
    peer, layout = (workloads.flux_peer, packed) if s.family is flux else (workloads.wan_peer, lambda x: x)
    return workloads.error(peer, layout, ref, b)


def build(s: Spec, who: str, layers: int, device: str) -> workloads.Work:
    """A side's step; of one layer also its float32 loss."""
    c, library = cut(s, layers), "transformers" if s.family is qwen2vl else "diffusers"
    ours, batch = who == "mmfunc", tree.put(batches(s)[who != "mmfunc"], device)
    ref, exact = workloads.made(library, s.family, c, device), None
    loss = lambda p, b: s.family.loss(p, c, b)
    if layers == 1:
        with torch.no_grad():
            exact = loss(workloads.loaded(s.family, c, ref), batch) if ours else run(s, ref, batch)
    ref, half = ref.to(HALF), halved(batch)
    if ours:
        params = workloads.loaded(s.family, c, ref)
        del ref  # before there are moments
        return workloads.trained(exact, loss, *tree.split(params, s.rule), half, "block",
                                 s.backend)._replace(device=device)
    if s.family is qwen2vl:
        ref.model.visual.requires_grad_(False)
    model = torch.compile(ref) if who == "compiled" else ref
    return workloads.theirs(exact, ref, lambda: run(s, model, half))._replace(device=device)


def side(s: Spec, who: str, layers: int, device: str, runs: int) -> dict[str, Any]:
    """Seconds of steps of one side, and bytes: free at first, most of a step, what stays, and that with gradients."""
    if who not in SIDES or layers < 1:
        raise ValueError(f"there is no side {who!r} of {layers} layers; sides are {', '.join(SIDES)}, of 1 or more")
    free = room(device)
    torch.backends.cudnn.allow_tf32 = False  # of convolutions in float32: the losses would not be equal
    work = build(s, who, layers, device)
    if device == "cuda":
        torch.cuda.empty_cache()  # what the float32 model had
    start = time.perf_counter()
    work.call()
    workloads.settle(device)
    first = time.perf_counter() - start
    work.call()  # at the second call a compiler may have done more
    before = torch.cuda.memory_allocated() if device == "cuda" else work.kept
    peak = before + workloads.temporary(work.call, device)
    live = tree.split(s.family.params(cut(s, layers)), s.rule)[0]
    return {"times": [workloads.seconds(work) for _ in range(runs)], "first_s": first, "free": free, "peak": peak,
            "kept": work.kept, "state": work.kept + HALF.itemsize * tree.size(live), "device": named(device),
            "check": None if work.check is None else work.check.item()}


def room(device: str) -> int:
    """Bytes that are free."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def named(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "host"


# ---- all sides

def started(name: str, who: str, layers: int, device: str, runs: int) -> dict[str, Any]:
    """side() in a process of its own, which holds the device's memory until it ends."""
    command = [sys.executable, __file__, name, who, str(layers), device, str(runs)]
    # deterministic products ask for this before cuBLAS starts; the peers get the same
    env = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} | os.environ
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"{name}, {who}, {layers} layers:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def line(a: tuple[int, float], b: tuple[int, float], n: int) -> float:
    """What a straight line through two points (layers, value) has at n layers."""
    return a[1] + (b[1] - a[1]) / (b[0] - a[0]) * (n - a[0])


def fit(one: dict, two: dict, most: int) -> int:
    """How many layers fit, by what steps of one and of two layers held: at the peak, or, which grows faster where
    layers keep little, as parameters, gradients and moments at once."""
    need = lambda n: max(line((1, one[k]), (2, two[k]), n) for k in ("peak", "state"))
    fits = [n for n in range(1, most + 1) if need(n) <= SHARE * one["free"]]
    if not fits:
        raise RuntimeError(f"one layer needs {need(1) / 2**30:.1f} GiB; {SHARE * one['free'] / 2**30:.1f} are planned")
    return fits[-1]


def peak(device: str) -> float | None:
    """Dense bf16 FLOP/s of a device, by its name; None where mmfunc.machines does not know it."""
    words = re.split(r"[\s-]", device.lower())
    other = {"pcie", "nvl"} & {*words} and "a100" not in words  # slower chips of the same name
    return None if other else next((m.peak for n, m in MACHINES.items() if n in words), None)


def told(s: Spec, layers: int, found: list[dict], one: dict) -> dict[str, Any]:
    """A side's results: medians and spread of seconds, the most bytes, the rate, MFU where the peak is known, and the
    extrapolation of the time to all layers."""
    out = row([t for f in found for t in f["times"]]) | {"layers": layers, "first_s": found[0]["first_s"],
                                                         "peak": max(f["peak"] for f in found)}
    rate, top = flops(s, layers) / out["median_s"], peak(one["device"])
    out |= {"tflop_per_s": rate / 1e12} | ({"mfu": round(rate / top, 4)} if top else {})
    if 1 < layers < s.layers:
        at = (1, row(one["times"])["median_s"]), (layers, out["median_s"])
        out["all_s"] = line(*at, s.layers)
        print(f"all {s.layers} layers: {out['all_s']:.3g} s, extrapolated from 1 and {layers}", flush=True)
    return out


def workload(name: str, device: str = "cuda", *, runs: int = 5, rounds: int = 2, sides: tuple[str, ...] = SIDES,
             start: Callable = started) -> dict[str, Any]:
    """Times of all sides in turn, of as many layers as fit for all, and of ours at as many as fit for it."""
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"{name} needs a GPU that this PyTorch can use")
    s, ask = SPECS[name], partial(start, name)
    probes = {w: [ask(w, n, device, 3) for n in (1, 2)] for w in sides}
    exact = {w: p[0]["check"] for w, p in probes.items()}
    if apart := {w: x for w, x in exact.items() if not abs(x - exact["mmfunc"]) <= 1e-4 * abs(exact["mmfunc"])}:
        raise RuntimeError(f"{name}: the float32 losses of {apart} differ from ours, {exact['mmfunc']}")
    fits = {w: fit(*p, s.layers) for w, p in probes.items()}
    n, found = min(fits.values()), {w: [] for w in sides}
    print(f"{name}: of {s.layers} layers fit {fits}", flush=True)
    for _ in range(rounds):
        for w in sides:
            found[w].append(ask(w, n, device, runs))
    rows = {w: told(s, n, f, probes[w][0]) for w, f in found.items()}
    ours = rows["mmfunc"]["median_s"]
    out = {"what": s.what, "device": found["mmfunc"][0]["device"], "of": s.layers, "fits": fits, "sides": rows,
           "ratios": {w: round(r["median_s"] / ours, 3) for w, r in rows.items() if w != "mmfunc"}}
    if (more := fits["mmfunc"]) > n:
        out["alone"] = told(s, more, [ask("mmfunc", more, device, runs)], probes["mmfunc"][0])
    return out


if __name__ == "__main__":
    if len(sys.argv) > 2:
        said = side(SPECS[sys.argv[1]], sys.argv[2], int(sys.argv[3]), sys.argv[4], int([*sys.argv, "3"][5]))
    else:
        said = workload(sys.argv[1])
    print(json.dumps(said))
