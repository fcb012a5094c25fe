"""What a model folder is trained to do. Each task is a module with the same functions: model, batches, signatures,
show, export; they get the flags of the training program."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

FILES = {"model_index.json": "pictures", "config.json": "language"}  # a file of the model folder: its task


def of(folder: Path) -> ModuleType:
    """The task of a model folder."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give a model folder with config.json, or a pipeline's with "
                                "model_index.json")
    for file, task in FILES.items():
        if (Path(folder) / file).exists():
            return import_module(f"{__name__}.{task}")
    raise FileNotFoundError(f"{folder} has neither {' nor '.join(FILES)}")
