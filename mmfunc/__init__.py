"""mmfunc: multimodal models as pure functions over parameter trees, compiled by torch.compile."""

import ctypes
import os
import sys
from importlib.util import find_spec

__version__ = "0.1.0"

CANN = "libhccl.so", "libge_runner.so", "libascendcl.so"  # libraries without which torch_npu does not load


def lacking() -> list[str]:
    """The libraries of CANN that the loader does not find."""
    def loads(library: str) -> bool:
        try:
            ctypes.CDLL(library)
        except OSError:
            return False
        return True

    return [library for library in CANN if not loads(library)]


def needs_cann() -> None:
    """An ImportError that says what to do, where torch_npu is installed and would not load."""
    if find_spec("torch_npu") and (missing := lacking()):
        raise ImportError(
            f"torch_npu is installed but CANN is not found ({', '.join(missing)}): source CANN's set_env.sh, or set "
            "TORCH_DEVICE_BACKEND_AUTOLOAD=0 to go without NPUs; python -m mmfunc.doctor says what else is missing")


# import torch loads torch_npu where it is installed, and fails in its depths; the doctor does without both
if (os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") != "0" and "torch" not in sys.modules
        and not any(a.endswith("mmfunc.doctor") for a in sys.orig_argv)):
    needs_cann()
