"""What the networks of a run were asked for, and how fast that went."""

import resource
import sys
from collections import Counter
from collections.abc import Callable

import torch


class Meter:
    """velocity(role, x_t, t, c) that counts its samples by role, shape, and whether recorded."""

    def __init__(self, velocity: Callable):
        self.velocity, self.calls = velocity, Counter()

    def __call__(self, role: str, x_t, t, c=None):
        self.calls[role, tuple(x_t.shape[1:]), torch.is_grad_enabled()] += len(x_t)
        return self.velocity(role, x_t, t, c)

    def take(self) -> Counter:
        """The counts since the last time."""
        calls, self.calls = self.calls, Counter()
        return calls


def peak_memory(device: torch.device) -> float:
    """The most bytes in use so far: tensors on a GPU, the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
