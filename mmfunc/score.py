"""How right an answer is: pure functions (answer, truths, options) -> score in [0, 1].

exact: equal after normalising. relaxed: ChartQA (Methani et al. 2020; Masry et al. 2022), 5 % on numbers. anls:
DocVQA (Biten et al. 2019), 1 - normalised Levenshtein distance, 0 from 0.5 on. choice: MMMU and AI2D, the letter is
read out of free text. Where several truths are given the best one counts. An answer out of which no letter can be read
is wrong; none is drawn at random in its place, as MMMU's own script does.
"""

import math
import re
import string
import unicodedata
from collections.abc import Callable, Sequence

LETTERS = string.ascii_uppercase


def normal(text: str) -> str:
    """Compatibility form, lower case, single spaces, without quotes around it and marks after it."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.lstrip(" \"'`*_").rstrip(" \"'`*_.,;:!?。、") or text  # NFKC has made other wide marks ASCII


def exact(answer: str, truths: Sequence[str], options: Sequence[str] = ()) -> float:
    """1 where the normalised answer is one of the truths.

    >>> exact("A Cat.", ["a cat"])
    1.0
    """
    return float(normal(answer) in [normal(t) for t in truths])


def value(text: str) -> float | None:
    """The number that a text is, a percentage as a fraction; None where it is none."""
    text = text.strip()
    try:
        found = float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def relaxed(answer: str, truths: Sequence[str], options: Sequence[str] = ()) -> float:
    """1 where a number is within 5 % of the truth, or the words are equal but for case; 0 is met exactly.

    >>> relaxed("10.4", ["10"]), relaxed("10.6", ["10"]), relaxed("Bar", ["bar"])
    (1.0, 0.0, 1.0)
    """
    def right(truth: str) -> bool:
        a, t = value(answer), value(truth)
        if a is None or t is None:
            return answer.strip().lower() == truth.strip().lower()
        return abs(a - t) <= 0.05 * abs(t) + 1e-12 * abs(t)  # the border itself counts in spite of rounding

    return float(any(right(t) for t in truths))


def distance(a: str, b: str) -> int:
    """Levenshtein: the fewest insertions, deletions and substitutions that make b of a."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def anls(answer: str, truths: Sequence[str], options: Sequence[str] = ()) -> float:
    """1 - distance / longer length to the nearest truth, 0 if that is 0.5 or less; letter case does not count.

    >>> anls("hallo", ["hello", "bye"])
    0.8
    """
    words = lambda text: " ".join(text.lower().split())

    def near(truth: str) -> float:
        a, t = words(answer), words(truth)
        far = distance(a, t) / max(len(a), len(t), 1)
        return 1 - far if far < 0.5 else 0.0

    return max((near(t) for t in truths), default=0.0)


def _last(pattern: str, text: str) -> str | None:
    """The first group of the last match."""
    found = re.findall(pattern, text)
    return found[-1] if found else None


def letter(answer: str, options: Sequence[str], letters: str = "") -> str | None:
    """The letter that an answer chooses, None where it chooses none; of several, the last.

    Tried in this order: the answer is a letter; it is an option's text; "answer is B"; "(B)"; "B." or "B:"; B standing
    alone (an article "A" before a small word is none); an option's text within the answer.

    >>> letter("I think the answer is (B).", ["cat", "dog"]), letter("it must be the dog", ["cat", "dog"])
    ('B', 'B')
    """
    valid = letters or LETTERS[: len(options) or 26]
    text = answer.strip()
    bare = text.strip(" .,:;!?()[]*\"'`").upper()
    if len(bare) == 1 and bare in valid:
        return bare
    texts = [normal(o) for o in options]
    if texts.count(normal(text)) == 1:
        return valid[texts.index(normal(text))]
    one = f"[{valid}]"
    forms = (rf"(?i:answer|choice|option)\s*(?i:is|:|=)?\s*\W*({one})(?![\w'])", rf"[(\[]\s*({one})\s*[)\]]",
             rf"(?<![\w'.])({one})\s?[.:)](?!\w)", rf"(?<![\w'])(?!A\s+[a-z])({one})(?![\w'])")
    found = next((f for form in forms if (f := _last(form, text))), None)
    if found:
        return found
    places = {valid[i]: m[-1].start() for i, o in enumerate(texts) if o
              and (m := list(re.finditer(rf"(?<!\w){re.escape(o)}(?!\w)", " ".join(text.casefold().split()))))}
    return max(places, key=lambda k: (places[k], len(texts[valid.index(k)]))) if places else None


def choice(answer: str, truths: Sequence[str], options: Sequence[str] = ()) -> float:
    """1 where the chosen letter is a truth's; a truth is a letter or an option's text."""
    valid, texts = LETTERS[: len(options) or 26], [normal(o) for o in options]
    wanted = []
    for t in truths:
        if t.strip().upper() in list(valid):
            wanted.append(t.strip().upper())
        elif normal(t) in texts:
            wanted.append(valid[texts.index(normal(t))])
        else:
            raise ValueError(f"the truth {t!r} is neither a letter {valid[0]}..{valid[-1]} nor one of {list(options)}")
    return float(letter(answer, options) in wanted)


METRICS: dict[str, Callable[..., float]] = {"exact": exact, "relaxed": relaxed, "anls": anls, "choice": choice}


def metric(name: str) -> Callable[..., float]:
    """The metric of that name."""
    if name not in METRICS:
        raise ValueError(f"no metric {name!r}; there are {', '.join(METRICS)}")
    return METRICS[name]


def table(rows: Sequence[dict]) -> dict:
    """Mean score and number of rows, over all and by the rows' "kind", as results.json holds them."""
    kinds = sorted({str(r.get("kind") or "all") for r in rows})
    of = lambda part: {"count": len(part), "score": math.fsum(r["score"] for r in part) / max(len(part), 1)}
    return {"overall": of(rows), "kinds": {k: of([r for r in rows if str(r.get("kind") or "all") == k]) for k in kinds}}
