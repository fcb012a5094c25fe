"""Images of any size as one packed buffer of patches: index tables made on the host, and how features are moved by
them.

Patches lie in one buffer [P, ...]. Who attends to whom is a segment id for each patch; segments are packed into rows of
one width, so that attention costs rows x width^2 and shapes depend on declared sizes only, whatever the images are.
"""

import numpy as np
import torch
from torch import Tensor

from mmfunc import shard
from mmfunc.tree import Tree


def put(x: Tensor, to: Tensor, size: int) -> Tensor:
    """Row p of x [P, ...] becomes row to[p] of [size, ...]; -1 goes nowhere, what gets nothing is zero.

    No two rows may go to one place. As a copy by index its gradient is a gather, hence deterministic.
    """
    room = x.new_zeros(size + 1, *x.shape[1:])
    return room.index_copy(0, torch.where(to < 0, size, to), x)[:size]


def inverse(to: np.ndarray, size: int) -> np.ndarray:
    """back[to[n]] = n; -1 for what is not taken."""
    back = np.full(size, -1, np.int64)
    back[to[to >= 0]] = np.flatnonzero(to >= 0)
    return back


def spots(grids: np.ndarray, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Frame number [P] and place (row, column) [P, 2] of each patch; merge x merge neighbours follow each other.

    grids [n, 3]: frames, rows and columns of patches of each image or video.
    """
    frames, places, count = [], [], 0
    for t, h, w in grids.tolist():
        rows, cols = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
        order = [a.reshape(h // merge, merge, w // merge, merge).transpose(0, 2, 1, 3).ravel() for a in (rows, cols)]
        places.append(np.tile(np.stack(order, -1), (t, 1)))
        frames.append(count + np.repeat(np.arange(t), h * w))
        count += t
    none = np.zeros(0, np.int64)
    return np.concatenate([none, *frames]), np.concatenate([np.zeros((0, 2), np.int64), *places])


def cells(frames: np.ndarray, places: np.ndarray, side: int) -> np.ndarray:
    """Window number of each patch: side x side patches of one frame."""
    key = np.concatenate([frames[:, None], places // side], 1)
    return np.unique(key, axis=0, return_inverse=True)[1].reshape(-1) if len(key) else frames


def enough(size: int | None, width: int) -> int | None:
    """Rows in which first fit always finds room for a full buffer: every two together hold more than one full row."""
    return None if size is None else 1 if width >= size else 2 * -(-size // width) + 1


def rows(segments: np.ndarray, width: int, size: int, count: int | None = None) -> dict[str, Tensor]:
    """Pack segments [p] of patches, first fit, into rows of a width for a buffer of `size` patches.

    Gives "patch" [R * width] (of each slot, or -1), "segments" [R, width] (0: empty) and "slot" [size] (of each
    patch, or -1). With count None, R is what is needed.
    """
    number, sizes = np.unique(segments, return_counts=True)
    order = np.argsort(segments, kind="stable")
    start = dict(zip(number.tolist(), (np.cumsum(sizes) - sizes).tolist()))
    used: list[int] = []
    placed = []
    for n, s in sorted(zip(number.tolist(), sizes.tolist()), key=lambda ns: -ns[1]):
        if s > width:
            raise ValueError(f"a frame has {s} patches, more than the {width} of an attention row; declare longer rows")
        r = next((i for i, u in enumerate(used) if u + s <= width), len(used))
        if r == len(used):
            used.append(0)
        placed.append((n, s, r, used[r]))
        used[r] += s
    if count is not None and len(used) > count:
        raise ValueError(f"the frames fill {len(used)} attention rows of {width} patches, {count} are declared")
    to = np.full(((len(used) if count is None else count), width), -1, np.int64)
    ids = np.zeros_like(to)
    for n, s, r, a in placed:
        to[r, a : a + s] = order[start[n] : start[n] + s]
        ids[r, a : a + s] = n + 1
    return {"patch": torch.from_numpy(to.ravel()), "segments": torch.from_numpy(ids),
            "slot": torch.from_numpy(inverse(to.ravel(), size))}


def in_rows(fn, q: Tensor, k: Tensor, v: Tensor, table: Tree) -> Tensor:
    """Attention fn within the rows of a table. q, k, v [P, H, K] -> [P, H, K]; of patches that are divided among ranks
    each takes all for some of the heads."""
    if shard.block():
        heads, (q, k, v) = q.shape[1], shard.by_heads(q, k, v)
        with shard.apart():
            return shard.by_rows(in_rows(fn, q, k, v, table), heads)
    shape = table["segments"].shape
    size = len(q)
    q, k, v = (put(t, table["slot"], shape.numel()).unflatten(0, shape) for t in (q, k, v))
    return put(fn(q, k, v, segments=table["segments"]).flatten(0, 1), table["patch"], size)


def mrope(types: np.ndarray, grids: list[tuple[int, int, int]], steps: list[float], merge: int, *,
          rule: str) -> np.ndarray:
    """Positions (time, row, column) of one sample's tokens, int64 [3, S].

    types [S]: 0 text, else vision. grids and steps: of each run of vision tokens in turn, its patch grid and the
    distance of its frames. Rule "4.51": text after a run goes on behind its largest position; "5.23": behind its
    larger side only.
    """
    edges = np.flatnonzero(np.diff(types)) + 1
    parts, at, seen = [], 0, iter(zip(grids, steps))
    for a, b in zip([0, *edges], [*edges, len(types)]):
        if types[a] == 0:
            parts.append(np.broadcast_to(np.arange(b - a) + at, (3, b - a)))
            at += b - a
            continue
        (t, h, w), step = next(seen)
        h, w = h // merge, w // merge
        time = (np.arange(t, dtype=np.float32) * np.float32(step)).astype(np.int64)
        run = np.stack([np.repeat(time, h * w), np.tile(np.repeat(np.arange(h), w), t), np.tile(np.arange(w), t * h)])
        if run.shape[1] != b - a:
            raise ValueError(f"a run of {b - a} vision tokens belongs to a grid of {t} x {h} x {w} = {run.shape[1]}")
        parts.append(run + at)
        at += max(h, w) if rule == "5.23" else int(run.max()) + 1
    return np.concatenate(parts, 1)


def placed(ids: np.ndarray, tokens: dict[str, int], counts: dict[str, int], size: int) -> dict[str, Tensor]:
    """Where merged features go: seen [B, S], whether a token is one; token [size], where each feature goes, or -1.

    tokens: the placeholder of each kind; counts: features of each kind, which lie one kind after the other.
    """
    to, start = np.full(ids.size, -1, np.int64), 0
    for name, token in tokens.items():
        where, n = np.flatnonzero(ids.ravel() == token), counts.get(name, 0)
        if len(where) != n:
            raise ValueError(f"the batch has {len(where)} {name} tokens for {n} {name} features")
        to[where] = start + np.arange(n)
        start += n
    return {"seen": torch.from_numpy((to >= 0).reshape(ids.shape)), "token": torch.from_numpy(inverse(to, size))}


def positions(kinds: np.ndarray, mask: np.ndarray, grids: dict[int, list], steps: dict[int, list], merge: int, *,
              rule: str) -> Tensor:
    """Positions (time, row, column) of tokens, int64 [3, B, S]; each segment of mask [B, S] starts at 0.

    kinds [B, S]: 0 text, else the kind of a vision token. grids, steps: for each kind, in the order of the batch, patch
    grids and distances of frames (1 where none is given).
    """
    grids, steps = ({k: iter(v) for k, v in d.items()} for d in (grids, steps))
    out = np.ones((3, *kinds.shape), np.int64)
    segments = [(b, n) for b, row in enumerate(mask) for n in np.unique(row[row > 0])]
    for b, n in segments:
        own = kinds[b][mask[b] == n]
        runs = own[np.flatnonzero(np.diff(own, prepend=0) * (own > 0))].tolist()
        found = [(tuple(next(grids[r])), next(steps[r], 1.0) if r in steps else 1.0) for r in runs]
        out[:, b, mask[b] == n] = mrope(own, [g for g, _ in found], [d for _, d in found], merge, rule=rule)
    return torch.from_numpy(out)
