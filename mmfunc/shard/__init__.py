"""Layouts: how tensors are divided among the ranks of a mesh. Without a mesh every tensor is whole and all of this is
the identity; nn marks where an activation meets maps that a mesh may divide, so that model code has one form.

mesh: axes and groups. collectives: the primitives. layout: P, relayout, a parameter's layouts. use: the mesh in use and
the marks. state: parameters, gradients and the optimizer's state. context, ring: attention over divided sequences.
world, meet, watch: a run of ranks from their start to their end.
rows, halo: sequences, patches, images and videos in parts. experts: mixtures of them. balance: encoders' work shared.
"""

from mmfunc.shard.balance import plan, shared
from mmfunc.shard.context import along, attention, by_heads, by_rows
from mmfunc.shard.experts import Routes, combine, dispatch, routes
from mmfunc.shard.halo import around, everywhere, first, groupnorm, later, parted
from mmfunc.shard.layout import Layout, P, Piece, relayout
from mmfunc.shard.mesh import AXES, PEERS, Mesh, Net, connect
from mmfunc.shard.rows import joined, local, samples, some, split, together
from mmfunc.shard.state import (
    alone,
    boxes,
    counted,
    everyone,
    filled,
    held,
    hold,
    mine,
    once,
    part,
    peers,
    pieces,
    place,
    rank,
    ready,
    share,
    staged,
    stored,
    sync,
    total,
    unready,
    whole,
)
from mmfunc.shard.use import (
    apart,
    block,
    complete,
    crossing,
    declare,
    each,
    enter,
    grouped,
    heads,
    image,
    inside,
    leave,
    mean,
    parts,
    size,
    start,
    summed,
    use,
    using,
)
from mmfunc.shard.watch import Job
from mmfunc.shard.world import world
