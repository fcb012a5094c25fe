"""Records, order, packing, loading: formats by their keys, hostile names, broken samples, any number of workers."""

import io
import json
import tarfile
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmfunc import data, media, models, packs, records
from mmfunc.prefetch import Prefetch
from mmfunc.tasks import language


def png(color=0, size=(16, 16)):
    out = io.BytesIO()
    Image.new("RGB", size, (color, 9, 9)).save(out, "png")
    return out.getvalue()


TURNS = [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "x"}]
ROWS = [
    {"messages": TURNS, "images": ["a.png"]},
    {"conversations": [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "x"}], "image": "a.png"},
    {"query": "what?", "response": "x", "images": ["a.png"]},
    {"instruction": "what?", "input": "", "output": "x", "image": "a.png"},
    {"question": "what?", "answer": "x", "image": "a.png"},
    {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what?"}]},
            TURNS[1],
        ]
    },
]


@pytest.mark.parametrize("row", ROWS, ids=lambda r: next(iter(r)))
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_formats(tmp_path, row, ending):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / f"d.{ending}").write_text(
        json.dumps([row, row]) if ending == "json" else json.dumps(row) + "\n\n" + json.dumps(row)
    )
    found = records.open(tmp_path / f"d.{ending}")
    assert len(found) == 2 and found[1].images == [tmp_path / "a.png"]
    assert found[1].messages[-1] == TURNS[1] and [m["role"] for m in found[1].messages] == ["user", "assistant"]
    if isinstance(found[1].messages[0]["content"], str):
        assert found[1].messages[0]["content"] == "<image>what?"


def test_captions_beside_media(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a red square\n")
    assert records.open(tmp_path)[0].messages == [
        {"role": "user", "content": "<image>"},
        {"role": "assistant", "content": "a red square"},
    ]


def test_tar_shards_are_read_in_place(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as t:
        for name, body in (
            ("n" * 150 + ".png", png(1)),
            ("n" * 150 + ".json", json.dumps(ROWS[0] | {"images": ["x.png"]}).encode()),
            ("../../evil.png", png(2)),
            ("../../evil.txt", b"a caption"),
            ("lonely.png", png(3)),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(body)
            t.addfile(info, io.BytesIO(body))
    found = records.open(tmp_path / "a.tar")
    assert len(found) == 2 and sorted(p.name for p in tmp_path.iterdir()) == ["a.tar"]
    both = {found[i].images[0]: found[i].messages[-1]["content"] for i in range(2)}
    assert both == {png(1): "x", png(2): "a caption"}


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "link.png", "none.png", "http://x/a.png", "a\0.png"])
def test_media_stay_below_their_root(tmp_path, name):
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "root" / "d.jsonl").write_text(json.dumps(ROWS[0] | {"images": [name]}))
    with pytest.raises(ValueError, match=r"d.jsonl:1: .*(root|missing|disk only)"):
        records.open(tmp_path / "root" / "d.jsonl")[0]


def test_bad_files_are_named(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"a": 1}\n{"messages": \n[]\n')
    with pytest.raises(ValueError, match=r"2 lines are no JSON objects: .*d.jsonl:2: .*d.jsonl:3: no object"):
        records.open(tmp_path / "d.jsonl")
    (tmp_path / "e.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="keys a is of no known format; known are messages"):
        records.open(tmp_path / "e.jsonl")[0]
    (tmp_path / "f.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no record"):
        records.open(tmp_path / "f.jsonl")
    with pytest.raises(ValueError, match="no known ending"):
        records.open(_touch(tmp_path / "f.xml"))


def _touch(p):
    p.write_text("x")
    return p


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(0, 5), st.integers(0, 3))
def test_order_is_a_permutation(n, seed, epoch):
    assert sorted(data.order(seed, epoch, n, i) for i in range(n)) == list(range(n))


def test_order_changes_and_scales():
    first = [data.order(0, 0, 1000, i) for i in range(1000)]
    assert first != [data.order(0, 1, 1000, i) for i in range(1000)] != [data.order(1, 0, 1000, i) for i in range(1000)]
    assert len({data.order(0, 0, 1 << 40, i) for i in range(500)}) == 500


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=30))
def test_packing_keeps_every_sample_whole(lengths):
    rows = data.pack(lengths, 20)
    assert sorted(i for r in rows for i in r) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in r) <= 20 for r in rows)
    samples = [{"input_ids": torch.full((n,), i + 1), "labels": torch.full((n,), i + 1)} for i, n in enumerate(lengths)]
    batch = data.collate(samples, rows, 20, 0, len(rows))
    assert (batch["input_ids"] > 0).sum() == sum(lengths)
    for r, members in enumerate(rows):
        for k, i in enumerate(members):
            own = batch["attention_mask"][r] == k + 1
            assert own.sum() == lengths[i] and (batch["input_ids"][r][own] == i + 1).all()
            assert batch["labels"][r][own].tolist() == [-100] + [i + 1] * (lengths[i] - 1)


def fake(bad=(), long=()):
    """Batches over 50 numbers; some of them broken, some too long."""
    def encode(r):
        i = int(r.id)
        if i in bad:
            raise media.BadMedia(f"{i} is broken")
        n = 90 if i in long else 3 + i % 5
        return {"input_ids": torch.full((n,), i), "labels": torch.full((n,), i)}

    rows = records.Records(50, lambda i: (str(i), {"messages": TURNS[1:]}, None))
    return lambda **plan: data.Batches(
        rows, encode, lambda b, patches: b, data.Plan(**({"batch": 4, "tokens": (8, 16)} | plan))
    )


SEVEN = models.get("qwen2:2.5-7b")


def lengths(seed, n, longest):
    """Tokens of conversations: a few hundred, and some of thousands."""
    return np.random.default_rng(seed).lognormal(np.log(380), 0.9, n).clip(16, longest).astype(int)


def flops(tokens):
    """Of a 7B model: its published 6.53e9 parameters of layers and 0.545e9 of the head, and causal pairs of tokens."""
    return 3 * (2 * (6.525e9 + 152064 * 3584) * tokens + 28 * 4 * 3584 * tokens * (tokens + 1) / 2)


@pytest.mark.parametrize("ranks, rows, size, each", [(8, 2, 8192, 24), (8, 4, 4096, 24), (8, 1, 32768, 48), (64, 4, 8192, 48),
                                                     (512, 2, 8192, 24), (8, 32, 8192, 32)])
def test_ranks_get_packs_of_equal_flops(ranks, rows, size, each):
    """Within 0.1 %, where the same samples as they come differ by more than a quarter; in the last case a row holds one
    sample. Every sample lies in one row with room for it."""
    for seed in range(3):
        tokens = lengths(seed, ranks * each, size)
        cost = language.flops(*SEVEN, tokens, 0 * tokens, ".", 0)
        assert abs(cost / flops(tokens.astype(float)) - 1).max() < 1e-3
        found = packs.deal(tokens if rows < each else np.full_like(tokens, size), cost, ranks, rows, size)
        assert sorted(i for r in found.rows for row in r for i in row) == list(range(len(tokens)))
        assert all(len(r) == rows and max(tokens[row].sum() for row in r) <= size for r in found.rows)
        loads = np.array([flops(tokens[sum(r, [])].astype(float)).sum() for r in found.rows])
        assert np.ptp(loads) / loads.mean() < 1e-3 and found.spread < 5.1e-4
        assert np.ptp(cost.reshape(ranks, -1).sum(1)) > 0.25 * cost.mean() * each


def test_dealing_within_limits():
    """Patches have a limit of their own; what does not fit is not dealt; one that costs more than all others is alone."""
    tokens, patches = np.array([4, 4, 4, 4]), np.array([8, 8, 0, 0])
    found = packs.deal(tokens, tokens, 2, 1, 8, patches, 8)
    assert [sum(patches[row[0]]) for row in found.rows] == [8, 8] and found.spread == 0
    assert packs.deal(tokens, tokens, 2, 1, 8, patches, 7) is None and packs.deal(tokens, tokens, 2, 1, 7) is None
    found = packs.deal(np.array([1, 9, 1, 1]), np.array([1, 9, 1, 1]), 2, 2, 9)
    assert sorted(sorted(sum(r, [])) for r in found.rows) == [[0, 2, 3], [1]] and found.spread == 1.0


def whole(sizes, **plan):
    """Batches of samples with so many tokens on each of four ranks, and on one."""
    def encode(r):
        if r.id == "5":
            raise media.BadMedia("5 is broken")
        n = int(sizes[int(r.id)])
        return {"input_ids": torch.full((n,), int(r.id)), "labels": torch.full((n,), int(r.id))}

    rows = records.Records(len(sizes), lambda i: (str(i), {"messages": TURNS[1:]}, None))
    plan = data.Plan(**{"batch": 64, "tokens": (1024, 4096), "accumulate": 2, "rows": 16, "seed": 3} | plan)
    known = packs.Known(*data.measured(rows, lambda r: (len(encode(r)["input_ids"]), 0)), flops(sizes.astype(float)))
    out = [data.Batches(rows, encode, lambda b, patches: b, plan, known=known) for _ in range(4)]
    for i, b in enumerate(out):
        b.part, b.parts = i, 4
    return out, data.Batches(rows, encode, lambda b, patches: b, plan)


@pytest.mark.parametrize("rows", [0, 16])
def test_the_global_batch_is_dealt(rows):
    """Four ranks have the samples of one process in each micro-batch, in equal shapes, and about the same to compute;
    batches are functions of their number, with a broken sample too."""
    tokens = lengths(1, 400, 2000)
    parts, one = whole(tokens, rows=rows)
    for n in range(4):
        (wanted, facts), found = one[n], [b[n] for b in parts]
        assert sorted(facts["ids"]) == sorted(i for _, f in found for i in f["ids"])
        assert sum(m["num_items_in_batch"] for (m, *_), _ in found) == wanted[0]["num_items_in_batch"]
        for k, want in enumerate(wanted):
            micro = [m[k] for m, _ in found]
            assert len({m["input_ids"].shape for m in micro}) == 1
            every = lambda ms: sorted(ms["input_ids"][ms["attention_mask"] > 0].tolist())
            assert every(want) == sorted(i for m in micro for i in every(m))
            own = [[(m["input_ids"][m["attention_mask"] > 0] == i).sum().item() for i in set(m["input_ids"].flatten().tolist())]
                   for m in micro]
            loads = np.array([flops(np.array(x, float)).sum() for x in own])
            assert np.ptp(loads) / loads.mean() < (0.005 if rows else 0.01)
        assert all(f["told"]["spread"] < 0.005 for _, f in found)
    for m, micro, f in data.stream(parts[2], 1, 4, workers=2):
        again, said = parts[2][m]
        assert f == said and all(torch.equal(a[k], b[k]) for a, b in zip(micro, again) for k in a)


def test_a_sample_that_is_longer_than_measured():
    """In place of one that broke after it was measured: no rank loses a token of it."""
    parts, _ = whole(np.full(64, 1000), accumulate=1, tokens=(1024,))
    size, dealt = parts[0].deal(0)
    assert size == 1024 and all(len(r) == 16 for r in dealt.rows)
    parts, _ = whole(np.full(64, 500), accumulate=1, tokens=(1024,), rows=32)
    parts[1].encode, was = (lambda r: {k: v.repeat(2) for k, v in was(r).items()}), parts[1].encode
    micro, facts = parts[1][0]
    assert facts["tokens"] == 16 * 1000 and micro[0]["input_ids"].shape == (16, 1024)


def test_resuming_is_a_number_for_any_workers():
    make = fake(bad=(7,))
    whole = list(data.stream(make(), 0, 20))
    for start, workers in ((0, 2), (7, 0), (7, 1), (13, 2)):
        for (n, micro, facts), (m, other, said) in zip(
            data.stream(make(), start, 20, workers), whole[start:], strict=True
        ):
            assert n == m and facts == said and all(torch.equal(micro[0][k], other[0][k]) for k in other[0])
    drawn = [i for _, _, f in whole[:12] for i in f["ids"]]
    assert len(set(drawn)) >= 47  # an epoch repeats nothing but the substitute


def test_broken_samples_are_replaced_listed_and_counted(tmp_path):
    watch = data.Watch(tmp_path / "bad.jsonl", least=50)
    with pytest.raises(ValueError, match=r"more than 1%.*is broken"):
        for n, _, facts in data.stream(fake(bad=(7, 9))(), 0, 30):
            assert len(facts["ids"]) == 4 and not {"7", "9"} & set(facts["ids"])
            watch(n, facts)
    rows = [json.loads(r) for r in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert {r["index"] for r in rows} <= {7, 9} and all("is broken" in r["reason"] for r in rows)
    with pytest.raises(ValueError, match="no usable sample after 10 tries; the last: .* is broken"):
        fake(bad=range(50))()[0]


def test_long_samples_are_named_never_cut():
    with pytest.raises(ValueError, match=r"^3 has 90 tokens, the longest row has 16; samples are never cut. Declare"):
        for i in range(13):
            fake(long=(3,))()[i]
    facts = [fake(long=(3,))(long="replace")[i][1] for i in range(13)]
    assert sum(len(f["bad"]) for f in facts) == 1


def test_buckets_micro_batches_and_counts():
    b = fake()(accumulate=3, batch=2, tokens=(4, 8))
    micro, facts = b[1]
    assert len(micro) == 3 and facts["samples"] == 6
    assert all(m["input_ids"].shape[1] == (4 if max((m["attention_mask"] > 0).sum(1)) <= 4 else 8) for m in micro)
    want = sum(int((m["labels"][:, 1:] >= 0).sum()) for m in micro)
    assert all(m["num_items_in_batch"] == want for m in micro)
    packed, _ = fake()(batch=8, tokens=(16,), rows=2)[0]
    assert packed[0]["input_ids"].shape[0] % 2 == 0 and packed[0]["attention_mask"].max() > 1
    with pytest.raises(ValueError, match="as many, shortest first"):
        data.Plan(1, (8, 4), (1, 1))


def test_items_fetched_ahead():
    """In order, one more than is in use, with the error that ends them; nothing is kept, and no thread remains."""
    asked = []

    def items():
        for i in range(5):
            asked.append(i)
            yield np.full(3, i)
        raise ValueError("the last")

    before = set(threading.enumerate())
    ahead = Prefetch(items())
    first = next(ahead)
    until = time.monotonic() + 10
    while len(asked) < 3 and time.monotonic() < until:  # one lies ready, one waits for its place
        time.sleep(0.01)
    assert first[0] == 0 and asked == [0, 1, 2]
    kept = weakref.ref(first)
    del first
    assert kept() is None
    assert [next(ahead)[0] for _ in range(4)] == [1, 2, 3, 4]
    for _ in range(2):
        with pytest.raises(ValueError, match="the last"):
            next(ahead)
    half = Prefetch(iter(range(100)))
    assert next(half) == 0
    del ahead, half
    while set(threading.enumerate()) - before and time.monotonic() < until:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before
