"""Published weights -> networks: folders of both layouts and single files, tensor by tensor.

`python -m models.weights --teacher wan22 --weights FOLDER` checks headers and sizes in seconds.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from config import Config
from models import lora, parallel
from models.cli import Parser, exit_status
from models.common import FileTensor, UserError, first_line, note, read_json, reading
from models.qwen_image import QwenImage
from models.wan import Wan

# -- teachers ------------------------------------------------------------------------------------


class TeacherSpec(NamedTuple):
    """A teacher: its network, and where its weights are published."""

    network: type
    settings: dict  # arguments of the network
    repository: str = ""  # "": random weights only, or those of folder
    boundary: float | None = None  # of two branches, the high-noise one serves t >= boundary
    sampling_defaults: tuple[int, float | None] = (50, 5.0)  # steps, shift; None: by size
    scale: int = 8  # pixels per latent, on each side
    folder: Path | None = None  # weights and prompts that come with this repository

    @property
    def is_i2v(self) -> bool:
        """Whether it makes a video from a first frame."""
        return self.settings.get("in_dim") == 36

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return self.settings.get("out_dim", 16)

    @property
    def fps(self) -> int:
        """Frames per second of its videos."""
        return 24 if self.channels == 48 else 16

    @property
    def pipeline(self) -> str:
        """Its pipeline of diffusers, as the model_index.json of its folder names it."""
        return self.network.pipelines[1 if self.is_i2v else 0]


A14B = dict(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=16, out_dim=16)
WAN_1B = dict(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, in_dim=16, out_dim=16)
WAN_5B = dict(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=48, out_dim=48)
QWEN_20B = dict(num_attention_heads=24, attention_head_dim=128, num_layers=60)
WAN_TINY = dict(dim=128, ffn_dim=256, num_heads=4, num_layers=2, text_dim=64, text_len=16)
QWEN_TINY = dict(num_attention_heads=4, attention_head_dim=32, num_layers=2)
QWEN_TINY |= dict(joint_attention_dim=64, axes_dims_rope=(8, 12, 12))
WAN_DIGITS = dict(dim=96, ffn_dim=384, num_heads=3, num_layers=3, text_dim=16, text_len=1)
MNIST = Path(__file__).parent.parent / "toy" / "mnist"
I2V = dict(in_dim=36)
# fmt: off
TEACHERS = {  # name, network, its settings, repository, boundary, (steps, shift)
    "wan21-1.3b": TeacherSpec(Wan, WAN_1B, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", None, (50, 8.0)),
    "wan21":      TeacherSpec(Wan, A14B, "Wan-AI/Wan2.1-T2V-14B-Diffusers", None, (50, 5.0)),
    "wan22":      TeacherSpec(Wan, A14B, "Wan-AI/Wan2.2-T2V-A14B-Diffusers", 0.875, (40, 12.0)),
    "wan22-i2v":  TeacherSpec(Wan, A14B | I2V, "Wan-AI/Wan2.2-I2V-A14B-Diffusers", 0.9, (40, 5.0)),
    "wan22-5b":   TeacherSpec(Wan, WAN_5B, "Wan-AI/Wan2.2-TI2V-5B-Diffusers", None, (50, 5.0), 16),
    "qwen-image": TeacherSpec(QwenImage, QWEN_20B, "Qwen/Qwen-Image", None, (50, None)),
    "wan21-tiny":      TeacherSpec(Wan, WAN_TINY, "", None, (50, 5.0)),
    "wan22-tiny":      TeacherSpec(Wan, WAN_TINY, "", 0.875, (40, 12.0)),
    "wan22-i2v-tiny":  TeacherSpec(Wan, WAN_TINY | I2V, "", 0.9, (40, 5.0)),
    "qwen-image-tiny": TeacherSpec(QwenImage, QWEN_TINY, "", None, (50, None)),
    "mnist":           TeacherSpec(Wan, WAN_DIGITS, "", None, (40, 3.0), 4, MNIST),
}
# fmt: on
# what the class of a network declares; models/wan.py says what each is
PORT = (
    "float32 makes_video takes_mask diffusers_class class_names pipelines cfg_argument vae_class "
    "official_sampler comfyui_node diffusers_name guide read_config adapted"
).split()


def teacher_spec(name: str) -> TeacherSpec:
    """The teacher of this name. Raises UserError; TypeError if its class declares too little."""
    if name not in TEACHERS:
        raise UserError(f"--teacher: expected one of {', '.join(TEACHERS)}, got {name}")
    network = TEACHERS[name].network
    missing = [attribute for attribute in PORT if not hasattr(network, attribute)]
    if missing:
        raise TypeError(f"{network.__name__}: expected {', '.join(missing)}, as models/wan.py has")
    return TEACHERS[name]


def is_random(cfg: Config) -> bool:
    """Return whether the weights are random: asked for (cfg.weights), or none are published."""
    spec = teacher_spec(cfg.teacher)
    return cfg.weights == ("random",) or not (cfg.weights or spec.repository or spec.folder)


def dtype_named(name: str) -> torch.dtype:
    """The dtype of --dtype."""
    return {"bf16": torch.bfloat16, "float32": torch.float32}[name]


# -- where the weights are -----------------------------------------------------------------------

DOWNLOAD = "download it again"
# folders of the two branches, high noise first: the original layout, that of diffusers
PAIRS = (("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"))


def branch_paths(teacher: str, *weights: str | Path) -> tuple[list[Path], float | None]:
    """One path per branch, high noise first, and the boundary.

    weights: the published folder, or one folder or file per branch; none for the default folder.
    """
    paths = [Path(path) for path in weights] or [default_folder(teacher)]
    boundary = teacher_spec(teacher).boundary
    for path in paths:
        check_exists(path, teacher)
    if len(paths) == 1 and paths[0].is_dir():
        root = paths[0]
        layouts = [[root / name for name in names] for names in (*PAIRS, ("transformer",))]
        paths = next((p for p in layouts if all(path.is_dir() for path in p)), [root])
        boundary = read_boundary(root / "model_index.json", teacher)
    if len(paths) != (2 if boundary else 1):
        pairs = " or ".join(" and ".join(pair) for pair in PAIRS)
        expected = f"two transformers ({pairs} in one folder)" if boundary else "one transformer"
        found = ", ".join(map(str, paths))
        raise UserError(f"{teacher}: expected {expected}, got {len(paths)}: {found}")
    noises = [lora.noise_of(path) for path in paths]
    if noises in (["high", "high"], ["low", "low"]) or len(set(paths)) < len(paths):
        both = f"{paths[0]} and {paths[1]} are both for {noises[0] or 'any'} noise"
        raise UserError(f"{both}; name one for high and one for low noise")
    ordered = sorted(paths, key=lora.noise_order)
    if ordered != paths:
        note(f"{ordered[0]} is for high noise and {ordered[1]} for low noise: swapped")
    return ordered, boundary


def read_boundary(index: Path, teacher: str) -> float | None:
    """The boundary in a model_index.json, if there is one, else the teacher's own.

    Raises UserError if it is that of another pipeline.
    """
    spec = teacher_spec(teacher)
    pipeline = read_json(index, DOWNLOAD) if index.is_file() else {}
    kind = pipeline.get("_class_name", spec.pipeline)
    if kind != spec.pipeline:  # such as an editing model of the same classes
        advice = f"of a fine-tune of {teacher}, name the transformer alone"
        raise UserError(f"{index}: expected {spec.pipeline}, found {kind}; {advice}")
    if not spec.boundary:
        return None
    with reading(index, DOWNLOAD):
        boundary = float(pipeline.get("boundary_ratio") or spec.boundary)  # that of a fine-tune
        if not 0 < boundary < 1:
            raise ValueError(f"boundary_ratio {boundary}")
    return boundary


def default_folder(teacher: str) -> Path:
    """The folder of a teacher's weights where --weights does not name one."""
    spec = TEACHERS[teacher]
    return spec.folder or Path("weights") / (spec.repository.split("/")[-1] or teacher)


def find_subfolder(teacher: str, folder: Path | None, part: str) -> Path | None:
    """A folder such as vae: in the weights, beside the file or folder, or in the default folder."""
    places = [Path(folder), Path(folder).parent] if folder else []
    places.append(default_folder(teacher))
    return next((place / part for place in places if (place / part).is_dir()), None)


def subfolder(teacher: str, folder: Path | None, part: str) -> Path:
    """The same. Raises UserError if there is none."""
    place = Path(folder or default_folder(teacher))
    check_exists(place, teacher)
    found = find_subfolder(teacher, folder, part)
    if found is None:
        place = place if place.is_dir() else place.parent
        repository = TEACHERS[teacher].repository
        command = f'hf download {repository} --include "{part}/*" --local-dir {place}'
        hint = f"; get it: {command}" if repository else ""
        raise UserError(f"{place} has no folder {part} as diffusers has{hint}")
    if folder and found.parent != Path(folder):
        note(f"{part} comes from {found}")
    return found


def check_exists(path: Path, teacher: str) -> None:
    """Raise UserError with the command that downloads the weights."""
    if not path.exists():
        raise UserError(f"{path} does not exist; {download_hint(teacher)}")


def download_hint(teacher: str) -> str:
    """How to get a teacher's weights."""
    if TEACHERS[teacher].folder:
        return "it comes with this repository: git checkout -- toy/mnist"
    repository = TEACHERS[teacher].repository
    if not repository:
        return f"{teacher} has no published weights; use --weights random"
    return f"get it: hf download {repository} --local-dir {default_folder(teacher)}"


@contextlib.contextmanager
def needs_extras(library: str) -> Iterator[None]:
    """Turn a failing import of an optional library into one line."""
    try:
        yield
    except ImportError as error:
        line = f"{library} is missing ({first_line(error)})"
        raise UserError(f"{line}; pip install -r models/requirements.txt") from error


def teacher_loras(cfg: Config) -> list[list[lora.LoraFile]]:
    """The LoRA files that are merged into each branch of the teacher, high noise first."""
    branches = 2 if teacher_spec(cfg.teacher).boundary else 1
    return lora.files_of_branches(map(lora.parse_file, cfg.teacher_lora), branches)


# -- what the files contain ----------------------------------------------------------------------

FLOATS = ("F32", "BF16", "F16")
FileTensors = dict[str, FileTensor]  # by name
NamedTensors = Iterable[tuple[str, Tensor]]  # or what has x[a:b] as rows, read when asked for


def safetensors_in(folder: Path) -> list[Path]:
    """The safetensors of a folder, without the hidden files that macOS writes beside them."""
    files = sorted(folder.glob("[!.]*.safetensors"))
    others = [x for x in folder.glob("[!.]*") if x.suffix.lower() in (".gguf", *lora.PICKLES)]
    if others and not files:
        lora.open_safetensors(min(others))  # says what it is
    if not files:
        raise UserError(f"{folder} contains no .safetensors; name a folder or file that does")
    return files


def shards(path: Path) -> list[Path]:
    """The files of one network: those of its index, or all safetensors of the folder."""
    if path.is_file():
        return [path]
    files = safetensors_in(path)
    indexes = sorted(path.glob("[!.]*.safetensors.index.json"))
    if len(indexes) > 1:
        raise UserError(f"{indexes[0]} and {indexes[1].name} are two networks; keep one")
    for index in indexes:
        with reading(index, DOWNLOAD):
            names = set(read_json(index, DOWNLOAD)["weight_map"].values())
            files = [path / Path(name).name for name in sorted(names)]
    return files


def index_tensors(files: Iterable[Path]) -> FileTensors:
    """Name -> tensor, from the headers. Prefixes of single files and of checkpoints are removed."""
    tensors = {}
    for file in files:
        for key, tensor in lora.open_safetensors(file).items():
            name = lora.bare_name(key)
            if name in tensors:
                raise UserError(f"{tensors[name].file} and {file} both have {name}; keep one")
            tensors[name] = tensor
    return tensors


# -- which network it is -------------------------------------------------------------------------

NETWORKS = {name: spec.network for spec in TEACHERS.values() for name in spec.network.class_names}
UNPORTED = ("image_dim", "added_kv_proj_dim", "zero_cond_t", "use_additional_t_cond")
UNPORTED += ("use_layer3d_rope", "guidance_embeds")
NOT_SETTINGS = {"dtype", "checkpointing", "round_t"}  # arguments that a config.json does not set


def architecture(path: Path, tensors: FileTensors, teacher: str) -> tuple[type, dict]:
    """Class and settings of a network: from its config.json, or else those of the teacher."""
    file = (path.parent if path.is_file() else path) / "config.json"
    if not file.is_file():
        if not teacher:
            raise UserError(f"{path} has no config.json beside it; name its --teacher")
        return teacher_spec(teacher)[:2]
    config = read_json(file, DOWNLOAD)
    network = NETWORKS.get(str(config.get("_class_name")))
    unported = [key for key in UNPORTED if config.get(key)]
    if not network or unported:
        found = f"{config.get('_class_name')} {' '.join(unported)}"
        raise UserError(f"{file}: expected one of {', '.join(NETWORKS)}, got {found}")
    with reading(file, DOWNLOAD):  # a wrong type fails here, or in build
        if config.get("num_layers", 0) > len(tensors):
            raise ValueError(f"num_layers {config['num_layers']:.6g} for {len(tensors)} tensors")
        return network, known_settings(network, network.read_config(config, tensors))


def known_settings(network: type, config: dict) -> dict:
    """The arguments of a network in a config. Raises ValueError unless they are positive."""
    arguments = signature(network).parameters
    known = [key for key in config if key in arguments.keys() - NOT_SETTINGS]
    for key in known:
        is_tuple = arguments[key].annotation is tuple
        kind = int if is_tuple else arguments[key].annotation
        values = config[key] if is_tuple else [config[key]]
        if not values or not all(type(x) in (int, kind) and 0 < x < 1e9 for x in values):
            raise ValueError(f"expected a positive {kind.__name__} as {key}, found {values}")
    return {key: config[key] for key in known}


def inspect_files(
    path: Path, dtype: torch.dtype, teacher: str = ""
) -> tuple[nn.Module, FileTensors]:
    """The network on the meta device, and where each parameter is stored, from headers alone.

    Raises UserError unless the files hold exactly one network, of the teacher's kind if named.
    """
    tensors = index_tensors(shards(path))
    network, settings = architecture(path, tensors, teacher)
    if teacher:
        spec = teacher_spec(teacher)
        expected = spec.settings | {"network": spec.network.__name__}
        found = {"network": network.__name__} | settings
        # teachers that are not published may have any size
        for key in expected if spec.repository else ["network"]:
            if found.get(key, expected[key]) != expected[key]:
                line = f"{teacher} has {key} {expected[key]}, but {path} has {found[key]}"
                raise UserError(f"{line}; name the weights of {teacher}")
    with reading(path, "its config.json does not describe a network"):
        net = build(network, settings, dtype)
    return net, match_tensors(net, tensors, path)


def both_names(net: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Names in diffusers, and ours -> ours."""
    return {net.diffusers_name(name): name for name in names} | {name: name for name in names}


def match_tensors(net: nn.Module, tensors: FileTensors, path: Path) -> FileTensors:
    """Our name of each parameter -> its tensor, of files in either layout."""
    expected = {name: tuple(p.shape) for name, p in net.named_parameters()}
    ours = both_names(net, expected)
    found = {ours.get(name, name): info for name, info in tensors.items()}
    for name, info in found.items():
        place = f"{info.file}: {info.key}"
        shape = expected.get(name)
        if not shape:
            raise UserError(f"{place} does not belong to a {type(net).__name__}")
        if info.shape != shape or info.dtype not in FLOATS:  # another size, or quantized
            dtypes = " or ".join(FLOATS)
            raise UserError(f"{place}: expected {dtypes} {shape}, got {info.dtype} {info.shape}")
    absent = [name for name in expected if name not in found]
    if absent:
        first = f"{absent[0]} {expected[absent[0]]}"
        raise UserError(f"{path} lacks {first}, {len(absent)} in all; download it again")
    return found


# -- loading -------------------------------------------------------------------------------------


def build(network: type, settings: dict, dtype: torch.dtype) -> nn.Module:
    """A network on the meta device. Keeps its settings; each parameter has its own dtype."""
    with torch.device("meta"):
        net = network(**settings, dtype=dtype)
    net.settings = settings
    for name, p in net.named_parameters():
        p.data = p.data.to(torch.float32 if any(part in name for part in net.float32) else dtype)
    return net


def meta_network(cfg: Config, branch: int, dtype: torch.dtype | None = None) -> nn.Module:
    """The network of the teacher's branch on the meta device; dtype: that of the run by default."""
    dtype = dtype or dtype_named(cfg.dtype)
    spec = teacher_spec(cfg.teacher)
    if is_random(cfg):
        return build(spec.network, spec.settings, dtype)
    path = branch_paths(cfg.teacher, *cfg.weights)[0][branch - 1]
    return inspect_files(path, dtype, cfg.teacher)[0]


def load_tensors(
    net: nn.Module, tensors: NamedTensors, device, allocate: Callable = nn.Module.to_empty
) -> nn.Module:
    """Fill a network on the meta device with tensors, one by one. Returns it in eval mode."""
    allocate(net, device=device)  # parallel.shard_and_allocate where ranks share it
    parameters = dict(net.named_parameters())
    for name, tensor in tensors:
        if parameters[name].dtype == torch.int8:
            tensor, scale = lora.quantize(tensor[:].to(device))
            parameters[name.removesuffix("weight") + "scale"].copy_(scale)
        parallel.copy_to_local(parameters[name], tensor)  # reads the rows of this rank
    return net.eval()


def trainable_copy(
    net: nn.Module, old: nn.Module | None, device, allocate: Callable = nn.Module.to_empty
) -> nn.Module:
    """The same network with float32 parameters to train, written over `old` if there is one.

    It computes in net's dtype, so before training the two compute exactly the same.
    """
    if not old:
        empty = build(type(net), net.settings, net.dtype).float()
        old = load_tensors(empty, (), device, allocate)
    base = {name: p for name, p in net.named_parameters() if not p.requires_grad}  # no adapters
    with torch.no_grad():
        for name, p in old.named_parameters():
            parallel.local(p).copy_(parallel.local(base[name]))
    return old


def load(
    path: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device="cpu",
    teacher: str = "",
    loras: Iterable[lora.LoraFile] = (),
    changes: dict[str, list[lora.Change]] | None = None,
    allocate: Callable = nn.Module.to_empty,
    int8: bool = False,
) -> nn.Module:
    """A network from published weights, frozen, in eval mode.

    path: a folder with config.json and safetensors of either layout, or one safetensors file.
    loras, then changes, are merged in float32. int8: see lora.store_int8. Memory never exceeds the
    network, one tensor and the LoRA: each is cast as it is read. A rank reads the rows it keeps.
    """
    net, tensors = inspect_files(Path(path), dtype, teacher)
    merged = read_loras(net, loras)
    for name, extra in (changes or {}).items():
        merged[name] = [*merged.get(name, []), *extra]

    def read_tensors() -> NamedTensors:
        total = sum(math.prod(x.shape) for x in tensors.values())
        options = dict(unit=" weights", unit_scale=True, disable=None)
        with tqdm(total=total, desc=str(path), **options) as bar:
            for name, x in sorted(tensors.items(), key=lambda item: (item[1].file, item[1].start)):
                yield name, MergedTensor(x, merged.get(name, []))
                bar.update(math.prod(x.shape))

    net.requires_grad_(False)
    if int8:
        lora.store_int8(net)
    return load_tensors(net, read_tensors(), device, allocate)


class MergedTensor(NamedTuple):
    """A stored tensor with changes: x[a:b] reads these rows and changes them."""

    stored: FileTensor
    changes: list[lora.Change]

    def __getitem__(self, rows: slice) -> Tensor:
        return lora.merge(self.stored[rows], self.changes, rows)


def read_loras(net: nn.Module, files: Iterable[lora.LoraFile]) -> dict[str, list[lora.Change]]:
    """The changes of the network that LoRA files make together, by parameter. Raises UserError."""
    shapes = {name: p.shape for name, p in net.named_parameters()}
    aliases = layer_aliases(net)
    total = {}
    for path, strength in files:
        for name, x in lora.read_changes(path, strength, aliases).items():
            is_low_rank = isinstance(x, lora.Factors)
            shape = (len(x.up), x.down.shape[1]) if is_low_rank else tuple(x.shape)
            if shape != shapes.get(name):
                line = f"{name}: expected the shape {tuple(shapes.get(name, ()))}, got {shape}"
                raise UserError(f"{path}: {line}; is it a LoRA of another model?")
            total[name] = lora.add_change(total.get(name, []), x)
    return total


def layer_aliases(net: nn.Module) -> dict[str, str]:
    """Every name that a LoRA file may use for a layer, with _ in place of dots -> ours."""
    layers = {name.rpartition(".")[0] for name, _ in net.named_parameters()}
    names = both_names(net, layers)
    aliases = {name.replace(".", "_"): ours for name, ours in names.items()}
    # diffusers' old names of the last layer of an attention lack its index
    last = {name: ours for name, ours in aliases.items() if name.endswith("_to_out_0")}
    return aliases | {name.removesuffix("_0"): ours for name, ours in last.items()}


def random_network(
    teacher: str | TeacherSpec,
    dtype: torch.dtype = torch.bfloat16,
    device="cpu",
    seed: int = 0,
    allocate: Callable = nn.Module.to_empty,
    int8: bool = False,
) -> nn.Module:
    """A network with random weights, frozen; its layers keep the scale of their input."""
    spec = teacher_spec(teacher) if isinstance(teacher, str) else teacher
    net = build(spec.network, spec.settings, dtype).requires_grad_(False)
    rng = torch.Generator().manual_seed(seed)  # on the CPU: the same on every device
    like = {name: (p.dtype, p.shape) for name, p in net.named_parameters()}

    def make_tensors() -> NamedTensors:
        for name, (kind, shape) in like.items():
            tensor = torch.empty(shape, dtype=kind)
            if "norm" in name and len(shape) == 1:
                yield name, tensor.fill_(float(name.endswith("weight")))
            else:
                std = shape[1:].numel() ** -0.5 if len(shape) > 1 else 0.02
                yield name, tensor.normal_(std=std, generator=rng)

    if int8:
        lora.store_int8(net)
    return load_tensors(net, make_tensors(), device, allocate)


# -- roles ---------------------------------------------------------------------------------------


class RoleWeights(NamedTuple):
    """The weights that turn a branch of the teacher into a role."""

    factors: dict[str, lora.Factors] = {}  # of an adapter, by layer
    changes: dict[str, list[lora.Change]] = {}  # to be merged, by parameter
    full: Callable[[], NamedTensors] | None = None  # in place of all parameters


def student_weights(cfg: Config, file, role: str) -> RoleWeights:
    """The weights of a student's expert. file: its student.safetensors, open. cfg: its settings."""
    names = [name.removeprefix(f"{role}/") for name in file.keys() if name.startswith(f"{role}/")]
    read = lambda name: file.get_tensor(f"{role}/{name}")
    if cfg.train_student == "full":
        return RoleWeights(full=lambda: ((name, read(name)) for name in names))
    scale = cfg.alpha / cfg.rank
    factors_of = lambda layer: lora.Factors(read(f"{layer}.up"), read(f"{layer}.down"), scale)
    layers = [name.removesuffix(".up") for name in names if name.endswith(".up")]
    return RoleWeights({layer: factors_of(layer) for layer in layers})


# -- the command ---------------------------------------------------------------------------------


def print_check(argv: list[str] | None) -> None:
    """Print the number of parameters, tensors, files, and the dtypes of each branch."""
    names = [name for name, spec in TEACHERS.items() if spec.repository]
    parser = Parser(__doc__ + "\n" + "\n".join(f"{n:12} {download_hint(n)}" for n in names))
    parser.add_argument("--teacher", default="wan22", help=f"one of {', '.join(names)}")
    parser.add_argument("--weights", nargs="+", default=[], help="folder, or one path per branch")
    args = parser.parse_args(argv)
    paths, boundary_t = branch_paths(args.teacher, *args.weights)
    for path in paths:
        net, infos = inspect_files(path, torch.bfloat16, args.teacher)
        number = sum(p.numel() for p in net.parameters())
        files = len({info.file for info in infos.values()})
        dtypes = ", ".join(sorted({info.dtype for info in infos.values()}))
        print(f"{path}: {number:,} parameters, {len(infos)} tensors, {files} files, {dtypes}")
    print(f"boundary {boundary_t}" if boundary_t else "one transformer")


def main(argv: list[str] | None = None) -> int:
    """Check published weights by their headers. Loads nothing."""
    return exit_status("weights.py", lambda: print_check(argv))


if __name__ == "__main__":
    sys.exit(main())
