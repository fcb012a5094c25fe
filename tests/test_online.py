"""Samples encoded while training: by one process, and by ranks that share them, each of which encodes some."""

import json
import sys
from pathlib import Path

import kills
import mesh_ranks
import pytest
import torch
from test_diffusion_runs import filled

sys.path.insert(0, str(Path(__file__).parent.parent / "programs"))
import drawings
import train

from mmfunc import bundle, clips, data, media, models, random, records, shard
from mmfunc.models import clip
from mmfunc.online import Encoder, Online
from mmfunc.recipes import Part
from mmfunc.tasks import pictures

MESHES = {2: [shard.Mesh(tp=2), shard.Mesh(ulysses=2), shard.Mesh(pp=2)],
          4: [shard.Mesh(ring=2, ulysses=2), shard.Mesh(data=2, tp=2), shard.Mesh(pp=2, ring=2)]}


def batches(b, numbers, workers=0):
    """Micro-batches and facts by number, as training gets them."""
    found = {}
    for n, micro, facts in data.stream(b, numbers.start, numbers.stop, workers):
        found[n] = b.together(n, facts) if "pixels" in facts else (micro, facts)
    return found


def same(found, want, part, parts):
    """Whether a rank has its part of each micro-batch, to the bit, and which samples those are."""
    for n, (micro, facts) in found.items():
        for m, w in zip(micro, want[n][0], strict=True):
            each = len(w["t"]) // parts
            own = {k: v[part * each :][:each] if v.ndim else v / parts for k, v in w.items()}
            assert own.keys() == m.keys() and all(torch.equal(m[k], v.to(m[k].dtype)) for k, v in own.items())
        assert set(facts["ids"]) <= set(want[n][1]["ids"])
        assert [b for b in facts["bad"] if b not in want[n][1]["bad"]] == []
    return True


# ---- which rank does what

class Rows:
    """Records of two sizes, one of which cannot be read; one's latents are not finite, one's caption neither."""

    def __len__(self):
        return 24

    def __getitem__(self, i):
        if i == 7:
            raise media.BadMedia("7 is broken")
        said = "endless" if i == 4 else "x" * (i % 11)
        return records.Record(str(i), [{"role": "assistant", "content": said}], [float("nan") if i == 5 else float(i)])


def counted(done):
    """An Online whose encoders write down what they did, and its batches."""
    def make(name, fn):
        def noted(x):
            done.append((name, x if isinstance(x, str) else tuple(x.shape)))
            return fn(x)
        return noted

    words = lambda said: torch.full((3,), float("inf") if said == "endless" else float(len(said)))
    seen = [Encoder(make(n, lambda x, n=n: {n: x + 1}), lambda size: 30 * size[1] * size[2]) for n in ("latents", "condition")]
    said = [Encoder(make(n, lambda c, n=n: {n: words(c)}), lambda c: 1 + len(c)) for n in ("one", "two")]
    sizes, read = [(1, 4, 4), (1, 2, 4)], lambda r, size: torch.full((2, *size[1:]), r.images[0])
    return clips.Batches(Online(Rows(), [i % 3 == 0 for i in range(24)], sizes, read, seen, said), clips.Plan((4,), 2, drop=0.3))


NUMBERS = range(6)


def encoded(rank, world, want):
    out = {}
    for mesh in MESHES[world]:
        with shard.use(shard.connect(mesh)):
            done = []
            b = counted(done)
            out[str(mesh)] = same(batches(b, NUMBERS), want, *shard.part()), done
            assert same(batches(counted([]), NUMBERS, workers=2), want, *shard.part())
    return out


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_encode_some_each(world):
    """The same bits and the same bad samples on every mesh, with any number of loaders; nothing is encoded twice, and
    no rank does much more than others."""
    done = []
    want = batches(counted(done), NUMBERS)
    bad = {(b["index"], b["reason"]) for _, facts in want.values() for b in facts["bad"]}
    assert bad == {(7, "7 is broken"), (5, "5: latents has values that are not finite"),
                   (4, "the caption 'endless': one has values that are not finite")}
    found = mesh_ranks.run(encoded, world, want)
    for mesh in MESHES[world]:
        here = [f[str(mesh)][1] for f in found]
        words = [x for some in here for x in some if x[0] in ("one", "two")]
        if mesh.data == 1:
            words = [w for w in words if w[1] != "endless"]  # captions are kept, but for bad ones
            assert len(words) == len({*words})
        pixels = [sum(x[0] not in ("one", "two") for x in some) for some in here]
        alone = sum(x[0] not in ("one", "two") for x in done)
        assert abs(sum(pixels) - alone) <= 2  # where the first encoder fails, one alone leaves out the second
        assert max(pixels) <= 1.1 * alone / world + len(NUMBERS), pixels


# ---- the encoders of pipelines

@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Pictures, clips, and pipelines with VAEs: FLUX, Wan from text, and Wan from images."""
    out = tmp_path_factory.mktemp("online")
    drawings.main(drawings.Args(out, pictures=12, clips=8))
    said, seen = bundle.load(out / "wan").text, models.get("clip:tiny-vision")[1]
    part = lambda name, **more: filled(Part(models.get(name)[0], models.get(name)[1].__class__(**more)), 1)
    vae = lambda name: filled(Part(*models.get(name)), 3)
    video = {"width": 48, "hidden": 80, "heads": 2, "layers": 2, "channels": 4, "text": 64, "time": 16}
    for kind, name, image in (("WanPipeline", "t2v", None), ("WanImageToVideoPipeline", "i2v", filled(Part(clip, seen), 4))):
        more = {"condition": 8, "image": seen.width} if image else {}
        bundle.export(out / name, bundle.scratch(kind, part("wan:tiny", **video, **more), vae("wan_vae:tiny"), said, image,
                                                 key=random.key(2), limits=(8,)))
    size = models.get("sd_vae:tiny")[1].latent
    bundle.export(out / "drawn", bundle.scratch(
        "FluxPipeline", part("flux:tiny", width=96, heads=4, layers=1, single=1, channels=size, text=64, pooled=64,
                             guidance=False, axes=(4, 10, 10)),
        vae("sd_vae:tiny"), bundle.load(out / "flux").text, key=random.key(2), limits=(8, 8)))
    return out


PIPES = {"t2v": ("clips", "9x16x16"), "i2v": ("clips", "9x16x16"), "drawn": ("drawings", "8x8")}


def source(root, name):
    folder, size = PIPES[name]
    how = pictures.Clips((size,), fps=8.0)
    return clips.Batches(pictures.online(root / name, records.open(root / folder), how), clips.Plan((2,), 2, drop=0.3))


def through(rank, world, root, want):
    out = []
    for mesh in MESHES[world][:2]:
        with shard.use(shard.connect(mesh)):
            out += [same(batches(source(root, name), range(2)), want[name], *shard.part()) for name in PIPES]
    return out


@pytest.mark.parametrize("world", [2, 4])
def test_pipelines_encoders_on_meshes(root, world):
    """Latents, conditions and texts have the bits of one process."""
    want = {name: batches(source(root, name), range(2)) for name in PIPES}
    assert {"condition", "encoder_hidden_states_image"} <= want["i2v"][0][0][0].keys()
    for found in mesh_ranks.run(through, world, root, want):
        assert found == [True] * 2 * len(PIPES)


def test_costs(root):
    """Of VAEs they grow with pixels and frames, of text encoders with what they read; without computing anything."""
    s = source(root, "i2v").source
    small, wide, long = (e.cost for e in s.seen[:1] for _ in range(3))
    assert 3.9 < wide((9, 32, 32)) / small((9, 16, 16)) < 4.6 and 1.9 < long((17, 16, 16)) / small((9, 16, 16)) < 2.1
    one, many = s.said[0].cost("a"), s.said[0].cost("a seven moving left")
    assert 2 < many / one < 3  # two tokens and five


def test_training_on_ranks_that_encode_together(root, tmp_path):
    """Losses of two ranks that have the same samples, by tensor parallelism and in stages, are those of one process."""
    losses = {}
    for mesh in (shard.Mesh(), shard.Mesh(tp=2), shard.Mesh(pp=2)):
        out = tmp_path / str(mesh)
        a = train.Args(root / "i2v", root / "clips", out / "run", steps=3, batch=2, accumulate=2, lr=1e-3, warmup=2, save=3,
                       backend="eager", workers=1, clips=pictures.Clips(("9x16x16",), fps=8.0), mesh=mesh, patience=60.0)
        k = kills.Ranks(out, train.main, a, world=mesh.world)
        assert set(k.wait(120).values()) == {0}, k.text()
        rows = map(json.loads, (out / "run" / "metrics.jsonl").read_text().splitlines())
        losses[str(mesh)] = [r["loss"] for r in rows if "loss" in r]
    want = losses.pop("one rank")
    for found in losses.values():
        assert len(found) == 3 and max(abs(x - w) / w for x, w in zip(found, want)) < 1e-5, losses
