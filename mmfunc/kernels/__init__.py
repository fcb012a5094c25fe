"""Hotspots: one function each, one implementation per device, and a plain reference."""

from mmfunc.kernels.attention import attend
