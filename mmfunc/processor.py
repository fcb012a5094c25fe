"""From a conversation with pictures to what a model reads: one way for training, asking and evaluation.

A folder's own files say how: tokenizer, chat template, preprocessor_config.json. Equal to transformers' Qwen2-VL
processors.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfunc import media, text

PADS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}


@dataclass(frozen=True)
class Processor:
    """A tokenizer, and how pictures and videos become patches."""

    text: text.Text
    image: media.Patches = field(default_factory=media.Patches)
    video: media.Patches = field(default_factory=lambda: media.Patches(least=128 * 28 * 28, most=28 * 28 * 768))
    fps: float = 2.0  # frames taken of a second of video
    frames: tuple[int, int] = (4, 768)  # least and most frames of a video


def load(folder: Path) -> Processor:
    """The processor of a model folder."""
    folder = Path(folder)
    said = _settings(folder, "preprocessor_config.json", "image_processor")
    moving = _settings(folder, "video_preprocessor_config.json", "video_processor") or said
    pr = Processor(text.load(folder))
    return replace(
        pr,
        image=_patches(pr.image, said),
        video=_patches(pr.video, moving),
        fps=moving.get("fps") or pr.fps,
        frames=(moving.get("min_frames", pr.frames[0]), moving.get("max_frames", pr.frames[1])),
    )


def _settings(folder: Path, own: str, part: str) -> dict:
    both = folder / "processor_config.json"
    said = json.loads(both.read_text()).get(part, {}) if both.exists() else {}
    return said or (json.loads((folder / own).read_text()) if (folder / own).exists() else {})


def _patches(s: media.Patches, said: dict) -> media.Patches:
    area = said.get("size") or {}
    if said.get("do_resize", True) is False or said.get("do_normalize", True) is False:
        raise ValueError("preprocessor_config.json turns resizing or normalising off, which is not supported")
    given = {
        "patch": said.get("patch_size"),
        "merge": said.get("merge_size"),
        "frames": said.get("temporal_patch_size"),
        "least": said.get("min_pixels") or area.get("shortest_edge"),
        "mean": said.get("image_mean"),
        "most": said.get("max_pixels") or area.get("longest_edge"),
        "std": said.get("image_std"),
        "scale": said.get("rescale_factor"),
    }
    return replace(s, **{k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None})


def write(folder: Path, s: media.Patches) -> None:
    """preprocessor_config.json for a model trained from scratch."""
    said = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "patch_size": s.patch,
        "merge_size": s.merge,
        "temporal_patch_size": s.frames,
        "min_pixels": s.least,
        "max_pixels": s.most,
        "size": {"shortest_edge": s.least, "longest_edge": s.most},
        "image_mean": list(s.mean),
        "image_std": list(s.std),
        "rescale_factor": s.scale,
    }
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(said, indent=2) + "\n")


def listed(messages: Sequence[dict]) -> list[dict]:
    """Messages with content as lists of parts: <image> and <video> in strings become parts."""
    def parts(content: Any) -> list[dict]:
        if not isinstance(content, str):
            return content
        found = [p for p in re.split(r"(<image>|<video>)", content) if p]
        return [{"type": p[1:-1]} if p in ("<image>", "<video>") else {"type": "text", "text": p} for p in found]

    return [m if m["role"] == "assistant" and isinstance(m["content"], str) else m | {"content": parts(m["content"])}
            for m in messages]


def encode(pr: Processor, messages: Sequence[dict], images: Sequence[Any] = (), videos: Sequence[Any] = (), *,
           generate: bool = False) -> dict[str, Any]:
    """A sample: input_ids [S], labels [S] (the assistant's words), pixel_values [P, ...], image_grid_thw [n, 3], and
    so on.

    images: files, bytes or PIL images, as many as the messages have places; videos: files or bytes. generate opens the
    assistant's next turn. A mismatch or unreadable media is a ValueError.
    """
    messages = _placed(messages, images, videos)
    seen = [media.patches(media.image(i), pr.image) for i in images]
    moving = [media.video(v, fps=pr.fps, least=pr.frames[0], most=pr.frames[1], frames=pr.video.frames) for v in videos]
    played = [media.clip(x, pr.video) for x, _ in moving]
    ids, labels = _words(pr, messages, [g for _, g in seen], [g for _, g in played], generate)
    sample: dict[str, Any] = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
    sample |= _pixels("pixel_values", "image_grid_thw", seen) | _pixels("pixel_values_videos", "video_grid_thw", played)
    if moving:
        sample["second_per_grid_ts"] = torch.tensor([pr.video.frames / fps for _, fps in moving])
    return sample


def measure(pr: Processor, messages: Sequence[dict], images: Sequence[Any] = (), videos: Sequence[Any] = ()
            ) -> tuple[int, int]:
    """(tokens, patches) of the sample that encode makes, from the headers of its media."""
    messages = _placed(messages, images, videos)

    def grid(frames: int, height: int, width: int, s: media.Patches) -> list[int]:
        return [frames, *(n // s.patch for n in media.size(height, width, s))]

    seen, played = [grid(*media.header(x, video=False), pr.image) for x in images], []
    for total, height, width, rate in map(media.film, videos):
        taken = media.sample(total, rate, fps=pr.fps, least=pr.frames[0], most=pr.frames[1], frames=pr.video.frames)
        played.append(grid(-(-len(taken) // pr.video.frames), height, width, pr.video))
    return len(_words(pr, messages, seen, played)[0]), sum(prod(g) for g in seen + played)


def _placed(messages: Sequence[dict], images: Sequence[Any], videos: Sequence[Any]) -> list[dict]:
    """Messages with as many places as there are media, or a ValueError."""
    messages = listed(messages)
    kinds = [p.get("type") for m in messages if not isinstance(m["content"], str) for p in m["content"]]
    for kind, given in (("image", images), ("video", videos)):
        if kinds.count(kind) != len(given):
            raise ValueError(f"the messages have {kinds.count(kind)} places for an {kind}, {len(given)} are given")
    return messages


def _words(pr: Processor, messages: list[dict], seen: list[list[int]], played: list[list[int]], generate: bool = False
           ) -> tuple[list[int], list[int]]:
    """(token ids, labels) of messages with pictures and videos of such grids."""
    parts = [(text.render(pr.text, messages, generate=True), False)] if generate else text.pieces(pr.text, messages)
    for kind, grids, s in (("image", seen, pr.image), ("video", played, pr.video)):
        counts = iter([prod(g) // s.merge**2 for g in grids])
        fill = lambda m, counts=counts: m[0] * next(counts)
        parts = [(re.sub(re.escape(PADS[kind]), fill, p), said) for p, said in parts]
    return text.encode(pr.text, [(p.replace(text.OPEN, "").replace(text.CLOSE, ""), said) for p, said in parts])


def _pixels(values: str, grid: str, found: list[tuple[Tensor, list[int]]]) -> dict[str, Tensor]:
    return {values: torch.cat([x for x, _ in found]), grid: torch.tensor([g for _, g in found])} if found else {}
