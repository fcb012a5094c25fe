"""Models, batches and plans for tests of meshes; the same on one rank, on simulated ranks and on real ones."""

from dataclasses import dataclass, replace
from functools import cache, partial
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mmfunc import jit, lora, models, nn, optim, random, shard, tree, update
from mmfunc.relay import Plan
from mmfunc.shard import layout
from mmfunc.shard.mesh import BATCH, Mesh
from mmfunc.tree import Param, Tree

PLANS = {
    "data2": Mesh(data=2),
    "fsdp2": Mesh(fsdp=2),
    "zero1": Mesh(fsdp=2, zero=1),
    "zero2": Mesh(fsdp=2, zero=2),
    "tp2": Mesh(tp=2),
    "tp2+sp": Mesh(tp=2, sequence=True),
    "ulysses2": Mesh(ulysses=2),
    "ring2": Mesh(ring=2),
    "fsdp2 tp2": Mesh(fsdp=2, tp=2),
    "tp2+sp ulysses2": Mesh(tp=2, ulysses=2, sequence=True),
    "ring2 ulysses2": Mesh(ring=2, ulysses=2),
    "data2 fsdp2": Mesh(data=2, fsdp=2),
    "fsdp2 ulysses2 tp2": Mesh(fsdp=2, ulysses=2, tp=2),
    "ep2": Mesh(ep=2),
    "fsdp2 ep2 tp2": Mesh(fsdp=2, ep=2, tp=2),
    "pp2": Mesh(pp=2),
    "pp2 interleaved": Mesh(pp=2),
    "pp2 zero-bubble": Mesh(pp=2),
    "pp2 data2": Mesh(pp=2, data=2),
    "pp2 fsdp2": Mesh(pp=2, fsdp=2),
    "pp2 zero2": Mesh(pp=2, fsdp=2, zero=2),
    "pp2 tp2": Mesh(pp=2, tp=2),
    "pp2 tp2+sp": Mesh(pp=2, tp=2, sequence=True),
    "pp2 ulysses2": Mesh(pp=2, ulysses=2),
    "pp2 ring2": Mesh(pp=2, ring=2),
    "pp2 zero1": Mesh(pp=2, fsdp=2, zero=1),
    "pp2 ep2": Mesh(pp=2, ep=2),
    "pp2 fsdp2 tp2": Mesh(pp=2, fsdp=2, tp=2),
    "pp2 tp2 ulysses2": Mesh(pp=2, tp=2, ulysses=2),
    "pp2 data2 tp2": Mesh(pp=2, data=2, tp=2),
    "pp2 ep2 tp2": Mesh(pp=2, ep=2, tp=2),
    "pp2 zero1 ring2": Mesh(pp=2, fsdp=2, ring=2, zero=1),
}
ONE = Plan()
STAGES = {"pp2 interleaved": Plan(virtual=2), "pp2 zero-bubble": Plan("zero-bubble"), "pp2 fsdp2": Plan("zero-bubble"),
          "pp2 tp2+sp": Plan("gpipe"), "pp2 ring2": Plan("1f1b", recompute=True), "pp2 zero1": Plan("zero-bubble"),
          "pp2 tp2 ulysses2": Plan("zero-bubble"), "pp2 zero1 ring2": Plan(virtual=2)}
SAMPLES = 4


@dataclass
class Case:
    """A model, its loss, whole parameters, and a sample's own batch entries."""

    module: Any
    c: Any
    params: Tree
    loss: Any  # (p, c, batch) -> 0-d
    batch: Any  # samples -> what a rank with these reads


def redrawn(declared: Tree) -> Tree:
    """Published initialisations are zero in places and hide errors."""
    def one(name: str, p: Any) -> Tensor:
        if not p.shape:
            return torch.tensor(0.5)
        x = random.normal(random.fold_in(random.key(7), name), p.shape)
        if len(p.shape) > 1:
            return x * (0.5 if "embed" in name else prod(p.shape[1 if len(p.shape) > 3 else -1 :]) ** -0.5)
        return 1 + 0.15 * x if "norm" in name and name.endswith("weight") or "span" in name else 0.1 * x
    return tree.unflatten({n: one(n, p) for n, p in tree.flatten(declared).items()}, declared)


def draw(seed: int, *size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def words(seed: int, *size: int, high: int = 140) -> Tensor:
    return torch.randint(0, high, size, generator=torch.Generator().manual_seed(seed))


def language(name: str, **change: Any) -> Case:
    """Rows of 37 tokens, which packs of two or three and padding fill."""
    module, c = models.get(name)
    c = replace(c, **change)
    ids = words(1, SAMPLES, 37)
    cuts = [(13, 30, 37), (20, 35, 35), (37, 37, 37), (5, 6, 33)]
    mask, place = torch.zeros(SAMPLES, 37, dtype=torch.int64), torch.zeros(SAMPLES, 37, dtype=torch.int64)
    for b, ends in enumerate(cuts):
        for k, (a, e) in enumerate(zip((0, *ends), ends)):
            mask[b, a:e], place[b, a:e] = k + 1, torch.arange(e - a)
    labels = torch.where((mask > 0) & (place > 0), ids, -100)

    def batch(which: list[int]) -> dict:
        count = (labels[which][:, 1:] >= 0).sum()
        return {"input_ids": ids[which], "attention_mask": mask[which], "position_ids": place[which],
                "labels": labels[which], "num_items_in_batch": count}

    return Case(module, c, redrawn(module.params(c)), module.loss, batch)


def vision(name: str) -> Case:
    """Images, a video and text alone, in different samples."""
    module, c = models.get(name)
    grids = [[(1, 6, 10)], [(1, 4, 4), (1, 2, 2)], [], [(3, 4, 4)]]
    video = [False, False, False, True]
    samples = []
    for i, found in enumerate(grids):
        ids = words(i, 3).tolist()
        for t, h, w in found:
            ids += [c.start_token] + [c.video_token if video[i] else c.image_token] * (t * h * w // 4) + [c.end_token]
        ids += words(10 + i, 5 + i).tolist()
        pixels = draw(20 + i, sum(t * h * w for t, h, w in found), 3 * 2 * c.patch**2)
        samples.append((ids, pixels, found))

    def batch(which: list[int]) -> dict:
        ids = torch.zeros(len(which), 31, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for b, i in enumerate(which):
            ids[b, : len(samples[i][0])] = torch.tensor(samples[i][0])
            mask[b, : len(samples[i][0])] = 1
        labels = torch.where((mask == 1) & (ids < 140), ids, -100)
        labels[:, 0] = -100
        out = {"input_ids": ids, "attention_mask": mask, "labels": labels,
               "num_items_in_batch": (labels[:, 1:] >= 0).sum()}
        for is_video, kind, grid in ((False, "pixel_values", "image_grid_thw"),
                                     (True, "pixel_values_videos", "video_grid_thw")):
            if here := [i for i in which if video[i] == is_video and samples[i][2]]:
                out |= {kind: torch.cat([samples[i][1] for i in here]),
                        grid: torch.tensor([g for i in here for g in samples[i][2]])}
        return module.prepare(c, out, patches=128, row=60)

    return Case(module, c, redrawn(module.params(c)), module.loss, batch)


def diffusion(name: str, shape: tuple[int, ...], **change: Any) -> Case:
    """Grids and numbers of text tokens that do not divide."""
    module, c = models.get(name)
    c = replace(c, **change)
    all_ = {"latents": draw(1, SAMPLES, c.channels, *shape), "noise": draw(2, SAMPLES, c.channels, *shape),
            "t": torch.tensor([0.83, 0.27, 0.5, 0.9]), "encoder_hidden_states": draw(3, SAMPLES, 7, c.text)}
    if name.startswith("flux"):
        all_ |= {"pooled_projections": draw(4, SAMPLES, c.pooled), "guidance": torch.tensor([3.5, 1.0, 2.0, 4.0])}
    else:
        all_["encoder_attention_mask"] = (torch.arange(7) < torch.tensor([[7], [3], [5], [7]])).int()
        if c.condition:
            all_ |= {"condition": draw(5, SAMPLES, c.condition, *shape),
                     "encoder_hidden_states_image": draw(6, SAMPLES, 9, c.image)}
    batch = lambda which: {k: v[which] for k, v in all_.items()} | {"num_items_in_batch": torch.tensor(len(which))}
    return Case(module, c, redrawn(module.params(c)), module.loss, batch)


def encoder(name: str, **change: Any) -> Case:
    """Sum of squares of what an encoder says against fixed numbers."""
    module, c = models.get(name)
    c = replace(c, **change)
    vision = getattr(c, "kind", "") == "vision"
    size = (c.image // c.patch) ** 2 + 1 if vision else 19
    want = draw(3, SAMPLES, size, c.width)
    ids, mask = words(1, SAMPLES, size), (torch.arange(size) < torch.tensor([[19], [11], [4], [16]])).long()
    all_ = {"pixel_values": draw(2, SAMPLES, 3, c.image, c.image)} if vision else {"input_ids": ids, "attention_mask": mask}

    def loss(p: Tree, c: Any, batch: dict) -> Tensor:
        out = module.forward(p, c, {k: batch[k] for k in all_})
        found = out if isinstance(out, Tensor) else out["hidden"] + out["penultimate"] + out["pooled"][:, None]
        return (found - batch["want"]).square().mean((1, 2)).sum() / batch["num_items_in_batch"]

    def batch(which: list[int]) -> dict:
        return {k: v[which] for k, v in (all_ | {"want": want}).items()} | {"num_items_in_batch": torch.tensor(len(which))}

    return Case(module, c, redrawn(module.params(c)), loss, batch)


def autoencoder(name: str, *shape: int) -> Case:
    """Rows, and frames, that do not divide."""
    module, c = models.get(name)
    x = draw(1, SAMPLES, c.channels, *shape)
    batch = lambda which: {"pixel_values": x[which], "num_items_in_batch": torch.tensor(len(which))}
    return Case(module, c, redrawn(module.params(c)), module.loss, batch)


def router(p: Tree, x: Tensor) -> tuple[Tensor, Tensor]:
    """(weights, numbers) of the two best experts of each token."""
    weight, ids = torch.softmax(nn.linear(p, x), -1).topk(2, -1)
    return weight / weight.sum(-1, keepdim=True), ids


def sparse(p: Tree, c: Any, x: Tensor, ctx: Tree) -> Tensor:
    """A layer of experts behind attention; ctx: room, and a list for what experts get, if it is to be known."""
    q, k, v = nn.qkv(p["self"], x, 6)
    x = x + nn.merge(p["self"], nn.attend(q, k, v))
    rows = shard.enter(x, "mlp")
    weight, ids = router(p["router"], rows)
    to = shard.routes(ids, 5, ctx["room"])
    h = torch.relu(torch.bmm(shard.dispatch(rows, to), p["up"].transpose(1, 2)))
    y = shard.combine(torch.bmm(h, p["down"].transpose(1, 2)), to, weight)
    ctx.get("counts", []).append(to.counts.detach())
    return x + shard.leave(y, "mlp")


EXPERTS = {"blocks": [{"self": nn.Attention(12, 2, 6), "router": nn.Linear(12, 5, "embed -> _"),
                       "up": Param((5, 16, 12), "expert mlp embed"),
                       "down": Param((5, 12, 16), "expert embed mlp")}] * 2}


def mixture() -> Case:
    """Numbers of experts and of rows that do not divide."""
    all_ = {"x": draw(1, SAMPLES, 7, 12), "want": draw(2, SAMPLES, 7, 12)}
    chain = nn.Chain(lambda p, c, b: (b["x"], {"room": None}), (("blocks", sparse),), lambda p, c, x, ctx: x)

    def loss(p: Tree, c: Any, batch: dict) -> Tensor:
        return (chain(p, c, batch) - batch["want"]).square().sum() / batch["num_items_in_batch"]

    batch = lambda which: {k: v[which] for k, v in all_.items()} | {"num_items_in_batch": torch.tensor(len(which))}
    return Case(SimpleNamespace(params=lambda c: EXPERTS), None, redrawn(EXPERTS), loss, batch)


CASES = {
    "qwen2": lambda: language("qwen2:tiny"),
    "qwen2 odd": lambda: language("qwen2:tiny", heads=3, kv_heads=1, width=48, hidden=45, vocab=151, tied=True),
    "qwen2 lora": lambda: language("qwen2:tiny"),
    "qwen2 head": lambda: language("qwen2:tiny"),
    "qwen2vl": lambda: vision("qwen2vl:tiny"),
    "flux": lambda: diffusion("flux:tiny", (6, 10)),
    "wan": lambda: diffusion("wan:tiny", (3, 6, 10)),
    "wan odd": lambda: diffusion("wan:tiny", (3, 6, 10), heads=3),
    "wan i2v": lambda: diffusion("wan:tiny-i2v", (3, 6, 10)),
    "t5": lambda: encoder("t5:tiny"),
    "umt5": lambda: encoder("t5:tiny-umt5", heads=3),
    "clip": lambda: encoder("clip:tiny-text"),
    "clip vision": lambda: encoder("clip:tiny-vision"),
    "sd_vae": lambda: autoencoder("sd_vae:tiny", 20, 12),
    "wan_vae": lambda: autoencoder("wan_vae:tiny", 13, 24, 8),
    "experts": mixture,
}


@cache
def case(name: str) -> Case:
    return CASES[name]()


def declared(name: str) -> Tree:
    """What a case's parameters are declared as, adapters included."""
    found = case(name).module.params(case(name).c)
    return lora.LoRA(found, 4, r"^blocks\..*\.(q|v|out|down)$", 8) if name.endswith("lora") else found


def divided(name: str) -> tuple[Tree, Tree]:
    """(trained, frozen) whole parameters of a case."""
    rule = {"lora": r"\.lora_[ab]$|^norm", "head": "^(norm|head)"}.get(name.partition(" ")[2])
    if not rule:
        return case(name).params, None
    return tree.split(redrawn(declared(name)), rule)


OPTIMIZERS = {  # name: (transformation, how far parameters may be apart after three calls of it)
    "sgd": (optim.chain(optim.clip(1.0), optim.scale(0.1)), 1e-6),
    "adamw": (optim.chain(optim.clip(1.0), optim.adamw(), optim.decay(0.1), optim.scale(1e-3)), 1e-5),
    "accumulated": (optim.accumulate(2, optim.chain(optim.clip(1.0), optim.adamw(), optim.scale(1e-3))), 1e-5),
}


def gradients(name: str, params: Tree, frozen: Tree, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, gradients as the optimizer's state is divided), on any mesh."""
    one = case(name)
    value = lambda p, b: shard.share(one.loss(shard.ready(tree.merge(p, frozen)), one.c, b))
    found, grads = jit.value_and_grad(value)(params, shard.counted(batch))
    return shard.total(found), shard.sync(tree.flatten(grads))


def trained(name: str, tx: optim.Transform, params: Tree, frozen: Tree, batch: dict, calls: int = 3) -> tuple[Tree, Any]:
    """Parameters after some calls of the training step, and what the last one reports, on any mesh."""
    one = case(name)
    state = optim.init(tx, params, frozen)
    for _ in range(calls):
        state, told = optim.step(lambda p, b: one.loss(p, one.c, b), tx, state, batch)
    return state["params"], told


def stepping(name: str, tx: optim.Transform, params: Tree, frozen: Tree, which: list[int], plan: Plan) -> tuple:
    """(step, what it takes): the training step of the mesh in use, and the batch or, in stages, one for each sample."""
    one, batch = case(name), case(name).batch(which)
    loss = lambda p, b: one.loss(p, one.c, b)
    pp = shard.using().net.mesh.pp if shard.using() else 1
    if pp == 1:
        return partial(optim.step, loss, tx), batch
    batches = [one.batch([i]) | {"num_items_in_batch": batch["num_items_in_batch"]} for i in which]
    return update.step(loss, tx, params, frozen, lambda: batches[0], pp, plan, backend="eager"), batches


def staged(name: str, plan: Plan, params: Tree, frozen: Tree, which: list[int], names: tuple[str, ...]) -> tuple:
    """gradients, and trained for each of some optimizers, in stages."""
    step, batches = stepping(name, OPTIMIZERS["sgd"][0], params, frozen, which, plan)
    value, grads = step.pipe(*[optim.ready(shard.held(p), None) for p in (params, frozen)], batches)
    ends = {}
    for o in names:
        again = replace(step, tx=OPTIMIZERS[o][0])
        state = optim.init(again.tx, tree.map(torch.clone, params), frozen)
        for _ in range(3):
            state, told = again(state, batches)
        ends[o] = state["params"], told
    return shard.total(value.sum()), shard.sync(tree.flatten(shard.unready(grads))), ends


@cache
def reference(name: str, optimizer: str | None = None) -> tuple:
    """gradients (or, with the name of an optimizer, trained) on one rank with all samples."""
    given = *divided(name), case(name).batch([*range(SAMPLES)])
    return trained(name, OPTIMIZERS[optimizer][0], *given) if optimizer else gradients(name, *given)


@dataclass
class Ranks:
    """Ranks that run: real ones, of which this process is one, or simulated ones, all of them here."""

    net: shard.Net
    local: Any  # (rank -> tree) -> tree of what ranks have
    common: Any  # what all ranks have -> the tensor


def samples(mesh: Mesh, rank: int) -> list[int]:
    """The samples of the global batch that a rank has."""
    n, i = 1, 0
    for axis, place in zip(shard.AXES, places(mesh)[rank]):
        if axis in BATCH:
            n, i = n * getattr(mesh, axis), i * getattr(mesh, axis) + place
    each = SAMPLES // n
    return [*range(i * each, (i + 1) * each)]


def places(mesh: Mesh) -> list[list[int]]:
    """The place of every rank on each axis."""
    sizes = [getattr(mesh, a) for a in shard.AXES]
    return torch.stack(torch.unravel_index(torch.arange(mesh.world), sizes), -1).tolist()


def found(ranks: Ranks, name: str, optimizers: tuple[str, ...] = (), plan: Plan = ONE) -> tuple[Tensor, dict, dict]:
    """(loss, whole gradients, {optimizer: (whole parameters after, report)}) of a case on a mesh; in stages a rank has
    gradients of its own."""
    with shard.use(ranks.net, declared(name)):
        specs = shard.using().layers[""].specs
        given = [shard.place(ranks.local(lambda r, t=t: t)) if t else None for t in divided(name)]
        if ranks.net.mesh.pp > 1:
            which = ranks.local(lambda r: samples(ranks.net.mesh, r))
            loss, grads, ends = staged(name, plan, *given, which, optimizers)
        else:
            batch = ranks.local(lambda r: case(name).batch(samples(ranks.net.mesh, r)))
            loss, grads = gradients(name, *given, batch)
            ends = {o: trained(name, OPTIMIZERS[o][0], *given, batch) for o in optimizers}
        grads = {n: ranks.common(layout.whole(g, specs[n], specs[n].optimize, ranks.net)) for n, g in grads.items()}
        ends = {o: tree.map(ranks.common, (shard.whole(after), told)) for o, (after, told) in ends.items()}
        return ranks.common(loss), grads, ends


def shares(name: str, loss: Tensor, grads: dict, ends: dict) -> dict[str, float]:
    """How far this is from one rank, as shares of what is allowed: 1 is just allowed."""
    want, slopes = reference(name)
    out = {"loss": (abs(loss - want) / want / 1e-6).item(), "gradients": worst(grads, slopes)[0] / 1e-5}
    for o, (after, told) in ends.items():
        wanted, said = reference(name, o)
        out[o] = apart(tree.flatten(after), tree.flatten(wanted), slopes) / OPTIMIZERS[o][1]
        out[f"{o} norm"] = (abs(told["grad_norm"] - said["grad_norm"]) / said["grad_norm"] / 1e-5).item()
        assert told["finite"]
    return out


def worst(found: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference, relative to a tensor's largest element.

    A gradient below 1e-6 of the largest of all is rounding noise (of a bias of keys, which softmax does not see): it
    must be as small.
    """
    top = max(map(largest, want.values()))
    return max((largest(g - want[k]) / (largest(want[k]) if largest(want[k]) > 1e-6 * top else 0.1 * top), k)
               for k, g in found.items()) if found else (0.0, "")


def largest(x: Tensor) -> float:
    return x.abs().max().item()


def apart(found: dict[str, Tensor], want: dict[str, Tensor], grads: dict[str, Tensor]) -> float:
    """The largest difference of parameters where the gradient is more than rounding noise, relative to 1 or theirs."""
    floor = 1e-6 * max(map(largest, grads.values()))
    seen = {k: (found[k] - v)[grads[k].abs() > max(1e-3 * largest(grads[k]), floor)] for k, v in want.items()}
    return max(largest(d) / max(largest(want[k]), 1.0) for k, d in seen.items() if d.numel())
