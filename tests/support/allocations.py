"""What operators allocate."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Allocations(TorchDispatchMode):
    """Element counts of all tensors that operators return."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            # an alias of the weight itself (a view, an in-place result) is no new memory
            if isinstance(tensor, torch.Tensor) and not self._is_weight(tensor):
                self.sizes.add(tensor.numel())
        return out

    weights: frozenset = frozenset()

    def _is_weight(self, tensor):
        return tensor.untyped_storage().data_ptr() in self.weights
