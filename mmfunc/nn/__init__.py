"""Neural network functions on parameter trees.

A capital declares, a small letter applies: `Linear(d, f, "embed -> mlp")` is a tree of Params, `linear(p, x)` uses one.
What a tree lacks is not done: no "bias", no bias; no "gate", no gating; no "norm", no query and key norms.

Dimensions: B batch, S sequence, L context, D width, H heads, G key heads, K head width, F hidden width, V vocabulary,
C channels, T Y X time and space. Activations are [B, S, D]; queries, keys and values are [B, S, H, K].
"""

from mmfunc.nn.attention import Attention, attend, joint, kv, merge, qkv, query, remember
from mmfunc.nn.basic import (
    MLP,
    Embed,
    LayerNorm,
    Linear,
    RMSNorm,
    embed,
    gelu_tanh,
    glu,
    layernorm,
    linear,
    mlp,
    quick_gelu,
    reduced,
    rmsnorm,
)
from mmfunc.nn.chain import Chain, running, whole
from mmfunc.nn.conv import (
    Conv,
    GroupNorm,
    Once,
    causal,
    conv,
    double,
    double_frames,
    groupnorm,
    halve,
    halve_frames,
    joined,
    laid,
    tiled,
)
from mmfunc.nn.diffusion import Offsets, adaln, gated, grid, modulate, patchify, sinusoid, unpatchify
from mmfunc.nn.loss import cross_entropy, targets
from mmfunc.nn.rope import axial, rotate, sections, unpaired
