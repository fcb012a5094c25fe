"""mmfunc: multimodal models as pure functions over parameter trees, compiled by torch.compile."""

__version__ = "0.1.0"
