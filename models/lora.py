"""Linear layers with low-rank adapters, and the LoRA files of all trainers.

The name of an adapter is an argument of the call, never a state of the network: a block that is
recomputed in backward must use the adapter that it used in forward.
"""

import contextlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from models import parallel
from models.common import TensorFile, UserError, note, read_json, reading, stream


class Linear(nn.Linear):
    """y = W x + b in the dtype of x, plus alpha / rank up(down(x)) of the adapter of this name.

    The adapter is None in a layer that its file does not change: y = W x + b. A frozen W may be
    int8 (see store_int8): then W is weight * scale, with one scale per row.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.adapters, self.scale = nn.ModuleDict(), None

    def forward(self, x: Tensor, adapter: str | None = None) -> Tensor:
        rows = x.flatten(0, -2)  # (n, inputs)
        bias = self.bias.to(x.dtype)
        if self.scale is None:
            y = F.linear(rows, self.weight.to(x.dtype), bias)
        else:
            y = torch.addcmul(bias, Int8Product.apply(rows, self.weight), self.scale.to(x.dtype))
        module = None if adapter is None else self.adapters[adapter]  # KeyError if misspelled
        if module is not None:
            module.add_to(y, rows)
        return y.unflatten(0, x.shape[:-1])


class Int8Product(torch.autograd.Function):
    """x W^T, of an int8 W, in the dtype of x.

    Autograd would keep the cast W until backward, as much memory as it saves: so cast it again.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        [weight] = ctx.saved_tensors
        return grad @ weight.to(grad.dtype), None


def store_int8(net: nn.Module) -> nn.Module:
    """Make the linear layers in the blocks of a frozen network int8, without values yet."""
    for layer in [x for x in parallel.blocks_of(net).modules() if isinstance(x, Linear)]:
        empty = partial(torch.empty, device=layer.weight.device)
        layer.weight = nn.Parameter(empty(layer.weight.shape, dtype=torch.int8), False)
        layer.scale = nn.Parameter(empty(len(layer.weight)), False)
    return net


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 (n, m) and float32 scales (n,) whose product is the weight, within half a scale."""
    weight = weight.float()
    # scales that bf16 represents exactly: a layer casts them to the dtype of x
    scale = (weight.abs().amax(1) / 127).clamp(min=1e-30).bfloat16().float()
    return (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


class Adapter(nn.Module):
    """alpha / rank up(down(x)), with float32 weights that compute in the dtype of x."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, device=None):
        super().__init__()
        device = device or linear.weight.device
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.up = nn.Parameter(torch.empty(linear.out_features, rank, device=device))

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """y += alpha / rank up(down(x)) in place, y (n, outputs), x (n, inputs)."""
        y.addmm_(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype).T, alpha=self.scale)


class Factors(NamedTuple):
    """The low-rank change of one layer: W + scale up down."""

    up: Tensor  # (outputs, rank) float32
    down: Tensor  # (rank, inputs) float32
    scale: float  # alpha / rank


def adapted_layers(net: nn.Module) -> dict[str, Linear]:
    """The linear layers that published LoRAs adapt, by name."""
    modules = net.named_modules()
    return {name: x for name, x in modules if isinstance(x, Linear) and net.adapted(name)}


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
    rng = stream(*key)
    parameters = {}
    for layer_name, layer in adapted_layers(net).items():
        adapter = layer.adapters[name]
        down = torch.randn(rank, layer.in_features, generator=rng) / rank  # on the CPU
        parallel.copy_to_local(adapter.down, down)
        parallel.local(adapter.up.detach()).zero_()
        parameters |= {f"{layer_name}.down": adapter.down, f"{layer_name}.up": adapter.up}
    return parameters


def attach(net: nn.Module, name: str, factors: dict[str, Factors], device=None) -> None:
    """Add a frozen adapter with these factors to their layers, and None to the other ones."""
    for key, layer in adapted_layers(net).items():
        layer.adapters[name] = None
        if key not in factors:
            continue
        up, down, scale = factors[key]
        layer.adapters[name] = adapter = Adapter(layer, len(down), 1.0, device)
        adapter.requires_grad_(False)
        adapter.scale = scale
        adapter.up.copy_(up)
        adapter.down.copy_(down)


# -- LoRA files ----------------------------------------------------------------------------------

# what trainers and wrappers write after, before and inside the name of a layer
LORA = r"(?:\.lora_|[._]lora\.|\.lora_linear_layer\.)"
SUFFIX = re.compile(
    rf"{LORA}(?:(?P<down>down|A)|(?P<up>up|B))(?:(?:\.[^.]+)?\.weight)?$"
    rf"|(?:{LORA}|\.)(?P<alpha>alpha)$|{LORA}(?P<rank>rank)$|\.(?P<diff>diff|diff_b|diff_m)$"
)
WRAPPERS = "base_model|model|module|generator|pipe|dit|unet|diffusion_model|transformer(?:_2)?"
PREFIX = re.compile(rf"^(?:(?:{WRAPPERS})\.)+")
FLAT_PREFIX = re.compile(rf"^(?:lora_unet|lora_transformer|lycoris|{WRAPPERS})_+")
INSIDE = re.compile(
    r"_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)[._]|(?<=\.)processor\."
)
# keys of other adapters; and of Wan2.1 I2V's image branch, in both layouts: Wan2.2 has none
OTHER_KINDS = {
    "a LoKr": "lokr_", "a LoHa": "hada_", "a DoRA": r"dora_scale|lora_magnitude_vector",
    "a LoRA with a bias": r"lora.*\.bias$",
}  # fmt: skip
IMAGE_BRANCH = r"[kv]_img|img_emb|attn2[._](?:add_[kv]_proj|norm_added_k)|image_embedder"
# settings of a training by name, small letters only: alpha, rank, and those of other rules
ALPHAS = ("loraalpha", "networkalpha", "alpha", "ssnetworkalpha")
RANKS = ("r", "rank", "lorarank", "networkdim", "ssnetworkdim")
OTHER_RULES = dict.fromkeys(("alphapattern", "userslora", "rslora", "usedora", "dorawd"), ".")
OTHER_RULES["initloraweights"] = "pissa|olora|corda|loftq|lora_ga"  # these change the base
NUMBER = re.compile(r"(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?", re.I)
DIFFS = {"diff": ".weight", "diff_b": ".bias", "diff_m": ".modulation"}
PICKLES = (".pt", ".pth", ".ckpt", ".bin")
WHOLE_FILE = "name a whole LoRA file, or download it again"
GGUF = "quantised (GGUF), which is not supported; take the bf16 or fp16 safetensors"
OTHER_FORMATS = (  # suffixes, first bytes, what to say
    ((".gguf",), (b"GGUF",), GGUF),
    (PICKLES, (b"PK", b"\x80\x02"), "a pickle, which is never opened; take the safetensors"),
)


def open_safetensors(file: Path, advice: str = "download it again"):
    """Open a safetensors file. Raises UserError for broken files and for other formats."""
    with reading(file, advice):
        try:
            return TensorFile(file)
        except Exception:
            with open(file, "rb") as opened:
                start = opened.read(4)
            for suffixes, starts, text in OTHER_FORMATS:
                if file.suffix.lower() in suffixes or start.startswith(starts):
                    raise UserError(f"{file} is {text}") from None
            raise


Change = Factors | Tensor  # of a parameter: of low rank, or as large as the parameter


def merge(weight: Tensor, changes: Iterable[Change], rows: slice) -> Tensor:
    """Rows a:b of a parameter, slice(a, b), with their changes, which are added in float32."""
    for change in changes:
        if isinstance(change, Factors):
            weight = weight.float().addmm(change.up[rows], change.down, alpha=change.scale)
        else:
            weight = weight.float() + change[rows]
    return weight


def add_change(changes: list[Change], new: Change) -> list[Change]:
    """The changes of a parameter with another one. Two of low rank become one of a higher rank."""
    if not (len(changes) == 1 and isinstance(changes[0], Factors) and isinstance(new, Factors)):
        return [*changes, new]
    up = torch.cat([x.scale * x.up for x in (*changes, new)], 1)
    return [Factors(up, torch.cat([x.down for x in (*changes, new)]), 1.0)]


def split_changes(
    changes: dict[str, list[Change]], net: nn.Module
) -> tuple[dict[str, Factors], dict[str, list[Change]]]:
    """Changes as (factors by adapted layer, the rest, which must be merged)."""
    factors = {}
    rest = dict(changes)
    for layer in adapted_layers(net):
        change = changes.get(f"{layer}.weight", [])
        if len(change) == 1 and isinstance(change[0], Factors):
            # as an adapter they stay float32 over a bf16 base
            [factors[layer]] = rest.pop(f"{layer}.weight")
    return factors, rest


def read_changes(path: Path, strength: float, aliases: dict[str, str]) -> dict[str, Change]:
    """Read a LoRA file: name of a parameter -> its change, times the strength.

    aliases: every name that a file may use for a layer, with _ in place of dots -> ours. Without
    an alpha the scale is 1. .diff, .diff_b, .diff_m change a whole weight, bias, modulation.
    """
    changes = {}
    scales = set()
    file = open_safetensors(path, WHOLE_FILE)
    with reading(path, WHOLE_FILE):
        training = read_training(path, file.metadata)
        layers = read_layers(path, file, aliases)
        for layer, parts in layers.items():
            for part in DIFFS.keys() & parts.keys():
                changes[layer + DIFFS[part]] = strength * parts[part]
            if parts.keys() - DIFFS.keys():
                up, down, scale = read_factors(parts, training, f"{path}: {layer}")
                changes[layer + ".weight"] = Factors(up, down, strength * scale)
                scales.add(scale)
    if scales:
        bounds = " to ".join(f"{x:.4g}" for x in sorted({min(scales), max(scales)}))
        note(f"{path}: alpha / rank = {bounds}")
    left_out = len(file) - sum(map(len, layers.values()))  # read_layers skips nothing else
    if left_out:
        note(f"{path}: {left_out} tensors of Wan2.1's image branch, absent here, are left out")
    return changes


def read_layers(path: Path, file: TensorFile, aliases: dict[str, str]) -> dict[str, dict]:
    """The tensors of a LoRA file by layer and part, in float32, without an image branch."""
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key in file.keys():
        for kind, pattern in OTHER_KINDS.items():
            if re.search(pattern, key):
                raise UserError(f"{path} is {kind} ({key}): not supported; use a LoRA")
        layer, part = parse_key(key, aliases)
        if not layer and re.search(IMAGE_BRANCH, key):
            continue
        if not layer:
            raise UserError(f"{path}: {key} is not known here; use a LoRA of this model")
        if part in layers[layer]:
            raise UserError(f"{path} has a second {key}; give one LoRA per file, of this model")
        tensor = file.get_tensor(key)
        is_float = tensor.is_floating_point() or part in ("alpha", "rank")
        layers[layer][part] = tensor = tensor.float()
        if not (is_float and tensor.isfinite().all()):
            problem = "contains NaN or infinity" if is_float else "is quantised"
            raise UserError(f"{path}: {key} {problem}; use another file")
    if not layers:
        raise UserError(f"{path} contains no LoRA of this network; use another file")
    return layers


class Training(NamedTuple):
    """What stands beside the tensors of a LoRA about its training."""

    alpha: float | None
    ranks: set[float]
    is_kohya: bool  # only kohya's names have the alpha


def read_training(path: Path, metadata: dict[str, str]) -> Training:
    """Read the metadata and an adapter_config.json.

    Raises UserError for two alphas, and for other rules than alpha / rank.
    """
    config = path.with_name("adapter_config.json")
    values = defaultdict(set)  # by name, small letters only
    settings = list(read_json(config, WHOLE_FILE).items()) if config.is_file() else []
    for key, text in metadata.items():
        with contextlib.suppress(ValueError):  # not JSON
            settings += json.loads(text).items() if text.startswith("{") else [(key, text)]
    for key, value in settings:
        name = re.sub("[^a-z]", "", key.rpartition(".")[2].lower())
        if str(value).lower() not in ("", "{}", "false", "0", "no", "none"):
            values[name].add(str(value))
    for name, pattern in OTHER_RULES.items():
        found = [value for value in values[name] if re.search(pattern, value)]
        if found:
            line = f"its metadata or {config.name} has {name} {found[0]}"
            raise UserError(f"{path}: {line}, which is not supported; use another file")
    numbers = lambda names: {float(x) for n in names for x in values[n] if NUMBER.fullmatch(x)}
    alphas = numbers(ALPHAS)
    ranks = set() if values["rankpattern"] else numbers(RANKS)
    if len(alphas) > 1:
        found = f"the alphas {' and '.join(map(str, sorted(alphas)))}"
        raise UserError(f"{path}: its metadata or {config.name} has {found}; keep one")
    return Training(max(alphas, default=None), ranks, not numbers(ALPHAS[:-1]))


def read_factors(parts: dict[str, Tensor], training: Training, name: str) -> Factors:
    """The factors of a layer, scale alpha / rank. Raises UserError for an alpha in doubt."""
    up, down = (parts.get(part, torch.empty(0)) for part in ("up", "down"))
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != len(down) or "diff" in parts:
        found = ", ".join(f"{part} {tuple(x.shape)}" for part, x in parts.items())
        raise UserError(f"{name}: expected only up (n, rank) and down (rank, m), found {found}")
    alpha = parts["alpha"].item() if "alpha" in parts else training.alpha
    problem = doubt_of_scale(alpha, len(down), parts, training)
    if problem:
        raise UserError(f"{name}: expected one alpha / rank, found {problem}; correct the file")
    return Factors(up, down, 1.0 if alpha is None else alpha / len(down))


def doubt_of_scale(alpha: float | None, rank: int, parts: dict, training: Training) -> str:
    """What speaks against the scale alpha / rank of a layer; "" if nothing does."""
    beside = training.alpha
    ranks = set() if "alpha" in parts or not beside else training.ranks
    if "rank" in parts:
        ranks = {parts["rank"].item()}
    if beside and not math.isclose(alpha, beside, rel_tol=0.01):  # .alpha may be bf16
        return f"{alpha:g} in its tensor, {beside:g} in metadata or adapter_config.json"
    if ranks and rank not in ranks:
        return f"rank {min(ranks):g} named beside factors of rank {rank}"
    if training.is_kohya and "alpha" not in parts and beside not in (None, rank):
        # musubi-tuner's convert_lora.py puts alpha / rank into the factors and keeps the metadata
        return f"no .alpha, but ss_network_alpha {beside:g}, which may be in the factors already"
    if alpha and not abs(alpha) < 1e30:  # of a damaged file
        return f"an alpha of {alpha:g}"
    return ""


def parse_key(key: str, aliases: dict[str, str]) -> tuple[str, str]:
    """Our name of a key's layer, and the part: up, down, alpha, rank, diff... Else two "".

    Prefixes are removed until the name, with _ in place of dots, is one of aliases.
    """
    suffix = SUFFIX.search(key)
    flat = INSIDE.sub("", key[: suffix.start()] if suffix else "").replace(".", "_")
    while flat not in aliases and FLAT_PREFIX.match(flat):
        flat = FLAT_PREFIX.sub("", flat)
    return (aliases[flat], suffix["diff"] or suffix.lastgroup) if flat in aliases else ("", "")


def bare_name(key: str) -> str:
    """A name in a file of weights without what trainers, torch.compile and FSDP put around it."""
    return PREFIX.sub("", INSIDE.sub("", key))


# -- which file is for which branch --------------------------------------------------------------

NOISE_WORD = re.compile(r"(high|low)[-_ .]?noise", re.I)  # as most names say it
WORD = re.compile(  # high, -low-, LOW, HN; not slow, lower, low_rank
    r"(?<![a-z])(high|low|hn|ln)(?![a-z])(?![-_ ]?(?:rank|res|quality|poly|angle|vram|lr))", re.I
)
FOLDER_WORD = re.compile(r"(?<![a-z])(high|low|hn|ln)(?:[-_ ]?(?:noise|model|lora))*$", re.I)
CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # between its words


def read_metadata(file: Path | str) -> dict[str, str]:
    """The strings in the header of a safetensors file; {} if there is no such file."""
    try:
        return TensorFile(Path(file)).metadata
    except (OSError, SafetensorError, ValueError):
        return {}


def noise_of(file: Path) -> str:
    """ "high", "low" or "": by the metadata that models/export.py writes, by name or by folder."""
    if "transformer_2" in (file.name, file.parent.name):  # of diffusers, beside transformer
        return "low"
    name, folder = (CAMEL.sub("_", x) for x in (file.name, file.parent.name))
    words = NOISE_WORD.findall(name) or WORD.findall(name) or FOLDER_WORD.findall(folder)
    noises = {"high" if word.lower().startswith("h") else "low" for word in words}
    return read_metadata(file).get("noise") or (noises.pop() if len(noises) == 1 else "")


def noise_order(file: Path) -> int:
    """A key to sort by: high noise first, low noise last, and between them what does not say."""
    return {"high": 0, "low": 2}.get(noise_of(file), 1)


class LoraFile(NamedTuple):
    """A LoRA file, and the factor of all its changes."""

    path: Path
    strength: float = 1.0

    def __str__(self) -> str:
        return str(self.path) if self.strength == 1 else f"{self.path}:{self.strength:g}"


def parse_file(text: str) -> LoraFile:
    """Parse FILE or FILE:STRENGTH."""
    match = re.fullmatch(rf"(.+):([-+]?{NUMBER.pattern})", str(text))
    if match and not Path(text).exists():
        return LoraFile(Path(match[1]), float(match[2]))
    return LoraFile(Path(text))


def files_of_branches(files: Iterable[LoraFile], branches: int) -> list[list[LoraFile]]:
    """The LoRA files of each branch, high noise first.

    Two files are one for each, told apart by metadata or name, or else by their order. Otherwise a
    file whose name says high or low is for that branch, and any other for both.
    """
    files = list(files)
    paths = [file.path for file in files]
    noises = [noise_of(path) for path in paths]
    is_same = len(set(paths)) < len(paths)
    if branches == 2 == len(files) and (len(set(noises)) == 2 or not any(noises) or is_same):
        return [[file] for file in sorted(files, key=lambda file: noise_order(file.path))]
    names = ", ".join(path.name for path in paths)
    if is_same:
        raise UserError(f"expected different LoRA files, got {names}; name each once")
    if branches == 1 and {"high", "low"} <= set(noises):
        raise UserError(f"expected LoRA files of one transformer, got {names}; drop one")
    if branches == 2 < len(files) and not any(noises):
        raise UserError(f"got {names}, which may be for high or low noise; say it in their names")
    kinds = [("high", ""), ("low", "")] if branches == 2 else [("high", "low", "")]
    return [[file for file, noise in zip(files, noises) if noise in kind] for kind in kinds]
