"""Lowering for Ascend NPUs by torchair: decompositions and converters, the graph of its engine (GE), its meaning.

Needs torch_npu: the wheel with CANN on a device, or with the stand-ins of `stubs` on any Linux machine. Nothing of
mmfunc imports this package before jit is asked for the backend "npu".
"""

import mmfunc

mmfunc.needs_cann()  # in one sentence

import torch_npu  # noqa: E402  registers the device, and makes torchair a module
