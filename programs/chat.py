"""Ask a model folder about images or a video.

    python programs/chat.py --model runs/sft/export --image page.png --question "what is the sum ?"

Without a question, and on a terminal, it asks for them line by line and remembers the conversation.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro

from mmfunc import answer, generate, random


@dataclass(frozen=True)
class Args:
    model: Path  # a hub folder
    question: str | None = None
    image: tuple[Path, ...] = ()  # one or several
    video: Path | None = None
    adapter: Path | None = None  # a PEFT folder
    new: int = 256  # tokens of an answer at most
    temperature: float = 0.0  # 0: always the most likely token
    top_k: int = 0
    top_p: float = 1.0
    repetition: float = 1.0  # penalty of what was said before
    seed: int = 0
    dtype: Literal["fp32", "bf16"] = "fp32"
    int8: bool = False  # weights of the decoder: half of bf16's bytes, which bound the time of a token
    backend: Literal["eager", "inductor", "npu"] = "eager"
    device: str = "cpu"  # or cuda, npu


def main(a: Args) -> None:
    dtype = torch.bfloat16 if a.dtype == "bf16" else torch.float32
    m = answer.load(a.model, adapter=a.adapter, dtype=dtype, backend=a.backend, device=a.device, int8=a.int8)
    how = generate.Sampling(a.temperature, a.top_k, a.top_p, a.repetition)
    videos = [a.video] if a.video else []
    if a.question is None and not sys.stdin.isatty():
        raise ValueError("give a --question, or run on a terminal")
    messages: list[dict] = []
    while (said := a.question or input("> ")).strip():
        places = "" if messages else "<image>" * len(a.image) + "<video>" * len(videos)
        messages.append({"role": "user", "content": places + said})
        tell, key = partial(stream, m, []), random.key(a.seed, a.device)
        reply = answer.ask(m, [(messages, a.image, videos)], new=a.new, how=how, key=key, tell=tell)[0]
        print("\r" + reply, flush=True)
        messages.append({"role": "assistant", "content": reply})
        if a.question:
            return


def stream(m: answer.Model, told: list[int], tokens: list[int]) -> None:
    """Show what has been said so far, on a terminal."""
    told += tokens
    if sys.stdout.isatty():
        print("\r" + answer.text.decode(m.processor.text, told).splitlines()[-1], end="", flush=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (ValueError, FileNotFoundError) as e:
        sys.exit(f"error: {e}")
