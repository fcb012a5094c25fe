"""Write the demo's pictures and clips of handwritten digits with captions, and small pipelines to train on them.

    python programs/drawings.py --out runs/demo

Pictures: the training scans, turned and shifted, 8 x 8, "a handwritten seven". Clips: a scan that moves through 16 x 16
pixels in 9 frames, "a seven moving left". Pixels stand for latents. OUT/flux and OUT/wan are pipelines whose text
encoders are small, random and stay as they are; their transformers are to be trained from scratch.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from digits import save, scans, vary
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from mmfunc import bundle, media, prompts, random
from mmfunc.models import clip, flux, t5, wan
from mmfunc.recipes import Part

NAMES = "zero one two three four five six seven eight nine".split()
WAYS = "left right up down".split()
FRAMES = 9


@dataclass(frozen=True)
class Args:
    out: Path  # where drawings/, clips/, flux/ and wan/ go
    pictures: int = 12_000
    clips: int = 4_000
    seed: int = 0  # of turns, shifts and ways


def offsets(way: Tensor, frames: int = FRAMES, room: int = 8) -> Tensor:
    """Top and left of a scan that crosses the room in one of WAYS. [N] -> [N, frames, 2]."""
    along = torch.linspace(0, room, frames).round().long().expand(len(way), frames)
    still = torch.full_like(along, room // 2)
    left, right, up, down = (way == i for i in range(4))
    x = torch.where(left[:, None], room - along, torch.where(right[:, None], along, still))
    y = torch.where(up[:, None], room - along, torch.where(down[:, None], along, still))
    return torch.stack([y, x], -1)


def moving(x: Tensor, way: Tensor, side: int = 16) -> Tensor:
    """Scans [N, 8, 8] moving through pictures [N, T, side, side]."""
    at = offsets(way)
    out = torch.zeros(len(x), at.shape[1], side, side)
    n, t = torch.arange(len(x))[:, None], torch.arange(at.shape[1])
    rows, cols = (at[..., i, None] + torch.arange(8) for i in (0, 1))
    out[n[..., None, None], t[None, :, None, None], rows[..., None], cols[..., None, :]] = x[:, None]
    return out


def words(special: tuple[str, ...], end: str) -> Tokenizer:
    """A tokenizer of the captions' words that ends each prompt."""
    known = [*special, "a", "handwritten", "moving", *NAMES, *WAYS]
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token=special[0]))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, known.index(end))])
    return t


def pipelines(out: Path, key: Tensor) -> None:
    """Small pipelines with random weights: FLUX for pictures, Wan for clips, each with its text encoders."""
    known = words(("<pad>", "</s>"), "</s>")
    said = prompts.Prompts(known, 0)
    encoder = partial(t5.Config, width=64, hidden=128, heads=4, k=16, layers=1, vocab=known.get_vocab_size())
    glance = clip.Config(width=64, hidden=128, heads=4, layers=1, project=0, vocab=known.get_vocab_size(), tokens=8,
                         eos=1)
    image = flux.Config(width=96, heads=4, layers=2, single=2, channels=1, text=64, pooled=64, guidance=False,
                        axes=(4, 10, 10))
    video = wan.Config(width=96, hidden=288, heads=4, layers=4, channels=1, text=64, time=64, patch=(3, 4, 4))
    bundle.export(out / "flux", bundle.scratch(
        "FluxPipeline", Part(flux, image), None, [(Part(clip, glance), said), (Part(t5, encoder("t5")), said)],
        scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}, key=key, limits=(8, 8)))
    bundle.export(out / "wan", bundle.scratch(
        "WanPipeline", Part(wan, video), None, [(Part(t5, encoder("umt5")), said)], key=key, limits=(8,)))


def main(a: Args) -> None:
    pipelines(a.out, random.key(a.seed))
    g = torch.Generator().manual_seed(a.seed)
    x, y, _, _ = scans()
    one = torch.randint(len(x), (a.pictures,), generator=g)
    files = save(vary(x[one], 8, g, 0.5, 0.0), a.out / "drawings" / "train", "drawing")
    rows = [{"file_name": f, "text": f"a handwritten {NAMES[d]}"} for f, d in zip(files, y[one].tolist())]
    (a.out / "drawings" / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    one, way = torch.randint(len(x), (a.clips,), generator=g), torch.randint(4, (a.clips,), generator=g)
    shown = moving(vary(x[one], 8, g, 0.5, 0.0).clamp(0, 1), way)
    folder, rows = a.out / "clips", []
    (folder / "train").mkdir(parents=True, exist_ok=True)
    for i, (film, d, w) in enumerate(zip(shown, y[one].tolist(), way.tolist())):
        frames = (film * 255).round().byte()[..., None].expand(-1, -1, -1, 3)
        media.write_video(folder / "train" / f"{i:05d}.mp4", np.ascontiguousarray(frames.numpy()), 8)
        rows.append({"file_name": f"train/{i:05d}.mp4", "text": f"a {NAMES[d]} moving {WAYS[w]}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (a.out / "drawings.txt").write_text("".join(f"a handwritten {n}\n" for n in NAMES))
    (a.out / "clips.txt").write_text("".join(f"a {n} moving {WAYS[i % 4]}\n" for i, n in enumerate(NAMES[:8])))
    print(f"{a.out}/drawings: {a.pictures} pictures, {folder}: {a.clips} clips, {a.out}/flux and {a.out}/wan")


if __name__ == "__main__":
    main(tyro.cli(Args))
