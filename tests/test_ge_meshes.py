"""Meshes lowered for Ascend NPUs by the real torchair: one graph for all ranks, computed on simulated ones: `make
test-ascend`, in .venv-ascend."""

import importlib.util

import pytest

if importlib.util.find_spec("torch_npu") is None:
    pytest.skip("torch_npu is in an environment of its own: make test-ascend", allow_module_level=True)

import meshes
import torch
from lowered import moved
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode

from mmfunc import jit, shard, tree
from mmfunc.kernels.ge import cost, interpreter, lowering
from mmfunc.shard import layout


@pytest.mark.parametrize("name, plan", [("qwen2", "fsdp2 tp2"), ("qwen2", "ulysses2"), ("wan", "fsdp2 tp2"),
                                        ("wan", "ulysses2"), ("flux", "tp2+sp")])
def test_meshes(name, plan):
    """One graph, the same on all ranks; computed for all of them at once it gives the loss and gradients of one rank."""
    want, slopes = meshes.reference(name)
    with lowering.rank(meshes.PLANS[plan]) as net:
        loss, grads, record = on_mesh(name, net)
    assert not record.failed and len(record.graphs) == 1
    off = meshes.worst(grads, slopes)
    assert abs(loss - want) <= 1e-6 * abs(want) and off[0] <= 1e-5, off
    assert any(op.type.startswith("Hcom") for op in record.graphs[0].op)


def on_mesh(name, net):
    """(loss, whole gradients, Record) of a training step that is lowered once and computed on simulated ranks."""
    one, world, places = meshes.case(name), net.mesh.world, meshes.places(net.mesh)
    declared, everyone = meshes.declared(name), spread([torch.tensor(at) for at in places])
    net.place = everyone
    with LocalTensorMode(world), shard.use(net, declared):
        parts = shard.place(tree.map(lambda t: spread([t] * world), one.params))
        specs = shard.using().layers[""].specs
    given = [moved((tree.map(lambda t, r=r: t._local_tensors[r], parts), one.batch(meshes.samples(net.mesh, r))), "npu")
             for r in range(world)]
    net.place, inputs, results = torch.tensor(places[0]).to("npu"), [], []

    def run(graph, tensors):
        """First the inputs of each rank are noted, then it gets what was computed from all of them."""
        if results:
            rank = places.index(net.place.cpu().tolist())
            return [t._local_tensors[rank].contiguous().to("npu") for t in results]
        inputs.append([t.cpu() for t in tensors])
        found = cost.cost(graph, tensors, record)[1]
        return [torch.zeros(t.shape, dtype=t.dtype).to("npu") for t in found]

    def every():
        for place, args in zip(places, given):
            net.place.copy_(torch.tensor(place))
            yield moved(step(*args), "cpu")

    with shard.use(net, declared), lowering.offline(run) as record:
        step = jit.jit(divided(one), backend="npu")
        list(every())
        with LocalTensorMode(world):
            graph = record.graphs[0]
            results += interpreter.run(graph, [spread(ts) for ts in zip(*inputs)], record.expected[graph.name])
        losses, slopes = zip(*every())
    net.place = everyone
    with LocalTensorMode(world):
        grads = {n: layout.whole(spread([s[n] for s in slopes]), specs[n], specs[n].optimize, net) for n in slopes[0]}
    return losses[0], {n: t._local_tensors[0] for n, t in grads.items()}, record


def divided(one):
    """meshes.gradients, for a compiler."""
    value = lambda p, b: shard.share(one.loss(shard.ready(p), one.c, b))

    def run(p, b):
        loss, grads = jit.value_and_grad(value)(p, shard.counted(b))
        return shard.total(loss), shard.sync(tree.flatten(grads))

    return run


def spread(values):
    """A tensor of one value a rank."""
    return LocalTensor({r: t.clone() for r, t in enumerate(values)})
