"""Captioned pictures and videos as batches, and diffusion training end to end: exact resume, ahead of time = online."""

import json
import math
import re
import shutil
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "programs"))
import drawings
import encode
import train
from kills import final, same
from safetensors.torch import load_file

from mmfunc import bundle, checkpoint, clips, data, diffusion, features, media, models, records
from mmfunc.online import Encoder, Online
from mmfunc.tasks import pictures


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A few drawings and clips, and the small pipelines."""
    out = tmp_path_factory.mktemp("drawings")
    drawings.main(drawings.Args(out, pictures=40, clips=12))
    return out


def test_header_and_frames(tmp_path):
    film = np.stack([np.full((32, 48, 3), 10 * i, np.uint8) for i in range(20)])
    media.write_video(tmp_path / "v.mp4", film, fps=8)
    level = lambda x: [round(f.float().mean().item() / 10) for f in x]
    assert media.header(tmp_path / "v.mp4", video=True) == (20, 32, 48)
    assert level(media.frames(tmp_path / "v.mp4", 5, 4)) == [0, 2, 4, 6, 8]
    assert level(media.frames(tmp_path / "v.mp4", 5, 8, start=1.0)) == [8, 9, 10, 11, 12]
    assert level(media.frames(tmp_path / "v.mp4", 5, 16)) == [0, 0, 1, 1, 2]
    with pytest.raises(media.BadMedia, match=r"v.mp4 ends after 2.50 s; 21 frames at 8 .* need 2.62 s"):
        media.frames(tmp_path / "v.mp4", 21, 8)
    (tmp_path / "t.mp4").write_bytes((tmp_path / "v.mp4").read_bytes()[:900])
    (tmp_path / "x.mp4").write_bytes(b"no video at all")
    for name in ("t.mp4", "x.mp4", "none.mp4"):
        with pytest.raises(media.BadMedia, match=name):
            media.frames(tmp_path / name, 1, 8)
        with pytest.raises(media.BadMedia, match=name):
            media.header(tmp_path / name, video=True)
    media.write_video(tmp_path / "one.mp4", film[:1], fps=8)
    with pytest.raises(media.BadMedia, match="one.mp4 ends after"):
        media.frames(tmp_path / "one.mp4", 5, 8)


def film(file, frames=40, codec="libx264"):
    """A noisy video, so that its frames are many bytes."""
    with av.open(str(file), "w", options={"movflags": "faststart"} if file.suffix == ".mp4" else {}) as box:
        stream = box.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for x in np.random.default_rng(0).integers(0, 255, (frames, 64, 96, 3)).astype(np.uint8):
            box.mux(stream.encode(av.VideoFrame.from_ndarray(x, format="rgb24")))
        box.mux(stream.encode())
    return file.read_bytes()


def sound(file):
    with av.open(str(file), "w") as box:
        stream, quiet = box.add_stream("aac", rate=16000), av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        quiet.rate = 16000
        box.mux(stream.encode(quiet))
        box.mux(stream.encode())
    return file.read_bytes()


CODEC = r"v\.\w+ is a video in a codec that is not known here"
DAMAGED = {  # what a video is made into: its name, and what is said of it
    "cut": ("v.mp4", lambda f: film(f)[: len(film(f)) // 2], r"v.mp4 cannot be decoded: .*Invalid data"),
    "cut between frames": ("v.mkv", lambda f: film(f)[: len(film(f)) // 2], r"v.mkv ends after [12]\.\d+ s; 30 frames at 8 .* need 3.75 s"),
    "no frames": ("v.mkv", lambda f: film(f).partition(bytes.fromhex("1F43B675"))[0], r"v.mkv cannot be decoded: .*End of file"),
    "one frame": ("v.mp4", lambda f: film(f, 1), r"v.mp4 ends after 0.12 s; 30 frames"),
    "no video": ("v.mp4", sound, r"v.mp4 has no video stream"),
    "codec of an mp4": ("v.mp4", lambda f: film(f).replace(b"avc1", b"zzz1"), CODEC),
    "codec of an mkv": ("v.mkv", lambda f: film(f).replace(b"V_MPEG4/ISO/AVC", b"V_XXXXX/ISO/AVC"), CODEC),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_videos_are_told_and_replaced(kind, tmp_path):
    """By name and reason, where they are read, from their header alone, and in a batch, which takes another."""
    name, made, match = DAMAGED[kind]
    (tmp_path / name).write_bytes(made(tmp_path / name))
    for source in (tmp_path / name, (tmp_path / name).read_bytes()):
        with pytest.raises(media.BadMedia, match=match if source == tmp_path / name else match.partition(" ")[2]):
            media.frames(source, 30, 8)
    film(tmp_path / "good.mp4")
    rows = [records.Record(n, [{"role": "assistant", "content": "x"}], [], [tmp_path / n]) for n in (name, "good.mp4")]
    encoded = online(rows, (30, 16, 16), lambda r, size: clips.pixels(r, size, 8.0), 1.0)
    micro, facts = clips.Batches(encoded, clips.Plan((2,), drop=0.0))[0]
    assert facts["ids"] == ["good.mp4"] * 2 and micro[0]["latents"].shape == (2, 3, 30, 16, 16)
    assert facts["bad"] and all(re.search(match, b["reason"]) and b["index"] == 0 for b in facts["bad"])


def test_a_variable_frame_rate_keeps_its_pace(tmp_path):
    with av.open(str(tmp_path / "v.mp4"), "w") as box:
        stream = box.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, now in enumerate([0, 100, 200, 600, 1000, 1100]):
            f = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 10 * i, np.uint8), format="rgb24")
            f.pts, f.time_base = now, Fraction(1, 1000)
            box.mux(stream.encode(f))
        box.mux(stream.encode())
    found = media.frames(tmp_path / "v.mp4", 11, 10)
    assert [round(f.float().mean().item() / 10) for f in found] == [0, 1, 2, 2, 2, 3, 3, 3, 3, 4, 4]


def test_sizes():
    among = [(1, 64, 64), (1, 32, 32), (1, 32, 64), (9, 32, 32), (5, 32, 32)]
    assert [clips.nearest(s, among) for s in ((1, 100, 90), (1, 40, 40), (1, 9, 9), (1, 50, 99), (7, 80, 80), (9, 80, 80))] \
        == [0, 1, 1, 2, 4, 3]
    with pytest.raises(ValueError, match="a video of 8 x 8 pixels has no size"):
        clips.nearest((9, 8, 8), among[:3])
    assert pictures.sizes(("8x16", "9x8x16")) == [(1, 8, 16), (9, 8, 16)]
    with pytest.raises(ValueError, match="'8' is neither"):
        pictures.sizes(("8",))


def test_pixels_cover_the_size_from_the_middle(tmp_path):
    x = np.zeros((20, 60, 3), np.uint8)
    x[:, 20:40] = 255
    Image.fromarray(x).save(tmp_path / "a.png")
    r = records.Record("a", [], [tmp_path / "a.png"])
    assert (clips.pixels(r, (1, 20, 20)) == 1).all() and clips.pixels(r, (1, 20, 60)).min() == -1
    assert clips.pixels(r, (1, 10, 10), channels=1).shape == (1, 10, 10)


LISTS = {
    "metadata.csv": "path,text\nv.mp4,a digit\n",
    "data.json": json.dumps([{"path": "v.mp4", "cap": ["a digit"]}]),
    "data.jsonl": json.dumps({"video": "v.mp4", "caption": "a digit"}),
    "videos.txt": "v.mp4\n",
}


@pytest.mark.parametrize("name", LISTS)
def test_captions_beside_videos(tmp_path, name):
    media.write_video(tmp_path / "v.mp4", np.zeros((3, 16, 16, 3), np.uint8))
    (tmp_path / name).write_text(LISTS[name])
    (tmp_path / "prompt.txt").write_text("a digit\n")
    r = records.open(tmp_path / name if name.startswith("data") else tmp_path)[0]
    assert (features.caption(r), r.videos) == ("a digit", [tmp_path / "v.mp4"])
    if name == "data.json":
        (tmp_path / "data.txt").write_text(".,data.json\n")
        assert records.open(tmp_path / "data.txt")[0].videos == [tmp_path / "v.mp4"]
    if name == "videos.txt":
        (tmp_path / "prompt.txt").write_text("a digit\nanother\n")
        with pytest.raises(ValueError, match=r"prompt.txt has 2 lines, .*videos.txt has 1"):
            records.open(tmp_path)


def online(rows, size, read, words):
    """Records of one size, encoded as they are."""
    return Online(rows, [0] * len(rows), [size], read, [Encoder(lambda x: {"latents": x}, math.prod)],
                           [Encoder(lambda said: {"words": torch.tensor([words])}, len)])


class Fake:
    """Thirty samples of two sizes."""

    sizes, place = [(1, 4, 4), (1, 2, 8)], [i % 3 == 0 for i in range(30)]

    def __len__(self):
        return 30

    def __getitem__(self, i):
        if i == 7:
            raise media.BadMedia("7 is broken")
        return str(i), {"latents": torch.full((2, *self.sizes[self.place[i]][1:]), float(i)), "words": torch.ones(3)}

    def empty(self):
        return {"words": torch.zeros(3)}


def drawn(**plan):
    """What the samples of four epochs get: by (id, noise) the time, and whether there are words."""
    found = {}
    b = clips.Batches(Fake(), clips.Plan(**{"batch": (4,), "drop": 0.3} | plan))
    for number in range(4 * sum(b.rounds)):
        micro, facts = b[number]
        rows = [{k: m[k][i] for k in ("noise", "t", "words", "latents")} for m in micro for i in range(len(m["t"]))]
        for name, row in zip(facts["ids"], rows, strict=True):
            assert row["latents"].flatten()[0] == float(name)
            found[name, tuple(row["noise"].flatten().tolist())] = row["t"].item(), bool(row["words"].any())
        assert len({m["latents"].shape for m in micro}) == 1 and micro[0]["num_items_in_batch"] == len(rows)
    return found


def test_noise_depends_on_seed_epoch_and_sample_only():
    first = drawn()
    assert len(first) > 4 * 29
    for plan in ({"batch": (2, 5)}, {"accumulate": 3}, {"batch": (1,)}):
        other = drawn(**plan)
        both = first.keys() & other.keys()
        assert len(both) > 4 * 29 - 12 and all(first[k] == other[k] for k in both)
    assert 0.15 < sum(not words for _, words in first.values()) / len(first) < 0.45
    assert not drawn(seed=1).keys() & first.keys()
    moved = drawn(times=diffusion.Times(shift=3.0))
    assert moved.keys() == first.keys() and all(moved[k][0] > first[k][0] for k in first)


def test_a_batch_is_a_function_of_its_number():
    b = clips.Batches(Fake(), clips.Plan((4,)))
    whole = list(data.stream(b, 0, 12))
    for n, micro, facts in data.stream(b, 5, 12, workers=2):
        assert facts == whole[n][2] and all(torch.equal(v, whole[n][1][0][k]) for k, v in micro[0].items())
    assert any(f["bad"] == [{"index": 7, "reason": "7 is broken"}] for _, _, f in whole)
    with pytest.raises(ValueError, match="3 batch sizes"):
        clips.Batches(Fake(), clips.Plan((1, 2, 3)))


def test_ranks_divide_each_micro_batch(monkeypatch):
    plan = clips.Plan((4,), accumulate=2)
    whole, parts = clips.Batches(Fake(), plan), []
    for i in range(2):
        monkeypatch.setattr(clips.shard, "part", lambda i=i: (i, 2))
        parts.append(clips.Batches(Fake(), plan))
    for n in range(6):
        micro, facts = whole[n]
        found = [p[n] for p in parts]
        for j, m in enumerate(micro):
            both = [f[0][j] for f in found]
            assert sum(b.pop("num_items_in_batch") for b in both) == m.pop("num_items_in_batch") == 8
            assert all(torch.equal(v, torch.cat([b[k] for b in both])) for k, v in m.items())
        assert sorted(facts["ids"]) == sorted(found[0][1]["ids"] + found[1][1]["ids"])
    with pytest.raises(ValueError, match="3 samples do not divide among 2 ranks"):
        clips.Batches(Fake(), clips.Plan((3,)))


def args(root, kind, out, **more):
    size = {"flux": "8x8", "wan": "9x16x16"}[kind]
    folder = {"flux": "drawings", "wan": "clips"}[kind]
    return train.Args(**{"model": root / kind, "data": root / folder, "out": out,
        "scratch": True, "steps": 4, "batch": 3, "lr": 1e-3, "warmup": 2, "save": 1, "backend": "eager", "workers": 0,
        "clips": pictures.Clips((size,), fps=8.0)} | more)


@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_resume_ahead_of_time_and_export(root, tmp_path, kind):
    """With accumulation and a running mean: online, interrupted, and from features, the ends are equal to the bit."""
    a = args(root, kind, tmp_path / "a", accumulate=2, ema=0.9, questions=tmp_path / "ask.txt")
    (tmp_path / "ask.txt").write_text("a handwritten seven\n")
    assert train.main(a) == 0
    rows = [json.loads(r) for r in (a.out / "gallery.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4] and (a.out / rows[0]["file"]).exists()
    assert all(json.loads(r)["loss"] > 0 for r in (a.out / "metrics.jsonl").read_text().splitlines() if "loss" in r)

    out = tmp_path / "b"
    shutil.copytree(checkpoint.place(a.out / "checkpoints", 2), checkpoint.place(out / "checkpoints", 2))
    assert train.main(replace(a, out=out, workers=2)) == 0 and same(final(out), final(a.out))

    encode.main(encode.Args(root / kind, a.data, tmp_path / "f", part=7, clips=a.clips))
    assert train.main(replace(a, out=tmp_path / "c", data=tmp_path / "f", clips=pictures.Clips())) == 0
    assert same(final(tmp_path / "c"), final(a.out))

    pipe = bundle.load(a.out / "export")
    mean = checkpoint.restore(a.out / "checkpoints", train.start(a, pictures)[4])[0]
    of = lambda p: p["text"]["weight"] if kind == "flux" else p["text"]["up"]["weight"]
    assert torch.equal(of(pipe.transformer.params), of(train.result(a, mean)))
    assert (a.out / "export" / "text_encoder" / "model.safetensors").exists()


def test_features_of_other_encoders_or_sizes_are_refused(root, tmp_path):
    a = args(root, "flux", tmp_path / "a")
    encode.main(encode.Args(a.model, a.data, tmp_path / "f", clips=a.clips))
    with pytest.raises(ValueError, match=r"sizes: \[\[1, 8, 8\]\] there, \[\[1, 16, 16\]\] in this run"):
        train.main(replace(a, data=tmp_path / "f", clips=replace(a.clips, sizes=("16x16",))))
    shutil.copytree(a.model, tmp_path / "other")
    file = tmp_path / "other" / "text_encoder_2" / "config.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(ValueError, match=r"made with .*/flux otherwise than with .*/other in this run: encoders: \w+ there, \w+ in"):
        train.main(replace(a, data=tmp_path / "f", model=tmp_path / "other"))
    (tmp_path / "f" / "index.json").unlink()
    with pytest.raises(ValueError, match="no finished folder of features|neither metadata"):
        features.Ahead(tmp_path / "f")
    with pytest.raises(ValueError, match="multiples of 2"):
        train.main(replace(a, clips=replace(a.clips, sizes=("9x9",))))
    with pytest.raises(ValueError, match="a FluxPipeline draws pictures; the size 9x8x8 has 9 frames"):
        train.main(replace(a, clips=replace(a.clips, sizes=("9x8x8",))))
    with pytest.raises(ValueError, match="give the sizes"):
        train.main(replace(a, clips=pictures.Clips()))


class Broken:
    """Two samples, the first with a NaN in its latents."""

    def __getitem__(self, i):
        return records.Record(str(i), [{"role": "assistant", "content": "x"}], [torch.tensor([float("nan"), 1.0][i])])

    def __len__(self):
        return 2


def test_values_that_are_not_finite(tmp_path):
    """In latents that are encoded now, in features, and in a caption's: the sample is named, and another taken."""
    encoded = lambda words: online(Broken(), (1, 1, 1), lambda r, size: r.images[0].expand(1, 1, 1), words)
    with pytest.raises(ValueError, match="0: latents has values that are not finite"):
        encoded(1.0).row(0)  # so encode.py leaves it out
    with pytest.raises(ValueError, match="the caption 'x': words has values that are not finite"):
        encoded(float("inf"))[1]
    nan = {"latents": torch.full((1, 1, 1), float("nan"))}
    said = lambda name: {"id": name, "size": [1, 1, 1]}
    good = encoded(1.0).row(1)
    features.write_part(tmp_path, 0, [(said("bad"), nan, "x", good[3]), (said("good"), *good[1:])])
    features.finish(tmp_path, {"sizes": [[1, 1, 1]]}, {"words": torch.zeros(1)})
    for source, name in ((encoded(1.0), "0"), (features.Ahead(tmp_path), "bad")):
        micro, facts = clips.Batches(source, clips.Plan((2,), drop=0.0))[0]
        assert micro[0]["latents"].isfinite().all() and len(set(facts["ids"])) == 1 and facts["bad"]
        assert all(b["reason"] == f"{name}: latents has values that are not finite" for b in facts["bad"])


def test_captions_that_are_too_long(root, tmp_path):
    """Cut with one warning that counts them, or refused by a flag, in training and ahead of time."""
    said = ["a handwritten seven", "a handwritten nine " * 4, "a nine " * 9, "a nine " * 9]
    rows = [json.loads(r) for r in (root / "drawings" / "metadata.jsonl").read_text().splitlines()[: len(said)]]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r | {"text": s}) + "\n" for r, s in zip(rows, said)))
    how = pictures.Clips(("8x8",))
    message = "2 of 3 prompts are longer than the 8 tokens of text_encoder and lose up to 11; 2 of 3 prompts .* text_encoder_2"
    e = encode.Args(root / "flux", tmp_path / "r.jsonl", tmp_path / "f", root / "drawings", clips=how)
    a = args(root, "flux", tmp_path / "a", data=e.data, media=e.media, clips=how, steps=2)
    for program, given in ((encode, e), (train, a)):
        with pytest.warns(UserWarning, match=message) as told:
            program.main(given)
        assert len([w for w in told if "prompts are longer" in str(w.message)]) == 1
        with pytest.raises(ValueError, match=message):
            program.main(replace(given, out=tmp_path / "new", clips=replace(how, strict=True)))


def test_lora_trains_and_is_written_for_diffusers(root, tmp_path):
    a = args(root, "wan", tmp_path / "a", lora=train.Lora(2))
    assert train.main(a) == 0
    names = load_file(tmp_path / "a" / "adapter" / "pytorch_lora_weights.safetensors")
    assert any(n.startswith("transformer.blocks.0.attn1.to_q.lora_A") for n in names)
    family, c, p = models.load(tmp_path / "a" / "export" / "transformer")
    assert family.__name__.endswith("wan") and p["blocks"][0]["self"]["q"]["weight"].isfinite().all()
