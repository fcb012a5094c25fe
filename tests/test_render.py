"""The sample program and the gallery on tiny pipelines: names, what files say, the same bits again, the page."""

import json
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from test_pipeline import picture, saved  # noqa: F401  a fixture

from mmfunc import gallery, metrics, pipeline, random, render, report

sys.path.insert(0, str(Path(__file__).parent.parent / "programs"))
import sample  # noqa: E402


@pytest.fixture(autouse=True)
def versions(monkeypatch):
    """The same from run to run, though somebody commits between two."""
    monkeypatch.setattr(metrics, "versions", lambda: {"torch": torch.__version__})


def test_videos_named_for_vbench_and_made_again(saved, tmp_path, capsys):  # noqa: F811
    folder, pipe = saved("WanPipeline")
    (tmp_path / "prompts.txt").write_text("the cat\n\na photo of / mars\n")
    how = {"model": folder, "size": "32x48", "frames": 5, "steps": 2, "fps": 8}
    sample.main(sample.Args(tmp_path / "a", prompts=tmp_path / "prompts.txt", repeat=2, seed=7, **how))
    files = sorted(p.name for p in (tmp_path / "a").glob("*.mp4"))
    assert files == ["a photo of _ mars-0.mp4", "a photo of _ mars-1.mp4", "the cat-0.mp4", "the cat-1.mp4"]
    said = gallery.said(tmp_path / "a" / "the cat-1.mp4")
    assert said["prompt"] == "the cat" and said["seed"] == 8 and said["guidance"] == 5.0 and said["frames"] == 5
    assert said["model"] == str(folder) and said["versions"]["torch"] == torch.__version__
    with av.open(str(tmp_path / "a" / "the cat-1.mp4")) as box:
        stream = box.streams.video[0]
        assert (stream.frames, stream.height, stream.width, stream.average_rate) == (5, 32, 48, 8)
    rows = metrics.read(tmp_path / "a" / "gallery.jsonl")[0]
    assert [r["seed"] for r in rows] == [7, 8, 9, 10] and rows[0]["file"] == "the cat-0.mp4"
    capsys.readouterr()
    sample.main(sample.Args(tmp_path / "b", again=tmp_path / "a" / "the cat-1.mp4"))
    assert "1/1  seed 8  the cat-0.mp4" in capsys.readouterr().out
    assert (tmp_path / "b" / "the cat-0.mp4").read_bytes() == (tmp_path / "a" / "the cat-1.mp4").read_bytes()
    sample.main(sample.Args(tmp_path / "c", prompt="the cat", seed=9, **how))
    assert (tmp_path / "c" / "the cat-0.mp4").read_bytes() != (tmp_path / "a" / "the cat-0.mp4").read_bytes()
    page = (tmp_path / "a" / "report.html").read_text()
    assert page.count("<video autoplay muted loop") == 4 and "a photo of / mars" in page and "seed 10" in page


def test_pictures_with_images(saved, tmp_path):  # noqa: F811
    """A start from a picture, and Kontext's look at two of them, by rows of a jsonl file."""
    folder, pipe = saved("FluxPipeline")
    kontext, _ = saved("FluxKontextPipeline")
    picture(20, 28).save(tmp_path / "x.png")
    picture(36, 16).save(tmp_path / "y.png")
    x, y = str(tmp_path / "x.png"), str(tmp_path / "y.png")
    rows = [{"prompt": "the cat", "image": x}, {"prompt": "the cat", "image": [x], "seed": 50}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sample.main(sample.Args(tmp_path / "a", folder, prompts=tmp_path / "p.jsonl", size="16x24", steps=3, strength=0.5))
    sample.main(sample.Args(tmp_path / "a", folder, prompt="horse", size="16x24", steps=3, seed=50))
    pixels = [np.asarray(Image.open(tmp_path / "a" / f"{n}.png")) for n in ("the cat-0", "the cat-1", "horse-0")]
    assert all(p.shape == (16, 24, 3) for p in pixels)
    off = [np.abs(p.astype(float) - np.asarray(Image.open(x).resize((24, 16)))).mean() for p in pixels]
    assert not np.array_equal(*pixels[:2])
    key, seen = random.key(50), gallery.picture(Path(x), 16, 24)[None]
    z = pipeline.latents(pipe, seen, random.fold_in(key, "image")[None])
    z = pipeline.sample(pipe, pipeline.texts(pipe, ["the cat"]), None, z.shape, steps=3, key=key[None], start=(z, 0.5))
    assert np.array_equal(gallery.bytes_of(pipeline.pixels(pipe, z)[0]), pixels[1])
    said = gallery.said(tmp_path / "a" / "the cat-1.png")
    assert said["seed"] == 50 and said["strength"] == 0.5 and list(said["inputs"]) == [x]
    assert "strength" not in gallery.said(tmp_path / "a" / "horse-0.png")
    sample.main(sample.Args(tmp_path / "b", kontext, prompt="on mars", image=(Path(x), Path(y)), steps=2, size="16x24",
                            references="own", true_guidance=2.0, negative="blurry"))
    sample.main(sample.Args(tmp_path / "c", again=tmp_path / "b" / "on mars-0.png"))
    assert (tmp_path / "b" / "on mars-0.png").read_bytes() == (tmp_path / "c" / "on mars-0.png").read_bytes()
    sample.main(sample.Args(tmp_path / "d", kontext, prompt="on mars", image=(Path(y), Path(x)), steps=2, size="16x24",
                            references="own", true_guidance=2.0, negative="blurry"))
    swapped = np.asarray(Image.open(tmp_path / "d" / "on mars-0.png"))
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "b" / "on mars-0.png")), swapped)
    picture(20, 28, seed=9).save(x)
    with pytest.raises(ValueError, match="x.png is not the file that it was"):
        sample.main(sample.Args(tmp_path / "c", again=tmp_path / "b" / "on mars-0.png"))
    assert min(off) > 1


def test_videos_from_an_image_and_from_a_video(saved, tmp_path):  # noqa: F811
    folder, pipe = saved("WanImageToVideoPipeline", "last")
    for i in (0, 1):
        picture(40, 60, i).save(tmp_path / f"{i}.png")
    images = tuple(tmp_path / f"{i}.png" for i in (0, 1))
    how = {"size": "32x48", "frames": 5, "steps": 2, "fps": 8}
    sample.main(sample.Args(tmp_path / "a", folder, prompt="the cat", image=images, **how))
    plain, _ = saved("WanPipeline")
    video = tmp_path / "a" / "the cat-0.mp4"
    sample.main(sample.Args(tmp_path / "b", plain, prompt="the cat", video=video, strength=0.5, **how))
    assert gallery.said(tmp_path / "b" / "the cat-0.mp4")["video"] == str(video)
    made = render.task(saved("WanImageToVideoPipeline")[1], "x", image=images[0])
    assert (made["height"], made["width"]) == (512, 768)  # 480 x 832 in the shape of 40 x 60


def test_what_cannot_be_made_is_told_before_it_is_tried(saved, tmp_path):  # noqa: F811
    _, plain = saved("WanPipeline")
    _, image = saved("WanImageToVideoPipeline")
    _, flux = saved("FluxPipeline")
    picture(40, 60).save(tmp_path / "x.png")
    x = tmp_path / "x.png"
    for pipe, given, match in (
            (image, {}, "needs an image, its first frame"), (plain, {"image": [x]}, "takes no image"),
            (flux, {"image": [x, x]}, "begins with one image; there are 2"), (flux, {"video": x}, "takes no video"),
            (plain, {"frames": 6}, "6 frames.*such as 5"), (plain, {"height": 30}, "such as 32 x 832"),
            (plain, {"strength": 0.5}, "neither an image nor a video"), (flux, {"frames": 5}, "makes pictures.*no frames"),
            (flux, {"negative": "blurry"}, "negative prompt is not read at true guidance 1.0"),
            (plain, {"negative": "blurry", "guidance": 1.0}, "negative prompt is not read at guidance 1.0")):
        with pytest.raises(ValueError, match=match):
            render.task(pipe, "cat", **given)
    for args, match in (({"prompt": "x"}, "give a --model"), ({"model": tmp_path}, "give a --prompt, or"),):
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            if "model" in args:
                sample.rows(sample.Args(tmp_path, **args))
            sample.main(sample.Args(tmp_path, **args))
    with pytest.raises(ValueError, match="does not say how it was made"):
        gallery.said(x)
    broken = pipeline.Pipeline(**{**vars(flux), "transformer": pipeline.Part(
        flux.transformer.family, flux.transformer.config,
        render.tree.map(lambda t: t * float("nan"), flux.transformer.params))})
    with pytest.raises(ValueError, match="latents of prompt 'the cat' with seed 3 are not finite"):
        render.make(broken, render.task(flux, "the cat", seed=3, height=16, width=24, steps=1))


def test_the_gallery_has_a_row_a_prompt_and_a_column_a_step(tmp_path):
    x = torch.linspace(-1, 1, 3 * 700 * 600).view(3, 700, 600)
    for step in range(0, 100, 10):
        for seed, prompt in enumerate(("<b>cat</b>", "dog")):
            file = gallery.save(tmp_path / f"{step}-{seed}", x, {"prompt": prompt})
            row = {"step": step, "prompt": prompt, "seed": seed, "file": file.name}
            with (tmp_path / "gallery.jsonl").open("a") as f:
                f.write(json.dumps(row) + "\n")
    (tmp_path / "0-0.png").unlink()
    page = report.write(tmp_path).read_text()
    assert "&lt;b&gt;cat" in page and "<b>cat" not in page and "<script" not in page
    assert page.count("<th>step") == 7 and "step 90" in page and "step 20<" not in page  # eight columns, one of step 0
    assert page.count("data:image/jpeg") == 15 and "0-0.png is not shown" in page
    assert gallery.said(tmp_path / "10-1.png") == {"prompt": "dog"}
    assert np.array_equal(np.asarray(Image.open(tmp_path / "10-1.png")), gallery.bytes_of(x))


def test_tiles_and_a_compiled_model_change_little(saved):  # noqa: F811
    _, pipe = saved("FluxPipeline")
    given = {"height": 64, "width": 48, "steps": 2, "seed": 3}
    plain = render.make(pipe, render.task(pipe, "the cat", **given))
    plans = {}
    for _ in range(2):
        other = render.make(pipe, render.task(pipe, "the cat", **given, backend="aot_eager"), plans)
    tiled = render.make(pipe, render.task(pipe, "the cat", **given, tile=32))
    assert len(plans) == 1 and (other - plain).abs().max() < 1e-3
    assert 1e-4 < (tiled - plain).abs().mean() < 0.3


def test_reuse_is_said_and_made_again(saved, tmp_path, capsys):  # noqa: F811
    folder, pipe = saved("FluxPipeline")
    how = {"prompt": "the cat", "size": "16x24", "steps": 6}
    sample.main(sample.Args(tmp_path / "a", folder, reuse=1e9, **how))
    assert "the cat-0.png  2 calls computed, 4 reused  " in capsys.readouterr().out
    assert gallery.said(tmp_path / "a" / "the cat-0.png")["reuse"] == 1e9
    assert metrics.read(tmp_path / "a" / "gallery.jsonl")[0][0]["reused"] == 4
    sample.main(sample.Args(tmp_path / "b", again=tmp_path / "a" / "the cat-0.png"))
    assert (tmp_path / "a" / "the cat-0.png").read_bytes() == (tmp_path / "b" / "the cat-0.png").read_bytes()
    for n, reuse in (("c", 0.0), ("d", None)):
        sample.main(sample.Args(tmp_path / n, folder, reuse=reuse, **how))
    pixels = [np.asarray(Image.open(tmp_path / n / "the cat-0.png")) for n in "acd"]
    assert np.array_equal(*pixels[1:]) and not np.array_equal(*pixels[:2])
    with pytest.raises(ValueError, match="reuse is -1.0; it must be 0"):
        render.task(pipe, "the cat", height=16, width=24, reuse=-1.0)


def test_levels_and_file_names():
    levels = torch.arange(256) / 255 * 2 - 1
    assert np.array_equal(gallery.bytes_of(levels.view(1, 16, 16))[..., 2].flatten(), np.arange(256))
    assert gallery.names(["a", "b", "a", "a/b"]) == ["a-0", "b-0", "a-1", "a_b-0"]
    assert len(gallery.names(["ü" * 300])[0].encode()) <= 200
    with pytest.raises(ValueError, match="5 x 8 pixels: an mp4 needs even sides"):
        gallery.save(Path("/nowhere"), torch.zeros(3, 2, 5, 8), {})
