"""Tokenizers and chat templates from a model folder's own files, rendered as transformers renders them.

Templates are jinja2 in an immutable sandbox. What the assistant says is marked either by the template's own
{% generation %} blocks or by rendering the conversation up to and with each answer.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers import decoders as token_decoders

from mmfunc import hub

OPEN, CLOSE = "\U0010fffe", "\U0010ffff"  # noncharacters around what {% generation %} holds
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *VISION)
CHATML = """{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}
{%- if part.type == 'image' or 'image' in part %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' or 'video' in part %}<|vision_start|><|video_pad|><|vision_end|>
{%- elif 'text' in part %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}: what the assistant says."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return OPEN + caller() + CLOSE


def _refuse(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def compile_template(source: str) -> jinja2.Template:
    """A chat template with the names and settings that templates on the hub rely on; a broken one is a ValueError."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = lambda x, ensure_ascii=False, indent=None, separators=None, sort_keys=False: json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    env.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    try:
        return env.from_string(source)
    except jinja2.TemplateError as e:
        raise ValueError(f"the chat template cannot be read: {e}") from e


@dataclass(frozen=True)
class Text:
    """A tokenizer, its chat template and the tokens that end an answer."""

    tokenizer: Tokenizer
    template: jinja2.Template | None
    special: dict[str, str]  # bos_token, eos_token, pad_token ... as far as there are
    stops: tuple[int, ...]

    @property
    def pad(self) -> int:
        return self.tokenizer.token_to_id(self.special.get("pad_token", "")) or 0


def load(folder: Path) -> Text:
    """The tokenizer of a model folder: tokenizer.json, and the template and special tokens beside it."""
    folder = Path(folder)
    if not (folder / "tokenizer.json").exists():
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json; save the tokenizer once with transformers' save_pretrained"
        )
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    said = hub.settings(folder / "tokenizer_config.json")
    named = {k: v for k, v in said.items() if k.endswith("_token") and v}
    plain = hub.settings(folder / "special_tokens_map.json") | named
    special = {k: v["content"] if isinstance(v, dict) else v for k, v in plain.items() if isinstance(v, (str, dict))}
    ends = hub.settings(folder / "generation_config.json").get("eos_token_id", [])
    ends = list(ends) if isinstance(ends, list) else [ends]
    ends += [tokenizer.token_to_id(special["eos_token"])] if "eos_token" in special else []
    source = _template(folder, said)
    return Text(tokenizer, compile_template(source) if source else None, special,
                tuple(sorted({e for e in ends if e is not None})))


def _template(folder: Path, said: dict) -> str | None:
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text()
    found = said.get("chat_template") or hub.settings(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list):
        return next((t["template"] for t in found if t["name"] == "default"), found[0]["template"])
    return found


def render(t: Text, messages: Sequence[dict], *, generate: bool = False, **names: Any) -> str:
    """A conversation as text; generate opens the assistant's next turn."""
    if t.template is None:
        raise ValueError("the model folder has no chat template")
    said = str(messages)
    if repr(OPEN)[1:-1] in said or repr(CLOSE)[1:-1] in said:
        raise ValueError("a message holds U+10FFFE or U+10FFFF, which no text may")
    try:
        return t.template.render(messages=list(messages), add_generation_prompt=generate, tools=None, documents=None,
                                 **t.special, **names)
    except (jinja2.TemplateError, OverflowError, MemoryError, TypeError, ValueError) as e:
        raise ValueError(f"the chat template fails on this conversation: {e}") from e


def pieces(t: Text, messages: Sequence[dict]) -> list[tuple[str, bool]]:
    """A conversation as text in pieces, each with whether the assistant says it (its end token included)."""
    whole = render(t, messages)
    if OPEN in whole:
        out = []
        for i, part in enumerate(whole.split(OPEN)):
            said, _, rest = part.partition(CLOSE)
            out += [(said, True), (rest, False)] if i else [(part, False)]
        return out
    out, at = [], 0
    for i, m in enumerate(messages):
        if m["role"] != "assistant":
            continue
        before = render(t, messages[:i], generate=True)
        after = (whole if i + 1 == len(messages) else render(t, messages[: i + 1])).rstrip()
        if not (whole.startswith(before) and whole.startswith(after) and len(before) <= len(after)):
            raise ValueError(
                "the chat template changes earlier turns as a conversation goes on, so that answers cannot be told "
                "apart; give it {% generation %} blocks"
            )
        out += [(whole[at : len(before)], False), (whole[len(before) : len(after)], True)]
        at = len(after)
    return [*out, (whole[at:], False)]


def encode(t: Text, parts: Sequence[tuple[str, bool]]) -> tuple[list[int], list[int]]:
    """Token ids, and labels: the ids of what the assistant says, -100 elsewhere."""
    text = "".join(p for p, _ in parts)
    edges, at = [], 0
    for p, said in parts:
        edges += [(at, at + len(p))] if said else []
        at += len(p)
    found = t.tokenizer.encode(text, add_special_tokens=False)
    labels, e = [], 0
    for i, (a, b) in zip(found.ids, found.offsets):
        while e < len(edges) and edges[e][1] <= a:
            e += 1
        labels.append(i if e < len(edges) and a >= edges[e][0] and b <= edges[e][1] else -100)
    return found.ids, labels


def decode(t: Text, ids: Sequence[int]) -> str:
    """The text of tokens, without special ones."""
    return t.tokenizer.decode(list(ids), skip_special_tokens=True)


WORD = r" ?[A-Za-z]+|[0-9]|\n| ?[^\sA-Za-z0-9]"


def write_words(folder: Path, texts: Sequence[str]) -> None:
    """A tokenizer folder for models trained from scratch: the words of texts, single digits, Qwen's special tokens,
    ChatML."""
    found = [
        w
        for t in (*texts, CHATML, "\nsystem\nuser\nassistant")
        for w in re.findall(WORD, re.sub(r"<\|.*?\|>|{.*?}", "\n", t))
    ]
    names = list(dict.fromkeys(["<unk>", "\n", *"0123456789", *found]))
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "isolated")
    tokenizer.decoder = token_decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    Path(folder).mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(Path(folder) / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
            "unk_token": "<unk>", "clean_up_tokenization_spaces": False, "model_max_length": 32768}
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(said, indent=2) + "\n")
    (Path(folder) / "chat_template.jinja").write_text(CHATML)
