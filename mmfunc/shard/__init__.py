"""Layouts: how tensors are divided among the ranks of a mesh. Without a mesh every tensor is whole and all of this is
the identity; nn marks where an activation meets maps that a mesh may divide, so that model code has one form.

mesh: axes and groups. collectives: the primitives. layout: P, relayout, a parameter's layouts. use: the mesh in use and
the marks. state: parameters, gradients and the optimizer's state. context, ring: attention over divided sequences.
"""

from mmfunc.shard.context import attention
from mmfunc.shard.layout import Layout, P, Piece, relayout
from mmfunc.shard.mesh import AXES, Mesh, Net, connect
from mmfunc.shard.state import (
    alone,
    counted,
    everyone,
    mine,
    part,
    pieces,
    place,
    rank,
    ready,
    share,
    squares,
    stored,
    sync,
    total,
    whole,
)
from mmfunc.shard.use import (
    block,
    crossing,
    declare,
    each,
    enter,
    grouped,
    inside,
    joined,
    leave,
    local,
    mean,
    parts,
    samples,
    size,
    some,
    split,
    start,
    summed,
    together,
    use,
    using,
    world,
)
