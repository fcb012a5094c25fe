"""A run as one page: curves, time, compilation, answers with their pictures. One file, no network, phone and print.

render(folder) reads metrics.jsonl, config.json, samples.jsonl, gallery.jsonl, results.json and bad_samples.jsonl of a
run; write() puts report.html beside them.
"""

import base64
import io
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from mmfunc.metrics import read, replace

STYLE = """
:root{--ink:#1c2430;--soft:#667085;--line:#e3e7ee;--card:#fff;--page:#f5f6f9;--a:#3056d3;--good:#107c54;--bad:#c0362c}
@media(prefers-color-scheme:dark){:root{--ink:#e8ebf1;--soft:#98a2b3;--line:#2c3442;--card:#171c26;--page:#0e121a;--a:#7d9bff;
--good:#4cc38a;--bad:#ff7a70}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:auto;padding:20px 16px 60px}h1{font-size:24px;margin:8px 0 2px}h2{font-size:17px;margin:32px 0 10px}
p.sub{color:var(--soft);margin:0 0 16px}.grid{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(150px,1fr))}
.wide{grid-template-columns:repeat(auto-fit,minmax(290px,1fr))}.card{background:var(--card);border:1px solid var(--line);
border-radius:10px;padding:12px 14px;break-inside:avoid;min-width:0}.big{font-size:24px;font-weight:650;font-variant-numeric:tabular-nums}
.soft{color:var(--soft);font-size:13px}svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font-size:11px}
img{width:100%;max-height:150px;object-fit:contain;image-rendering:pixelated;background:#000;border-radius:6px}
video{width:100%;max-height:320px;background:#000;border-radius:6px}.shots td{min-width:150px}.shots img{max-height:320px;
image-rendering:auto}.ok{color:var(--good)}.no{color:var(--bad)}.bar{display:flex;height:14px;border-radius:7px;overflow:hidden;background:var(--line)}
.bar i{display:block}table{border-collapse:collapse;width:100%;font-size:13px}th{white-space:nowrap}td,th{text-align:left;padding:5px 8px;
border-bottom:1px solid var(--line);vertical-align:top;overflow-wrap:anywhere}.scroll{overflow-x:auto}
details{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 14px}summary{cursor:pointer}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:12px}@media print{body{background:#fff}.card,details{border-color:#ccc}}
"""
COLOURS = {"data_wait": "#e8a33d", "compute": "#3056d3", "checkpoint": "#8a63d2", "other": "#98a2b3"}


def thinned(points: Sequence[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    """At most so many points: means of equal stretches."""
    n = -(-len(points) // most)
    parts = [points[i : i + n] for i in range(0, len(points), n)]
    return [(p[-1][0], math.fsum(y for _, y in p) / len(p)) for p in parts]


def curve(
    title: str, points: Sequence[tuple[float, float]], marks: Sequence[tuple[float, str]] = (), log: bool = False
) -> str:
    """An SVG line chart in a card; marks are vertical lines with a colour."""
    if not points:
        return ""
    pts = thinned(points)
    f = (lambda y: math.log10(max(y, 1e-12))) if log else float
    xs, ys = [x for x, _ in pts], [f(y) for _, y in pts]
    x0, x1, y0, y1 = min(xs), max(*xs, min(xs) + 1), min(ys), max(ys)
    y1 = y1 if y1 > y0 else y0 + 1
    px, py = (lambda x: 44 + (x - x0) / (x1 - x0) * 346), (lambda y: 150 - (y - y0) / (y1 - y0) * 130)
    line = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in zip(xs, ys))
    shown = lambda y: f"{10**y if log else y:.3g}"
    ticks = "".join(
        f'<line x1="44" x2="390" y1="{py(y):.0f}" y2="{py(y):.0f}" stroke="var(--line)"/><text x="40" y="{py(y) + 4:.0f}" '
        f'text-anchor="end">{shown(y)}</text>'
        for y in (y0, (y0 + y1) / 2, y1)
    )
    lines = "".join(
        f'<line x1="{px(x):.1f}" x2="{px(x):.1f}" y1="20" y2="150" stroke="{c}" stroke-dasharray="3 3"/>'
        for x, c in marks
    )
    return (
        f'<div class="card"><b>{escape(title)}</b> <span class="soft">{points[-1][1]:.4g}{", log scale" if log else ""}</span>'
        f'<svg viewBox="0 0 400 172" role="img" aria-label="{escape(title)}">{ticks}{lines}<polyline points="{line}" fill="none" '
        f'stroke="var(--a)" stroke-width="2" stroke-linejoin="round"/><text x="44" y="167">{x0:g}</text><text x="390" y="167" '
        f'text-anchor="end">step {x1:g}</text></svg></div>'
    )


def figure(value: str, name: str) -> str:
    """A number in a card."""
    return f'<div class="card"><div class="big">{escape(value)}</div><div class="soft">{escape(name)}</div></div>'


def picture(path: str, root: Path) -> str:
    """An image of the run, or a video that plays, within the page."""
    file = root / path
    kind = {"jpg": "jpeg"}.get(file.suffix[1:].lower(), file.suffix[1:].lower())
    if not file.is_file() or file.stat().st_size > (16_000_000 if kind == "mp4" else 2_000_000):
        return f'<div class="soft">{escape(path)} is not shown</div>'
    if kind == "mp4":
        data = base64.b64encode(file.read_bytes()).decode()
        return f'<video autoplay muted loop playsinline src="data:video/mp4;base64,{data}"></video>'
    if kind not in ("png", "jpeg", "webp", "gif", "bmp"):
        return f'<div class="soft">{escape(path)}</div>'
    return f'<img alt="" src="data:image/{kind};base64,{base64.b64encode(file.read_bytes()).decode()}">'


def sample(row: dict, root: Path) -> str:
    """A question with its pictures or videos, the answer and the truth."""
    shown = [*row.get("images", []), *row.get("videos", [])]
    right = row["score"] >= 1
    truth = " / ".join(map(str, row["truth"]))
    verdict = (
        f'<span class="ok">✓ {escape(row["answer"])}</span>'
        if right
        else (
            f'<span class="no">✗ {escape(row["answer"]) or "(nothing)"}</span> <span class="soft">truth: {escape(truth)}</span>'
        )
    )
    return (f'<div class="card">{"".join(picture(i, root) for i in shown[:4])}<div class="soft">'
            f'{escape(row["question"])}</div><div>{verdict}</div></div>')


def shot(path: str, root: Path) -> str:
    """A picture of the gallery, made smaller where it is large, or a video."""
    file = root / path
    if not file.is_file() or file.suffix not in (".png", ".jpg"):
        return picture(path, root)
    with Image.open(file) as x:
        if max(x.size) <= 512:
            return picture(path, root)
        x = x.convert("RGB")
    x.thumbnail((512, 512))
    x.save(small := io.BytesIO(), "JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(small.getvalue()).decode()}">'


def gallery(rows: Sequence[dict], root: Path, most: int = 8) -> str:
    """Samples of fixed prompts and seeds: a row for each, a column a step, of which at most so many are shown."""
    rows = [r for r in rows if {"step", "prompt", "seed", "file"} <= r.keys()]
    steps = sorted({r["step"] for r in rows})
    steps = steps if len(steps) <= most else [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]
    cells: dict[tuple, dict[int, str]] = {}
    for r in rows:
        cells.setdefault((r["prompt"], r["seed"]), {})[r["step"]] = r["file"]
    head = "".join(f"<th>{f'step {s}' if s else ''}</th>" for s in steps)
    body = "".join(
        f'<tr><td>{escape(str(prompt))}<div class="soft">seed {escape(str(seed))}</div></td>'
        + "".join(f"<td>{shot(files[s], root) if s in files else ''}</td>" for s in steps) + "</tr>"
        for (prompt, seed), files in cells.items())
    return f'<div class="card scroll"><table class="shots"><tr><th></th>{head}</tr>{body}</table></div>'


def table(rows: Sequence[dict], names: Sequence[str]) -> str:
    """Rows of facts under names."""
    shown = lambda v: "" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v)
    head = "".join(f"<th>{escape(n)}</th>" for n in names)
    body = "".join("<tr>" + "".join(f"<td>{escape(shown(r.get(n)))}</td>" for n in names) + "</tr>" for r in rows)
    return f'<div class="card scroll"><table><tr>{head}</tr>{body}</table></div>'


def split(steps: Sequence[dict]) -> str:
    """Where the time went, as one bar."""
    total = math.fsum(r.get("step_ms", 0) for r in steps) or 1
    parts = {k: math.fsum(r.get(f"{k}_ms", 0) for r in steps) for k in COLOURS if k != "other"}
    parts["other"] = max(total - sum(parts.values()), 0)
    bar = "".join(f'<i style="width:{v / total:.2%};background:{COLOURS[k]}"></i>' for k, v in parts.items())
    said = " · ".join(
        f'<span style="color:{COLOURS[k]}">■</span> {k.replace("_", " ")} {v / total:.0%}' for k, v in parts.items()
    )
    return f'<div class="card"><div class="bar">{bar}</div><div class="soft">{said} of {total / 1e3:.0f} s</div></div>'


def render(folder: Path) -> str:
    """The page of a run's folder."""
    rows, _ = read(folder / "metrics.jsonl")
    steps, events = [r for r in rows if "loss" in r], [r for r in rows if "event" in r]
    samples, _ = read(folder / "samples.jsonl")
    bad, _ = read(folder / "bad_samples.jsonl")
    said = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else {}
    results = json.loads((folder / "results.json").read_text()) if (folder / "results.json").exists() else None
    marks = [(r["step"], "var(--bad)") for r in steps if r.get("skipped")] + [
        (e["step"], "#e8a33d") for e in events if e["event"] == "restart"
    ]
    body = [f"<h1>{escape(folder.resolve().name)}</h1><p class='sub'>{escape(str(said.get('command', '')))}</p>"]
    body.append(_summary(steps, results))
    body += _evaluation(folder, results)
    if samples:
        last = max(s.get("step", 0) for s in samples)
        body.append(f"<h2>Answers after step {last}</h2><div class='grid'>"
                    + "".join(sample(s, folder) for s in samples if s.get("step", 0) == last) + "</div>")
    if shots := read(folder / "gallery.jsonl")[0]:
        body.append("<h2>Samples</h2>" + gallery(shots, folder))
    if steps:
        said_of = "<p class='soft'>Red: updates that were skipped. Amber: restarts.</p>"
        body.append(f"<h2>Curves</h2>{said_of}<div class='grid wide'>{''.join(_curves(steps, samples, marks))}</div>")
        body.append("<h2>Time</h2>" + split(steps))
    if compiled := [e for e in events if e["event"] == "compile"]:
        body.append("<h2>Compiled graphs</h2>" + table(compiled, ("seconds", "cached", "signature")))
    if bad:
        body.append(f"<h2>Samples that could not be used: {len(bad)}</h2>" + table(bad[:50], ("batch", "index", "reason")))
    other = [e for e in events if e["event"] not in ("compile", "restart")]
    body.append("<h2>Events</h2>" + table(other, ("event", "step", "reason", "ids")) if other else "")
    body.append(f"<h2>Settings</h2><details><summary>flags, versions, machine</summary><pre>{escape(json.dumps(said, indent=2))}</pre></details>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    title = f"<title>{escape(folder.resolve().name)}</title>"
    return f'<!doctype html><html lang="en">{head}{title}<style>{STYLE}</style><main>{"".join(body)}</main></html>'


def _evaluation(folder: Path, results: dict | None) -> list[str]:
    """Scores by kind of question, what else was measured, and some of the answers that were wrong."""
    if not results:
        return []
    facts = [{"measured": k, "found": v} for k, v in results.items() if k not in ("overall", "kinds")]
    kinds = [{"questions": k, "asked": v["count"], "right": f"{v['score']:.1%}"} for k, v in results["kinds"].items()]
    wrong = [r for r in read(folder / "rows.jsonl")[0] if r["score"] < 1][:12]
    mistakes = f"<h2>Mistakes</h2><div class='grid'>{''.join(sample(r, folder) for r in wrong)}</div>" if wrong else ""
    return ["<h2>Evaluation</h2>" + table(kinds, ("questions", "asked", "right")), table(facts, ("measured", "found")),
            mistakes]


def _summary(steps: Sequence[dict], results: dict | None) -> str:
    cards = (
        [figure(f"{results['overall']['score']:.1%}", f"of {results['overall']['count']} held-out questions")]
        if results
        else []
    )
    if steps:
        last, some = steps[-1], sorted(r["tokens_per_s"] for r in steps)
        loss = "not finite" if last.get("loss") is None else f"{last['loss']:.4f}"
        cards += [
            figure(str(last["step"]), "updates"),
            figure(loss, "loss"),
            figure(f"{some[len(some) // 2]:,.0f}", "tokens a second"),
            figure(f"{max(r['mem']['peak_rss'] for r in steps) / 2**30:.2f} GiB", "most memory"),
            figure(f"{sum(r.get('skipped', 0) for r in steps)}", "updates skipped"),
        ]
    return f'<div class="grid">{"".join(cards)}</div>'


def _curves(steps: Sequence[dict], samples: Sequence[dict], marks: Sequence[tuple[float, str]]) -> list[str]:
    """The cards of all curves that a run has."""
    def of(name: str) -> list[tuple[float, float]]:
        return [(r["step"], r[name]) for r in steps if r.get(name) is not None]

    by_step: dict[Any, list[float]] = {}
    for s in samples:
        by_step.setdefault(s.get("step", 0), []).append(s["score"])
    right = [(k, math.fsum(v) / len(v)) for k, v in sorted(by_step.items())]
    rate = [(r["step"], r["lr"]) for r in steps if r.get("lr")]
    mem = [(r["step"], r["mem"]["rss"] / 2**30) for r in steps if "mem" in r]
    return [
        curve("loss", of("loss"), marks, log=min((y for _, y in of("loss")), default=0) > 0),
        curve("gradient norm", of("grad_norm"), marks),
        curve("learning rate", rate),
        curve("sampled answers right", right) if len(right) > 1 else "",
        curve("tokens a second", of("tokens_per_s")),
        curve("memory, GiB", mem),
    ]


def write(folder: Path) -> Path:
    """report.html of a run's folder, replaced as a whole."""
    replace(Path(folder) / "report.html", render(Path(folder)))
    return Path(folder) / "report.html"
