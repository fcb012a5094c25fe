"""Captioned pictures and videos as batches, and diffusion training end to end: exact resume, ahead of time = online."""

import json
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
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent / "programs"))
import drawings
import encode
import train

from mmfunc import bundle, checkpoint, clips, data, diffusion, features, media, models, records
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


def args(root, kind, out, **more):
    size = {"flux": "8x8", "wan": "9x16x16"}[kind]
    folder = {"flux": "drawings", "wan": "clips"}[kind]
    return train.Args(root / kind, root / folder, out, **{
        "scratch": True, "steps": 4, "batch": 3, "lr": 1e-3, "warmup": 2, "save": 1, "backend": "eager", "workers": 0,
        "clips": pictures.Clips((size,), fps=8.0)} | more)


def final(out, step=4):
    return load_file(checkpoint.place(out / "checkpoints", step) / "state-0.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


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
    mean = checkpoint.restore(a.out / "checkpoints", train.start(a, pictures)[2])[0]
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
    with pytest.raises(ValueError, match=r"encoders: \w+ there, \w+ in this run"):
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


def test_lora_trains_and_is_written_for_diffusers(root, tmp_path):
    a = args(root, "wan", tmp_path / "a", lora=train.Lora(2))
    assert train.main(a) == 0
    names = load_file(tmp_path / "a" / "adapter" / "pytorch_lora_weights.safetensors")
    assert any(n.startswith("transformer.blocks.0.attn1.to_q.lora_A") for n in names)
    family, c, p = models.load(tmp_path / "a" / "export" / "transformer")
    assert family.__name__.endswith("wan") and p["blocks"][0]["self"]["q"]["weight"].isfinite().all()
