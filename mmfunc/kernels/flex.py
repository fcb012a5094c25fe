"""Attention that skips blocks of keys which a mask hides: torch.nn.attention.flex_attention, fast where Inductor
compiles it.

torch.nn.attention.varlen is left out: ids come in any order, so a graph of fixed shapes would sort all tokens and allow
for S segments of up to S tokens, a launch of S * S / 128 mostly empty blocks for each head; and for a pair of segments
its causal order counts places within a segment, ours counts them in the row.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

FEW = 128  # queries of one block: with fewer there is nothing to skip
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


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, segments: Tensor | tuple[Tensor, Tensor] | None,
              start: Tensor | None, scale: float, bias: Tensor | None = None) -> Tensor:
    """q [B, S, H, K], k and v [B, L, G, K] -> [B, S, H, K]; masks as in attention.attend.

    A row that sees nothing gives zeros, and no gradient. The mask is data: which blocks are read is computed in the
    graph, so that one graph serves all segments and starts, and layers share it. PyTorch refuses gradients on CPU.
    """
    rows, columns = segments if isinstance(segments, tuple) else (segments, segments)
    first = 0 if start is None else start

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
        batch = None if segments is None else max(len(rows), len(columns))
        mask = create_block_mask(visible, batch, None, q.shape[1], k.shape[1], q.device)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = flex_attention(q, k, v, None if bias is None else biased, mask, scale, q.shape[1] != k.shape[1])
    return y.transpose(1, 2)
