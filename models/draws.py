"""Random numbers as functions of what they are for."""

import hashlib

import torch
from torch import Tensor


def stream(*where) -> torch.Generator:
    """A random stream that is a function of `where` alone: (seed, phase, iteration, update, ...).

    No global state, so none is saved: a resumed run needs its counters only. On the CPU, so that
    a seed means the same numbers on every device.
    """
    digest = hashlib.blake2b(repr(where).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def normal(shape, *where) -> Tensor:
    """Standard normal numbers of the stream `where`, float32 on the CPU."""
    return torch.randn(shape, generator=stream(*where))


def uniform(shape, *where) -> Tensor:
    """Numbers of U(0, 1) of the stream `where`, float32 on the CPU."""
    return torch.rand(shape, generator=stream(*where))


def integers(n: int, count: int, *where) -> Tensor:
    """n of the numbers 0 .. count - 1, of the stream `where`, int64 on the CPU."""
    return torch.randint(count, (n,), generator=stream(*where))
