"""Sample digits from the demo's small pipelines, and let a classifier that saw training scans only judge them.

    python programs/judge.py --model runs/demo/flux-run/export --out runs/demo/flux-run
    python programs/judge.py --model runs/demo/wan-run/export --out runs/demo/wan-run

Writes rows.jsonl, results.json and report.html: how many samples are what was asked for, with guidance and without; of
clips also whether they move as asked; and how far samples are from the nearest training scan, beside held-out scans.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from digits import scans
from drawings import NAMES, WAYS, offsets
from sklearn.svm import SVC
from torch import Tensor

from mmfunc import bundle, gallery, random, report, score
from mmfunc.tasks import pictures


@dataclass(frozen=True)
class Args:
    model: Path  # a pipeline of drawings or clips
    out: Path  # rows.jsonl, results.json, report.html, samples/
    count: int = 0  # samples; 0: 200 drawings or 80 clips
    guidance: float = 3.0
    steps: int = 20
    seed: int = 1


def crossing(x: Tensor) -> tuple[Tensor, Tensor]:
    """Way (of WAYS) by which the centre of mass moves from the first frame to the last, and the scan, the mean over
    frames of what lies around it. [N, T, 16, 16] in 0..1 -> [N], [N, 8, 8]."""
    mass = (x - 0.2).clamp(min=0) + 1e-6
    place = torch.arange(16.0)
    y, z = ((mass.sum(d) * place).sum(-1) / mass.sum((2, 3)) for d in (3, 2))
    dy, dx = y[:, -1] - y[:, 0], z[:, -1] - z[:, 0]
    way = torch.where(dx.abs() > dy.abs(), torch.where(dx < 0, 0, 1), torch.where(dy < 0, 2, 3))
    at = offsets(way)
    parts = [[film[t, r : r + 8, c : c + 8] for t, (r, c) in enumerate(spots.tolist())] for film, spots in zip(x, at)]
    return way, torch.stack([torch.stack(p).mean(0) for p in parts])


def near(x: Tensor, known: Tensor) -> float:
    """Median distance of scans [N, 8, 8] to the nearest of known ones."""
    return torch.cdist(x.flatten(1), known.flatten(1)).min(1).values.median().item()


def main(a: Args) -> None:
    x, y, held, truth = scans()
    judge = SVC(gamma=0.256, C=10).fit(x.flatten(1), y)
    able = judge.score(held.flatten(1), truth)
    pipe = bundle.load(a.model)
    video = pipe.kind == "WanPipeline"
    n = a.count or (80 if video else 200)
    digits, ways = torch.arange(n) % 10, torch.arange(n) // 10 % 4
    prompts = [f"a {NAMES[d]} moving {WAYS[w]}" if video else f"a handwritten {NAMES[d]}" for d, w in zip(digits, ways)]
    rows, facts = [], {"pixels": "they stand for latents; the text encoder is small, random and frozen",
                       "held-out scans that the judge reads right": f"{able:.1%}",
                       "distance to the nearest training scan: held-out scans": round(near(held, x), 3)}
    for scale in (a.guidance, 1.0):
        how = {"steps": a.steps, **({"guidance": scale} if video else {"true_guidance": scale})}
        drawn = pictures.drawn(pipe, prompts, (9, 16, 16) if video else (1, 8, 8), random.key(a.seed), **how)
        seen = (drawn[:, 0] / 2 + 0.5).clamp(0, 1)
        way, still = crossing(seen) if video else (ways, seen)
        found = torch.tensor(judge.predict(still.flatten(1)))
        name = f"guidance {scale:g}" if scale > 1 else "no guidance"
        facts[f"distance to the nearest training scan: {name}"] = round(near(still, x), 3)
        for i, prompt in enumerate(prompts):
            stem = a.out / "samples" / f"{name.replace(' ', '-')}-{i:03d}"
            file = gallery.save(stem, drawn[i], {"prompt": prompt}, 8)
            row = {"question": prompt, "videos" if video else "images": [str(file.relative_to(a.out))]}
            judged = [("digit", digits[i], found[i], NAMES), ("way", ways[i], way[i], WAYS)][: 2 if video else 1]
            rows += [row | {"id": f"{file.name}:{what}", "kind": f"{what}, {name}", "answer": known[got],
                            "truth": [known[want]], "score": float(want == got)} for what, want, got, known in judged]
    (a.out / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    results = {"model": str(a.model), "metric": "what was asked for, by a classifier of training scans", **facts,
               **score.table(rows)}
    (a.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    report.write(a.out)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Args))
