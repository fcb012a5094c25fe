"""What Inductor's graphs are changed to before it makes code of them."""

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from mmfunc.kernels import product, wide


class Rewrite(CustomGraphPass):
    """Products of a few rows together, and in float32 those that this CPU has no instructions for."""

    def __call__(self, graph: fx.Graph) -> None:
        product.gather(graph)
        if wide.slow():
            wide.widen(graph)

    def uuid(self) -> bytes:
        return get_hash_for_files((product.__file__, wide.__file__), str(wide.slow()))
