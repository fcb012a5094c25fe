"""Schemes that divide what is no sequence: images and videos, patches of pictures, experts, words; on real ranks."""

import subprocess
import sys
from dataclasses import replace
from functools import cache, partial

import mesh_ranks
import meshes
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from mmfunc import generate, jit, models, nn, random, shard, tree
from mmfunc.models import sd_vae, wan_vae
from mmfunc.shard import layout
from mmfunc.tree import Tree

D, E, K = 12, 5, 2  # width, experts, experts of a token
PLANS = {2: [shard.Mesh(ulysses=2), shard.Mesh(ring=2)],
         4: [shard.Mesh(ring=2, ulysses=2), shard.Mesh(fsdp=2, ulysses=2)]}


def whole_gradients(net: shard.Net | None, declared: Tree, loss, params: Tree, batch: Tree) -> tuple[Tensor, dict]:
    """(loss, gradients) of all ranks of a mesh, whole; net None: of this process alone."""
    with shard.use(net, declared):
        value = lambda p, b: shard.share(loss(shard.ready(p), b))
        found, grads = jit.value_and_grad(value)(shard.place(params), batch)
        grads = shard.sync(tree.flatten(grads))
        if net:
            specs = shard.using().layers[""].specs
            grads = {n: layout.whole(g, specs[n], specs[n].optimize, net) for n, g in grads.items()}
        return shard.total(found), grads


def apart(found: tuple, want: tuple) -> float:
    """How far (loss, gradients) are apart, as a share of what is allowed."""
    return max((abs(found[0] - want[0]) / want[0]).item() / 1e-6, meshes.worst(found[1], want[1])[0] / 1e-5)


def off(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


# ---- autoencoders

SHAPES = {"sd_vae:tiny": (3, 20, 12), "sd_vae:tiny-quant": (3, 20, 12), "wan_vae:tiny": (3, 13, 24, 8)}


@cache
def autoencoder(name: str) -> tuple:
    """(family, Config, parameters, pixels), float64."""
    module, c = models.get(name)
    params = meshes.redrawn(module.params(c))
    return module, c, tree.map(torch.Tensor.double, params), meshes.draw(1, 2, *SHAPES[name]).double()


def coded(net: shard.Net | None, name: str) -> dict[str, Tensor]:
    """Latents, pixels, loss and gradients of an autoencoder."""
    module, c, params, x = autoencoder(name)
    declared = module.params(c)
    half = net.size(("fsdp",)) if net else 1
    mine = x.chunk(half)[net.at[shard.AXES.index("fsdp")]] if half > 1 else x
    loss = lambda p, b: module.loss(p, c, b) / half
    value, grads = whole_gradients(net, declared, loss, params, {"pixel_values": mine})
    with torch.no_grad(), shard.use(net, declared):
        p = shard.ready(shard.place(params))
        mean, logvar = module.encode(p, c, x)
        out = {"mean": mean, "logvar": logvar, "pixels": module.decode(p, c, mean)}
        if name == "wan_vae:tiny":  # without a cache frames are divided too
            out |= dict(zip(("all mean", "all logvar"), module.encode(p, c, x, chunk=None)))
            out["all pixels"] = module.decode(p, c, mean, chunk=None)
    return {"loss": value} | out | {f"grad {n}": g for n, g in grads.items()}


def codes(rank: int, world: int, wanted: dict) -> dict[str, tuple]:
    """The largest difference from one process, and of what."""
    out = {}
    for mesh in PLANS[world]:
        net = shard.connect(mesh)
        for name, want in wanted.items():
            found = coded(net, name)
            floor = 1e-9 * max(w.abs().max() for n, w in want.items() if n.startswith("grad"))
            far = {n: off(found[n], w) for n, w in want.items() if not n.startswith("grad") or w.abs().max() > floor}
            out[f"{mesh} {name}"] = max((v, n) for n, v in far.items())
    return out


@pytest.mark.parametrize("world", PLANS)
def test_rows_of_images_equal_one_process(world, monkeypatch):
    """Sides and frames that do not divide, norms over all pixels, attention in the middle, streams, gradients.

    In float64, norms too, which shows more than rounding would let see.
    """
    for name in SHAPES:
        autoencoder(name)
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.is_floating_point() else x.double())
    wanted = {name: coded(None, name) for name in SHAPES}
    for found in mesh_ranks.run(codes, world, wanted):
        assert len(found) == 6 and max(v for v, _ in found.values()) < 1e-11, found


class Live(TorchDispatchMode):
    """The most bytes of new storages that are alive at a time, beside given ones."""

    def __init__(self, given: Tree):
        super().__init__()
        self.given, self.alive, self.peak = {t.untyped_storage()._cdata for t in tree.leaves(given)}, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and (s := t.untyped_storage())._cdata not in self.given | self.alive.keys():
                self.alive[s._cdata] = StorageWeakRef(s), s.nbytes()
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(n for _, n in self.alive.values()))
        return out


WIDE = {"sd_vae:tiny": ((16, 128, 8), {"widths": (24, 48)}), "wan_vae:tiny": ((4, 3, 24, 2), {"width": 16})}


def peaks(rank: int, world: int) -> dict[str, float]:
    """Bytes for decoding, beside the pixels, and for a loss with its gradients."""
    out = {}
    for name, (shape, wide) in WIDE.items():
        module, c = models.get(name)
        c = replace(c, **wide)
        p, z = tree.init(module.params(c), random.key(0)), torch.zeros(1, *shape)
        with shard.use(shard.connect(shard.Mesh(ulysses=world)) if world > 1 else None, module.params(c)):
            with torch.no_grad(), Live([p, z]) as live:
                pixels = module.decode(p, c, z)
            out[f"{name} decode"] = live.peak - pixels.nbytes
            with Live([p, pixels]) as live:
                jit.value_and_grad(module.loss)(p, c, {"pixel_values": pixels})
            out[f"{name} loss"] = live.peak
    return out


def fallen():
    alone = peaks(0, 1)
    for world in (2, 4):
        for found in mesh_ranks.run(peaks, world):
            shares = {k: round(found[k] / n * world, 2) for k, n in alone.items()}
            assert max(shares.values()) < 1.1 + 0.1 * world, shares


def test_memory_of_rows_falls():
    """To a half and a quarter of one process's, but for halos and what is whole; in a process of its own, as after other
    tests it was seen to hold more."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


# ---- encoders of pictures of different sizes

PICTURES = [(48, 40), (8, 8), (24, 16), (40, 40), (16, 16), (8, 24), (32, 32)]


def costs() -> list[float]:
    """Of encoding: pixels, and the pairs of them that attend at the lowest resolution."""
    return [y * x + (y * x / 4) ** 2 / 64 for y, x in PICTURES]


def seen(p: Tree, batch: list[Tensor]) -> Tensor:
    """A loss of the latents of pictures."""
    module, c = models.get("sd_vae:tiny")
    shapes = [(1, 2 * c.latent, y // 2, x // 2) for y, x in PICTURES][: len(batch)]
    run = lambda x: module.encode_forward(p, c, {"pixel_values": x})
    return sum((z * z.detach().cos()).sum() for z in shard.shared(run, batch, costs()[: len(batch)], shapes))


def saw(rank: int, world: int, params: Tree, wants: dict[int, tuple]) -> dict:
    """How far this is from one process, for many pictures and for one alone."""
    module, c = models.get("sd_vae:tiny")
    meshes_ = {2: [shard.Mesh(ulysses=2)], 4: [shard.Mesh(ring=2, ulysses=2)]}[world]
    return {(str(m), n): apart(whole_gradients(shard.connect(m), module.params(c), seen, params, pictures()[:n]), want)
            for m in meshes_ for n, want in wants.items()}


def pictures() -> list[Tensor]:
    """In float64: with another number of threads oneDNN's float32 convolutions of some CPUs differ by more than 1e-5."""
    return [meshes.draw(i, 1, 3, y, x).double() for i, (y, x) in enumerate(PICTURES)]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_pictures(world):
    module, c = models.get("sd_vae:tiny")
    params = tree.map(torch.Tensor.double, meshes.redrawn(module.params(c)))
    wants = {n: whole_gradients(None, module.params(c), seen, params, pictures()[:n]) for n in (7, 1)}
    for found in mesh_ranks.run(saw, world, params, wants):
        assert len(found) == 2 and max(found.values()) < 1, found


def test_a_plan_by_costs():
    """Each item once; no rank has more than an even share and one item, and with many items it is close to even."""
    loads = [sum(costs()[i] for i in own) for own in shard.plan(costs(), 3)]
    assert sorted(i for own in shard.plan(costs(), 3) for i in own) == list(range(7))
    assert max(loads) <= sum(loads) / 3 + max(costs())
    many = (meshes.draw(1, 512).abs() * 1000 + 10).tolist()
    loads = [sum(many[i] for i in own) for own in shard.plan(many, 8)]
    assert max(loads) < 1.005 * min(loads)


# ---- heads that do not divide

HEADS = {"blocks": [{"self": nn.Attention(D, 6, 4, kv_heads=2)}] * 2}


def packed(p: Tree, c: None, x: Tensor, ctx: Tree) -> Tensor:
    q, k, v = nn.qkv(p["self"], x, 4)
    return x + nn.merge(p["self"], nn.attend(q, k, v, causal=ctx["causal"], segments=ctx["segments"]))


def attended(p: Tree, batch: Tree) -> Tensor:
    ctx = {k: batch[k] for k in ("causal", "segments")}
    chain = nn.Chain(lambda p, c, b: (b["x"], ctx), (("blocks", packed),), lambda p, c, x, ctx: x)
    return ((chain(p, None, batch) - batch["want"]).square() * (batch["segments"] > 0)[..., None]).sum()


def heads(rank: int, world: int, params: Tree, wants: list[tuple]) -> dict:
    out = {}
    for mesh in (shard.Mesh(ulysses=4), shard.Mesh(ring=4), shard.Mesh(tp=4), shard.Mesh(tp=2, ulysses=2)):
        net = shard.connect(mesh)
        for i, (batch, want) in enumerate(wants):
            out[f"{mesh} {i}"] = apart(whole_gradients(net, HEADS, attended, params, batch), want)
    return out


def test_fewer_key_heads_than_ranks():
    """6 query and 2 key heads on 4 ranks, 13 tokens in packs: causal and not."""
    params, segments = meshes.redrawn(HEADS), torch.tensor([[1] * 5 + [2] * 6 + [0] * 2, [3] * 13])
    batches = [{"x": meshes.draw(1, 2, 13, D), "want": meshes.draw(2, 2, 13, D), "segments": segments, "causal": causal}
               for causal in (True, False)]
    wants = [(b, whole_gradients(None, HEADS, attended, params, b)) for b in batches]
    for found in mesh_ranks.run(heads, 4, params, wants):
        assert len(found) == 8 and max(found.values()) < 1, found


# ---- experts

def dense(p: Tree, c: None, x: Tensor, ctx: Tree) -> Tensor:
    """The same by all experts for all tokens."""
    q, k, v = nn.qkv(p["self"], x, 6)
    x = x + nn.merge(p["self"], nn.attend(q, k, v))
    weight, ids = meshes.router(p["router"], x)
    each = torch.einsum("bsef,edf->bsed", torch.relu(torch.einsum("bsd,efd->bsef", x, p["up"])), p["down"])
    kept = torch.zeros(*x.shape[:2], E).scatter(-1, ids, weight)
    ctx["counts"].append((kept > 0).sum((0, 1)).float())
    return x + (each * kept[..., None]).sum(2)


def mixture(layer, room: int | None = None):
    """(loss, what experts got of each layer) of a small network of experts, as a function of (p, batch)."""
    counts = []
    chain = nn.Chain(lambda p, c, b: (b["x"], {"room": room, "counts": counts}), (("blocks", layer),),
                     lambda p, c, x, ctx: x)

    def loss(p: Tree, batch: Tree) -> Tensor:
        counts.clear()
        return (chain(p, None, batch) - batch["want"]).square().sum() / batch["num_items_in_batch"]

    return loss, counts


MIXED = {2: [shard.Mesh(ep=2), shard.Mesh(tp=2), shard.Mesh(tp=2, sequence=True)],
         4: [shard.Mesh(ep=4), shard.Mesh(ep=2, tp=2), shard.Mesh(ep=2, ulysses=2), shard.Mesh(fsdp=2, ep=2)]}


def mixed(rank: int, world: int, params: Tree, batch: Tree, want: tuple, each: Tensor) -> dict:
    """How far this is from one process on each mesh, and whether experts got as many tokens."""
    out = {}
    for mesh in MIXED[world]:
        net = shard.connect(mesh)
        mine = meshes.samples(mesh, rank)
        loss, counts = mixture(meshes.sparse)
        own = {k: v[mine] for k, v in batch.items()} | {"num_items_in_batch": torch.tensor(len(mine))}
        with shard.use(net):
            own = shard.counted(own)
        found = whole_gradients(net, meshes.EXPERTS, loss, params, own)
        out[str(mesh)] = apart(found, want), torch.equal(torch.stack(counts), each)
    return out


@pytest.mark.parametrize("world", MIXED)
def test_experts_equal_the_dense_computation(world):
    """Experts, hidden channels and rows that do not divide; the router learns the same, and the counts are of all."""
    params = meshes.redrawn(meshes.EXPERTS)
    batch = {"x": meshes.draw(1, 4, 7, D), "want": meshes.draw(2, 4, 7, D)}
    loss, counts = mixture(dense)
    want = whole_gradients(None, meshes.EXPERTS, loss, params, batch | {"num_items_in_batch": 4})
    assert all(g.abs().max() > 1e-3 for n, g in want[1].items() if n.endswith(("router.weight", "up", "down")))
    assert [int(c.sum()) for c in counts] == [4 * 7 * K] * 2
    for found in mesh_ranks.run(mixed, world, params, batch, want, torch.stack(counts)):
        assert all(far < 1 and same for far, same in found.values()), found


def test_experts_without_room_drop_the_last_tokens():
    x, ids = meshes.draw(1, 2, 5, D), torch.tensor([[0], [1], [0], [0], [2]]).expand(2, 5, 1)
    to = shard.routes(ids, 4, room=3)
    assert to.counts.tolist() == [6, 2, 2, 0] and (to.place < 0).flatten().nonzero().flatten().tolist() == [5, 7, 8]
    y = shard.combine(shard.dispatch(x, to), to, torch.full((2, 5, 1), 2.0))
    want = 2 * x
    want[1, [0, 2, 3]] = 0
    assert torch.equal(y, want)


# ---- space and time

def across(p: Tree, c: None, x: Tensor, ctx: Tree) -> Tensor:
    """Attention along time, then along space, [B, T, S, D]."""
    def attention(name: str, x: Tensor) -> Tensor:
        return nn.merge(p[name], nn.attend(*nn.qkv(p[name], nn.layernorm(None, x), 6)))

    x = x + shard.along(partial(attention, "time"), x, 1)
    x = x + shard.along(partial(attention, "space"), x, 2)
    return x + nn.mlp(p["mlp"], x)


VIDEO = {"blocks": [{"time": nn.Attention(D, 2, 6), "space": nn.Attention(D, 2, 6), "mlp": nn.MLP(D, 16)}] * 2}
SPATIAL = nn.Chain(lambda p, c, b: (b["x"], {}), (("blocks", across),), lambda p, c, x, ctx: x)
SWITCHED = {2: [shard.Mesh(ulysses=2), shard.Mesh(tp=2)],
            4: [shard.Mesh(ring=2, ulysses=2), shard.Mesh(ulysses=4), shard.Mesh(ulysses=2, tp=2, sequence=True)]}


def video(p: Tree, batch: Tree) -> Tensor:
    return (SPATIAL(p, None, batch) - batch["want"]).square().mean()


class Count(TorchDispatchMode):
    """How often a collective is called."""

    def __init__(self, name: str):
        super().__init__()
        self.name, self.calls = name, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func.__name__.startswith(self.name)
        return func(*args, **(kwargs or {}))


def switched(rank: int, world: int, params: Tree, batch: Tree, want: tuple) -> dict:
    """How far this is from one process on each mesh, and how many exchanges a forward pass has."""
    out = {}
    for mesh in SWITCHED[world]:
        net = shard.connect(mesh)
        found = whole_gradients(net, VIDEO, video, params, batch)
        with shard.use(net, VIDEO), torch.no_grad(), Count("all_to_all") as count:
            video(shard.ready(shard.place(params)), batch)
        out[str(mesh)] = apart(found, want), count.calls
    return out


@pytest.mark.parametrize("world", SWITCHED)
def test_space_and_time_take_turns(world):
    """5 frames of 7 places: two exchanges a layer, and none without rows to divide."""
    params, batch = meshes.redrawn(VIDEO), {"x": meshes.draw(1, 2, 5, 7, D), "want": meshes.draw(2, 2, 5, 7, D)}
    want = whole_gradients(None, VIDEO, video, params, batch)
    for found in mesh_ranks.run(switched, world, params, batch, want):
        assert all(far < 1 and calls == (0 if mesh == "tp 2" else 4) for mesh, (far, calls) in found.items()), found


# ---- words

def spoken(rank: int, world: int, want: dict) -> dict:
    """How far logits are from one process, and whether the same is said."""
    out = {}
    for mesh in ([shard.Mesh(tp=2), shard.Mesh(fsdp=2)] if world == 2 else [shard.Mesh(tp=4)]):
        net = shard.connect(mesh)
        for name, (logits, told) in want.items():
            found = says(net, name)
            out[f"{mesh} {name}"] = off(found[0], logits), found[1] == told
    return out


def says(net: shard.Net | None, name: str) -> tuple[Tensor, list]:
    one, ids = meshes.case(name), meshes.words(3, 2, 9)
    with shard.use(net, meshes.declared(name)), torch.no_grad():
        p = shard.ready(shard.place(one.params))
        logits = shard.complete(one.module.forward(p, one.c, {"input_ids": ids}), "vocab")
        how = generate.Sampling(temperature=0.7, top_k=20, repetition=1.3)
        told = [generate.generate(Family(one.module), p, one.c, {"input_ids": ids}, new=5, how=how, chunk=4)
                for how in (None, how)]
    return logits, told


class Family:
    """What generation asks of a language model."""

    def __init__(self, module):
        self.step, self.cache = module.step, module.cache
        self.embeds = lambda p, c, batch: module.embeds(p, c, batch)


@pytest.mark.parametrize("world", [2, 4])
def test_words_under_a_divided_vocabulary(world):
    """Whole logits, greedy and sampled tokens; a vocabulary and heads that do not divide."""
    want = {n: says(None, n) for n in ("qwen2", "qwen2 odd")}
    for found in mesh_ranks.run(spoken, world, want):
        assert all(far < 1e-5 and same for far, same in found.values()), found


# ---- compiled

def chained(block, c) -> object:
    chain = nn.Chain(lambda p, c, b: (b["x"], {}), (("blocks", block),), lambda p, c, x, ctx: x)
    return lambda p, b: chain(p, c, b).square().mean()


def looked(p: Tree, batch: Tree) -> Tensor:
    """A loss of what ranks see of pictures, some each."""
    run = lambda x: (x.flatten() @ p["see"]["weight"][:, : x.numel()].T).tanh()
    return sum(y.square().sum() for y in shard.shared(run, batch["x"], [t.numel() for t in batch["x"]], [(3,)] * 3))


PLAIN, CAUSAL = sd_vae.Config(groups=2), wan_vae.Config()
SMALL = {  # mesh, what is declared, (p, batch) -> loss, shape of x
    "rows": (shard.Mesh(ulysses=2), {"blocks": [sd_vae.Resnet(4, 4), {"down": nn.Conv(4, 4, (3, 3))}, {
        "norm": nn.GroupNorm(4), "self": nn.Attention(4, 1, 4)}, {"up": nn.Conv(4, 2, (3, 3))}]},
        chained(sd_vae.block, PLAIN), (1, 4, 10, 6)),
    "frames": (shard.Mesh(ring=2), {"blocks": [nn.Conv(4, 4, (3, 3, 3)), {
        "down": nn.Conv(4, 4, (3, 3)), "time": nn.Conv(4, 4, (3, 1, 1))}, {
        "up": nn.Conv(4, 4, (3, 3)), "time": nn.Conv(4, 8, (3, 1, 1))}]}, chained(wan_vae.block, CAUSAL), (1, 4, 7, 4, 6)),
    "space and time": (shard.Mesh(ulysses=2), {"blocks": VIDEO["blocks"][:1]}, chained(across, None), (2, 5, 7, D)),
    "experts": (shard.Mesh(ep=2), {"blocks": meshes.EXPERTS["blocks"][:1]}, chained(
        lambda p, c, x, ctx: meshes.sparse(p, c, x, {"room": None}), None), (2, 7, D)),
    "pictures": (shard.Mesh(tp=2), {"see": nn.Linear(60, 3)}, looked, [(3, 5, 4), (3, 2, 2), (3, 4, 1)]),
}


def compiled(rank: int, world: int, backend: str) -> dict[str, float]:
    """How far loss and gradients of compiled schemes are from the eager ones."""
    out = {}
    for name, (mesh, declared, loss, shape) in SMALL.items():
        x = meshes.draw(1, *shape) if isinstance(shape, tuple) else [meshes.draw(i, *s) for i, s in enumerate(shape)]
        with shard.use(shard.connect(mesh), declared):
            params = shard.place(meshes.redrawn(declared))
            step = lambda p, b, loss=loss: jit.value_and_grad(lambda p, b: shard.share(loss(shard.ready(p), b)))(p, b)
            want, found = (jit.jit(step, backend=b)(params, {"x": x}) for b in ("eager", backend))
        out[name] = apart(*((v, tree.flatten(g)) for v, g in (found, want)))
    return out


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.deep)])
def test_compiled_schemes_equal_eager_ones(backend):
    """Each as one graph, forward and backward, on two ranks."""
    for found in mesh_ranks.run(compiled, 2, backend):
        assert found.keys() == SMALL.keys() and max(found.values()) < 1, found


if __name__ == "__main__":
    fallen()
