"""Published weights -> our networks: folders of either layout and single files, tensor by tensor.

`python -m models.weights --teacher wan22 --weights FOLDER` says whether headers and sizes fit.
"""

import contextlib
import difflib
import inspect
import itertools
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from models import lora, parallel
from models.files import UserError, first_line, read_json
from models.flags import Parser, exit_status
from models.qwen_image import QwenImage
from models.wan import Wan


class Row(NamedTuple):
    """A teacher: its network, where its weights are published, which experts own which times."""

    network: type
    settings: dict  # of the network
    repository: str = ""  # none: random weights only, or those of folder
    boundary: float | None = None  # two experts: high noise for t >= boundary
    usual: tuple[int, float | None] = (50, 5.0)  # steps and shift it is sampled with; None: by size
    scale: int = 8  # pixels a latent, of a side
    folder: Path | None = None  # weights and prompts that come with this repository

    @property
    def from_image(self) -> bool:
        """Whether it goes from an image to a video."""
        return self.settings.get("in_dim") == 36

    @property
    def fps(self) -> int:
        """Frames a second of its videos."""
        return 24 if self.settings.get("out_dim") == 48 else 16


ROOT = Path(__file__).parent.parent
A14B = dict(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
TINY = dict(dim=128, ffn_dim=256, num_heads=4, num_layers=2, text_dim=64, text_len=16)
DIGITS = dict(dim=96, ffn_dim=384, num_heads=3, num_layers=3, text_dim=16, text_len=1)
QWEN = dict(num_attention_heads=24, attention_head_dim=128, num_layers=60)
QWEN_TINY = dict(
    num_attention_heads=4, attention_head_dim=32, num_layers=2, joint_attention_dim=64,
    axes_dims_rope=(8, 12, 12),
)  # fmt: skip
TEACHERS = {
    "wan21-1.3b": Row(
        Wan,
        dict(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        usual=(50, 8.0),
    ),
    "wan21": Row(Wan, A14B, "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
    "wan22": Row(Wan, A14B, "Wan-AI/Wan2.2-T2V-A14B-Diffusers", 0.875, (40, 12.0)),
    "wan22-i2v": Row(
        Wan, A14B | dict(in_dim=36), "Wan-AI/Wan2.2-I2V-A14B-Diffusers", 0.9, (40, 5.0)
    ),
    "wan22-5b": Row(
        Wan,
        dict(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=48, out_dim=48),
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        scale=16,
    ),
    "qwen-image": Row(QwenImage, QWEN, "Qwen/Qwen-Image", usual=(50, None)),
    "wan21-tiny": Row(Wan, TINY),
    "wan22-tiny": Row(Wan, TINY, boundary=0.875, usual=(40, 12.0)),
    "wan22-i2v-tiny": Row(Wan, TINY | dict(in_dim=36), boundary=0.9, usual=(40, 5.0)),
    "qwen-image-tiny": Row(QwenImage, QWEN_TINY, usual=(50, None)),
    "mnist": Row(Wan, DIGITS, usual=(40, 3.0), scale=4, folder=ROOT / "toy" / "mnist"),
}
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Stored(NamedTuple):
    """A tensor in a file: where it is and what its header says."""

    file: Path
    key: str
    shape: tuple
    dtype: str


# -- what a folder holds -------------------------------------------------------------------------


def shards(path: Path) -> list[Path]:
    """The files of one network: those that the index names, or all safetensors of the folder."""
    if path.is_file():
        return [path]
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise UserError(f"{path} holds {len(indices)} indices; name the folder of one network")
    if indices:
        names = read_json(indices[0], "download it again").get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise UserError(f"{indices[0]} has no weight_map of file names; download it again")
        files = [path / name for name in sorted(set(names.values()))]
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files and (path / "config.json").is_file():
        raise UserError(
            f"{path} has a config.json and no .safetensors beside it; download it again"
        )
    if not files:
        raise UserError(f"{path} holds no .safetensors; pickles (.pth, .bin) are never opened")
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise UserError(f"{path} lacks {absent[0]}, which its index names; download it again")
    return files


def contents(files: Iterable[Path]) -> dict[str, Stored]:
    """name -> tensor, from the headers alone; a prefix that single files carry is taken off."""
    found = {}
    for file in files:
        with opened(file) as shard:
            for key in shard.keys():
                part = shard.get_slice(key)
                name = key.removeprefix("model.").removeprefix("diffusion_model.")
                if name in found:
                    raise UserError(f"{file} and {found[name].file} both hold {name}; keep one")
                found[name] = Stored(file, key, tuple(part.get_shape()), part.get_dtype())
    return found


def opened(file: Path):
    """A safetensors file, mapped and not read; a UserError where it is none, or cut short."""
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"cannot read {file} ({first_line(error)}); download it again") from error


# -- which network it is -------------------------------------------------------------------------

CLASSES = {"WanModel": Wan, "WanTransformer3DModel": Wan, "QwenImageTransformer2DModel": QwenImage}
# diffusers' words for Wan's settings
WORDS = {"in_channels": "in_dim", "out_channels": "out_dim", "num_attention_heads": "num_heads"}
# setting -> a tensor, the axis that tells it, in units of
SHAPES = {
    Wan: {
        "dim": ("patch_embedding.weight", 0, 1),
        "ffn_dim": ("blocks.0.ffn.0.weight", 0, 1),
        "in_dim": ("patch_embedding.weight", 1, 1),
        "out_dim": ("head.head.weight", 0, 4),  # a patch of 1 x 2 x 2
        "text_dim": ("text_embedding.0.weight", 1, 1),
        "freq_dim": ("time_embedding.0.weight", 1, 1),
        "num_heads": ("patch_embedding.weight", 0, 128),  # of 128, in all that is published
    },
    QwenImage: {
        "num_attention_heads": ("img_in.weight", 0, 128),
        "attention_head_dim": ("transformer_blocks.0.attn.norm_q.weight", 0, 1),
        "joint_attention_dim": ("txt_in.weight", 1, 1),
        "in_channels": ("img_in.weight", 1, 1),
    },
}
BRANCHES = (  # not ported
    "image_dim", "added_kv_proj_dim", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope",
    "guidance_embeds",
)  # fmt: skip


def architecture(path: Path, found: dict[str, Stored]) -> tuple[type, dict]:
    """Class and settings of a network: config.json's where there is one, the rest from shapes."""
    network = QwenImage if "img_in.weight" in found else Wan
    file = (path.parent if path.is_file() else path) / "config.json"
    config = read_json(file, "download it again") if file.is_file() else {}
    name = config.get("_class_name")
    if config and CLASSES.get(str(name)) is not network:
        raise UserError(f"{file} is of a {name}, the weights beside it are of a {network.__name__}")
    branches = [key for key in BRANCHES if config.get(key)]
    if branches:
        raise UserError(f"{file}: {branches[0]} is {config[branches[0]]}; that is not ported")
    if config.get("patch_size") not in (None, 2, [1, 2, 2]):
        raise UserError(f"{file}: patch_size is {config['patch_size']}, ported is [1, 2, 2] or 2")
    settings = settings_of(network, config, file)
    for key, (tensor, axis, unit) in SHAPES[network].items():
        if key not in settings:
            settings[key] = size(found, network, tensor, axis, path) // unit
            if not settings[key]:
                raise UserError(f"{path}: heads are not of 128, so it needs its config.json beside")
    settings.setdefault("num_layers", layers(found))
    return network, settings


def settings_of(network: type, config: dict, file: Path) -> dict:
    """The settings that a config.json holds, in our words. Raises UserError for odd values."""
    words = {WORDS.get(k, k) if network is Wan else k: v for k, v in config.items()}
    counts = {*SHAPES[network], "num_layers", "text_len", "attention_head_dim"} & set(words)
    for key in sorted(counts):
        if type(words[key]) is not int or not 0 < words[key] < 10**6:
            raise UserError(f"{file}: {key} {words[key]!r} is no count; download it again")
    if network is Wan and {"attention_head_dim", "num_heads"} <= counts:
        words["dim"] = words["num_heads"] * words["attention_head_dim"]
    axes = words.get("axes_dims_rope")
    even = isinstance(axes, list) and all(type(n) is int and n % 2 == 0 for n in axes)
    if axes is not None and not (even and sum(axes) == words.get("attention_head_dim")):
        raise UserError(f"{file}: axes_dims_rope {axes!r} makes no head; download it again")
    eps = words.get("eps", 1e-6)
    if type(eps) not in (int, float) or not 0 < eps < 1:
        raise UserError(f"{file}: eps {eps!r} is no small number; download it again")
    known = set(inspect.signature(network).parameters) - {"dtype", "checkpointing", "round_t"}
    return {k: v for k, v in words.items() if k in known}


def size(found: dict[str, Stored], network: type, name: str, axis: int, path: Path) -> int:
    """The length of one axis of a tensor, under either name."""
    stored = found.get(name) or found.get(network.diffusers_name(name))
    if stored is None or len(stored.shape) <= axis:
        raise UserError(f"{path} is of no {network.__name__}: it has no {name}, or not its shape")
    return stored.shape[axis]


def layers(found: dict[str, Stored]) -> int:
    """How many blocks the names count."""
    numbers = [n.split("blocks.")[1].split(".")[0] for n in found if "blocks." in n]
    return max((int(n) + 1 for n in numbers if n.isdigit()), default=1)


def match(net: nn.Module, found: dict[str, Stored], path: Path) -> dict[str, Stored]:
    """Our name -> tensor in a file; a UserError for one that is absent, too many or mis-shaped."""
    expected = {name: tuple(p.shape) for name, p in net.named_parameters()}
    ours = {net.diffusers_name(name): name for name in expected} | {name: name for name in expected}
    stored = {ours.get(name, name): there for name, there in found.items()}
    for name, there in stored.items():
        if name not in expected:
            raise UserError(f"{there.file} holds {there.key}, which a {type(net).__name__} has not")
        if there.shape != expected[name]:
            raise UserError(
                f"{there.file}: {there.key} has the shape {there.shape}, expected {expected[name]}"
            )
        if there.dtype not in DTYPES:
            raise UserError(
                f"{there.file}: {there.key} is {there.dtype}, expected {'/'.join(DTYPES)}"
            )
    absent = [name for name in expected if name not in stored]
    if absent:
        raise UserError(
            f"{path} lacks {absent[0]} {expected[absent[0]]}"
            + (f" and {len(absent) - 1} more" if absent[1:] else "")
        )
    return stored


# -- loading -------------------------------------------------------------------------------------


def plan(path: Path, dtype: torch.dtype, teacher: str = "") -> tuple[nn.Module, dict[str, Stored]]:
    """The network on the meta device and where each parameter is, from headers alone. UserError."""
    if not path.exists():
        raise UserError(f"{path} does not exist; {how_to_get(teacher)}")
    found = contents(shards(path))
    network, settings = architecture(path, found)
    check_kind(teacher, network, settings, path)
    try:
        net = build(network, settings, dtype)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: its config makes no network ({first_line(error)})") from error
    return net, match(net, found, path)


def build(network: type, settings: dict, dtype: torch.dtype) -> nn.Module:
    """A network on the meta device that knows its settings; each parameter in its own dtype."""
    with torch.device("meta"):
        net = network(**settings, dtype=dtype)
    net.settings = settings
    for name, p in net.named_parameters():
        p.data = p.data.to(dtype_of(name, net))
    return net


def fill(
    net: nn.Module, tensors: Iterable[tuple[str, Tensor]], device, make_room=nn.Module.to_empty
) -> nn.Module:
    """Give a network of the meta device its tensors, one by one; in eval mode.

    make_room(net, device=...): where processes share them, for a part of each.
    """
    make_room(net, device=device)
    places = dict(net.named_parameters())
    for name, tensor in tensors:
        parallel.put(places[name], tensor)
        del tensor  # may be the last hold on a mapped shard
    return net.eval()


def copy(net: nn.Module, old: nn.Module | None, device, make_room=nn.Module.to_empty) -> nn.Module:
    """The same network with float32 parameters of its own, which learn; old ones are written over.

    Inside it computes in net's dtype, so that at first it computes exactly what net does.
    """
    new = old or fill(build(type(net), net.settings, net.dtype).float(), (), device, make_room)
    mine = {name: p for name, p in net.named_parameters() if not p.requires_grad}
    with torch.no_grad():
        for name, p in new.named_parameters():
            parallel.part(p).copy_(parallel.part(mine[name]))
    return new


def load(
    folder,
    dtype=torch.bfloat16,
    device="cpu",
    teacher_lora=None,
    teacher="",
    make_room=nn.Module.to_empty,
    changes=None,
) -> nn.Module:
    """A network from published weights, in eval mode and frozen, dtype inside.

    folder holds config.json and safetensors of either layout, or is a single safetensors file.
    Never more memory than the network, one shard and the LoRA: tensors are cast as they are read.
    A teacher_lora is merged in float32, then `changes` of read_lora. With the name of a teacher its
    kind is checked. make_room as in fill. Raises UserError for all that is not a whole network.
    """
    net, stored = plan(Path(folder), dtype, teacher)
    merges = [read_lora(net, Path(teacher_lora)) if teacher_lora else {}, changes or {}]
    total = sum(p.numel() for p in net.parameters())

    def tensors():
        with tqdm(total=total, desc=str(folder), unit=" weights", unit_scale=True,
                  disable=None) as bar:  # fmt: skip
            for name, tensor in stream(stored):
                tensor = merged(tensor, name, merges)
                check_values(tensor, stored[name])
                yield name, tensor
                bar.update(tensor.numel())
                del tensor  # the last hold on a mapped shard

    return fill(net.requires_grad_(False), tensors(), device, make_room)


def merged(tensor: Tensor, name: str, merges: list[dict[str, lora.Change]]) -> Tensor:
    """A parameter with the changes that LoRAs make of it, one after the other, in float32."""
    for changes in merges:
        if name in changes:
            tensor = changes[name].merge(tensor.float())
    return tensor


def check_values(tensor: Tensor, there: Stored) -> None:
    """Raise UserError for NaN, for inf, and for the zeros that a broken download leaves."""
    low, high = (bound.item() for bound in tensor.aminmax())  # one pass, no copy
    if not math.isfinite(low + high):
        raise UserError(f"{there.file}: {there.key} is not finite; download it again")
    if low == high == 0 and tensor.ndim > 1:
        raise UserError(f"{there.file}: {there.key} is all zeros; download it again")


def dtype_of(name: str, net: nn.Module) -> torch.dtype:
    """In what a parameter is kept: the network's dtype, or float32 where its port says so."""
    return torch.float32 if any(part in name for part in net.float32) else net.dtype


def read_lora(net: nn.Module, path: Path) -> dict[str, lora.Change]:
    """A LoRA's changes of the network, parameter by parameter. Raises UserError."""
    changes = lora.read(path, aliases(net))
    expected = {name: tuple(p.shape) for name, p in net.named_parameters()}
    for name, change in changes.items():
        if name not in expected:
            raise UserError(f"{path}: {name} is no weight of this network")
        if change.shape != expected[name]:
            raise UserError(f"{path}: its change of {name} has not the shape {expected[name]}")
    return changes


def stream(stored: dict[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, file by file: one is open at a time, and a tensor is read when asked for."""
    by_file = sorted(stored, key=lambda name: stored[name].file)
    for file, names in itertools.groupby(by_file, key=lambda name: stored[name].file):
        with opened(file) as shard:
            for name in names:
                yield name, shard.get_tensor(stored[name].key)


def aliases(net: nn.Module) -> dict[str, str]:
    """Every name that a LoRA file may give a layer -> ours."""
    modules = [name for name, module in net.named_modules() if name]
    modules += [name.rsplit(".", 1)[0] for name, _ in net.named_parameters()]
    names = {net.diffusers_name(name): name for name in modules} | {name: name for name in modules}
    return names | {"lora_unet_" + name.replace(".", "_"): ours for name, ours in names.items()}


class Teacher(NamedTuple):
    """The experts, high noise first, and the t from which on the first one answers."""

    experts: list[nn.Module]
    boundary: float | None


def load_teacher(name: str, *folders, teacher_lora=(), **how) -> Teacher:
    """The experts of a teacher, from its published folder or from one path an expert, high first.

    how: dtype and device of load. teacher_lora: one file an expert. Raises UserError.
    """
    paths, boundary = locate(name, *folders)
    teacher_lora = [teacher_lora] if isinstance(teacher_lora, (str, Path)) else list(teacher_lora)
    if teacher_lora and len(teacher_lora) != len(paths):
        raise UserError(f"{name} takes {len(paths)} LoRA, one an expert, got {len(teacher_lora)}")
    for path in paths:  # all of them, before the first is loaded
        plan(path, torch.bfloat16, name)
    files = lora.high_first(teacher_lora) or [None] * len(paths)
    experts = [load(p, teacher_lora=f, teacher=name, **how) for p, f in zip(paths, files)]
    return Teacher(experts, boundary)


# folders of the experts inside a published one: original, diffusers; or diffusers' only one
PAIRS = (("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"))
LAYOUTS = (*PAIRS, ("transformer",))


def locate(name: str, *folders) -> tuple[list[Path], float | None]:
    """One path an expert, high noise first, and the boundary. Raises UserError."""
    row = row_of(name)
    paths = [Path(folder) for folder in folders] or [default_folder(name)]
    absent = [path for path in paths if not path.exists()]
    if absent:
        raise UserError(f"{absent[0]} does not exist; {how_to_get(name)}")
    experts, boundary = 2 if row.boundary else 1, row.boundary
    if len(paths) == 1 and paths[0].is_dir():
        root = paths[0]
        pairs = [[root / folder for folder in pair] for pair in LAYOUTS]
        held = next((pair for pair in pairs if all(path.is_dir() for path in pair)), [root])
        if held == [root] and not any(root.glob("*.safetensors*")) and experts == 2:
            pairs = " or ".join(" and ".join(pair) for pair in PAIRS)
            raise UserError(f"{root} holds no two transformers; {name} needs {pairs} in it")
        if len(held) != experts:
            raise UserError(f"{root} holds {words(len(held))}, {name} has {words(experts)}")
        index = root / "model_index.json"
        if boundary and index.is_file():  # a fine-tune may have a boundary of its own
            own = read_json(index, "download it again").get("boundary_ratio")
            boundary = boundary if own is None else own
            if type(boundary) is not float or not 0 < boundary < 1:
                raise UserError(f"{index}: boundary_ratio {boundary!r} is no time inside (0, 1)")
        paths = held
    if len(paths) != experts:
        raise UserError(
            f"{name} has {words(experts)}: name its folder, or a path for each, high first"
        )
    return paths, boundary


def words(experts: int) -> str:
    """1 -> one transformer, 2 -> two."""
    return "two transformers (high and low noise)" if experts == 2 else "one transformer"


def row_of(name: str) -> Row:
    """The row of a teacher that has weights. Raises UserError."""
    if name not in TEACHERS:
        near = difflib.get_close_matches(name, TEACHERS, 3, 0) or list(TEACHERS)
        raise UserError(f"unknown teacher {name}; nearest: {', '.join(near)}")
    return TEACHERS[name]


def default_folder(name: str) -> Path:
    """Where how_to_get puts the weights, so that nobody need name them; or what is here already."""
    row = TEACHERS[name]
    return row.folder or Path("weights") / (row.repository.split("/")[-1] or name)


def component(name: str, folder: Path | None, part: str) -> Path:
    """A folder beside the transformer in the published weights: text_encoder, vae. UserError."""
    root = Path(folder) if folder else default_folder(name)
    if not root.is_dir():
        raise UserError(f"{root} does not exist; {how_to_get(name)}")
    if not (root / part).is_dir():
        raise UserError(f"{root} holds no {part}/, of the layout of diffusers; {how_to_get(name)}")
    return root / part


@contextlib.contextmanager
def needs_extras(library: str):
    """Around the import of a library of the frozen ends: one line where it is missing."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"{library} is missing ({first_line(error)}); pip install -r requirements-full.txt"
        ) from error


def how_to_get(name: str) -> str:
    """The command that downloads a teacher, or where the commands are."""
    if name not in TEACHERS:
        return "python -m models.weights --help lists how to get published ones"
    if TEACHERS[name].folder:
        return "it comes with this repository: git checkout toy"
    if not TEACHERS[name].repository:
        return f"{name} is not published: models.weights.random makes one"
    repository = TEACHERS[name].repository
    return f"get it: hf download {repository} --local-dir {default_folder(name)}"


def check_kind(name: str, network: type, settings: dict, path: Path) -> None:
    """Raise UserError for weights of another model than the teacher's; tiny ones have any size."""
    if not name:
        return
    row = row_of(name)
    if network is not row.network:
        raise UserError(f"{path} is of a {network.__name__}, {name} is a {row.network.__name__}")
    wanted = {"in_dim": 16, "out_dim": 16} | row.settings if network is Wan else row.settings
    for key, value in wanted.items():
        if (row.repository or key in ("in_dim", "out_dim")) and settings.get(key, value) != value:
            raise UserError(f"{path} has {key} {settings[key]}, {name} has {value}")


def random(
    name: str, dtype=torch.bfloat16, device="cpu", seed: int = 0, make_room=nn.Module.to_empty
) -> nn.Module:
    """A network of a teacher's size with random weights: to size, to time. 14B takes a minute."""
    row = row_of(name)
    return random_network(row.network, row.settings, dtype, device, seed, make_room)


def random_network(
    network: type, settings: dict, dtype, device="cpu", seed: int = 0, make_room=nn.Module.to_empty
) -> nn.Module:
    """A network in eval mode, frozen: linear layers keep the scale of their input."""
    net = build(network, settings, dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same on every device
    shapes = {key: (p.dtype, p.shape) for key, p in net.named_parameters()}

    def tensors():
        for key, (kind, shape) in shapes.items():
            tensor = torch.empty(shape, dtype=kind)
            if "norm" in key and len(shape) == 1:
                yield key, tensor.fill_(float(key.endswith("weight")))
            else:
                std = shape[1:].numel() ** -0.5 if len(shape) > 1 else 0.02
                yield key, tensor.normal_(std=std, generator=generator)

    return fill(net, tensors(), device, make_room)


# -- the command ---------------------------------------------------------------------------------


def main(argv=None) -> int:
    """Check published weights by their headers, in seconds: nothing is loaded."""
    parser = Parser(__doc__ + "\n" + "\n".join(f"{n:12} {how_to_get(n)}" for n in published()))
    add = parser.add_argument
    add("--teacher", default="wan22", help=f"one of {', '.join(published())}")
    add("--weights", nargs="+", default=[], help="folder, or one path an expert")
    return exit_status("weights.py", lambda: check_download(parser.parse_args(argv)))


def check_download(args) -> None:
    """The command's work. Raises UserError."""
    paths, boundary = locate(args.teacher, *args.weights)
    for path in paths:
        net, stored = plan(path, torch.bfloat16, args.teacher)
        number = sum(p.numel() for p in net.parameters())
        files = len({there.file for there in stored.values()})
        held = ", ".join(sorted({there.dtype for there in stored.values()}))
        print(f"{path}: {number:,} parameters, {len(stored)} tensors, {files} files, {held}")
    print(f"boundary {boundary}" if boundary else "one expert")


def published() -> list[str]:
    """The teachers that can be downloaded."""
    return [name for name, row in TEACHERS.items() if row.repository]


if __name__ == "__main__":
    sys.exit(main())
