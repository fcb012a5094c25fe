"""Write scikit-learn's 1,797 scanned digits as pictures with questions and answers.

    python programs/digits.py --out runs/demo

Single digits ("which digit is this?") and pages of two ("left", "right", "sum"), as messages jsonl beside png files.
Training pictures are shifted, turned and noisy copies of the training scans; held-out scans appear nowhere in training
and are written as they are. A small tokenizer and a small Qwen2.5-VL config, without weights, go to OUT/model.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

from mmfunc import media, processor, text
from mmfunc.models import qwen2, qwen2vl

QUESTIONS = {
    "single": "which digit is this ?",
    "left": "which digit is left ?",
    "right": "which digit is right ?",
    "sum": "what is the sum ?",
}


@dataclass(frozen=True)
class Args:
    out: Path  # where data/ and model/ go
    singles: int = 12_000  # training pictures of one digit
    pages: int = 14_000  # training pictures of two digits, each with three questions
    side: int = 32  # pixels of a digit's side
    seed: int = 0  # of shifts, turns, noise and pairs


def scans() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training scans [N, 8, 8] in 0..1 and digits [N], then the 360 held-out ones."""
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train, held = train_test_split(np.arange(len(y)), test_size=360, stratify=y, random_state=0)
    return x[train], y[train], x[held], y[held]


def vary(x: Tensor, side: int, g: torch.Generator, much: float = 1.0, noise: float = 0.05) -> Tensor:
    """Turned, scaled, sheared, shifted and noisy copies. [N, 8, 8] -> [N, side, side]."""
    n = len(x)
    spread = lambda size, *shape: (torch.rand(n, *shape, generator=g) * 2 - 1) * size * much
    turn, scale, shear, shift = spread(0.21), 1 + spread(0.12, 2), spread(0.1), spread(0.25, 2)
    rows = [torch.stack([turn.cos() * scale[:, 0], -turn.sin() * scale[:, 0] + shear, shift[:, 0]], -1),
            torch.stack([turn.sin() * scale[:, 1], turn.cos() * scale[:, 1], shift[:, 1]], -1)]
    grid = affine_grid(torch.stack(rows, 1), [n, 1, side, side], align_corners=False)
    y = grid_sample(x[:, None], grid, align_corners=False)[:, 0]
    return y + noise * torch.randn(y.shape, generator=g)


def enlarge(x: Tensor, side: int) -> Tensor:
    """[N, 8, 8] -> [N, side, side]."""
    return interpolate(x[:, None], size=(side, side), mode="bilinear", align_corners=False)[:, 0]


def save(pictures: Tensor, folder: Path, prefix: str) -> list[str]:
    """Write [N, H, W] in 0..1 as png files; their names relative to the parent of folder."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{folder.name}/{prefix}{i:05d}.png" for i in range(len(pictures))]
    for name, p in zip(names, (pictures.clamp(0, 1) * 255).round().byte().numpy()):
        Image.fromarray(p).convert("RGB").save(folder.parent / name, compress_level=1)
    return names


def record(image: str, kind: str, answer: int) -> dict:
    """One question about one picture."""
    turns = [{"role": "user", "content": f"<image>{QUESTIONS[kind]}"}, {"role": "assistant", "content": str(answer)}]
    return {"id": f"{image}:{kind}", "kind": kind, "messages": turns, "images": [image]}


def page_records(names: list[str], left: Tensor, right: Tensor) -> list[dict]:
    """The three questions about each page."""
    return [record(name, kind, answer) for name, i, j in zip(names, left.tolist(), right.tolist())
            for kind, answer in (("left", i), ("right", j), ("sum", i + j))]


def train_records(a: Args, x: Tensor, y: Tensor, g: torch.Generator, out: Path) -> list[dict]:
    """Varied copies of training scans, by themselves and as pages."""
    one = torch.randint(len(x), (a.singles,), generator=g)
    names = save(vary(x[one], a.side, g), out / "train", "single")
    left, right = torch.randint(len(x), (2, a.pages), generator=g)
    pages = torch.cat([vary(x[left], a.side, g), vary(x[right], a.side, g)], 2)
    return ([record(n, "single", int(d)) for n, d in zip(names, y[one])]
            + page_records(save(pages, out / "train", "page"), y[left], y[right]))


def heldout_records(a: Args, x: Tensor, y: Tensor, g: torch.Generator, out: Path) -> list[dict]:
    """Each held-out scan once by itself, and once on the left and once on the right of a page."""
    whole = enlarge(x, a.side)
    rows = [record(n, "single", int(d)) for n, d in zip(save(whole, out / "heldout", "single"), y)]
    left, right = torch.randperm(len(x), generator=g), torch.randperm(len(x), generator=g)
    names = save(torch.cat([whole[left], whole[right]], 2), out / "heldout", "page")
    return rows + page_records(names, y[left], y[right])


def model(a: Args, folder: Path) -> None:
    """Config, tokenizer and processor settings of a Qwen2.5-VL of 0.4 million parameters; no weights."""
    text.write_words(folder, list(QUESTIONS.values()))
    token = text.load(folder).tokenizer.token_to_id
    patches = media.Patches(patch=a.side // 4, least=(a.side // 2) ** 2, most=(a.side * 2) ** 2)
    processor.write(folder, patches)
    decoder = qwen2.Config(
        width=64, hidden=160, heads=4, kv_heads=2, layers=2, vocab=64, theta=1e4, tied=True, tokens=512, init=0.5
    )
    c = qwen2vl.Config(decoder, width=64, hidden=128, heads=4, layers=3, patch=patches.patch, window=a.side, full=(2,),
                       sections=(2, 3, 3), image_token=token("<|image_pad|>"), video_token=token("<|video_pad|>"),
                       start_token=token("<|vision_start|>"), end_token=token("<|vision_end|>"))
    end = {"eos_token_id": token("<|im_end|>"), "bos_token_id": None, "pad_token_id": token("<|endoftext|>")}
    said = qwen2vl.hub(c)
    said["text_config"] |= end
    (folder / "config.json").write_text(json.dumps(said | end, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(end | {"do_sample": False}, indent=2) + "\n")


def main(a: Args) -> None:
    model(a, a.out / "model")
    g = torch.Generator().manual_seed(a.seed)
    x, y, x_held, y_held = scans()
    out = a.out / "data"
    parts = {"train": train_records(a, x, y, g, out), "heldout": heldout_records(a, x_held, y_held, g, out)}
    for name, rows in parts.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        print(f"{out / name}.jsonl: {len(rows)} records")


if __name__ == "__main__":
    main(tyro.cli(Args))
