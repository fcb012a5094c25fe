"""Text, media, processor: equal to transformers; broken and hostile input is refused by name."""

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

from mmfunc import media, processor, text

CHAT = [{"role": "user", "content": "<image>which digit ?"}, {"role": "assistant", "content": "17"},
        {"role": "user", "content": "and left ?"}, {"role": "assistant", "content": "3 ."}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    text.write_words(path, ["which digit ?", "and left ?", " ."])
    processor.write(path, media.Patches(patch=8, least=16 * 16, most=64 * 64))
    return path


def noise(shape, mode="RGB", seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*shape, 4), dtype=np.uint8), "RGBA").convert(
        mode
    )


def test_a_sample_is_what_transformers_makes(folder):
    pr, theirs = processor.load(folder), AutoTokenizer.from_pretrained(folder)
    s = processor.encode(pr, CHAT, [noise((37, 81))])
    said = theirs.apply_chat_template(processor.listed(CHAT), tokenize=False)
    assert said == text.render(pr.text, processor.listed(CHAT))
    count = int(s["image_grid_thw"].prod()) // 4
    assert theirs(said.replace("<|image_pad|>", "<|image_pad|>" * count))["input_ids"] == s["input_ids"].tolist()
    assert [theirs.decode([i]) for i in s["labels"].tolist() if i >= 0] == [
        "1",
        "7",
        "<|im_end|>",
        "3",
        " .",
        "<|im_end|>",
    ]
    asked = processor.encode(pr, CHAT[:1], [noise((37, 81))], generate=True)
    said = theirs.apply_chat_template(processor.listed(CHAT[:1]), tokenize=False, add_generation_prompt=True)
    assert text.render(pr.text, processor.listed(CHAT[:1]), generate=True) == said and (asked["labels"] == -100).all()
    assert text.decode(pr.text, theirs("and left ?")["input_ids"]) == "and left ?"


def test_a_sample_is_measured_without_decoding(folder, tmp_path):
    pr = processor.load(folder)
    noise((37, 81)).save(tmp_path / "a.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # on its side
    noise((64, 40)).save(tmp_path / "b.jpg", exif=turned)
    media.write_video(tmp_path / "v.mp4", np.zeros((21, 32, 48, 3), np.uint8), fps=8)
    said = [{"role": "user", "content": "<image><video><image>which digit ?"}, *CHAT[1:2]]
    given = said, [tmp_path / "a.png", tmp_path / "b.jpg"], [tmp_path / "v.mp4"]
    s = processor.encode(pr, *given)
    assert processor.measure(pr, *given) == (len(s["input_ids"]), len(s["pixel_values"]) + len(s["pixel_values_videos"]))
    with pytest.raises(ValueError, match="2 places for an image, 0 are given"):
        processor.measure(pr, said)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "LA"])
@pytest.mark.parametrize("shape", [(37, 81), (200, 170), (9, 1300), (3, 3)])
def test_patches_equal_to_the_bit(mode, shape):
    for said in (
        {},
        {"patch_size": 8, "min_pixels": 256, "max_pixels": 4096},
        {"merge_size": 1, "temporal_patch_size": 1},
    ):
        theirs = Qwen2VLImageProcessorPil(**said)(noise(shape, mode), return_tensors="pt")
        mine, grid = media.patches(media.image(noise(shape, mode)), processor._patches(media.Patches(), said))
        assert torch.equal(mine, theirs["pixel_values"]) and theirs["image_grid_thw"].tolist() == [grid]


TEMPLATES = [
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content|tojson }}{% endfor %}",
    "{%- set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}:{{ m['content'] | trim }}\n{% endfor %}",
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_render_as_in_transformers(folder, template):
    theirs = AutoTokenizer.from_pretrained(folder)
    t = text.load(folder)
    t = text.Text(t.tokenizer, text.compile_template(template), t.special, t.stops)
    mine = text.render(t, CHAT).replace(text.OPEN, "").replace(text.CLOSE, "")
    assert mine == theirs.apply_chat_template(CHAT, chat_template=template, tokenize=False)


def test_generation_blocks_mark_the_answers(folder):
    t = text.load(folder)
    t = text.Text(t.tokenizer, text.compile_template(TEMPLATES[2]), t.special, t.stops)
    assert [p for p, said in text.pieces(t, CHAT) if said] == ["17<|im_end|>", "3 .<|im_end|>"]
    changing = text.Text(
        t.tokenizer,
        text.compile_template("{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}"),
        {},
        (),
    )
    with pytest.raises(ValueError, match="changes earlier turns"):
        text.pieces(changing, CHAT)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{% for i in range(10**12) %}x{% endfor %}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
        "{{ cycler.__init__.__globals__.os }}",
    ],
)
def test_hostile_templates_are_refused(folder, template):
    t = text.load(folder)
    t = text.Text(t.tokenizer, text.compile_template(template), t.special, t.stops)
    with pytest.raises(ValueError, match="chat template fails"):
        text.render(t, CHAT)
    with pytest.raises(ValueError, match="cannot be read"):
        text.compile_template("{% for %}")


def bomb(side):
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b""))


def test_bad_pictures(tmp_path):
    good = tmp_path / "a.png"
    noise((64, 64)).save(good)
    for name, body, said in (
        ("t.png", good.read_bytes()[:3000], "cannot be decoded"),
        ("h.jpg", b"<html>404</html>", "no image: it starts with b'<html>"),
        ("b.png", bomb(30_000), "900000000 pixels"),
        ("e.png", b"", "no image"),
    ):
        (tmp_path / name).write_bytes(body)
        with pytest.raises(media.BadMedia, match=f"(?s){name}.*{said}"):
            media.image(tmp_path / name)
    with pytest.raises(media.BadMedia, match="cannot be decoded"):
        media.image(tmp_path / "missing.png")
    with pytest.raises(media.BadMedia, match="200 to 1"):
        media.patches(noise((2, 900)), media.Patches())


def test_videos(tmp_path, folder):
    frames = np.stack([np.full((48, 64, 3), 10 * i, np.uint8) for i in range(20)])
    media.write_video(tmp_path / "v.mp4", frames, fps=8)
    x, rate = media.video(tmp_path / "v.mp4", fps=4, least=4, most=768)
    assert x.shape == (10, 3, 48, 64) and rate == 4
    assert [round(f.float().mean().item() / 10) for f in x] == list(range(0, 20, 2))
    late, _ = media.video(tmp_path / "v.mp4", fps=4, start=1.0)
    assert round(late[0].float().mean().item() / 10) == 8
    pr = processor.load(folder)
    s = processor.encode(
        pr, [{"role": "user", "content": "<video>which ?"}], videos=[tmp_path / "v.mp4"], generate=True
    )
    t, h, w = s["video_grid_thw"][0].tolist()
    assert (s["input_ids"] == pr.text.tokenizer.token_to_id("<|video_pad|>")).sum() == t * h * w // 4
    assert s["second_per_grid_ts"].tolist() == [pytest.approx(2 / 1.6)]
    (tmp_path / "v2.mp4").write_bytes((tmp_path / "v.mp4").read_bytes()[:900])
    with pytest.raises(media.BadMedia, match="v2.mp4"):
        media.video(tmp_path / "v2.mp4")


THEIRS = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
library = torch.library.Library("torchvision", "FRAGMENT")  # the wheel's own operators need CUDA; none is used here
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLVideoProcessor
processor = Qwen2VLVideoProcessor(do_sample_frames=False, cap_pixels_per_frame=False)
out = {}
for name, x in load_file(sys.argv[2]).items():
    seen = processor(videos=[x], return_tensors="pt")
    out |= {name: seen["pixel_values_videos"], f"{name}.grid": seen["video_grid_thw"][0]}
save_file(out, sys.argv[3])
"""


def test_videos_equal_transformers(tmp_path):
    """In a process of its own: transformers' video processor wants torchvision, whose wheel does not fit this torch."""
    g = torch.Generator().manual_seed(0)
    shapes = (6, 3, 113, 170), (5, 3, 40, 333), (3, 3, 700, 900), (1, 3, 57, 56)
    videos = {str(i): torch.randint(0, 256, s, generator=g, dtype=torch.uint8) for i, s in enumerate(shapes)}
    save_file(videos, tmp_path / "in.safetensors")
    files = [str(tmp_path / f"{n}.safetensors") for n in ("in", "out")]
    subprocess.run([sys.executable, "-c", THEIRS, str(Path(sys.prefix) / "torchvision"), *files], check=True)
    theirs = load_file(files[1])
    for name, x in videos.items():
        mine, grid = media.clip(x, media.Patches(least=128 * 28 * 28, most=28 * 28 * 768))
        assert grid == theirs[f"{name}.grid"].tolist() and (mine - theirs[name]).abs().max() < 1e-6


def test_places_and_media_must_agree(folder):
    pr = processor.load(folder)
    with pytest.raises(ValueError, match="1 places for an image, 0 are given"):
        processor.encode(pr, CHAT)
    with pytest.raises(ValueError, match="0 places for an video, 1 are given"):
        processor.encode(pr, CHAT[2:], videos=["v.mp4"])
