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


class Factors(NamedTuple):
    """What an adapter is: it adds scale up down x."""

    up: Tensor  # (outputs, rank) float32
    down: Tensor  # (rank, inputs) float32
    scale: float  # alpha / rank


def attach(net: nn.Module, name: str, factors: dict[str, Factors], device=None) -> None:
    """Give every adapted layer an adapter of this name, whose factors are these, frozen.

    device: where a layer computes, if its weights may be elsewhere by now.
    """
    for key, layer in adapted(net).items():
        up, down, scale = factors[key]
        layer.adapters[name] = adapter = Adapter(layer, len(down), 1.0, device)
        adapter.requires_grad_(False)
        adapter.scale = scale
        adapter.up.copy_(up)
        adapter.down.copy_(down)


def has_adapter(net: nn.Module, name: str) -> bool:
    """Whether the adapted layers have one of this name."""
    return any(name in layer.adapters for layer in adapted(net).values())


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
    """Two files in the order high noise, low noise, if one says it; as they come otherwise.

    Raises UserError where both say the same.
    """
    says = [noise_of(file) for file in files]
    if len(says) == 2 and says[0] == says[1] != "":
        raise UserError(f"{files[0]} and {files[1]} are both of {says[0]} noise; name one of each")
    swapped = len(says) == 2 and (says[0] == "low" or says[1] == "high")
    return list(files)[::-1] if swapped else list(files)


NOISE = re.compile(r"(high|low)[-_ ]?noise", re.I)  # as names say it, before anything else
WORD = re.compile(  # High, -low-, LOW; not slow, FLOW, lower
    r"((?<![a-zA-Z])(?:high|low)|High|Low)(?![a-z])|(?<![a-zA-Z])(HIGH|LOW)(?![a-zA-Z])"
)


def noise_of(file) -> str:
    """high, low, or nothing: by the metadata that models/export.py writes, or the file's name."""
    said, name = metadata(file).get("noise"), Path(file).name
    found = NOISE.findall(name) or ["".join(words) for words in WORD.findall(name)]
    words = {word.lower() for word in found}
    return said or (words.pop() if len(words) == 1 else "")


def metadata(file) -> dict[str, str]:
    """What the header of a file says besides tensors; nothing where there is no such file."""
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError, ValueError):
        return {}


class Change(NamedTuple):
    """What a file does to one parameter."""

    shape: tuple  # that the parameter must have
    merge: Callable[[Tensor], Tensor]  # W -> W + alpha / rank up down
    factors: Factors | None = None  # where it is of that kind


def split(changes: dict[str, Change], net: nn.Module) -> tuple[dict[str, Factors], dict]:
    """A file's changes as adapters of all adapted layers, and the rest, which must be merged.

    As adapters they keep float32 factors over a bf16 base. None, where a layer has none.
    """
    layers = {f"{key}.weight": key for key in adapted(net)}
    found = {
        k: changes[w].factors for w, k in layers.items() if w in changes and changes[w].factors
    }
    if len(found) < len(layers):
        return {}, changes
    return found, {name: change for name, change in changes.items() if name not in layers}


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
    change = Change((len(up), down.shape[1]), merge, Factors(up, down, scale))
    return changes | {module + ".weight": change}


def adder(change: Tensor) -> Change:
    """w -> w + change."""
    return Change(tuple(change.shape), lambda w: w + change)


# -- who takes which file ------------------------------------------------------------------------


class Key(NamedTuple):
    """A key of a LoRA file, taken apart."""

    prefix: str  # diffusion_model. transformer. lora_unet_ or nothing
    module: str
    part: str  # up, down, alpha, diff
    word: str  # lora_down, lora_up, lora_A, lora_B, alpha, diff


def taken_apart(key: str) -> Key:
    """The parts of a key. Raises UserError where its end is none of a LoRA's."""
    suffix = SUFFIX.search(key)
    if not suffix:
        raise UserError(f"{key} ends in nothing that a LoRA has (lora_down.weight, lora_up.weight, "
                        "lora_A.weight, lora_B.weight, alpha)")  # fmt: skip
    head = re.match(r"diffusion_model\.|transformer\.|lora_unet_|", key)[0]
    part = "diff" if suffix["diff"] else suffix.lastgroup
    word = suffix[part] if part != "diff" else "diff"
    return Key(head, key[len(head) : suffix.start()], part, word)


def refusals(dtypes: dict[str, str], wan: bool) -> dict[str, str]:
    """Consumer -> why it refuses a file, key -> dtype, or silently does the wrong thing.

    As read in their code of 2025-11 to 2026-08; an empty reason: it takes the file.
    """
    found = [taken_apart(key) for key in dtypes]
    float32 = all(
        kind == "F32" for key, kind in zip(found, dtypes.values()) if key.part in ("up", "down")
    )
    prefixes, words = {key.prefix for key in found}, {key.word for key in found}
    factors = {key.module for key in found if key.part in ("up", "down")}
    scaled = {key.module for key in found if key.part == "alpha"}
    ab, every, some = bool(words & {"lora_A", "lora_B"}), factors <= scaled, bool(scaled)
    outside = [key for key in found if not re.match(r"(transformer_)?blocks[._]", key.module)]
    renamed = any(re.search(r"attn[12][._]to_|ffn[._]net[._]", key.module) for key in found)
    native = wan and renamed  # diffusers' names of Wan's layers
    foreign = prefixes - {"diffusion_model.", ""}
    reasons = {
        "diffusers": [
            (wan and "" in prefixes, "Wan's names without a prefix load nothing, or raise"),
            (wan and some and bool(outside), f"it raises on alpha of {first(outside)}"),
            (wan and any("patch_embedding" in key.module for key in outside),
             "it raises on a change of patch_embedding"),
            ("transformer." in prefixes and not ab,
             "it doubles the prefix transformer. of lora_down and lora_up, and loads nothing"),
            (not wan and not ab and not every, "lora_down and lora_up need an alpha"),
            (not wan and ab and some, "it drops the alpha of lora_A and lora_B"),
            ("diff" in words, "whole differences (.diff)"),
        ],
        "ComfyUI": [
            (native, "it has no map for diffusers' names of Wan's layers"),
            (wan and "" in prefixes, "Wan's names need the prefix diffusion_model."),
            ("transformer." in prefixes, "it has no map for the prefix transformer."),
        ],
        "LightX2V": [
            (native, "it knows the original names alone"),
            (bool(foreign), f"it does not strip the prefix {min(foreign, default='')}"),
        ],
    }  # fmt: skip
    if wan:
        reasons["Wan2.2-Lightning"] = [
            (native or bool(foreign), "it knows the original names alone"),
            (ab, "it ignores lora_A and lora_B"),
            (not every, "it needs an alpha for every layer"),
            (not float32, "up and down must be float32"),
            ("diff" in words, "whole differences (.diff)"),
        ]
    return {
        who: next((reason for wrong, reason in rows if wrong), "") for who, rows in reasons.items()
    }


def first(keys: list[Key]) -> str:
    """The module of the first key, for a message."""
    return keys[0].module if keys else ""
