"""What a training step does with parameters, gradients and the optimizer's state on the mesh in use; without one all of
it is the identity. Leaves are found by name."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmfunc import tree
from mmfunc.shard import layout
from mmfunc.shard.collectives import number, psum
from mmfunc.shard.layout import Layout, Piece, Spec
from mmfunc.shard.mesh import AXES, BATCH, PEERS
from mmfunc.shard.use import ALL, Use, in_layer, use, using
from mmfunc.tree import Tree


def specs(names: list[str] | dict) -> dict[str, Spec]:
    """The layouts of parameters on the mesh in use."""
    known = using().layers[""].specs
    if lost := [n for n in names if n not in known]:
        raise ValueError(f"{lost[0]} is not among the {len(known)} parameters that the mesh in use was given, such as "
                         f"{', '.join(list(known)[:3])}")
    return {n: known[n] for n in names}


def _each(fn: Callable, params: Tree) -> Tree:
    found = specs(flat := tree.flatten(params))
    return tree.unflatten({n: fn(t, found[n]) for n, t in flat.items()}, params)


def place(params: Tree) -> Tree:
    """This rank's part of whole parameters."""
    now = using()
    return params if now is None else _each(lambda t, s: layout.place(t, s, s.store, now.net), params)


def boxes(names: list[str] | dict) -> dict[str, tuple[slice, ...] | None]:
    """What this rank stores of whole parameters, without padding; None of those of other stages. Without a mesh: {}."""
    now = using()
    found = {n: layout.piece(s, s.store, now.net) for n, s in specs(names).items()} if now else {}
    own = lambda n: not now.held or now.net.at[AXES.index("pp")] in now.held[n]
    return {n: tuple(slice(a, a + size) for a, size in zip(p.start, p.size)) if own(n) else None
            for n, p in found.items()}


def filled(params: Tree) -> Tree:
    """Those parts as place gives them, with padding."""
    now = using()
    fill = lambda t, s: t if t.is_meta else layout.filled(t, s, s.store, now.net)
    return params if now is None else _each(fill, params)


def whole(params: Tree) -> Tree:
    """The parameters that ranks have in parts; all ranks call this."""
    now = using()
    if now is None:
        return params
    found = _each(lambda t, s: layout.whole(t, s, s.store, now.net), params)
    return _filled(found, now) if now.held else found


def _filled(params: Tree, now: Use) -> Tree:
    """Whole parameters with those of the other stages."""
    flat, (rank, group) = tree.flatten(params), staged()
    kinds = {n: kind for said in everyone({n: t.dtype for n, t in flat.items()}) for n, kind in said.items()}
    for n, s in specs(kinds).items():
        own = n in flat and now.held[n][0] == rank
        flat[n] = flat[n].contiguous() if own else torch.empty(s.shape, dtype=kinds[n], device=now.net.place.device)
        dist.broadcast(flat[n], group=group, group_src=now.held[n][0])
    return tree.unflatten(flat, params)


# ---- stages of a pipeline

def staged() -> tuple[int, Any]:
    """(this rank's place along pp, the process group of the places there; None without such an axis)."""
    now = using()
    return (now.net.at[AXES.index("pp")], now.net.processes(("pp",))) if now and now.net.mesh.pp > 1 else (0, None)


def hold(holders: dict[str, tuple[int, ...]], ranks: int) -> None:
    """Tell the mesh in use which places along pp have a parameter from now on."""
    now = using()
    if now is None or now.net.mesh.pp == 1:
        return
    if now.net.mesh.pp != ranks:
        raise ValueError(f"the stages lie on {ranks} ranks, the mesh {now.net.mesh} has {now.net.mesh.pp} along pp")
    now.held = holders


def held(params: Tree) -> Tree:
    """Of parameters those that this rank's stages read, None elsewhere."""
    now = using()
    if now is None or not now.held:
        return params
    return tree.unflatten({n: t for n, t in tree.flatten(params).items() if staged()[0] in now.held[n]}, params)


def pieces(state: Tree) -> dict[str, Piece]:
    """What this rank has of each leaf of a training state."""
    now = using()
    if now is None:
        return {n: Piece(tuple(t.shape), (0,) * t.ndim, tuple(t.shape), 1, 0) for n, t in tree.flatten(state).items()}
    return {n: _piece(n, t, now) for n, t in tree.flatten(state).items()}


def _piece(name: str, t: Tensor, now: Use) -> Piece:
    """Parameters are as they are stored, what the optimizer keeps is divided as its updates; all else is whole. What
    several stages have, the first of them writes."""
    section, _, rest = name.partition(".")
    known = now.layers[""].specs
    while section in ("params", "frozen", "opt") and rest and rest not in known:
        rest = rest.rpartition(".")[0]
    s = known.get(rest) or Spec(tuple(t.shape), (1,) * t.ndim, (), *[Layout(((),) * t.ndim)] * 3)
    found = layout.piece(s, s.optimize if section == "opt" else s.store, now.net)
    return found if staged()[0] == now.held.get(rest, (0,))[0] else found._replace(copy=-1)


def _ways(flat: dict[str, Tensor], src: str, dst: str) -> dict[str, tuple[Spec, Layout, Layout]]:
    return {n: (s, getattr(s, src), getattr(s, dst)) for n, s in specs(flat).items()}


def ready(params: Tree) -> Tree:
    """Parameters as the loss uses them: gathered over fsdp, but for those of layers that are gathered one by one."""
    now = using()
    if now is None:
        return params
    flat = tree.flatten(params)
    apart = _apart(flat, now)
    return tree.unflatten(flat | layout.gathered(apart, _ways(apart, "store", "compute"), now.net), params)


def unready(grads: Tree) -> Tree:
    """Gradients of what ready gave as those of what it was given: its transpose."""
    now = using()
    if now is None:
        return grads
    flat = tree.flatten(grads)
    apart = _apart(flat, now)
    return tree.unflatten(flat | layout.scattered(apart, _ways(apart, "compute", "store"), now.net), grads)


def _apart(flat: dict[str, Tensor], now: Use) -> dict[str, Tensor]:
    """What is gathered before the loss."""
    return {n: t for n, t in flat.items() if now.net.mesh.zero < 3 or not in_layer(n)}


def counted(batch: Tree) -> Tree:
    """A batch whose num_items_in_batch is that of all samples; each rank comes with the number of its own."""
    now = using()
    axes = now.net.axes(BATCH) if now else ()
    if not axes:
        return batch
    if not isinstance(batch, dict) or "num_items_in_batch" not in batch:
        raise ValueError(f"the mesh {now.net.mesh} divides samples: each rank's batch needs num_items_in_batch, the "
                         "number of targets or samples in it, so that the mean is that of all")
    count = psum(batch["num_items_in_batch"].float(), axes, now.net)
    return batch | {"num_items_in_batch": torch.where(count == 0, 1.0, count)}


def share(loss: Tensor) -> Tensor:
    """This rank's share of a loss, which ranks with the same samples have in common."""
    now = using()
    n = now.net.size(tuple(a for a in ALL if a not in BATCH)) if now else 1
    return loss / n if n > 1 else loss


def total(x: Tensor) -> Tensor:
    """The sum over all ranks."""
    now = using()
    return x if now is None else psum(x, now.net.axes(AXES), now.net)


def sync(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients by name, summed over the axes that do not divide them, as the optimizer's state is divided."""
    now = using()
    if now is None:
        return grads
    ways = _ways(grads, "store", "optimize")
    axes = {n: _missing(s, now) for n, (s, _, _) in ways.items()}
    alone = lambda n: ways[n][1] == ways[n][2] and not axes[n]
    grads = {n: g if alone(n) or not layout.wide(g, now.net) else g.float() for n, g in grads.items()}
    return layout.summed(layout.scattered(grads, ways, now.net), axes, now.net)


def _missing(s: Spec, now: Use) -> tuple[str, ...]:
    return now.net.axes(tuple(a for a in ALL if a not in s.optimize.axes))


def once(each: dict[str, Tensor]) -> Tensor:
    """The sum over ranks of 0-d float32 numbers of this rank's parts of leaves, those of copies counted once."""
    now = using()
    if now is None:
        return torch.stack([*each.values()]).sum()
    copies = [now.net.size(_missing(s, now)) * len(now.held.get(n, (0,))) for n, s in specs(each).items()]
    shares = [x / n if n > 1 else x for x, n in zip(each.values(), copies)]  # none in a stage that is frozen
    total = torch.stack(shares or [torch.zeros((), device=now.net.place.device)]).sum()
    return psum(total, now.net.axes(AXES), now.net)


def mine(flat: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of each stored parameter that this rank updates."""
    now = using()
    if now is None:
        return flat
    return {n: t if s.store == s.optimize else layout.place(t, s, _only(s), now.net)
            for (n, t), s in zip(flat.items(), specs(flat).values())}


def _only(s: Spec) -> Layout:
    """What divides a leaf in its optimizer's layout and not where it is stored."""
    return Layout(tuple(b[len(a):] for a, b in zip(s.store.dims, s.optimize.dims)))


def stored(flat: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters as they are stored, from the parts that ranks have updated."""
    now = using()
    return flat if now is None else layout.gathered(flat, _ways(flat, "optimize", "store"), now.net)


def rank() -> tuple[int, int]:
    """(number of this rank, ranks in all)."""
    now = using()
    return (now.net.rank, now.net.mesh.world) if now else (0, 1)


def alone(fn: Callable, *args: object) -> None:
    """fn of whole tensors, run by the first rank without a mesh."""
    if rank()[0] == 0:
        with use(None):
            fn(*args)


def part() -> tuple[int, int]:
    """(number of this rank's part of the samples, parts in all)."""
    now = using()
    return (number(BATCH, now.net), now.net.size(BATCH)) if now else (0, 1)


def peers() -> tuple[int, int]:
    """(number of this rank among those with the same samples, how many they are)."""
    now = using()
    return (number(PEERS, now.net), now.net.size(PEERS)) if now else (0, 1)


def everyone(said: object, axes: tuple[str, ...] = AXES) -> list:
    """What each rank says, along some axes."""
    now = using()
    if now is None or not now.net.axes(axes):
        return [said]
    out = [None] * now.net.size(axes)
    dist.all_gather_object(out, said, now.net.processes(axes))
    return out
