"""Attention that skips blocks of keys which a mask hides: torch.nn.attention.flex_attention, fast where Inductor
compiles it.

torch.nn.attention.varlen is left out: ids come in any order, so a graph of fixed shapes would sort all tokens and allow
for S segments of up to S tokens, a launch of S * S / 128 mostly empty blocks for each head; and for a pair of segments
its causal order counts places within a segment, ours counts them in the row.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128  # queries, and keys, that are read or skipped together
FEW = BLOCK  # with fewer queries there is nothing to skip
WIDTHS = 16, 256  # of a head in Triton's products, and in shared memory


def supports(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether it is worth taking for q [B, S, H, K], k and v [B, L, G, K]: as part of a graph, in float16, bfloat16 or
    float32, for a block of queries at least. Operation by operation it would hold all scores."""
    low, high = WIDTHS
    return (torch.compiler.is_compiling() and q.shape[1] >= FEW and q.dtype == k.dtype == v.dtype
            and q.dtype in (torch.float16, torch.bfloat16, torch.float32)
            and all(low <= t.shape[-1] <= high for t in (q, v)))


def _of(t: Tensor, b: Tensor) -> Tensor:
    """The index of a batch in t, of which all batches may share one."""
    return b if len(t) > 1 else 0 * b


def _ends(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each block of ids [B, S]: the least that is no padding, the greatest, and the least of all, which is 0 where
    the row ends within the block."""
    t = torch.nn.functional.pad(t, (0, -t.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK)).clamp(min=0)
    return t.masked_fill(t == 0, torch.iinfo(t.dtype).max).amin(-1), t.amax(-1), t.amin(-1)


def blocks(queries: int, keys: int, causal: bool, rows: Tensor | None, columns: Tensor | None, first: Tensor | int,
           device: torch.device) -> tuple[Tensor, Tensor]:
    """Which blocks of keys a block of queries may see some of, and sees all of: bool [1 or B, blocks, blocks].

    By the least and greatest id of a block, not by each pair as create_block_mask has it: that would be S * L
    operations in each layer, as many as the scores of a head. Ids in any order are right, in order also fast.
    """
    i = torch.arange(0, queries, BLOCK, device=device)[:, None]
    j = torch.arange(0, keys, BLOCK, device=device)
    full = ((i + BLOCK <= queries) & (j + BLOCK <= keys))[None]
    some = torch.ones_like(full)
    if causal:
        some, full = some & (j <= i + BLOCK - 1 + first), full & (j + BLOCK - 1 <= i + first)
    if rows is not None:
        low, high, least = (t[:, :, None] for t in _ends(rows))
        low_k, high_k, least_k = (t[:, None] for t in _ends(columns))
        some = some & (low <= high_k) & (low_k <= high)
        full = full & (least == high) & (least_k == high_k) & (high == high_k) & (high > 0)
    return some, full


def _listed(seen: Tensor) -> tuple[Tensor, Tensor]:
    """For each block of queries the number of blocks of keys, and their places before all others: int32, one head."""
    seen = seen[:, None].to(torch.int32)
    return seen.sum(-1, dtype=torch.int32), seen.argsort(dim=-1, descending=True, stable=True).to(torch.int32)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, segments: Tensor | tuple[Tensor, Tensor] | None,
              start: Tensor | None, scale: float, bias: Tensor | None = None) -> Tensor:
    """q [B, S, H, K], k and v [B, L, G, K] -> [B, S, H, K]; masks as in attention.attend.

    A row that sees nothing gives zeros, and no gradient. The mask is data: which blocks are read is computed in the
    graph, so that one graph serves all segments and starts. PyTorch refuses gradients on CPU.
    """
    rows, columns = segments if isinstance(segments, tuple) else (segments, segments)
    rows, columns = (None if t is None else t.to(torch.int32) for t in (rows, columns))  # they may be bool
    first = 0 if start is None else start.to(q.device)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j <= i + first if causal else j >= 0
        if segments is None:
            return seen
        own = columns[_of(columns, b), j]
        return seen & (rows[_of(rows, b), i] == own) & (own > 0)

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[_of(bias, b), h, i, j]

    mask = None
    if causal or segments is not None:
        some, full = blocks(q.shape[1], k.shape[1], causal, rows, columns, first, q.device)
        lists = (*_listed(some & ~full), *_listed(full))
        mask = BlockMask.from_kv_blocks(*lists, BLOCK, visible, (q.shape[1], k.shape[1]))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = flex_attention(q, k, v, None if bias is None else biased, mask, scale, q.shape[1] != k.shape[1])
    return y.transpose(1, 2)
