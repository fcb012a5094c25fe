"""Pictures and videos between files and tensors in -1..1; what is written says inside how it was made."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from mmfunc import media

SAID = "mmfunc"  # the text chunk of a PNG; in an mp4 it is the comment
LONGEST = 180  # bytes of a prompt in a file's name


def resized(image: Image.Image, height: int, width: int) -> Tensor:
    """An image as pixels [3, height, width] in -1..1, resized as diffusers does it (Lanczos, its shape not kept)."""
    x = media.rgb(image).resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(x).astype(np.float32) / 255.0).permute(2, 0, 1) * 2 - 1


def picture(file: Path, height: int, width: int) -> Tensor:
    """An image file as pixels [3, height, width]."""
    return resized(media.image(file), height, width)


def clip(file: Path, frames: int, height: int, width: int, fps: float) -> Tensor:
    """The beginning of a video file at a frame rate, as pixels [3, frames, height, width]."""
    x = media.frames(file, frames, fps).permute(0, 2, 3, 1).numpy()
    return torch.stack([resized(Image.fromarray(f), height, width) for f in x], 1)


def bytes_of(pixels: Tensor) -> np.ndarray:
    """Pixels [3, (T,) Y, X] in -1..1 as uint8 [(T,) Y, X, 3]; one channel is grey."""
    x = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return x.expand(3, *x.shape[1:]).movedim(0, -1).cpu().numpy()


def save(stem: Path, pixels: Tensor, said: dict, fps: int = 16) -> Path:
    """Write pixels [3, Y, X] as stem.png, [3, T, Y, X] as stem.mp4 (even sides only), with what is said of them."""
    x, text = bytes_of(pixels), json.dumps(said)
    file = stem.with_name(stem.name + (".png" if pixels.ndim == 3 else ".mp4"))
    file.parent.mkdir(parents=True, exist_ok=True)
    if pixels.ndim == 3:
        info = PngInfo()
        info.add_text(SAID, text)
        Image.fromarray(x).save(file, pnginfo=info)
    else:
        media.write_video(file, x, fps, text)
    return file


def said(file: Path) -> dict:
    """What a file that save wrote says of itself."""
    if Path(file).suffix == ".mp4":
        with av.open(str(file)) as box:
            text = box.metadata.get("comment")
    else:
        with Image.open(file) as x:
            text = x.info.get(SAID)
    if not text:
        raise ValueError(f"{file} does not say how it was made")
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise ValueError(f"{file} has a comment that is not of mmfunc: {text[:60]!r}") from None


def names(prompts: Sequence[str]) -> list[str]:
    """File names without suffix as VBench reads them, "{prompt}-{index}": the n-th of one prompt has the index n."""
    found: dict[str, int] = {}
    out = []
    for prompt in prompts:
        name = re.sub(r"[/\0\r\n]", "_", prompt).encode()[:LONGEST].decode(errors="ignore") or "_"
        out.append(f"{name}-{found.get(name, 0)}")
        found[name] = found.get(name, 0) + 1
    return out
