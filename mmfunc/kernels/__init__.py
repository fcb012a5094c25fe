"""Hotspots: one function each, one implementation per device, and a plain reference."""

from mmfunc.kernels.attention import attend
from mmfunc.kernels.npu import fused
from mmfunc.kernels.product import dequantized, linear
