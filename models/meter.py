"""What the networks of a run were asked for, and how fast that went."""

import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable

import torch


class Meter:
    """velocity(role, x_t, t, c) that counts its samples by role, shape, and whether recorded."""

    def __init__(self, velocity: Callable):
        self.velocity = velocity
        self.restart()

    def __call__(self, role: str, x_t, t, c=None):
        self.calls[role, tuple(x_t.shape[1:]), torch.is_grad_enabled()] += len(x_t)
        return self.velocity(role, x_t, t, c)

    def take(self) -> Counter:
        """The counts since the last time."""
        calls, self.calls = self.calls, Counter()
        return calls

    def lap(self) -> float:
        """Seconds since the last lap."""
        before, self.clock = self.clock, time.perf_counter()
        return self.clock - before

    def restart(self) -> None:
        """Counts and clock from here on."""
        self.calls, self.clock = Counter(), time.perf_counter()

    def forget_peak(self, device: torch.device) -> None:
        """Peak memory from here on, where that can be asked for."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def peak_memory(self, device: torch.device) -> float:
        """The most bytes in use so far: tensors on a GPU, the process on a CPU."""
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def summary(rows: list[dict], passes: int) -> str:
    """A phase's log in a line: seconds of a micro-batch, memory, share of the products' rate."""
    half = rows[len(rows) // 2 :]  # the first are slower: memory is found, kernels are chosen
    of = lambda key, kind="": [r[key] for r in half if key in r and r["role"].startswith(kind)]
    middle = lambda numbers: statistics.median(numbers) if numbers else float("nan")
    fake, student = (middle(of("seconds_update", kind)) / passes for kind in ("fake", "student"))
    return (
        f"{fake:.3g} s a micro-batch of a fake update, {student:.3g} s of a generator update; "
        f"peak {max(of('memory_gb')):.4g} GB; {100 * middle(of('share')):.3g} % of the rate of a "
        f"large product, {100 * middle(of('share_recomputed')):.3g} % with what is computed again"
    )
