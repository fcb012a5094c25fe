"""Prompts of diffusion models as tokens, from the tokenizer folders beside their text encoders.

Read is tokenizer.json, or the vocab.json and merges.txt of a CLIP tokenizer.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ftfy
import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from mmfunc import hub

WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP's
ENDS = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>"}  # CLIP's, where its files say nothing

MATCHED = "lstrip", "rstrip", "single_word", "normalized"  # how an added token is found in a text


@dataclass(frozen=True)
class Prompts:
    """A tokenizer and the id that fills up what is shorter."""

    tokenizer: Tokenizer
    pad: int


def load(folder: Path) -> Prompts:
    """The tokenizer of a folder such as tokenizer/ or tokenizer_2/ of a diffusers checkpoint."""
    folder = Path(folder)
    special, added = _special(folder)
    if (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        special = ENDS | special
        tokenizer = _clip(folder, special, added)
    else:
        found = "only spiece.model, which is not read" if (folder / "spiece.model").exists() else "neither of them"
        raise FileNotFoundError(
            f"a tokenizer is tokenizer.json, or CLIP's vocab.json and merges.txt; {folder} has {found}. Convert it "
            f"once: transformers.AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    pad = tokenizer.token_to_id(special.get("pad_token", ""))
    if pad is None:
        raise ValueError(f"{folder} names no pad_token of its vocabulary in tokenizer_config.json or "
                         f"special_tokens_map.json: {special.get('pad_token')!r}")
    return Prompts(tokenizer, pad)


def _special(folder: Path) -> tuple[dict[str, str], dict[str, dict]]:
    """bos_token, eos_token, pad_token ... as the folder's files say them, and how each added token is matched."""
    said = hub.settings(folder / "tokenizer_config.json")
    plain = hub.settings(folder / "special_tokens_map.json") | {k: v for k, v in said.items() if v}
    tokens = {k: v if isinstance(v, dict) else {"content": v} for k, v in plain.items()
              if k.endswith("_token") and isinstance(v, (str, dict))}
    listed = [tokens[n] for n in ENDS if n in tokens]  # one text under several names: the last name says how
    listed += [v for _, v in sorted(said.get("added_tokens_decoder", {}).items(), key=lambda kv: int(kv[0]))]
    added = {v["content"]: {k: v[k] for k in MATCHED if k in v} for v in listed}
    return {k: v["content"] for k, v in tokens.items()}, added


def _clip(folder: Path, special: dict[str, str], added: dict[str, dict]) -> Tokenizer:
    """CLIP's byte pairs: lower case, whole words marked by </w>, between a start and an end token."""
    tokenizer = Tokenizer(models.BPE.from_file(
        str(folder / "vocab.json"), str(folder / "merges.txt"), end_of_word_suffix="</w>",
        continuing_subword_prefix="", unk_token=special["unk_token"]))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORD), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    added = {special[n]: {} for n in ENDS} | added
    tokenizer.add_special_tokens([AddedToken(text, special=True, **how) for text, how in added.items()])
    if lost := [t for t in hub.settings(folder / "added_tokens.json") if tokenizer.token_to_id(t) is None]:
        raise ValueError(f"added_tokens.json of {folder} adds {lost[0]!r}; save it with transformers of today, so that "
                         "there is a tokenizer.json")
    start, end = ((special[n], tokenizer.token_to_id(special[n])) for n in ("bos_token", "eos_token"))
    tokenizer.post_processor = processors.RobertaProcessing(end, start, trim_offsets=False, add_prefix_space=False)
    return tokenizer


def encode(p: Prompts, texts: Sequence[str], length: int) -> tuple[dict[str, Tensor], list[int]]:
    """input_ids and attention_mask [B, length], and how many tokens of each text found no room."""
    room = length - p.tokenizer.num_special_tokens_to_add(False)
    if room < 1:
        raise ValueError(f"prompts of {length} tokens have no room for words; this tokenizer adds {length - room}")
    found = p.tokenizer.encode_batch(list(texts), add_special_tokens=False)
    cut = [max(len(e) - room, 0) for e in found]
    for e in found:
        e.truncate(room)
    rows = [p.tokenizer.post_process(e).ids for e in found]
    ids = [row + [p.pad] * (length - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}, cut


def clean(text: str) -> str:
    """A prompt as Wan and its like read it: broken encodings mended, HTML entities resolved, spaces made single."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()
