"""What sample.py asks of a large teacher: conditions, one network at a time, videos, pictures."""

import gc
import importlib.util
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from models import large, lora, pictures, text, vae, video, weights
from models.bases import Blocks
from models.export import fingerprint
from models.files import UserError, first_line
from models.qwen_image import QwenImage
from sde import shift as shift_of

EXTRAS = "pip install -r requirements-full.txt, or keep the latents alone with --latents"


# -- before anything is loaded -------------------------------------------------------------------


def settled(cfg, args):
    """The settings of a run or a preset as this command changes them. Raises UserError."""
    if args.size:
        if not re.fullmatch(r"(\d+x)?\d+x\d+", args.size):
            raise UserError(f"--size {args.size} is not HEIGHTxWIDTH, as 480x832")
        cfg = replace(cfg, size=(args.size,))
    parts = cfg.size[0].partition(":")[0].split("x")
    if args.frames is not None:
        if args.size and len(parts) == 3 and parts[0] != str(args.frames):
            raise UserError(f"--size {args.size} and --frames {args.frames} do not agree")
        cfg, parts = replace(cfg, frames=args.frames), parts[-2:]
    cfg = replace(cfg, size=("x".join(parts),))
    large.check(cfg)
    return cfg


def check_ends(cfg, args) -> None:
    """Raise UserError now for what would be missing after the transformers have worked."""
    if args.image and not large.is_image(cfg):
        raise UserError(f"--image is for image to video, as of wan22-i2v; {cfg.teacher} takes none")
    if args.image:
        vae.opened(args.image)  # a broken one shows now
    if args.prompt and args.prompts:
        raise UserError("--prompt or --prompts, not both")
    if args.image and not (args.prompt or args.prompts):
        raise UserError("--image needs a --prompt that says what happens")
    if large.is_image(cfg) and not args.image and (args.prompt or args.prompts):
        if not large.is_random(cfg):
            raise UserError(f"{cfg.teacher} goes from an image to a video; give --image")
    if not args.latents and has_vae(cfg):
        needed = ["diffusers"] + ["imageio_ffmpeg"] * (frames_of(cfg) > 1)
        absent = [name for name in needed if importlib.util.find_spec(name) is None]
        if absent:
            raise UserError(f"{absent[0]} is missing; {EXTRAS}")
        weights.component(cfg.teacher, large.folder_of(cfg), "vae")


def has_vae(cfg) -> bool:
    """Whether there ought to be one: random weights have none."""
    folder = large.folder_of(cfg) or weights.default_folder(cfg.teacher)
    published = bool(weights.row_of(cfg.teacher).repository)
    return not large.is_random(cfg) and (published or (folder / "vae").is_dir())


def frames_of(cfg) -> int:
    """Of a sample, in pixels."""
    shape = next(iter(large.buckets(cfg)))
    return 4 * shape[1] - 3 if len(shape) == 4 else 1


def teacher_times(cfg, shift: float | None) -> tuple[float, ...]:
    """The times of the published sampler, cfg.steps of them and 0; with a shift, those of that.

    Qwen-Image shifts by e^mu, where mu grows with the tokens, and stretches to end at 0.02.
    """
    usual, shape = weights.row_of(cfg.teacher).usual[1], next(iter(large.buckets(cfg)))
    u = [1 - i / cfg.steps for i in range(cfg.steps)]
    S = shift or usual or math.exp(0.5 + 0.4 * (math.prod(shape[1:]) / 4 - 256) / 7936)
    times = [shift_of(x, S) for x in u]
    if not (shift or usual) and cfg.steps > 1:
        times = [1 - (1 - t) * 0.98 / (1 - times[-1]) for t in times]
    return (*times, 0.0)


# -- conditions ----------------------------------------------------------------------------------


def ask(cfg, args, out: Path, home: Path, device):
    """Settings, conditions, shape, names of the samples: n of each prompt, or n of the run's own.

    Text encoder and VAE are on the device one after the other, and gone when this returns.
    """
    check_ends(cfg, args)
    shape = next(iter(large.buckets(cfg)))
    if not (args.prompt or args.prompts):
        path = large.prompts_of(cfg)
        if path and not large.source(path, home).is_file():
            raise UserError('say what to sample: --prompt "...", or --prompts FILE')
        c, _ = large.data(cfg, home)(args.n, args.seed, "sample", 0)
        return cfg, c, shape, [f"{j:03}" for j in range(args.n)]
    cfg = replace(cfg, prompts=str(embeddings(cfg, args, out, device)), images="")
    found = large.open_prompts(cfg, Path(cfg.prompts))
    count = len(found.about["prompts"])
    c = text.batch([found.row(i) for i in range(count) for _ in range(args.n)])
    if weights.row_of(cfg.teacher).network is not QwenImage:
        c.pop("mask", None)  # Wan attends to padding
    if large.is_image(cfg):
        free(device)  # of the text encoder
        frame = image(cfg, args, shape, device)
        c["image"] = frame.expand(count * args.n, *frame.shape[1:])
    free(device)
    return cfg, c, shape, [f"{i:03}-{j:02}" for i in range(count) for j in range(args.n)]


def embeddings(cfg, args, out: Path, device) -> Path:
    """The user's file of them, or one made in the output folder; made once."""
    if args.prompts and args.prompts.suffix == ".safetensors":
        return args.prompts
    prompts = [args.prompt] if args.prompt else text.read_prompts(args.prompts)
    folder, path = large.folder_of(cfg), out / "asked.safetensors"
    if large.is_random(cfg):
        raise UserError("random weights have no text encoder; --prompts takes embeddings for them")
    encoder = weights.component(cfg.teacher, folder, "text_encoder").resolve()
    if path.is_file():
        about = text.open_embeddings(path).about
        if about["prompts"] == prompts and about.get("encoder") == str(encoder):
            return path
    text.embed_all(cfg.teacher, folder, prompts, None, path, 16, str(device), True)
    return path


def image(cfg, args, shape: tuple, device) -> Tensor:
    """The condition of image to video, (1, 20, F, h, w), of the user's picture."""
    if not args.image:
        return large.random_image(shape, args.seed)[None]
    model = vae.load_vae(cfg.teacher, large.folder_of(cfg), str(device), args.tiles)
    scale = weights.row_of(cfg.teacher).scale
    pixels = vae.read_image(args.image, scale * shape[2], scale * shape[3])
    return vae.first_frame(model, pixels[None], frames_of(cfg)).cpu()


def free(device) -> None:
    """Give back what nobody holds."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


# -- networks ------------------------------------------------------------------------------------


class Wear(NamedTuple):
    """What makes the teacher's network that of a role."""

    factors: dict[str, lora.Factors] = {}  # of an adapter, by layer
    changes: dict[str, lora.Change] = {}  # to be merged, by parameter
    own: Callable[[], Iterable] | None = None  # all parameters (name, tensor), in place of those


def student_wear(cfg, file, role: str) -> Wear:
    """A student's expert, from its open student.safetensors."""
    names = [name.removeprefix(f"{role}/") for name in file.keys() if name.startswith(f"{role}/")]
    read = lambda name: file.get_tensor(f"{role}/{name}")
    if cfg.generator == "full":
        return Wear(own=lambda: ((name, read(name)) for name in names))
    scale = cfg.alpha / cfg.rank
    layers = [name.removesuffix(".up") for name in names if name.endswith(".up")]
    return Wear({k: lora.Factors(read(f"{k}.up"), read(f"{k}.down"), scale) for k in layers})


def sampler(cfg, experts: dict[str, int], wear: Callable, device, out: Path, offload: str):
    """velocity(role, x_t, t, c) of which one network is in memory: that of the role asked last.

    experts: role -> the teacher's expert; wear(role) -> Wear. Guidance by cfg.
    """
    null = large.null_of(cfg, out) if any(g != 1 for g in cfg.guidance) else {}
    guide, held = large.guided(cfg, null), SimpleNamespace(role="", key=None, net=None)

    def change(role: str) -> None:
        """The network becomes that of another role; it is the base as long as that will do."""
        on = wear(role)
        key = role if on.own or on.changes else experts[role]
        if key != held.key:
            held.net = None
            free(device)
            held.net, held.key = loaded(cfg, experts[role], on, device, offload), key
        if on.factors and not lora.has_adapter(held.net, role):
            lora.attach(held.net, role, on.factors, device)
        held.role, held.adapter = role, role if on.factors else None

    def velocity(role: str, x_t: Tensor, t: Tensor, c=None) -> Tensor:
        if role != held.role:
            change(role)
        return guide(experts[role])(partial(held.net, adapter=held.adapter), x_t, t, c)

    return velocity


def loaded(cfg, e: int, on: Wear, device, offload: str) -> nn.Module:
    """The teacher's expert, or a student's own parameters in its place; blocks may stay behind."""
    blocks = offload == "blocks" or (offload == "auto" and too_big(cfg, device))
    where = torch.device("cpu") if blocks else torch.device(device)
    cfg = replace(cfg, offload="none")
    if on.own:
        net = weights.fill(empty(cfg, e).requires_grad_(False), on.own(), where)
    else:
        net = large.load(cfg, where, e, [], on.changes)
    if blocks:
        print("the blocks stay in host memory; --offload none keeps them on the device")
        Blocks(net, torch.device(device))
    return net


def too_big(cfg, device) -> bool:
    """Whether a network would leave no room to compute on this GPU."""
    if torch.device(device).type != "cuda":
        return False
    size = sum(p.nbytes for p in empty(cfg, 1).parameters())
    return 1.25 * size > torch.cuda.mem_get_info()[0]


def empty(cfg, e: int) -> nn.Module:
    """The network of the teacher's expert on the meta device."""
    dtype, row = large.plan.dtype_named(cfg.dtype), weights.row_of(cfg.teacher)
    if large.is_random(cfg):
        return weights.build(row.network, row.settings, dtype)
    return weights.plan(weights.locate(cfg.teacher, *cfg.weights)[0][e - 1], dtype)[0]


# -- files of others -----------------------------------------------------------------------------


class Worn(NamedTuple):
    """LoRA files on a published base."""

    roles: list[str]  # that take the steps
    times: tuple[float, ...]
    experts: dict[str, int]
    wear: Callable[[str], Wear]


def worn(cfg, paths: list[Path], ask_steps: bool, times: tuple[float, ...], boundary) -> Worn:
    """Which file takes which steps: as its metadata says if it is ours, else by t.

    ask_steps: the user wants other steps than such metadata say. Raises UserError.
    """
    inside = lambda path: sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    paths = [file for path in paths for file in inside(path)]
    said = [lora.metadata(path) for path in paths]
    for path, about in zip(paths, said):
        check_lora(cfg, path, about)
    written = bool(paths) and all("times" in about for about in said)
    ours = written and not ask_steps
    if written and not ours:
        print(f"note: these files are for t = {said[0]['times']}; other steps were asked for")
    roles, times, files, experts = (
        by_metadata(paths, said, 2 if boundary else 1) if ours else by_time(paths, times, boundary)
    )
    for role in files if ours else ():
        check_base(cfg, files[role], experts[role])
    read = lambda role: weights.read_lora(empty(cfg, experts[role]), files[role])
    for role in files:  # all of them, before a base is loaded
        rest = lora.split(read(role), empty(cfg, experts[role]))[1]
        if rest and (large.is_random(cfg) or list(experts.values()).count(experts[role]) > 1):
            raise UserError(f"{files[role]} changes more than the layers that adapters are for, "
                            "and that needs a published base of its own")  # fmt: skip
    wear = lambda role: Wear(*lora.split(read(role), empty(cfg, experts[role])))
    return Worn(roles, times, experts, wear)


def check_lora(cfg, path: Path, about: dict) -> None:
    """Raise UserError for another base, and for a file that no consumer takes; say who does not."""
    if not path.is_file():
        raise UserError(f"--lora {path} is no file; name LoRA files, or a folder of them")
    if about.get("teacher", cfg.teacher) != cfg.teacher:
        raise UserError(f"{path} is for {about['teacher']}, not for {cfg.teacher}")
    found = weights.contents([path])
    wan = weights.row_of(cfg.teacher).network is not QwenImage
    try:
        reasons = lora.refusals({there.key: there.dtype for there in found.values()}, wan)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    refused = {who: why for who, why in reasons.items() if why}
    if len(refused) == len(reasons):
        raise UserError(
            f"{path} fits nobody: " + "; ".join(f"{a}: {b}" for a, b in refused.items())
        )
    for who, why in refused.items() if "paper" not in about else ():  # of ours the card says it
        print(f"note: {path.name} is not for {who}: {why}")


def check_base(cfg, path: Path, e: int) -> None:
    """Say so where a file was made on other files of the base than are here."""
    made, here = lora.metadata(path).get("base_fingerprint"), fingerprint(cfg, e)
    if made != here:
        print(f"note: {path.name} was made on other files of the base than these: another layout, "
              "or other weights")  # fmt: skip


def by_metadata(paths: list[Path], said: list[dict], transformers: int) -> tuple:
    """Roles of the steps, times, files and experts by role, of files that we wrote."""
    files, owners, experts, count = {}, {}, {}, 0
    for path, about in zip(paths, said):
        try:
            role = f"student{int(about['phase'])}"
            owners |= {int(i): role for i in json.loads(about["steps"])}
            count += len(json.loads(about["steps"]))
            files[role], experts[role] = path, int(about["expert"])
            times = checked_times(json.loads(about["times"]))
            if not 1 <= experts[role] <= transformers:
                raise ValueError(f"expert {experts[role]}")
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise UserError(f"{path}: its metadata is damaged ({error}); export it again") from None
    same = ("times", "phases", "base", "boundary")
    if len({tuple(about.get(key) for key in same) for about in said}) > 1:
        raise UserError("these files are of unlike students: " + ", ".join(p.name for p in paths))
    whole = sorted(owners) == list(range(len(times) - 1)) and count == len(owners)
    if not whole or len(files) != len(paths):
        held = ", ".join(sorted(files))
        raise UserError(f"--lora has {held} of {said[0]['phases']} phases; name each once")
    for role in sorted(files):
        print(f"{files[role].name}: {role}, by its metadata")
    return [owners[i] for i in sorted(owners)], times, files, experts


def checked_times(times) -> tuple[float, ...]:
    """1 > ... > 0, as a header says. Raises ValueError."""
    times = tuple(map(float, times))
    if not (times[0] == 1 and times[-1] == 0 and all(a > b for a, b in pairwise(times))):
        raise ValueError(f"times {times}")
    return times


def by_time(paths: list[Path], times: tuple[float, ...], boundary: float | None) -> tuple:
    """The same of other files: one for each transformer, chosen by t."""
    experts = 2 if boundary else 1
    if len(paths) != experts:
        raise UserError(f"--lora takes {experts}, one for each transformer, got {len(paths)}")
    ordered = lora.high_first(paths)
    files = {f"student{e}": path for e, path in enumerate(ordered, 1)}
    if experts == 2:
        told = any(lora.noise_of(path) for path in paths)
        how = "by metadata or name" if told else "in the order given"
        print(f"high noise: {ordered[0].name}, low noise: {ordered[1].name}, {how}")
    roles = [f"student{1 if not boundary or t >= boundary else 2}" for t in times[:-1]]
    return roles, times, files, {role: int(role[-1]) for role in files}


# -- results -------------------------------------------------------------------------------------


def present(cfg, c, xs: list[Tensor], args, names: list[str], device) -> tuple[dict, Iterator]:
    """Numbers of the samples xs at each time, and (file name, bytes) of what to write, in turn."""
    found = {"diversity": large.diversity(xs[-1])} if len(xs[-1]) > 1 else {}
    return found, written(cfg, xs, args, names, device)


def written(cfg, xs: list[Tensor], args, names: list[str], device) -> Iterator[tuple[str, bytes]]:
    """Latents first: whatever comes after can be done again from them, by --decode."""
    kept = {f"x{i}": x for i, x in enumerate(xs)} if args.trajectory else {"x": xs[-1]}
    about = {"kind": "latents", "teacher": cfg.teacher, "names": names} | args.about
    if not args.decode:
        yield "latents.safetensors", save(kept, {"about": json.dumps(about)})
    if args.latents or not has_vae(cfg):
        if not args.latents:
            print("no VAE belongs to random weights: the sheet is a preview of latents")
        times = args.about["times"][-len(kept) :]
        rows = {f"t = {t:.4g}": x for t, x in zip(times, kept.values())}
        yield "samples.png", pictures.sheet(rows, None, args.title)
        return
    model = vae.load_vae(cfg.teacher, large.folder_of(cfg), str(device), args.tiles)
    fps, shown = weights.row_of(cfg.teacher).fps, []
    for name, x in zip(tqdm(names, "decoding", disable=None), xs[-1].split(1)):
        frames = video.to_bytes(vae.decode(model, x)[0])  # (F, h, w, 3), or (h, w, 3)
        frames = frames[None] if frames.ndim == 3 else frames
        if len(frames) == 1:
            yield f"{name}.png", video.png(frames[0])
        else:
            yield f"{name}.mp4", video.mp4(frames, fps)
        if len(shown) < SHOWN:
            shown.append((name, video.few(frames)))
    yield "samples.png", video.contact(shown, args.title)


def read_latents(cfg, args) -> tuple[list[str], list[Tensor]]:
    """Names and latents of an earlier command, to be decoded. Raises UserError."""
    check_ends(cfg, args)
    path, shape = args.decode, next(iter(large.buckets(cfg)))
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            x = file.get_tensor(max(file.keys(), key=lambda key: int(key[1:] or 0)))
            teacher, names = weights.TEACHERS[about["teacher"]], about["names"]
        if len(names) != len(x) or not all(re.fullmatch(r"\d+(-\d+)?", name) for name in names):
            raise ValueError("names that do not fit")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds no latents ({first_line(error)})") from error
    same = teacher.network is weights.row_of(cfg.teacher).network
    if not same or x.ndim != 1 + len(shape) or x.shape[1] != shape[0]:
        raise UserError(f"{path} is of {about['teacher']}, whose VAE is not {cfg.teacher}'s")
    if not has_vae(cfg):
        raise UserError("random weights have no VAE; --weights names a folder with one")
    return names, [x]


SHOWN = 16  # rows of a contact sheet
