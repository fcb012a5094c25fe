"""docs/benchmarks.md and its pictures, from a file of results.

    python benchmarks/page.py benchmarks/results/<file>.json
"""

import json
import sys
from html import escape
from pathlib import Path
from typing import Any

import workloads

COLORS = {"eager": "#8a8f98", "compiled": "#4f7cac", "openvino": "#c08a3e", "int8": "#5a9a68"}


def bars(title: str, rows: list[tuple[str, float, str]], unit: str, line: float | None = None) -> str:
    """An SVG of horizontal bars (name, value, colour); line: where the value is to be at the least."""
    top, width, high = max(v for _, v, _ in rows) * 1.1, 520, 22 * len(rows) + 40
    x = lambda v: 150 + v / top * (width - 210)
    body = "".join(
        f'<text x="144" y="{44 + 22 * i}" text-anchor="end">{escape(name)}</text><rect x="150" y="{32 + 22 * i}" '
        f'height="15" width="{x(v) - 150:.1f}" fill="{color}"/><text x="{x(v) + 4:.1f}" y="{44 + 22 * i}">'
        f"{v:g}{unit}</text>" for i, (name, v, color) in enumerate(rows))
    at = 0.0 if line is None else x(line)
    mark = f'<path d="M{at:.1f} 26V{high - 6}" stroke="#b33" stroke-dasharray="4 3"/>' if at else ""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {high}" font-family="sans-serif" '
            f'font-size="12"><rect width="100%" height="100%" fill="#fff"/><text x="8" y="16" font-weight="bold">'
            f"{escape(title)}</text>{mark}{body}</svg>\n")


def table(head: list[str], rows: list[list[Any]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, r))} |" for r in (head, ["---"] * len(head), *rows)) + "\n"


def seconds(r: dict[str, float]) -> str:
    return f"{r['median_s']:.3g} ({r['min_s']:.3g} to {r['max_s']:.3g})"


def scaled(said: dict[str, Any]) -> str:
    """What scaling.py found, of the parts that were measured."""
    out = []
    if packed := said.get("packed"):
        for what, key in (("loss and gradients", ""), ("the whole step, with its optimizer", "step_")):
            each = ", ".join(f"{n}: {t} us a token" for n, t in zip(packed["tokens"], packed[f"{key}us_per_token"]))
            out.append(f"- Packed rows of 512-token segments, {what}: {each};\n  last over first "
                       f"{packed[f'{key}last_over_first']}.")
    if depth := said.get("depth"):
        layers = ", ".join(f"{r['layers']}: {r['compile_cpu_s']}" for r in depth["rows"])
        out.append(f"- Compile CPU seconds in block mode by layers: {layers}; {depth['ratio']} over all.")
    if loader := said.get("loader"):
        share = f"{100 * loader['wait_share']:.2g} %"
        out.append(f"- One loader process, tar shards of 336 x 336 jpegs: {loader['samples_per_s']} samples/s. Asked\n"
                   f"  for {loader['asked_per_s']} (10 x W1's rate) it is waited for {share} of the time.")
    if ranks := said.get("ranks"):
        out.append(f"- Weak scaling, one thread a rank: {ranks['seconds'][0]} s on one, {ranks['seconds'][1]} s on "
                   f"{ranks['ranks'][1]}.")
    return "\n".join(["## Scaling\n", *out, ""]) if out else ""


def attended(rows: list[dict[str, Any]]) -> str:
    """What attention.py found."""
    head = ["shape", "pass", "PyTorch", "ours", "ratio", "causal", "packed"]
    found = table(head, [[r["shape"], *list(r.values())[1:]] for r in rows])
    return "## Attention on CPU\n\nGFLOP a core-second; causal order and 16 packed segments as shares of the time of " \
           f"full attention.\n\n{found}\n" if rows else ""


def accelerated(found: dict[str, Any]) -> str:
    """What gpu.py found, by workload."""
    if not found:
        return ""
    rows = []
    for name, w in found.items():
        for side, r in [*w["sides"].items(), *([("mmfunc alone", w["alone"])] if "alone" in w else [])]:
            rows.append([name, w["what"], f"{r['layers']} of {w['of']}", side, seconds(r), w["ratios"].get(side, ""),
                         f"{r['tflop_per_s']:.0f}", f"{100 * r['mfu']:.1f} %" if "mfu" in r else "",
                         f"{r['peak'] / 2**30:.1f}", f"{r['all_s']:.3g}" if "all_s" in r else ""])
    head = ["", "what", "layers", "side", "seconds", "over ours", "TFLOP/s", "MFU", "peak GiB",
            "all layers, s (extrapolated)"]
    names = ", ".join(sorted({w["device"] for w in found.values()}))
    unknown = "" if any("mfu" in r for w in found.values() for r in w["sides"].values()) else \
        " The peak of this device is not known: no MFU."
    return f"""## On a GPU

{names}: bf16 training steps of blocks of full width, as many layers as fit for all sides, and for ours alone. Sides
take turns as processes that hold the device one after the other; their float32 losses were equal to 1e-4 before.
Ours recomputes what is no product (`remat="dots"`), keeps float32 moments and is deterministic; peers keep all
activations and bfloat16 moments. MFU counts the FLOPs of the forward and backward pass, none twice, of pairs that see
each other, against the dense bf16 peak of `mmfunc.machines`.{unknown}

{table(head, rows)}
"""


def compared(works: dict[str, Any]) -> str:
    """The table of all sides."""
    head = ["", "what", "side", "seconds", "over ours", "compile, CPU s", "temporary MiB", "peak RSS GiB"]
    return table(head, [
        [n, (workloads.WORKS[n].__doc__ or "").strip(), p, seconds(r), "" if p == "mmfunc" else w["ratios"][p],
         f"{r['compile_cpu_s']:.0f}" if n == "W1" else "",
         f"{r['temporary'] / 2**20:.0f}" if "temporary" in r else "", f"{r['peak_rss'] / 2**30:.1f}"]
        for n, w in works.items() for p, r in w["peers"].items()])


def write(said: dict[str, Any], folder: Path, more: list[str]) -> None:
    """The page and its pictures in a folder, of what was measured; more: the parts of scaling.py that were not."""
    folder.mkdir(exist_ok=True)
    works, can, m = said["workloads"], said["limits"], said["machine"]
    ratios = [(f"{n} / {p}", r, COLORS[p]) for n, w in works.items() for p, r in w["ratios"].items()]
    (folder / "ratios.svg").write_text(bars("time of a peer over ours", ratios, "x", 1))
    parts = [(n, w["fkr"], "#5a8f5a") for n, w in works.items() if "fkr" in w]
    (folder / "roofline.svg").write_text(bars("best possible time of this machine over ours", parts, "", 1))
    ours = [[n, w.get("gflop", ""), w.get("gflop_per_core_s", ""), w.get("fkr", w.get("read_share", "")),
             w.get("memory", ""), w.get("memory_with_state", "")] for n, w in works.items()]
    first, rate = works["W1"]["peers"]["mmfunc"], {k: f"{v / 1e9:.0f}" for k, v in can.items()}
    reads = f", {works['W5']['read_gb_s']} GB/s" if "read_gb_s" in works.get("W5", {}) else ""
    versions = ", ".join(f"{k} {v}" for k, v in said["versions"].items())
    waits = "; ".join(sorted({*said.get("waits", {}).values()})) or "not known"
    shares = ["", "GFLOP", "GFLOP a core-second", "fraction of roofline", "temporary memory / eager", "with the state"]
    text = f"""# Benchmarks

{said["date"]}: {m["cpu"]}, {m["cores"]} cores, {m["threads"]} threads; {versions}.
This page shows [the results](../benchmarks/results) of `benchmarks/suite.py`, {said["minutes"]} minutes of bf16 runs.
OpenMP's threads while they wait: {waits}.
Not measured: {", ".join([n for n in workloads.WORKS if n not in works] + more) or "nothing"}.

Each side of a workload is a process of its own, with the same weights and batches; they take turns,
and their float32 losses or outputs were equal to 1e-4 before (of int8: to 0.1). A time is the median (lowest to highest).

![ratios](ratios.svg)

{compared(works)}
## Fraction of the machine's own roofline

This machine does {rate["gemm"]} GFLOP/s in matrix products, {rate["conv"]} in convolutions, {rate["attention"]} in
attention (there and back), each by the faster of our way and PyTorch's, and reads {can["read"] / 1e9:.1f} GB/s. The
best possible time of a graph is its FLOPs at these rates, each argument read once, and what a training step renews
(parameters and moments) copied at {can["copy"] / 1e9:.1f} GB/s; all else is taken as free. For
W5 the figure is the share of the bandwidth of reading that was measured in turn with it{reads}. Done in float32 for want of instructions: {m.get("float32", "-")}.

![roofline](roofline.svg)

{table(shares, ours)}
A second process with a warm compile cache takes its first W1 step after {first["warm_first_s"]:.1f} s, of
{first["warm_compile_cpu_s"]:.1f} CPU seconds more than a later one.

{accelerated(said.get("gpu", {}))}{attended(said.get("attention", []))}{scaled(said)}"""
    (folder / "benchmarks.md").write_text(text)


if __name__ == "__main__":
    import scaling

    results = json.loads(Path(sys.argv[1]).read_text())
    write(results, Path(__file__).parent.parent / "docs", [n for n in scaling.PARTS if n not in results])
