"""The smallest network of the contract v = net(x_t, t, c): an MLP for points in R^d."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """`layers` linear layers with SiLU and residuals between; x_t (B, d), t (B,) -> v (B, d).

    The input has sin and cos of 2^k x (k = 0 .. octaves - 1) for each axis and of 16 frequencies
    of t from 1 to 30, so that sharp modes and short times can be told apart; c["class"] (B,)
    enters as one hot.
    """

    def __init__(
        self, dim: int = 2, width: int = 64, layers: int = 4, classes: int = 0, octaves: int = 5
    ):
        super().__init__()
        self.classes = classes
        t_freq = torch.logspace(0, math.log10(30), 16)[None]  # (1, 16)
        freq = torch.block_diag(*[2.0 ** torch.arange(octaves)[None]] * dim, t_freq)  # (d + 1, W)
        self.register_buffer("freq", freq.repeat(1, 2), persistent=False)  # (d + 1, 2 W)
        # cos is sin a quarter turn later: one product and one sine make all the waves
        phase = torch.tensor([0.0, math.pi / 2]).repeat_interleave(freq.shape[1])
        self.register_buffer("phase", phase, persistent=False)  # (2 W,)
        sizes = [dim + 1 + 2 * freq.shape[1] + classes] + [width] * (layers - 1) + [dim]
        self.first, *hidden, self.last = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])]
        self.hidden = nn.ModuleList(hidden)

    def forward(self, x_t: Tensor, t: Tensor, c: dict | None = None, adapter=None) -> Tensor:
        xt = torch.cat([x_t, t[:, None]], 1)  # (B, d + 1)
        parts = [xt, torch.addmm(self.phase, xt, self.freq).sin()]
        if self.classes:
            parts.append(F.one_hot(c["class"], self.classes).to(x_t.dtype))
        h = F.silu(self.first(torch.cat(parts, 1)))  # (B, width)
        for linear in self.hidden:
            h = h + F.silu(linear(h))
        return self.last(h)
