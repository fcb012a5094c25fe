"""Images and videos: read within limits, resized and cut into patches as Qwen2-VL's processors do.

Images equal transformers' PIL-based processor to the bit. Nothing is fetched: a path is a file below the media root.
"""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

PIXELS = 64_000_000  # of an image, before it is decoded
FRAMES = 100_000  # of a video


class BadMedia(ValueError):
    """A picture or video that cannot be used, and why."""


@dataclass(frozen=True)
class Patches:
    """How a picture becomes patches; min and max are pixels after resizing."""

    patch: int = 14
    merge: int = 2
    frames: int = 2
    least: int = 56 * 56
    most: int = 28 * 28 * 1280
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    scale: float = 1 / 255


def inside(root: Path, name: str) -> Path:
    """The file of a name below a root; a name that leads out of it, by .. or a link or as an absolute path, is
    BadMedia."""
    if "\0" in name or "://" in name:
        raise BadMedia(f"{name!r} is no path of a file; media are read from disk only")
    root = Path(root).resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise BadMedia(f"{name} leads out of the media root {root}")
    if not path.is_file():
        raise BadMedia(f"{path} is missing")
    return path


def image(source: Path | bytes | Image.Image) -> Image.Image:
    """An image in RGB, turned as its EXIF says. BadMedia names the file and what is wrong."""
    if isinstance(source, Image.Image):
        return rgb(source)
    name = source if isinstance(source, (str, Path)) else f"an image of {len(source)} bytes"
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as x:
            if x.width * x.height > PIXELS:
                raise BadMedia(f"{name} has {x.width} x {x.height} pixels; the limit is {PIXELS / 1e6:g} million")
            return rgb(ImageOps.exif_transpose(x))
    except UnidentifiedImageError:
        raise BadMedia(f"{name} is no image: it starts with {_head(source)!r}") from None
    except Image.DecompressionBombError as e:
        raise BadMedia(f"{name} is too large: {e}") from None
    except (OSError, SyntaxError, ValueError) as e:
        raise e if isinstance(e, BadMedia) else BadMedia(f"{name} cannot be decoded: {e}") from None


def rgb(x: Image.Image) -> Image.Image:
    """In RGB; what is transparent lies on white."""
    if "A" in x.getbands() or x.info.get("transparency") is not None:
        x = Image.alpha_composite(Image.new("RGBA", x.size, "white"), x.convert("RGBA"))
    return x.convert("RGB")


def _head(source: Path | bytes) -> bytes:
    return source[:16] if isinstance(source, bytes) else Path(source).read_bytes()[:16]


def size(height: int, width: int, s: Patches) -> tuple[int, int]:
    """The size that an image is resized to: whole tokens, within the limits, about the same shape."""
    if max(height, width) > 200 * min(height, width):
        raise BadMedia(f"an image of {width} x {height} pixels is too long; the limit is 200 to 1")
    unit = s.patch * s.merge
    h, w = round(height / unit) * unit, round(width / unit) * unit
    if h * w > s.most:
        shrink = math.sqrt(height * width / s.most)
        return max(unit, math.floor(height / shrink / unit) * unit), max(unit, math.floor(width / shrink / unit) * unit)
    if h * w < s.least:
        grow = math.sqrt(s.least / (height * width))
        return math.ceil(height * grow / unit) * unit, math.ceil(width * grow / unit) * unit
    return h, w


def patches(source: Image.Image, s: Patches) -> tuple[Tensor, list[int]]:
    """Patches [N, C * frames * patch^2] in float32, merged neighbours together, and their grid (1, rows, columns)."""
    h, w = size(source.height, source.width, s)
    x = np.asarray(source.resize((w, h), Image.Resampling.BICUBIC))
    x = (x.astype(np.float64) * s.scale).astype(np.float32)
    x = (x - np.array(s.mean, np.float32)) / np.array(s.std, np.float32)
    x = torch.from_numpy(x).permute(2, 0, 1)
    return cut(x.expand(s.frames, *x.shape), s), [1, h // s.patch, w // s.patch]


def cut(x: Tensor, s: Patches) -> Tensor:
    """Frames [T, C, Y, X] -> [N, C * frames * patch^2] in the order (time, token row, token column, patch in token)."""
    t, c, h, w = x.shape
    m, p = s.merge, s.patch
    x = x.reshape(t // s.frames, s.frames, c, h // m // p, m, p, w // m // p, m, p)
    return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, c * s.frames * p * p).contiguous()


def video(source: Path | bytes, *, fps: float = 2.0, least: int = 4, most: int = 768, frames: int = 2,
          start: float = 0.0) -> tuple[Tensor, float]:
    """Frames uint8 [T, C, Y, X], as many as fps asks for, evenly spaced, and how many a second they are.

    least and most bound their number, which is a multiple of `frames`; start is in seconds.
    """
    name = source if isinstance(source, (str, Path)) else f"a video of {len(source)} bytes"
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as box:
            stream = _stream(box, name)
            rate = float(stream.average_rate or 24)
            total = stream.frames or sum(1 for _ in box.decode(video=0))
            if not 0 < total <= FRAMES:
                raise BadMedia(f"{name} has {total} frames; there must be 1 to {FRAMES}")
            box.seek(0)
            first = min(round(start * rate), total - 1)
            wanted = sample(total - first, rate, fps=fps, least=least, most=most, frames=frames)
            keep = set((wanted + first).tolist())
            found = {i: f.to_ndarray(format="rgb24") for i, f in enumerate(box.decode(video=0)) if i in keep}
    except (av.error.FFmpegError, OSError, IndexError) as e:
        raise BadMedia(f"{name} cannot be decoded: {e}") from None
    if len(found) < len(keep):
        raise BadMedia(f"{name} ends early: {len(found)} of {len(keep)} frames are there")
    x = torch.from_numpy(np.stack([found[i + first] for i in wanted.tolist()])).permute(0, 3, 1, 2)
    return x, len(wanted) / (total - first) * rate


def _stream(box: Any, name: Any) -> Any:
    """The first video stream of an open file."""
    if not box.streams.video:
        raise BadMedia(f"{name} has no video stream")
    stream = box.streams.video[0]
    if stream.codec_context is None:
        raise BadMedia(f"{name} is a video in a codec that is not known here")
    if stream.width * stream.height > PIXELS:
        raise BadMedia(f"{name} has frames of {stream.width} x {stream.height} pixels")
    return stream


def header(source: Path | bytes, *, video: bool) -> tuple[int, int, int]:
    """Frames (1 of a picture), rows and columns, without decoding; frames are what the container says or its length
    times its rate."""
    name = source if isinstance(source, (str, Path)) else f"a medium of {len(source)} bytes"
    opened = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    try:
        if not video:
            with Image.open(opened) as x:
                turned = x.getexif().get(0x0112, 1) >= 5  # on its side
                return (1, x.width, x.height) if turned else (1, x.height, x.width)
        return film(source)[:3]
    except (OSError, SyntaxError) as e:
        raise BadMedia(f"{name} cannot be read: {e}") from None


def film(source: Path | bytes) -> tuple[int, int, int, float]:
    """Frames, rows, columns and frames a second of a video, without decoding."""
    name = source if isinstance(source, (str, Path)) else f"a medium of {len(source)} bytes"
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as box:
            s = _stream(box, name)
            length = float(s.duration * s.time_base) if s.duration else (box.duration or 0) / 1e6
            rate = float(s.average_rate or 24)
            return max(s.frames or round(length * rate), 2), s.height, s.width, rate
    except (av.error.FFmpegError, OSError) as e:
        raise BadMedia(f"{name} cannot be read: {e}") from None


def _timeline(box: Any, name: Any) -> Iterator[tuple[float, Any]]:
    """(seconds since the first frame, frame) of the frames of an open video."""
    stream, first = _stream(box, name), None
    for i, f in enumerate(box.decode(video=0)):
        now = i / float(stream.average_rate or 24) if f.time is None else f.time
        first = now if first is None else first
        yield now - first, f


def frames(source: Path | bytes, count: int, fps: float, start: float = 0.0) -> Tensor:
    """`count` frames uint8 [T, C, Y, X], 1/fps seconds apart from `start` (seconds) on, each the nearest by its own
    timestamp, so that a variable frame rate keeps its pace. A video that ends before that is BadMedia."""
    name = source if isinstance(source, (str, Path)) else f"a video of {len(source)} bytes"
    out: list[np.ndarray] = []
    latest: tuple[float, Any] | None = None
    wanted = lambda: len(out) < count
    step = lambda: start + len(out) / fps
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as box:
            for now, f in _timeline(box, name):
                while latest and wanted() and step() <= (latest[0] + now) / 2:
                    out.append(latest[1].to_ndarray(format="rgb24"))
                latest = now, f
                if not wanted():
                    break
            if latest is None:
                raise BadMedia(f"{name} has no frames")
            rate = float(box.streams.video[0].average_rate or fps)
            while wanted() and step() <= latest[0] + 0.5 / min(rate, fps) + 1e-6:
                out.append(latest[1].to_ndarray(format="rgb24"))
    except (av.error.FFmpegError, OSError, IndexError) as e:
        raise BadMedia(f"{name} cannot be decoded: {e}") from None
    if wanted():
        raise BadMedia(f"{name} ends after {latest[0] + 1 / rate:.2f} s; {count} frames at {fps:g} a second from "
                       f"{start:g} s on need {start + count / fps:.2f} s")
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2)


def sample(total: int, rate: float, *, fps: float, least: int, most: int, frames: int) -> Tensor:
    """Which of total frames (at rate a second) to take for fps a second, int32."""
    most = math.floor(min(most, total) / frames) * frames
    n = math.floor(min(max(total / rate * fps, least), most, total) / frames) * frames
    return torch.arange(0, total, total / max(n, 1)).int()[: max(n, 1)]


def clip(x: Tensor, s: Patches) -> tuple[Tensor, list[int]]:
    """Frames uint8 [T, C, Y, X] -> patches [N, ...] in float32 and their grid (T / frames, rows, columns)."""
    h, w = size(x.shape[2], x.shape[3], s)
    x = interpolate(x, (h, w), mode="bicubic", antialias=True, align_corners=False)
    mean, std = (torch.tensor(v)[:, None, None] * (1.0 / s.scale) for v in (s.mean, s.std))
    x = (x.float() - mean) / std
    if pad := -len(x) % s.frames:
        x = torch.cat([x, x[-1:].expand(pad, *x.shape[1:])])
    return cut(x, s), [len(x) // s.frames, h // s.patch, w // s.patch]


def write_video(file: Path, frames: np.ndarray, fps: int = 8, comment: str = "") -> None:
    """Frames uint8 [T, Y, X, 3] with even sides as an mp4, which may hold a comment."""
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"a video of {frames.shape[1]} x {frames.shape[2]} pixels: an mp4 needs even sides")
    with av.open(str(file), "w") as box:
        box.metadata["comment"] = comment
        stream = box.add_stream("libx264", rate=fps, options={"crf": "18"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for x in frames:
            box.mux(stream.encode(av.VideoFrame.from_ndarray(x, format="rgb24")))
        box.mux(stream.encode())
