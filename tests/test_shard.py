"""Every family on every plan equals one process: loss, gradients, parameters after steps; on simulated ranks."""

import json
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path

import mesh_ranks
import mesh_saves
import meshes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from mmfunc import checkpoint, hub, jit, keys, models, nn, optim, shard, tree
from mmfunc.shard import P, collectives, relayout, ring
from mmfunc.shard.mesh import abstract


def shift(x: Tensor, axis: str, net: shard.Net) -> Tensor:
    """collectives.shift without numbers that differ by rank."""
    n = getattr(net.mesh, axis)
    return collectives.gather(x[None], 0, (axis,), net).index_select(0, (net.index((axis,)) - 1) % n)[0]


@contextmanager
def simulated(mesh: shard.Mesh):
    """The ranks of a mesh, simulated in this process."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=mesh.world)
    was, ring.shift = ring.shift, shift
    try:
        net = shard.connect(mesh)
        net.place = LocalTensor({r: torch.tensor(at) for r, at in enumerate(meshes.places(mesh))})
        with LocalTensorMode(mesh.world):
            yield meshes.Ranks(net, lambda fn: spread([fn(r) for r in range(mesh.world)]), one)
    finally:
        ring.shift = was
        dist.destroy_process_group()


def spread(values: list) -> object:
    """A tree of one value a rank."""
    return tree.map(lambda *ts: LocalTensor(dict(enumerate(t.clone() for t in ts))), *values)


def one(x: Tensor) -> Tensor:
    """What all ranks have in common."""
    found = list(x._local_tensors.values())
    assert all(torch.equal(found[0], t) for t in found)
    return found[0]


SPREAD = {  # cases on real ranks in every run of the tests; all of them: tests/mesh_ranks.py
    "qwen2": ("zero1", "ring2"), "qwen2 odd": ("tp2+sp", "ring2 ulysses2", "pp2 tp2"), "qwen2 lora": ("fsdp2 tp2",),
    "qwen2 head": ("pp2 fsdp2",),
    "qwen2vl": ("tp2", "data2 fsdp2"), "wan i2v": ("zero2", "tp2+sp ulysses2"), "wan odd": ("tp2",),
    "flux": ("ulysses2", "fsdp2 tp2", "pp2 interleaved"), "t5": ("data2",), "umt5": ("ring2 ulysses2",), "clip": ("tp2+sp",),
    "clip vision": ("fsdp2",), "experts": ("pp2 ep2",), "sd_vae": ("pp2 zero1",), "wan_vae": ("ring2",),
}
SIMULATED = [("qwen2", "fsdp2 ulysses2 tp2"), ("flux", "ring2 ulysses2"), ("wan", "tp2+sp ulysses2")]


def test_real_ranks_equal_one_process():
    wanted = [(name, plan) for name, plans in SPREAD.items() for plan in plans]
    found = mesh_ranks.matrix(wanted, tuple(meshes.OPTIMIZERS))
    wrong = {at: f for at, f in found.items() if max(f.values()) >= 1}
    assert not wrong and len(found) == len(wanted)


@pytest.mark.parametrize("name,plan", SIMULATED)
def test_simulated_ranks_equal_one_process(name, plan):
    mesh = meshes.PLANS[plan]
    meshes.reference(name)  # not on simulated ranks
    with simulated(mesh) as ranks:
        found = meshes.found(ranks, name)
    apart = meshes.shares(name, *found)
    assert max(apart.values()) < 1, apart


def traced(name: str, rank: int | None, plan: str | None = None) -> str:
    """The operations of a training step on a rank of a mesh, which is not there; rank None: without a mesh."""
    mesh = meshes.PLANS[plan] if plan else shard.Mesh()
    if mesh.world > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=mesh.world)
    net = None if rank is None else shard.connect(mesh)
    trained, frozen = meshes.divided(name)
    batch = meshes.case(name).batch(meshes.samples(mesh, rank or 0))
    one, tx = meshes.case(name), meshes.OPTIMIZERS["adamw"][0]
    try:
        with shard.use(net, meshes.declared(name)):
            state = optim.init(tx, shard.place(trained), frozen and shard.place(frozen))
            step = jit.jit(partial(optim.step, lambda p, b: one.loss(p, one.c, b), tx))
            text = step.lower(state, batch).text()
    finally:
        if mesh.world > 1:
            dist.destroy_process_group()
    return re.sub(r"'\d+'\)", "group)", text)


@pytest.mark.parametrize("name", ["qwen2", "wan i2v"])
def test_a_mesh_of_one_rank_costs_nothing(name):
    assert traced(name, 0) == traced(name, None)


@pytest.mark.parametrize("name,plan", [("qwen2", "fsdp2 tp2"), ("qwen2", "ulysses2"), ("qwen2vl", "ulysses2"),
                                       ("experts", "ep2")])
def test_all_ranks_run_one_graph(name, plan):
    """But for the names of their groups; numbers of ranks are inputs. (Sends of rings and halos have them as constants,
    and encoders' work is shared unevenly.)"""
    first, last = (traced(name, r, plan) for r in (0, meshes.PLANS[plan].world - 1))
    assert first == last and ("all_gather_into_tensor" in first or "all_to_all" in first)


def test_only_the_axes_that_change_communicate():
    """Rows go between tp alone around maps; all four ranks gather them once, behind the blocks."""
    text = traced("qwen2", 0, "tp2+sp ulysses2")
    sizes = [int(n) for n in re.findall(r"all_gather_into_tensor\.default\([^,]+, (\d+),", text)]
    # of each layer 2 gathers forward, and backward those of 2 scatters
    assert sizes.count(4) == 1 and sizes.count(2) >= 8, sizes


def compiled(rank: int, world: int, plan: str, name: str, mode: str, remat: str | None = None,
             compute: torch.dtype | None = None) -> list[float]:
    """How far a step compiled on real ranks is from the eager one: loss, norm, parameters."""
    mesh = meshes.PLANS[plan]
    one, tx = meshes.case(name), meshes.OPTIMIZERS["adamw"][0]
    with shard.use(shard.connect(mesh), meshes.declared(name)):
        whole, batch, ends = shard.place(meshes.divided(name)[0]), one.batch(meshes.samples(mesh, rank)), []
        for backend in ("eager", "aot_eager"):
            loss = lambda p, b: one.loss(p, one.c, b)
            step = jit.jit(partial(optim.step, loss, tx, compute=compute), mode, backend, remat=remat)
            ends.append(step(optim.init(tx, tree.map(torch.clone, whole)), batch))
    (a, told), (b, said) = ends
    apart = [abs(told[k] - said[k]).item() for k in ("loss", "grad_norm")]
    return [*apart, max((x - y).abs().max().item() for x, y in zip(tree.leaves(a["params"]), tree.leaves(b["params"])))]


@pytest.mark.parametrize("plan,mode", [pytest.param("ring2", "whole", marks=pytest.mark.deep), ("tp2+sp", "block")])
def test_compiled_equals_eager(plan, mode):
    meshes.case("qwen2")
    assert max(max(r) for r in mesh_ranks.run(compiled, 2, plan, "qwen2", mode)) < 2e-6


@pytest.mark.parametrize("plan,remat,compute", [("fsdp2 tp2", None, None), ("fsdp2 tp2", "dots", torch.bfloat16),
                                                ("ring2 ulysses2", "nothing", None)])
def test_compiled_on_four_ranks(plan, remat, compute):
    """Each rank would compile the same graph: one does, against the eager step, without the others."""
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=4)
    try:
        assert max(compiled(3, 4, plan, "qwen2", "whole", remat, compute)) < 2e-6
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("src,dst", [
    (P("tp", None), P(None, "tp")), (P(None, ("fsdp", "tp")), P("fsdp", None)), (P(None, None), P("fsdp", "tp")),
    (P(None, None, partial=("tp",)), P("tp", None)), (P("fsdp", None, partial=("tp",)), P("fsdp", None)),
    (P("tp", None), P(("fsdp", "tp"), None)), (P(("fsdp", "tp"), None), P("fsdp", "tp")), (P(("fsdp", "tp"), None), P(None, ("fsdp", "tp"))),
])
def test_relayout(src, dst):
    """Bits of a tensor from any layout to any other, and the transpose of it as its gradient."""
    x = torch.arange(64.0).view(8, 8)
    with simulated(shard.Mesh(fsdp=2, tp=2)) as ranks:
        net, nothing, axes = ranks.net, P(None, None), ("fsdp", "tp")
        start = relayout(ranks.local(lambda r: x), nothing, P(*src.dims), net)
        start = (start / 2 if src.partial else start).detach().requires_grad_()  # two equal halves of a sum
        end = relayout(start, src, dst, net)
        seen = ranks.common(relayout(end, dst, nothing, net).detach())
        copies = net.size(tuple(a for a in axes if a not in dst.axes))  # the loss of a rank is its share
        g = torch.autograd.grad((end * end.detach()).sum() / copies, start)[0]
        g = collectives.psum(g, net.axes(tuple(a for a in axes if a not in src.axes + src.partial)), net)
        g = ranks.common(relayout(g, P(*src.dims), nothing, net))
    assert torch.equal(seen, x) and torch.equal(g, x)


def test_meshes_that_do_not_fit():
    for mesh, message in ((shard.Mesh(fsdp=2, tp=2), "fsdp 2 x tp 2 has 4 ranks, but 1 are running; start 4"),
                          (shard.Mesh(tp=0), "tp 0; an axis has at least one rank")):
        with pytest.raises(ValueError, match=message):
            shard.connect(mesh)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=6)
    with pytest.raises(ValueError, match="but 6 are running; fsdp 3 or tp 3 would fit"):
        shard.connect(shard.Mesh(fsdp=2, tp=2))
    dist.destroy_process_group()


def test_what_a_mesh_asks_for():
    one = meshes.case("qwen2")
    batch = one.batch([0, 1])
    del batch["num_items_in_batch"]
    with simulated(shard.Mesh(fsdp=2)) as ranks, shard.use(ranks.net, meshes.declared("qwen2")):
        with pytest.raises(ValueError, match="fsdp 2 divides samples: .* needs num_items_in_batch"):
            shard.counted(batch)
        with pytest.raises(ValueError, match="lora_a is not among the 27 parameters"):
            shard.place({"blocks": [{"lora_a": torch.zeros(2)}]})


def ranks_of(plan: str) -> int:
    return mesh_saves.PLANS[plan].world


def sessions(jobs: list[tuple]) -> dict[tuple, list[float]]:
    """The first rank's losses of each job, on real ranks; those of one number of ranks in one start."""
    out = {}
    for world in sorted({ranks_of(j[0]) for j in jobs}):
        mine = [j for j in jobs if ranks_of(j[0]) == world]
        found = mesh_ranks.run(mesh_saves.all_of, world, mine)
        assert all(f == found[0] for f in found)
        out |= dict(zip(mine, found[0]))
    return out


@pytest.mark.parametrize("name", ["qwen2 odd", "qwen2 lora"])
def test_saved_on_one_mesh_read_on_another(name, tmp_path):
    """Every pair of meshes: parameters and moments to the bit, the next 5 losses to 1e-5; each element written once."""
    meshes.case(name)
    sessions([(a, name, tmp_path / "none", tmp_path / a, 2) for a in mesh_saves.PLANS])
    jobs = [(b, name, tmp_path / a, tmp_path / f"{a} to {b}", 5) for a in mesh_saves.PLANS for b in mesh_saves.PLANS]
    losses = sessions(jobs)
    for (b, _, source, out, _), found in losses.items():
        before, after = mesh_saves.whole(name, source, 2), mesh_saves.whole(name, out, 2)
        assert all(torch.equal(x, y) for x, y in zip(tree.leaves(before), tree.leaves(after), strict=True)), (source, b)
        want = losses["1", name, tmp_path / "1", tmp_path / "1 to 1", 5]
        assert all(abs(x - y) < 1e-5 * y for x, y in zip(found, want)), (source, b)
    sizes = [f.stat().st_size for f in sorted(checkpoint.place(tmp_path / "fsdp2", 2).glob("*.safetensors"))]
    assert len(sizes) == 2 and max(sizes) < 1.1 * min(sizes)


READING = ("--model {0}/model --data {0}/data/train.jsonl --rows.tokens 28 --rows.patches 128 --rows.attention 64 "
           "--batch 2 --accumulate 2")
DRAWING = "--model {0}/flux --data {0}/drawings --clips.sizes 8x8 --ema 0.9 --batch 4"


def summed(rank, world):
    """How often the gradients of bf16 parameters are not the rounded sum of ranks' gradients, by dtype of the sum, and
    how far the sums of gradients of whole bf16 parameters are from it."""
    slopes = meshes.draw(1, world, 96, 64).bfloat16()
    exact, out, declared = slopes.double().sum(0), {}, {"map": nn.Linear(64, 96, bias=False)}
    for how in ("fp32", "own"):
        with shard.use(shard.connect(shard.Mesh(fsdp=world, zero=2, reduce=how)), declared):
            part = shard.place({"map": {"weight": torch.zeros(96, 64).bfloat16()}})
            value = lambda p: (shard.ready(p)["map"]["weight"] * slopes[rank]).sum()
            found = shard.whole(jit.value_and_grad(value)(part)[1])["map"]["weight"]
            assert found.dtype == torch.bfloat16
            out[how] = (found != exact.bfloat16()).float().mean().item()
        with shard.use(shard.connect(shard.Mesh(data=world, reduce=how)), declared):
            found = shard.sync({"map.weight": slopes[rank]})["map.weight"]
            out[f"{how} data"] = (found - exact).abs().max().item()
    return out


def test_bf16_gradients_are_summed_in_float32():
    """Rounded once where parameters are bf16; in bf16 a fifth of the sums would be others."""
    for found in mesh_ranks.run(summed, 4):
        assert found["fp32"] < 1e-3 and found["own"] > 0.2, found
        assert found["fp32 data"] < 1e-6 and found["own data"] > 1e-3, found


class Counted:
    """Part of a file, of which what is read is written down."""

    def __init__(self, part, read):
        self.part, self.read = part, read

    def __getitem__(self, at):
        x = self.part[at]
        self.read.append(x.nbytes)
        return x


@pytest.mark.parametrize("name", ["qwen2", "qwen2 odd", "qwen2vl", "wan i2v", "flux"])
def test_a_rank_reads_its_part_of_a_folder(name, tmp_path, monkeypatch):
    """The bits that it would place of the whole, and no byte more, but of tensors that have another shape there."""
    one, opened, read = meshes.case(name), hub._opened, []
    models.export(tmp_path / "a", one.module, one.c, one.params)

    def counted(file, stack):
        shapes, reader = opened(file, stack)
        return shapes, lambda n: Counted(reader(n), read)

    monkeypatch.setattr(hub, "_opened", counted)
    flat = tree.flatten(one.params)
    turned = {n for n, p in keys.lookup(flat, models.table(one.module, one.c)).items() if p.shape}
    for plan in ("fsdp2", "zero1", "tp2", "fsdp2 tp2"):
        mesh, shares = meshes.PLANS[plan], []
        for rank in range(mesh.world):
            with shard.use(abstract(mesh, rank), one.module.params(one.c)):
                read.clear()
                found, want = tree.flatten(models.load(tmp_path / "a", parts=True)[2]), tree.flatten(shard.place(one.params))
                own = {n: prod(b.stop - b.start for b in box) for n, box in shard.boxes(flat).items()}
            assert found.keys() == want.keys() and all(torch.equal(t, want[n]) for n, t in found.items())
            assert sum(read) == 4 * sum(flat[n].numel() if n in turned else size for n, size in own.items())
            shares.append(sum(read) / sum(t.nbytes for t in flat.values()))
        assert max(shares) < {"fsdp2": 0.55, "zero1": 1.01, "tp2": 0.8, "fsdp2 tp2": 0.45}[plan], shares
    with shard.use(abstract(shard.Mesh(pp=2), 1), one.module.params(one.c)):
        shard.hold({n: (1,) if ".1." in n else (0,) for n in flat}, 2)
        read.clear()
        found = tree.flatten(models.load(tmp_path / "a", parts=True)[2])
        assert all(t.is_meta and t.shape == flat[n].shape if ".1." not in n else torch.equal(t, flat[n])
                   for n, t in found.items())
        assert sum(read) == sum(t.nbytes for n, t in flat.items() if ".1." in n) > 0


def program(root, out, *more, ranks=1, what=READING):
    """A run of programs/train.py on a few scanned digits."""
    start = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"] if ranks > 1 else []
    said = (f"{what.format(root)} --out {out} --scratch --steps 4 --lr 1e-3 --warmup 2 --save 2 "
            "--backend eager --workers 0")
    file = Path(__file__).parent.parent / "programs" / "train.py"
    done = subprocess.run([sys.executable, *start, str(file), *said.split(), *more], capture_output=True, text=True,
                          timeout=90)
    return done.returncode, done.stderr


def logged(out):
    """Losses by step."""
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["loss"] for r in rows if "loss" in r}


def like(a, b):
    assert a.keys() == b.keys() and all(abs(x - b[n]) < 1e-5 * x for n, x in a.items())


def test_train_under_torchrun(tmp_path):
    """Two ranks end where one does, go on from each other's checkpoints, and a mesh that does not fit is told."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "programs"))
    import digits

    digits.main(digits.Args(tmp_path, singles=24, pages=12))
    assert program(tmp_path, tmp_path / "one") == (0, "")
    for out in ("two", "stages"):
        shutil.copytree(tmp_path / "one", tmp_path / out)
        shutil.rmtree(checkpoint.place(tmp_path / out / "checkpoints", 4))  # goes on from the middle
    for out, more in (("tp", ("--mesh.tp", "2")), ("two", ("--mesh.fsdp", "2")), ("stages", ("--mesh.pp", "2"))):
        code, said = program(tmp_path, tmp_path / out, *more, ranks=2)
        assert code == 0, said
        like(logged(tmp_path / out), logged(tmp_path / "one"))
        a, b = (models.load(tmp_path / n / "export")[2] for n in (out, "one"))
        assert all((x - y).abs().max() < 1e-4 for x, y in zip(tree.leaves(a), tree.leaves(b)))
    code, said = program(tmp_path, tmp_path / "bad", "--mesh.tp", "3", ranks=2)
    assert code and "the mesh tp 3 has 3 ranks, but 2 are running; tp 2 would fit" in said
    for more, message in ((("--stages.virtual", "2"), "says how a model is cut into stages, but the mesh has pp 1"),
                          (("--mesh.pp", "2", "--mode", "block"), "there is no mode 'block' of that, only 'whole'")):
        code, said = program(tmp_path, tmp_path / "bad", *more)
        assert code == 3 and message in said


def test_drawings_under_torchrun(tmp_path):
    """Two ranks with half of the samples each, or half of the layers."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "programs"))
    import drawings

    drawings.main(drawings.Args(tmp_path, pictures=16, clips=1))
    stages = "--mesh.pp", "2", "--stages.schedule", "zero-bubble"
    for out, more, ranks in (("one", (), 1), ("data", ("--mesh.data", "2"), 2), ("stages", stages, 2)):
        code, said = program(tmp_path, tmp_path / out, *more, ranks=ranks, what=DRAWING)
        assert code == 0, said
        like(logged(tmp_path / out), logged(tmp_path / "one"))
