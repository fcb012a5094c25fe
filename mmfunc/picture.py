"""How a model lies on a mesh, and what a plan holds, as text for a terminal and as SVG."""

from html import escape

from mmfunc import tree
from mmfunc.parts import local
from mmfunc.plan import Forecast, Model
from mmfunc.shard import layout
from mmfunc.shard.mesh import AXES, Mesh, abstract

WHAT = {"data": "samples", "fsdp": "samples; parameters, gradients, optimizer", "tp": "heads, hidden, vocabulary",
        "ring": "sequences", "ulysses": "sequences, heads in attention", "pp": "layers", "ep": "samples; experts"}
COLORS = {"parameters": "#4878a8", "optimizer": "#7aa6c2", "gradients": "#c2a15a", "activations": "#a85a5a",
          "batch": "#808080", "working": "#c0c0c0"}


def rows(model: Model, mesh: Mesh) -> list[tuple[str, str, str, str]]:
    """(parameter, its whole shape, the axes that divide each dimension where it is stored, a rank's shape); of layers
    of a list one of each kind."""
    net, seen, out = abstract(mesh), set(), []
    for name, p in tree.flatten(model.declared).items():
        short = ".".join("*" if part.isdigit() else part for part in name.split("."))
        if (short, p.shape) in seen or len(p.shape) < 2:
            continue
        seen.add((short, p.shape))
        s = layout.spec(p, net)
        dims = [f"{n} / {'·'.join(axes)}" if axes else n for n, axes in zip(s.names, s.store.dims)]
        whole, own = (" x ".join(map(str, shape)) for shape in (p.shape, local(s, s.store, net)))
        out.append((short, whole, ", ".join(dims), own))
    return out


def held(f: Forecast) -> dict[str, int]:
    """Bytes by what they hold, up to the peak."""
    parts = {n: f.memory[n] for n in ("parameters", "optimizer", "batch", "activations")}
    rest = f.memory["peak"] - sum(parts.values())
    grads = min(f.memory["gradients"], rest)
    return parts | {"gradients": grads, "working": rest - grads}


def text(model: Model, f: Forecast, memory: float, width: int = 60) -> str:
    """The mesh as nested boxes, the layouts as a table, memory as bars."""
    axes = [a for a in AXES if getattr(f.plan.mesh, a) > 1]
    lines = []
    for i, a in enumerate(axes):
        lines.append("│ " * i + f"┌ {a} {getattr(f.plan.mesh, a)}: divides {WHAT[a]}")
    lines.append("│ " * len(axes) + "one device")
    lines += ["│ " * i + "└" + "─" * 20 for i in reversed(range(len(axes)))]
    table = [("parameter", "whole", "dimensions / axes", "a rank's"), *rows(model, f.plan.mesh)]
    wide = [max(len(r[i]) for r in table) for i in range(4)]
    lines += ["", *("  ".join(c.ljust(w) for c, w in zip(r, wide)).rstrip() for r in table), ""]
    for name, size in held(f).items():
        lines.append(f"{name:12}{size / 2**30:9.2f} GiB  {'█' * round(width * size / memory)}")
    lines.append(f"{'peak':12}{f.memory['peak'] / 2**30:9.2f} GiB of {memory / 2**30:.0f}")
    return "\n".join(lines)


def svg(model: Model, f: Forecast, memory: float) -> str:
    """The same as a drawing."""
    axes, out = [a for a in AXES if getattr(f.plan.mesh, a) > 1], []
    label = lambda x, y, s, size=13: out.append(f'<text x="{x}" y="{y}" font-size="{size}">{escape(s)}</text>')
    box = lambda x, y, w, h, fill="none": out.append(
        f'<rect x="{x:.1f}" y="{y}" width="{w:.1f}" height="{h}" fill="{fill}" stroke="#404040"/>')
    label(20, 26, f"{model.name} on {f.plan.mesh}", 16)
    deep = 40 + 26 * len(axes)
    for i, a in enumerate(axes):
        box(20 + 14 * i, 40 + 22 * i, 860 - 28 * i, 2 * deep - 36 * i)
        label(26 + 14 * i, 56 + 22 * i, f"{a} {getattr(f.plan.mesh, a)}: {WHAT[a]}")
    label(26 + 14 * len(axes), 60 + 22 * len(axes), "one device")
    y, x = 70 + 2 * deep, 20.0
    for name, size in held(f).items():
        w = 860 * size / max(memory, f.memory["peak"])
        box(x, y, w, 24, COLORS[name])
        x += w
    box(20, y, 860 * memory / max(memory, f.memory["peak"]), 24)
    for i, (name, size) in enumerate(held(f).items()):
        box(20 + 145 * i, y + 34, 10, 10, COLORS[name])
        label(34 + 145 * i, y + 43, f"{name} {size / 2**30:.1f} GiB", 11)
    table = rows(model, f.plan.mesh)
    for i, row in enumerate(table):
        for x, cell in zip((20, 300, 460, 720), row):
            label(x, y + 74 + 18 * i, cell, 12)
    height = y + 90 + 18 * len(table)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="900" height="{height}" font-family="sans-serif">\n'
            '<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(out) + "\n</svg>\n")
