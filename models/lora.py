"""Low-rank adapters: a role is an argument of the call, never a state of the network."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from models import parallel
from models.draws import stream
from models.files import UserError, first_line


class Linear(nn.Linear):
    """y = W x + b in the dtype of x, plus alpha / rank up(down(x)) of the adapter that is named."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.adapters = nn.ModuleDict()

    def forward(self, x: Tensor, adapter: str | None = None) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
        return y if adapter is None else y + self.adapters[adapter](x)


class Adapter(nn.Module):
    """alpha / rank up down x, float32 weights."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, device=None):
        super().__init__()
        device = device or linear.weight.device
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.up = nn.Parameter(torch.empty(linear.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.scale * self.up.to(x.dtype))


def adapted(net: nn.Module) -> dict[str, Linear]:
    """The linear layers of a port that adapters are for, by name."""
    named = net.named_modules()
    return {key: m for key, m in named if isinstance(m, Linear) and net.adapted(key)}


def add_adapter(net: nn.Module, name: str, rank: int = 64, alpha: float = 8, device=None) -> None:
    """Give every adapted layer a place for an adapter of this name, if it has none."""
    for layer in adapted(net).values():
        if name not in layer.adapters:
            layer.adapters[name] = Adapter(layer, rank, alpha, device)


def parameters(net: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Those of the adapter of this name."""
    found = {key: layer.adapters[name] for key, layer in adapted(net).items()}
    return {f"{key}.{x}": p for key, one in found.items() for x, p in one.named_parameters()}


def start_adapter(
    net: nn.Module, name: str, where: tuple, rank: int = 64, alpha: float = 8, device=None
) -> dict[str, nn.Parameter]:
    """Give every adapted linear layer of a port an adapter of this name, or start it anew in place.

    down is a function of `where`, up is 0: the adapter changes nothing yet. Returns its parameters.
    """
    add_adapter(net, name, rank, alpha, device)
    draws = stream(*where)
    for layer in adapted(net).values():
        adapter = layer.adapters[name]
        drawn = torch.randn(rank, layer.in_features, generator=draws) / rank  # on the CPU
        parallel.put(adapter.down, drawn)
        parallel.part(adapter.up.detach()).zero_()
    return parameters(net, name)


# -- files of others -----------------------------------------------------------------------------

# lora_down / lora_up and lora_A / lora_B are two words for the same two factors
SUFFIX = re.compile(
    r"\.(?:(?P<down>lora_down|lora_A)|(?P<up>lora_up|lora_B))(?:\.default)?\.weight$"
    r"|\.(?P<alpha>alpha)$|\.(?P<diff>diff|diff_b|diff_m)$"
)


def high_first(files) -> list:
    """Two files in the order high noise, low noise, if both names tell; as they come otherwise."""
    says = [re.search(r"(?<![a-z])(high|low)(?![a-z])", Path(f).name.lower()) for f in files]
    swapped = [word and word[0] for word in says] == ["low", "high"]
    return list(files)[::-1] if swapped else list(files)


class Change(NamedTuple):
    """What a file does to one parameter."""

    shape: tuple  # that the parameter must have
    merge: Callable[[Tensor], Tensor]  # W -> W + alpha / rank up down


def read(path: Path, aliases: dict[str, str]) -> dict[str, Change]:
    """name of a parameter -> the file's change of it.

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
        module, part = place(key, aliases)
        if not module:
            raise UserError(f"{path}: {key} is of no layer of this network")
        if part in layers.setdefault(module, {}):
            raise UserError(f"{path}: {key} is there twice, under two names")
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {key} is not finite")
        layers[module][part] = tensor
    if not layers:
        raise UserError(f"{path} holds no tensor")
    alpha = alpha_of(about, path)
    changes = [changes_of(module, parts, alpha, path) for module, parts in layers.items()]
    return {name: change for found in changes for name, change in found.items()}


def place(key: str, aliases: dict[str, str]) -> tuple[str, str]:
    """Our name of the layer that a key belongs to, and which part of its change it is."""
    suffix = SUFFIX.search(key)
    if not suffix:
        return "", ""
    module = re.sub(r"^(diffusion_model|transformer)\.", "", key[: suffix.start()])
    return aliases.get(module, ""), suffix["diff"] or suffix.lastgroup


def alpha_of(about, path: Path) -> float | None:
    """The alpha of diffusers' metadata. Raises UserError for what it may say besides."""
    if not isinstance(about, dict):
        raise UserError(f"{path}: its lora_adapter_metadata is no JSON object")
    about = {key.removeprefix("transformer."): value for key, value in about.items()}
    unknown = [key for key in ("alpha_pattern", "use_rslora", "use_dora") if about.get(key)]
    if unknown:
        raise UserError(f"{path}: {unknown[0]} in its metadata is not supported")
    alpha = about.get("lora_alpha")
    if alpha is not None and type(alpha) not in (int, float):
        raise UserError(f"{path}: lora_alpha {alpha!r} in its metadata is no number")
    return alpha


def changes_of(module: str, parts: dict[str, Tensor], alpha: float | None, path: Path) -> dict:
    """The merges of one layer: what each of its parameters becomes."""
    kinds = {"diff": ".weight", "diff_b": ".bias", "diff_m": ".modulation"}
    changes = {module + kinds[kind]: adder(parts[kind]) for kind in kinds if kind in parts}
    if not {"up", "down", "alpha"} & set(parts):
        return changes
    up, down = parts.get("up"), parts.get("down")
    if up is None or down is None or "diff" in parts:
        raise UserError(f"{path}: {module} needs both factors of its change, and nothing beside")
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0] or not len(down):
        raise UserError(f"{path}: {module} has factors {tuple(up.shape)} and {tuple(down.shape)}")
    if "alpha" in parts and parts["alpha"].numel() != 1:
        raise UserError(f"{path}: {module} has an alpha of {parts['alpha'].numel()} numbers")
    rank = len(down)
    own = parts["alpha"].item() if "alpha" in parts else alpha
    scale = 1.0 if own is None else own / rank
    merge = lambda w: w.addmm(up, down, alpha=scale)
    return changes | {module + ".weight": Change((len(up), down.shape[1]), merge)}


def adder(change: Tensor) -> Change:
    """w -> w + change."""
    return Change(tuple(change.shape), lambda w: w + change)
