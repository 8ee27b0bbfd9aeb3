"""Range regularization for model compression and quantization. `import r2` does not import torch until it is needed.

r2.compress(model, method, batch, **settings)    quantize or palettize any model in place (r2.library)
r2.regularizers                                  range regularizers for any loop
r2.pack.save(model, path), r2.pack.load(path)    the compressed file
r2.export.to_onnx(model, path, images)           ONNX
"""

import importlib
from typing import Any

_MODULES = ("regularizers", "pack", "export")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"r2.{name}")
    if name == "compress":
        return importlib.import_module("r2.library").compress
    if name == "__version__":
        from importlib.metadata import version

        return version("r2")
    raise AttributeError(f"module 'r2' has no attribute {name!r}")
