"""What makes the host wait for a device, seen on the CPU, where the same operations wait for nothing."""

import sys

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Their result is a number for the host, or has a size that depends on values.
NAMES = {
    "_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
    "repeat_interleave", "bincount",
}  # fmt: skip
READS = (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy)
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")


class Waits(TorchDispatchMode):
    """Collects the names of what the host has to wait for: of operations, a mask as an index among them, and of copies.

    `seen` counts all operations: a test that has seen too few of them has looked at the wrong place.
    """

    def __init__(self):
        super().__init__()
        self.found, self.seen = [], 0
        self._copies = Copies(self.found)

    def __enter__(self):
        self._copies.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._copies.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in INDEXING else []
        masked = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        self.seen += 1
        if masked or name in NAMES:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Collects the names of copies between host and device, which for a CPU are no operations."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        moved = function is torch.Tensor.to and any(isinstance(a, torch.device) for a in (*args, *kwargs.values()))
        made = function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None
        # PyTorch moves gradients' norms to the device on which they are
        own = not sys._getframe(1).f_globals["__name__"].startswith("torch.")
        if own and (function in READS or made or (moved and not kwargs.get("non_blocking"))):
            self.found.append(function.__name__)
        return function(*args, **kwargs)
