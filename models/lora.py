"""Low-rank adapters, and the LoRA files of all trainers.

The name of an adapter is an argument of the call, never a state of the network: a block that is
recomputed in backward must use the adapter that it used in forward.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from models import parallel
from models.common import UserError, first_line, stream


class Linear(nn.Linear):
    """y = W x + b in the dtype of x, plus alpha / rank up(down(x)) of the adapter of this name."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.adapters = nn.ModuleDict()

    def forward(self, x: Tensor, adapter: str | None = None) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
        return y if adapter is None else y + self.adapters[adapter](x)


class Adapter(nn.Module):
    """alpha / rank up down x, with float32 weights that compute in the dtype of x."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, device=None):
        super().__init__()
        device = device or linear.weight.device
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.up = nn.Parameter(torch.empty(linear.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.scale * self.up.to(x.dtype))


class Factors(NamedTuple):
    """The low-rank change of one layer: W + scale up down."""

    up: Tensor  # (outputs, rank) float32
    down: Tensor  # (rank, inputs) float32
    scale: float  # alpha / rank


def adapted_layers(net: nn.Module) -> dict[str, Linear]:
    """The linear layers that published LoRAs adapt, by name."""
    return {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, Linear) and net.adapted(name)
    }


def add_adapter(net: nn.Module, name: str, rank: int = 64, alpha: float = 8, device=None) -> None:
    """Add an adapter of this name to every adapted layer that has none. It has no values yet."""
    for layer in adapted_layers(net).values():
        if name not in layer.adapters:
            layer.adapters[name] = Adapter(layer, rank, alpha, device)


def start_adapter(
    net: nn.Module, name: str, key: tuple, rank: int = 64, alpha: float = 8, device=None
) -> dict[str, nn.Parameter]:
    """Add an adapter, or start it again in place. Returns its parameters.

    up is 0, so the network computes what it did before; down comes from the random stream of key.
    The names are blocks.0.ffn.0.down, blocks.0.ffn.0.up, ...
    """
    add_adapter(net, name, rank, alpha, device)
    rng, parameters = stream(*key), {}
    for layer_name, layer in adapted_layers(net).items():
        adapter = layer.adapters[name]
        down = torch.randn(rank, layer.in_features, generator=rng) / rank  # on the CPU
        parallel.copy_to_local(adapter.down, down)
        parallel.local(adapter.up.detach()).zero_()
        parameters |= {f"{layer_name}.down": adapter.down, f"{layer_name}.up": adapter.up}
    return parameters


def attach(net: nn.Module, name: str, factors: dict[str, Factors], device=None) -> None:
    """Add a frozen adapter with these factors, one for every adapted layer."""
    for key, layer in adapted_layers(net).items():
        up, down, scale = factors[key]
        layer.adapters[name] = adapter = Adapter(layer, len(down), 1.0, device)
        adapter.requires_grad_(False)
        adapter.scale = scale
        adapter.up.copy_(up)
        adapter.down.copy_(down)


# -- LoRA files ----------------------------------------------------------------------------------

# lora_down / lora_up and lora_A / lora_B are two names of the same two factors
SUFFIX = re.compile(
    r"\.(?:(?P<down>lora_down|lora_A)|(?P<up>lora_up|lora_B))(?:\.default)?\.weight$"
    r"|\.(?P<alpha>alpha)$|\.(?P<diff>diff|diff_b|diff_m)$"
)
DIFFS = {"diff": ".weight", "diff_b": ".bias", "diff_m": ".modulation"}


class Delta(NamedTuple):
    """The change of one parameter."""

    shape: tuple  # that the parameter must have
    apply: Callable[[Tensor], Tensor]  # W float32 -> W + alpha / rank up down
    factors: Factors | None = None  # if it is of low rank


def delta_of(factors: Factors) -> Delta:
    """The change that these factors make, to be merged into a weight."""
    up, down, scale = factors
    shape = (len(up), down.shape[1])
    return Delta(shape, lambda weight: weight.addmm(up, down, alpha=scale), factors)


def split_deltas(
    deltas: dict[str, Delta], net: nn.Module
) -> tuple[dict[str, Factors], dict[str, Delta]]:
    """A file's changes as (factors by adapted layer, the rest, which must be merged).

    As an adapter the factors stay float32 over a bf16 base. If one adapted layer has no factors
    there is no adapter, and everything is merged.
    """
    layers = {f"{name}.weight": name for name in adapted_layers(net)}
    factors = {layers[key]: d.factors for key, d in deltas.items() if key in layers and d.factors}
    if len(factors) < len(layers):
        return {}, deltas
    return factors, {key: delta for key, delta in deltas.items() if key not in layers}


def read_deltas(path: Path, aliases: dict[str, str]) -> dict[str, Delta]:
    """Read a LoRA file: name of a parameter -> its change.

    aliases: every name that a file may use for a layer -> ours. Without an alpha the scale is 1,
    or that of diffusers' metadata. .diff, .diff_b, .diff_m change a whole weight, bias, modulation.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key).float() for key in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path} ({first_line(error)}); name a LoRA file") from error
    metadata = json.loads(read_metadata(path).get("lora_adapter_metadata", "{}"))
    metadata = {key.removeprefix("transformer."): value for key, value in metadata.items()}
    for key in ("alpha_pattern", "use_rslora", "use_dora"):  # other scales than ours
        if metadata.get(key):
            raise UserError(f"{path}: {key} in its metadata is not supported; use another file")
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        layer, part = parse_key(key, aliases)
        if not layer:
            raise UserError(f"{path}: {key} is not a LoRA of a layer of this network")
        layers[layer][part] = tensor
    deltas = {}
    for layer, parts in layers.items():
        deltas |= layer_deltas(layer, parts, metadata.get("lora_alpha"), path)
    return deltas


def layer_deltas(
    layer: str, parts: dict[str, Tensor], alpha: float | None, path: Path
) -> dict[str, Delta]:
    """The changes of one layer's parameters. alpha: of the file, if the layer has none."""
    deltas = {}
    for part in DIFFS.keys() & parts.keys():
        diff = parts[part]
        deltas[layer + DIFFS[part]] = Delta(tuple(diff.shape), lambda w, diff=diff: w + diff)
    if not {"up", "down", "alpha"} & parts.keys():
        return deltas
    if not {"up", "down"} <= parts.keys() or "diff" in parts:
        raise UserError(f"{path}: {layer}: a LoRA needs lora_up and lora_down, and no .diff")
    up, down = parts["up"], parts["down"]
    alpha = parts["alpha"].item() if "alpha" in parts else alpha
    scale = 1.0 if alpha is None else alpha / len(down)
    return deltas | {layer + ".weight": delta_of(Factors(up, down, scale))}


def parse_key(key: str, aliases: dict[str, str]) -> tuple[str, str]:
    """Our name of the layer of a key ("" if it has none), and the part: up, down, alpha, diff..."""
    suffix = SUFFIX.search(key)
    if not suffix:
        return "", ""
    module = re.sub(r"^(diffusion_model|transformer)\.", "", key[: suffix.start()])
    return aliases.get(module, ""), suffix["diff"] or suffix.lastgroup


# -- which file is for which branch --------------------------------------------------------------

NOISE = re.compile(r"(high|low)[-_ ]?noise", re.I)  # as most names say it
WORD = re.compile(r"(?<![a-z])(high|low)(?![a-z])", re.I)  # high, -low-, LOW; not slow, lower


def read_metadata(file: Path | str) -> dict[str, str]:
    """The strings in the header of a safetensors file; {} if there is no such file."""
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError, ValueError):
        return {}


def noise_of(file: Path | str) -> str:
    """ "high", "low" or "": by the metadata that models/export.py writes, or by the file's name."""
    name = Path(file).name
    words = {word.lower() for word in NOISE.findall(name) or WORD.findall(name)}
    return read_metadata(file).get("noise") or (words.pop() if len(words) == 1 else "")


def sort_high_low(files: Iterable) -> list:
    """Sort two files: high noise first. If neither says what it is, they keep their order."""
    files = list(files)
    noises = [noise_of(file) for file in files]
    if len(files) == 2 and noises[0] == noises[1] != "":
        raise UserError(f"{files[0]} and {files[1]} are both for {noises[0]} noise; name one each")
    swapped = len(files) == 2 and (noises[0] == "low" or noises[1] == "high")
    return files[::-1] if swapped else files
