"""Softmax attention with masks as data: causal order, segments, and an offset into a cache.

On CPU it is the kernel of `mmfunc.kernels.cpu`: PyTorch's fused one reaches 40 % of the GEMM peak in bf16 and does not
skip what is masked. What that kernel does not take (a bias, float16, gradients of very few scores, no compiler) goes
block by block over the queries, so that a block of scores stays in cache. On NPU it is torch_npu's fused operation, on
CUDA what the table `CUDA` says of a kind of mask, elsewhere PyTorch's scaled_dot_product_attention.
`reference` is the definition that all of them are tested against.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mmfunc.kernels import cpu, flex, npu

BLOCK = 128  # queries of a block: 128 x 4096 float32 scores are 2 MB
WIDEST = 512  # of a head on NPU
HIDDEN = -1e30  # the score of what is masked: finite, so that a row that sees nothing stays finite

Segments = Tensor | tuple[Tensor, Tensor] | None


def visible(s: slice, limit: int, causal: bool, segments: Segments, start: Tensor | None,
            device: torch.device) -> Tensor | None:
    """Which of the first `limit` keys the queries s may see: bool [B or 1, 1, 1, s, limit], or None for all."""
    mask = None
    if causal:
        i = torch.arange(s.start, s.stop, device=device)[:, None] + (0 if start is None else start)
        mask = (torch.arange(limit, device=device) <= i)[None, None, None]
    if segments is not None:
        q, k = segments if isinstance(segments, tuple) else (segments, segments)
        q, k = q[:, s, None], k[:, None, :limit]
        same = ((q == k) & (k > 0))[:, None, None]
        mask = same if mask is None else mask & same
    return mask


def blocked(q: Tensor, k: Tensor, v: Tensor, causal: bool, segments: Segments, start: Tensor | None, scale: float,
            bias: Tensor | None = None, block: int = BLOCK) -> Tensor:
    """Block by block over the queries. q [B, S, H, K], k and v [B, L, G, K] -> [B, S, H, K]."""
    (_, size, heads, width), groups, keys = q.shape, k.shape[2], k.shape[1]
    q = q.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    bias = None if bias is None else bias.unflatten(1, (groups, -1))
    out = []
    for a in range(0, size, block):
        s = slice(a, min(a + block, size))
        limit = min(s.stop, keys) if causal and start is None else keys
        mask = visible(s, limit, causal, segments, start, q.device)
        rows = q[:, :, :, s]  # grouped queries share one product with their key head
        n = rows.shape[2:4]
        scores = (rows.flatten(2, 3) @ k[:, :, :limit].transpose(-1, -2)).unflatten(2, n).float() * scale
        if bias is not None:
            scores = scores + bias[:, :, :, s, :limit]
        if mask is not None:
            scores = scores.masked_fill(~mask, HIDDEN)
        weights = torch.softmax(scores, -1).to(v.dtype)
        out.append((weights.flatten(2, 3) @ v[:, :, :limit]).unflatten(2, n))
    y = torch.cat(out, 3) if len(out) > 1 else out[0]
    return y.permute(0, 3, 1, 2, 4).reshape(-1, size, heads, width)


def fused(q: Tensor, k: Tensor, v: Tensor, causal: bool, segments: Segments, start: Tensor | None, scale: float,
          bias: Tensor | None = None) -> Tensor:
    """PyTorch's kernel; shapes as in blocked."""
    plain = causal and segments is None and start is None and bias is None and q.shape[1] == k.shape[1]
    mask = None
    if not plain:
        mask = visible(slice(0, q.shape[1]), k.shape[1], causal, segments, start, q.device)
        mask = None if mask is None else mask[:, 0]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if q.shape[1] != k.shape[1] and not (mask is bias is None):  # with a mask the kernels of CUDA take no shared heads
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    if mask is not None:  # a row that sees nothing would be NaN: let it see all
        mask = mask | ~mask.any(-1, keepdim=True)
    if bias is not None:
        bias = bias.to(q.dtype)
        mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
    y = scaled_dot_product_attention(q, k, v, mask, is_causal=plain, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


# On CUDA, by kind of mask. The choice follows published figures and is not measured yet on a GPU: without a mask tensor
# PyTorch's kernel is FlashAttention or cuDNN's; with one it is the memory-efficient kernel, which reads S * L of mask
# and skips nothing. flex_attention skips, but would sum the gradient of a bias by atomics, in any order.
# `python benchmarks/attention.py` on a machine with a GPU measures the candidates and says where the table is wrong.
CUDA: dict[str, Callable] = {
    "full": fused, "causal": fused, "segments": flex.attention, "cache": flex.attention, "bias": fused,
}


def kind(causal: bool, segments: Segments, start: Tensor | None, bias: Tensor | None) -> str:
    """What mask that is, a key of `CUDA`: the first that holds of bias, cache (causal from a start), segments (causal
    or not), causal, full."""
    held = {"bias": bias is not None, "cache": causal and start is not None, "segments": segments is not None,
            "causal": causal}
    return next((name for name, holds in held.items() if holds), "full")


def tabled(q: Tensor, k: Tensor, v: Tensor, causal: bool, segments: Segments, start: Tensor | None, scale: float,
           bias: Tensor | None = None) -> Tensor:
    """What `CUDA` says of this mask, or fused where flex_attention is not worth taking; shapes as in blocked."""
    run = CUDA[kind(causal, segments, start, bias)]
    if run is flex.attention and not flex.supports(q, k, v):
        run = fused
    return run(q, k, v, causal, segments, start, scale, bias)


def ascend(q: Tensor, k: Tensor, v: Tensor, causal: bool, segments: Segments, start: Tensor | None, scale: float,
           bias: Tensor | None = None) -> Tensor:
    """torch_npu's fused operation, which takes this layout and fewer key heads as they are; shapes as in blocked."""
    if bias is not None:  # its gradient is not to be had from that operation
        return blocked(q, k, v, causal, segments, start, scale, bias)
    if q.shape[-1] > WIDEST:
        raise ValueError(f"attention on NPU takes heads of a width up to {WIDEST}, not {q.shape[-1]}")
    if start is None and (y := npu.fused("attention", q, k, v, causal, segments, scale)) is not None:
        return y
    if causal and segments is None and start is None and q.shape[1] == k.shape[1]:
        place = torch.arange(2048, device=q.device)  # the size that is asked for
        mask, mode = place > place[:, None], 2
    else:
        seen = visible(slice(0, q.shape[1]), k.shape[1], causal, segments, start, q.device)
        # a row that sees nothing sees all
        mask, mode = None if seen is None else (~seen & seen.any(-1, keepdim=True))[:, 0], 0
    return torch.ops.npu.npu_fusion_attention(q, k, v, q.shape[2], "BSND", atten_mask=mask, scale=scale,
                                              sparse_mode=mode)[0]


def reference(q: Tensor, k: Tensor, v: Tensor, causal: bool, segments: Segments, start: Tensor | None, scale: float,
              bias: Tensor | None = None) -> Tensor:
    """The definition: one softmax over all scores; shapes as in blocked."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    mask = visible(slice(0, q.shape[2]), k.shape[2], causal, segments, start, q.device)
    scores = (q @ k.transpose(-1, -2)).float() * scale
    scores = scores if bias is None else scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask[:, 0], HIDDEN)
    return (torch.softmax(scores, -1).to(v.dtype) @ v).transpose(1, 2)


@torch.library.custom_op("mmfunc::keep", mutates_args=())
def keep(x: Tensor) -> Tensor:
    """A copy with a name: what a remat policy may keep of attention."""
    return x.clone()


keep.register_fake(torch.empty_like)
keep.register_autograd(lambda ctx, g: g)

BACKENDS: dict[str, Callable] = {  # by device type; fused elsewhere
    "cpu": blocked, "meta": blocked, "npu": ascend, "cuda": tabled,
}


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, segments: Segments = None,
           start: Tensor | None = None, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """Softmax attention. q [B, S, H, K], k and v [B, L, G, K] with H a multiple of G -> [B, S, H, K].

    segments [B, S] (or a pair for queries and keys): only equal ones see each other, 0 is padding and seen by nothing.
    start (0-d): index of the first query among the keys, for causal order within a cache.
    bias [1 or B, H, S, L]: added to the scaled scores.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are no multiple of {k.shape[2]} key heads")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    many = q.shape[1] >= cpu.FEW[0] and q.shape[1] * k.shape[1] >= cpu.FEW[1]
    own = q.device.type == "cpu" and bias is None and (many or not torch.is_grad_enabled())
    if own and cpu.supports(q, k, v, scale):
        both = segments if isinstance(segments, tuple) else (segments, segments)
        both = [cpu.ids(t, len(q)) for t in both]  # here, so that all layers of a graph share it
        if not many:
            return torch.ops.mmfunc.cpu_attention_few(q, k, v, *both, start, causal, scale)
        return cpu.attention(q, k, v, *both, start, causal, scale)[0]
    y = BACKENDS.get(q.device.type, fused)(q, k, v, causal, segments, start, scale, bias)
    own = q.device.type in ("npu", "cuda") and bias is None  # a remat policy knows their operations itself
    return keep(y) if torch.is_grad_enabled() and y.requires_grad and not own else y
