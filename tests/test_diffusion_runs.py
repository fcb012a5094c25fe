"""A diffusion run with everything at once: videos encoded online by a VAE and a text encoder, LoRA, a running mean and
accumulation; stopped, killed, cut into other micro-batches, and read from features. And what a large one would need."""

import json
import resource
import shutil
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import kills
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "programs"))
import drawings
import encode
import train

from mmfunc import bundle, checkpoint, data, jit, models, optim, random, tree
from mmfunc.models import wan, wan_vae
from mmfunc.recipes import Part
from mmfunc.tasks import pictures


def filled(part, seed):
    """Random weights everywhere: published beginnings are zero in places, and hide what does not depend on them."""
    declared = tree.map(lambda p: replace(p, init=tree.normal(0.1)), part.family.params(part.config))
    return replace(part, params=tree.init(declared, random.key(seed)))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Twelve clips, and a Wan pipeline with a VAE."""
    out = tmp_path_factory.mktemp("runs")
    drawings.main(drawings.Args(out, pictures=2, clips=12))
    c = wan.Config(width=48, hidden=80, heads=2, layers=2, channels=4, text=64, time=16)
    words = bundle.load(out / "wan").text
    bundle.export(out / "video", bundle.scratch(
        "WanPipeline", filled(Part(wan, c), 1), Part(wan_vae, wan_vae.PRESETS["tiny"]), words, key=random.key(2), limits=(8,)))
    return out


def args(root, out, **more):
    return train.Args(root / "video", root / "clips", out, **{
        "steps": 4, "batch": 2, "accumulate": 2, "ema": 0.9, "lora": train.Lora(2), "lr": 1e-3, "warmup": 2, "save": 1,
        "backend": "eager", "workers": 0, "clips": pictures.Clips(("9x16x16",), fps=8.0, drop=0.3)} | more)


def program(root, out, steps=4):
    """The command line of the run that args describes."""
    said = (f"--model {root}/video --data {root}/clips --out {out} --steps {steps} --batch 2 --accumulate 2 --ema 0.9 "
            "--lora.rank 2 --lr 1e-3 --warmup 2 --save 1 --backend eager --workers 0 --clips.sizes 9x16x16 --clips.fps 8 "
            "--clips.drop 0.3")
    return [sys.executable, train.__file__, *said.split()]


@pytest.fixture(scope="module")
def run(root):
    a = args(root, root / "whole")
    assert train.main(a) == 0
    return a


def test_it_trains(root, run):
    """LoRA is all that changes, in every adapted map; the mean lags behind; the base is exported with it merged."""
    last = kills.final(run.out, 4)
    trained = [n for n in last if n.startswith("params.")]
    assert trained and all(".lora_" in n for n in trained) and len(trained) == 2 * 2 * 2 * 4
    first = tree.flatten(train.start(run, pictures)[4]["params"])
    assert all(not torch.equal(last[n], first[n.removeprefix("params.")]) for n in trained)
    means = {n: t for n, t in last.items() if n.endswith(".ema")}
    assert len(means) == len(trained) and not any(torch.equal(t, last["params." + n[4:].split(".tx.")[0]])
                                                  for n, t in means.items())
    before, after = (bundle.load(p, ["transformer"]).transformer.params for p in (run.model, run.out / "export"))
    changed = {n for n, t in tree.flatten(after).items() if not torch.equal(t, tree.at(before, n))}
    assert changed == {n.removeprefix("params.").replace("lora_a", "weight") for n in trained if n.endswith("lora_a")}


@pytest.mark.parametrize(("step", "workers"), [(2, 2), (3, 1)])
def test_going_on_gives_the_same_bits(root, run, tmp_path, step, workers):
    at = checkpoint.place(run.out / "checkpoints", step)
    shutil.copytree(at, checkpoint.place(tmp_path / "checkpoints", step))
    assert train.main(replace(run, out=tmp_path, workers=workers)) == 0
    assert kills.same(kills.final(tmp_path, 4), kills.final(run.out, 4))
    losses = lambda out: {r["step"]: r["loss"] for r in map(json.loads, (out / "metrics.jsonl").open()) if "loss" in r}
    assert losses(tmp_path) == {k: v for k, v in losses(run.out).items() if k > step}


def test_kills_and_sigterm_end_in_the_same_bits(root, run, tmp_path):
    """The program itself, killed by -9 and asked to stop by SIGTERM, then run to its end."""
    kills.stopped(program(root, tmp_path), tmp_path)
    assert kills.same(kills.final(tmp_path, 4), kills.final(run.out, 4))


@pytest.mark.deep
def test_25_kills_lose_nothing(root, tmp_path):
    assert kills.start(program(root, tmp_path / "whole", 300)).wait() == 0
    kills.often(program(root, tmp_path / "a", 300), tmp_path / "a", 300)
    assert kills.same(*(kills.final(tmp_path / n, 300) for n in ("whole", "a")))


def trained(a):
    """(losses of the updates, parameters and their means) of a run's steps."""
    _, _, source, step, state = train.start(a, pictures)
    losses = []
    for _, micro, _ in data.stream(source, 0, a.steps):
        losses.append(step(state, micro)[1]["loss"].item())
    return losses, tree.leaves(state["params"]) + tree.leaves(optim.averaged(state))


def test_micro_batches_are_one_batch(root, run):
    """4 x 1, 2 x 2 and 1 x 4 samples: losses equal to 1e-6, parameters and means, which moved by 1e-3, to 1e-7."""
    losses, params = trained(replace(run, batch=4, accumulate=1))
    assert len(losses) == 4 and len({round(x, 4) for x in losses}) == 4
    for batch in (2, 1):
        other, found = trained(replace(run, batch=batch, accumulate=4 // batch))
        assert all(abs(a - b) < 1e-6 * abs(a) for a, b in zip(losses, other))
        assert all((a - b).abs().max() < 1e-7 for a, b in zip(params, found))


def test_noise_and_times_depend_on_the_sample_only(root, run):
    """Of two epochs, whatever the batch size, accumulation and number of loader processes."""
    family, c = models.family(run.model / "transformer")

    def drawn(workers=0, **plan):
        batches, found = pictures.batches(replace(run, **plan), family, c), {}
        for number, micro, facts in data.stream(batches, 0, 2 * sum(batches.rounds), workers):
            rows = [{k: v[i] for k, v in m.items() if v.ndim} for m in micro for i in range(len(m["t"]))]
            for name, row in zip(facts["ids"], rows, strict=True):
                found[name, number >= sum(batches.rounds)] = row
        return found

    first = drawn(batch=3, accumulate=1)
    assert len(first) == 24 and len({row["t"].item() for row in first.values()}) == 24
    for how in ({"batch": 3, "accumulate": 1, "workers": 2}, {"batch": 1, "accumulate": 4, "workers": 1},
                {"batch": 6, "accumulate": 2}):
        other = drawn(**how)
        assert other.keys() == first.keys()
        assert all(torch.equal(v, other[k][n]) for k, row in first.items() for n, v in row.items()), how


def test_features_need_no_encoder(root, run, tmp_path, monkeypatch):
    """Ahead of time: the same bits, and no weight of VAE or text encoder is ever read."""
    encode.main(encode.Args(run.model, run.data, tmp_path / "f", part=5, clips=run.clips))
    real, read = models.load, []
    monkeypatch.setattr(models, "load", lambda folder, *a, **how: read.append(Path(folder).name) or real(folder, *a, **how))
    a = replace(run, data=tmp_path / "f", out=tmp_path / "a")
    assert train.main(a) == 0 and set(read) == {"transformer"}
    assert kills.same(kills.final(a.out, 4), kills.final(run.out, 4))
    assert (a.out / "export" / "vae" / "diffusion_pytorch_model.safetensors").exists()


def large(name):
    """The whole training step of a published model, abstract: bf16 computation, float32 state, nothing kept of layers."""
    module, c = models.get(name)
    meta = lambda *shape: torch.empty(shape, device="meta")
    tx = optim.chain(optim.clip(1.0), optim.adamw(0.9, 0.98), optim.scale(1e-5))
    with torch.device("meta"):
        state = optim.init(tx, tree.abstract(module.params(c)))
    shape = (1, 16, 21, 60, 104) if module is wan else (1, 16, 128, 128)
    batch = {"latents": meta(*shape), "noise": meta(*shape), "t": meta(1), "encoder_hidden_states": meta(1, 512, c.text)}
    batch |= {} if module is wan else {"pooled_projections": meta(1, c.pooled), "guidance": meta(1)}
    loss = lambda p, b: module.loss(p, c, b)
    return c, jit.jit(partial(optim.step, loss, tx, compute=torch.bfloat16), donate=True, remat="nothing"), state, batch


def formula(name, c):
    """(dense maps, attention) of a forward pass in FLOPs, without embeddings of time."""
    d, attend = c.width, lambda q, kv: 4 * q * kv * d
    if name.startswith("wan"):  # 81 x 480 x 832: 32,760 tokens; text 512
        n, s, hidden = 21 * 30 * 52, 512, c.hidden
        dense = c.layers * (2 * n * (6 * d * d + 2 * d * hidden) + 2 * s * 2 * d * d)
        return dense + 2 * n * d * 4 * 32 + 2 * s * (c.text * d + d * d), c.layers * (attend(n, n) + attend(n, s))
    n, s, depth = 64 * 64, 512, c.layers + c.single
    return 2 * (n + s) * 12 * d * d * depth + 2 * s * c.text * d + 2 * n * d * 128, depth * attend(n + s, n + s)


@pytest.mark.deep
@pytest.mark.parametrize("name", ["wan:t2v-14b", "flux:dev"])
def test_a_large_training_step_on_paper(name):
    """Memory and FLOPs of 14B and 12B in under 3 minutes, without a weight: 4 forward passes of dense maps (one is the
    recomputation), and attention once or twice forward and, with its scores once more, 2.5 times backward."""
    was, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.time()
    c, step, state, batch = large(name)
    low = step.lower(state, batch)
    memory, cost = low.memory(), low.cost()
    seconds, grown = time.time() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - was) / 2**20
    dense, attention = formula(name, c)
    ops = cost["flops_by_op"]
    flat = sum(ops.get(n, 0) for n in ("mm.default", "addmm.default"))
    rest = (cost["flops"] - flat) / attention
    print(f"\n{name}: {seconds:.0f} s, {cost['flops'] / 1e15:.3f} PFLOP, attention {rest:.2f}, process +{grown:.1f} GiB, "
          + ", ".join(f"{k} {v / 2**30:.1f} GiB" for k, v in memory.items()))
    assert seconds < 180 and grown < 4
    assert abs(flat / (4 * dense) - 1) < 0.01
    assert min(abs(rest / k - 1) for k in (3.5, 4.5)) < 0.01
    params = tree.size(state["params"])
    assert abs(memory["arguments"] / (12 * params) - 1) < 0.01  # the parameters and two moments, float32
    assert memory["outputs"] < 1e4 and 4 * params < memory["temporary"] < 6 * params  # gradients, and less than a copy
