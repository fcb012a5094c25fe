"""Functions lowered for Ascend NPUs and computed from their graphs, for tests."""

import torch

from mmfunc import jit, nn, tree
from mmfunc.kernels.ge import cost, lowering

X = torch.ones(4, 6)


def moved(t, device):
    return tree.map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, t)


def step(loss):
    return lambda p, b: jit.value_and_grad(loss)(p, b)


def on_npu(fn, *args, **how):
    """(results on CPU, Record) of a function that torchair lowered and the interpreter computed."""
    torch._dynamo.reset()
    with lowering.simulated() as record:
        out = jit.jit(fn, backend="npu", **how)(*moved(args, "npu"))
    return moved(out, "cpu"), record


def shapes_of(fn, *args, **how):
    """(what it costs, Record) of a function that torchair lowered; nothing is computed."""
    total = cost.Cost()

    def run(graph, inputs):
        found, results = cost.cost(graph, inputs, record)
        total.add(found)
        return [torch.empty(t.shape, dtype=t.dtype).to("npu") for t in results]

    torch._dynamo.reset()
    with lowering.offline(run) as record:
        jit.jit(fn, backend="npu", **how)(*moved(args, "npu"))
    return total, record


def heads(p, **masks):
    """Attention of 4 tokens with two heads of width 3."""
    q = p.unflatten(-1, (2, 3))[None]
    return nn.attend(q, q * 0.5, q + 1, **masks)
