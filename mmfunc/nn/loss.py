"""Next-token loss that never holds the logits: chunk by chunk, with the gradient computed on the way (Hsu et al. 2024).

A chunk of tokens gets its logits, its loss and, in the same pass, the gradients of x and of the vocabulary matrix; the
backward pass only scales them. So the three products are done once each, and float32 logits exist for one chunk only.
Where the vocabulary is divided, ranks exchange two numbers a token: what their words add to the normaliser, and the
target's logit.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from mmfunc import shard
from mmfunc.nn.chain import region


def targets(labels: Tensor) -> Tensor:
    """The label that each position predicts: labels shifted left, -100 at the end. [B, S] -> [B, S]."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)


def _chunk(x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [N, D], weight [V, D], labels [N] -> sum of losses, logits in float32, their log-normaliser, the mask."""
    logits = linear(x, weight).float()
    if shard.parts("vocab"):
        return _part(logits, labels)
    norm = torch.logsumexp(logits, -1)
    keep = labels >= 0
    loss = torch.where(keep, norm - logits.gather(-1, labels.clamp(min=0)[:, None])[:, 0], 0.0)
    return loss.sum(), logits, norm, keep


def _part(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """_chunk for a part of the vocabulary, logits [N, V / n]."""
    words = _words(logits[0])
    logits = logits.masked_fill(words >= shard.size("vocab/1"), -1e30)  # rows of padding
    found = torch.where(words == labels[:, None], logits, 0.0).sum(-1)
    norms, found = shard.each(torch.stack([torch.logsumexp(logits, -1), found]), "vocab").unbind(1)
    norm, keep = torch.logsumexp(norms, 0), labels >= 0
    return torch.where(keep, norm - found.sum(0), 0.0).sum(), logits, norm, keep


def _words(weight: Tensor) -> Tensor:
    """The numbers of the words that rows of the vocabulary matrix are of."""
    words = torch.arange(len(weight), device=weight.device)
    return words + shard.start(len(weight), "vocab") if shard.parts("vocab") else words


@region
def _total(x: Tensor, weight: Tensor, labels: Tensor, chunk: int, of_x: bool, of_weight: bool) -> tuple:
    """The sum of the cross-entropies of x [N, D] against labels [N], and its gradients of x and weight, or None."""
    total = x.new_zeros((), dtype=torch.float32)
    dx = []
    dw = torch.zeros(weight.shape, dtype=torch.float32, device=x.device) if of_weight else None
    words = _words(weight)
    for a in range(0, len(x), chunk):
        part, target = x[a : a + chunk], labels[a : a + chunk]
        loss, logits, norm, keep = _chunk(part, weight, target)
        total = total + loss
        slope = (logits - norm[:, None]).exp() - (words == target[:, None]).float()
        slope = torch.where(keep[:, None], slope, 0.0).to(x.dtype)
        if of_x:
            dx.append(slope @ weight)
        if dw is not None:
            dw = dw + (slope.T @ part).float()
        del logits, slope  # else they stay while the next ones are made
    return total, torch.cat(dx) if dx else None, None if dw is None else dw.to(x.dtype)


class _Loss(torch.autograd.Function):
    """Sum of the cross-entropies of x [N, D] against labels [N]."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        total, *found = _total(x, weight, labels, chunk, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(*(x.new_zeros(0) if t is None else t for t in found))
        return total

    @staticmethod
    def backward(ctx, g: Tensor):
        dx, dw = ctx.saved_tensors
        g = shard.summed(g, "vocab")  # each rank's total has this rank's words in it
        return (dx * g).to(dx.dtype) if len(dx) else None, (dw * g).to(dw.dtype) if len(dw) else None, None, None


def cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, num_items: Tensor | None = None, chunk: int = 512
) -> Tensor:
    """Cross-entropy of logits x @ weight.T against the next labels, divided by num_items or by their number (0-d,
    float32).

    x [B, S, D], weight [V, D], labels [B, S] as given to the model: -100 is ignored, the shift happens here.
    """
    after = targets(labels).flatten()
    x, mine = shard.some(x.flatten(0, 1)), shard.some(after, fill=-100)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        pieces = max(1, -(-len(x) // chunk))
        total = _Loss.apply(x, weight, mine, max(1, -(-len(x) // pieces)))  # of equal size: the same compiled kernels
    else:
        total = sum(_chunk(x[a : a + chunk], weight, mine[a : a + chunk])[0] for a in range(0, len(x), chunk))
    total = shard.together(total)
    return total / (shard.samples((after >= 0).sum()).clamp(min=1) if num_items is None else num_items)
