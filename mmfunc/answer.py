"""A model folder that answers questions about pictures: what chat, evaluate and a training run's samples share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfunc import data, generate, jit, lora, models, processor, quant, score, text, tree
from mmfunc.records import Record, Records
from mmfunc.tree import Tree


@dataclass(frozen=True)
class Model:
    """A family with its Config, parameters and processor, ready to answer."""

    family: Any
    config: Any
    params: Tree
    processor: processor.Processor
    call: jit.Jitted  # the decoder's step, which keeps what it compiled


def ready(family: Any, c: Any, params: Tree, pr: processor.Processor, backend: jit.Backend = "eager") -> Model:
    """A Model from its parts."""
    return Model(family, c, params, pr, generate.stepper(family.step, c, backend=backend))


def load(
    folder: Path, *, adapter: Path | None = None, dtype: torch.dtype | None = None, backend: jit.Backend = "eager",
    device: str = "cpu", int8: bool = False,
) -> Model:
    """A Model from a hub folder, with the PEFT adapter of another folder if given; int8: the decoder's weights."""
    family, c, params = models.load(folder, dtype, device)
    if adapter:
        params = lora.load(
            adapter, family.params(c), params, models.table(family, c), models.spellings(family, c)
        )[1]
    params = quant.quantize(lora.merge(params), quant.DECODER) if int8 else params
    return ready(family, c, params, processor.load(folder), backend)


def ask(
    m: Model,
    questions: Sequence[tuple[list[dict], Sequence, Sequence]],
    *,
    new: int,
    how: generate.Sampling | None = None,
    key: Tensor | None = None,
    tell: Callable | None = None,
) -> list[str]:
    """Answers to (messages, images, videos), as one batch."""
    pr = m.processor
    samples = [processor.encode(pr, said, images, videos, generate=True) for said, images, videos in questions]
    batch = data.left(samples, pr.text.pad)
    if hasattr(m.family, "prepare"):
        batch = m.family.prepare(m.config, batch)
    batch = tree.put(batch, tree.leaves(m.params)[0].device)
    out = generate.generate(
        m.family, m.params, m.config, batch, new=new, stops=pr.text.stops, how=how, key=key, call=m.call, tell=tell
    )
    return [text.decode(pr.text, ids).strip() for ids in out]


def question(r: Record) -> tuple[list[dict], list[str]]:
    """The messages to ask and the accepted answers: the last turn of the assistant, or the fields answer(s)."""
    last = r.messages[-1]
    said = r.extra.get("answers", r.extra.get("answer", last["content"] if last["role"] == "assistant" else None))
    if said is None:
        raise ValueError(
            f"{r.id} has no answer to compare with: neither a last turn of the assistant nor answer or answers"
        )
    return [*r.messages[:-1]] if last["role"] == "assistant" else r.messages, [
        str(a) for a in (said if isinstance(said, list) else [said])
    ]


def examine(m: Model, records: Records, which: Sequence[int], *, metric: str, new: int, batch: int,
            each: Callable = map) -> list[dict]:
    """A row for each of the records: id, kind, question, answer, truth, score, images. each: map, or what lets ranks
    take batches in turn."""
    measure, batches = score.metric(metric), [which[a : a + batch] for a in range(0, len(which), batch)]
    examined = lambda some: _examined(m, [records[i] for i in some], measure, new)
    return [row for rows in each(examined, batches) for row in rows]


def _examined(m: Model, asked: Sequence[Record], measure: Callable, new: int) -> list[dict]:
    """The rows of one batch."""
    found = [question(r) for r in asked]
    answers = ask(m, [(said, r.images, r.videos) for r, (said, _) in zip(asked, found)], new=new)
    return [
        {
            "id": r.id,
            "kind": r.extra.get("kind", "all"),
            "question": plain(said),
            "answer": answer,
            "truth": truths,
            "score": measure(answer, truths, r.extra.get("options", ())),
            "images": [str(i) for i in r.images if isinstance(i, Path)],
        }
        for r, (said, truths), answer in zip(asked, found, answers)
    ]


def plain(messages: Sequence[dict]) -> str:
    """What was asked last, without media."""
    content = messages[-1]["content"]
    content = content if isinstance(content, str) else "".join(p.get("text", "") for p in content)
    return content.replace("<image>", "").replace("<video>", "").strip()
