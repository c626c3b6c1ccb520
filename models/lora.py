"""Low-rank adapters: a role is an argument of the call, never a state of the network."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from models.files import UserError, first_line


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


# -- files of others -----------------------------------------------------------------------------

# lora_down / lora_up and lora_A / lora_B are two words for the same two factors
SUFFIX = re.compile(
    r"\.(?:(?P<down>lora_down|lora_A)|(?P<up>lora_up|lora_B))(?:\.default)?\.weight$"
    r"|\.(?P<alpha>alpha)$|\.(?P<diff>diff|diff_b|diff_m)$"
)


def high_first(files) -> list:
    """Files in the order high noise, low noise, if their names tell; as they come otherwise."""
    return sorted(files, key=lambda file: "low" in Path(file).name.lower())


def read(path: Path, aliases: dict[str, str]) -> dict[str, Callable[[Tensor], Tensor]]:
    """name of a parameter -> what merges the file's change into it, W + alpha / rank up down.

    aliases: every name of a layer -> ours. Without alpha the scale is 1, or what the metadata
    of diffusers says; .diff, .diff_b, .diff_m are whole changes of weight, bias, modulation.
    Raises UserError for a file that is no LoRA of this network.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key).float() for key in file.keys()}
            about = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"cannot read {path} ({first_line(error)}); name a LoRA file") from error
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        suffix = SUFFIX.search(key)
        module = re.sub(
            r"^(diffusion_model|transformer)\.", "", key[: suffix.start()] if suffix else ""
        )
        if module not in aliases:
            raise UserError(f"{path}: {key} is of no layer of this network")
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {key} is not finite")
        part = suffix["diff"] or suffix.lastgroup
        layers.setdefault(aliases[module], {})[part] = tensor
    alpha = about.get("transformer.lora_alpha", about.get("lora_alpha"))
    changes = {}
    for module, parts in layers.items():
        changes |= changes_of(module, parts, alpha, path)
    return changes


def changes_of(module: str, parts: dict[str, Tensor], alpha, path: Path) -> dict:
    """The merges of one layer."""
    targets = {"diff": ".weight", "diff_b": ".bias", "diff_m": ".modulation"}
    changes = {module + targets[kind]: adder(parts[kind]) for kind in targets if kind in parts}
    if ("up" in parts) != ("down" in parts) or not changes and "up" not in parts:
        raise UserError(f"{path}: {module} has not both factors of its change")
    if "up" in parts:
        up, down = parts["up"], parts["down"]
        if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
            raise UserError(
                f"{path}: {module} has factors {tuple(up.shape)} and {tuple(down.shape)}"
            )
        rank = down.shape[0]
        scale = (parts["alpha"].item() if "alpha" in parts else alpha or rank) / rank
        changes[module + ".weight"] = lambda w: w.addmm(up, down, alpha=scale)
    return changes


def adder(change: Tensor) -> Callable[[Tensor], Tensor]:
    """w -> w + change."""
    return lambda w: w + change.reshape(w.shape)
