"""What makes the host wait for a device, seen on the CPU, where the same operations wait for nothing."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Their result is a number for the host, or has a size that depends on values.
NAMES = {
    "_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
    "repeat_interleave", "bincount",
}  # fmt: skip
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")


class Waits(TorchDispatchMode):
    """Collects the names of the operations whose result the host has to wait for, a mask as an index among them.

    `seen` counts all operations: a test that has seen too few of them has looked at the wrong place.
    """

    def __init__(self):
        super().__init__()
        self.found, self.seen = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in INDEXING else []
        masked = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        self.seen += 1
        if masked or name in NAMES:
            self.found.append(name)
        return function(*args, **(kwargs or {}))
