"""Low-rank adapters: a role is an argument of the call, never a state of the network."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """y = W x + b in the dtype of x, plus alpha / rank up(down(x)) of the adapter that is named."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.adapters = nn.ModuleDict()

    def forward(self, x: Tensor, adapter: str | None = None) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
        return y + self.adapters[adapter](x) if adapter in self.adapters else y


class Adapter(nn.Module):
    """alpha / rank up down x, float32 weights; up starts at zero, so that it starts as nothing."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        place = dict(device=linear.weight.device, dtype=torch.float32)
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.randn(rank, linear.in_features, **place) / rank)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank, **place))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.scale * self.up.to(x.dtype))


def add_adapter(net: nn.Module, name: str, rank: int = 64, alpha: float = 8) -> None:
    """Give every adapted linear layer of a port an adapter of this name."""
    for key, module in net.named_modules():
        if isinstance(module, Linear) and net.adapted(key):
            module.adapters[name] = Adapter(module, rank, alpha)
