"""Layouts. Without a mesh every tensor is whole and `enter` and `leave` are identities; nn marks with them where an
activation meets maps that a mesh may split, so that model code has one form."""

from torch import Tensor


def enter(x: Tensor, axis: str) -> Tensor:
    """Bring an activation into maps whose outputs are split on a logical axis."""
    return x


def leave(x: Tensor, axis: str) -> Tensor:
    """Sum the partial outputs of maps whose inputs were split on a logical axis."""
    return x


def mean(x: Tensor, axis: str) -> Tensor:
    """Mean over the last dimension, which may be split on a logical axis. [..., D] -> [..., 1]."""
    return x.mean(-1, keepdim=True)
