"""The preset of large teachers: Wan and Qwen-Image, from published or random weights.

runs.Preset lists what train.py and sample.py call; `cfg` is a config.Config. A sample is a
latent: (C, F, h, w) of a video, (C, h, w) of a picture of Qwen-Image. Its conditions are "text"
(B, L, D), "mask" (B, L) for Qwen-Image, and for image to video "image" (B, 20, F, h, w): a mask of
4 channels and the latents of the first frame.
"""

import gc
import importlib.util
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache, lru_cache, partial
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

import moe
from config import Config
from models import encoders, export, lora, media, parallel, plan, weights
from models.common import UserError, is_rank0, normal, note, reading, stream
from models.layers import attention_backend
from models.parallel import SINGLE, Topology
from models.runs import Preset
from models.weights import dtype_named, is_random, teacher_spec
from phases import Phase, branch_at, full_time, pick_interval, renoise_times, step_times, trajectory
from sde import diffuse, shift_time, v_to_x0

EXAMPLE_PROMPTS = Path(__file__).parent / "prompts.txt"
SIZE = re.compile(r"(?:(\d{1,4})x)?(\d{1,5})x(\d{1,5})(?::(\d{0,9}\.?\d{1,9}))?")
SHEET_ROWS = 16  # samples in the contact sheet of sample.py


# -- settings -------------------------------------------------------------------------------------


def buckets(cfg: Config) -> dict[tuple, float]:
    """Shape of a sample -> its probability, for the sizes of --size."""
    shapes: dict[tuple, float] = {}
    for text in cfg.size:
        shape, probability = parse_size(cfg, text)
        shapes[shape] = shapes.get(shape, 0) + probability
    total = sum(shapes.values())
    return {shape: probability / total for shape, probability in shapes.items()}


def parse_size(cfg: Config, text: str) -> tuple[tuple, float]:
    """Convert 81x480x832:0.4 to the shape of a latent and its weight, 1 if none is given."""
    spec = teacher_spec(cfg.teacher)
    match = SIZE.fullmatch(text)
    if not match or not float(match[4] or 1):
        raise UserError(f"--size: expected [FRAMESx]HEIGHTxWIDTH[:PROBABILITY], got {text}")
    frames, height, width = int(match[1] or cfg.frames), int(match[2]), int(match[3])
    unit = 2 * spec.scale  # pixels of a token, which is 2 x 2 latents
    nearest = [max(1, round(side / unit)) * unit for side in (height, width)]
    if nearest != [height, width]:
        expected = f"multiples of {unit} (nearest: {nearest[0]}x{nearest[1]})"
        raise UserError(f"--size: expected {expected}, got {text}")
    if frames < 1 or frames % 4 != 1:
        nearest_frames = 4 * max(0, round((frames - 1) / 4)) + 1
        raise UserError(f"--frames: expected 4n + 1 (nearest: {nearest_frames}), got {frames}")
    shape = (spec.channels, height // spec.scale, width // spec.scale)
    if frames > 1 and not spec.network.makes_video:
        raise UserError(f"--frames: expected 1, {cfg.teacher} makes pictures, got {frames}")
    if spec.network.makes_video:
        shape = (shape[0], (frames - 1) // 4 + 1, *shape[1:])
    return shape, float(match[4] or 1)


def check_config(cfg: Config, topology: Topology = SINGLE) -> None:
    """Raise UserError for settings that do not fit the teacher. Reads no file."""
    spec = teacher_spec(cfg.teacher)
    branches = 2 if spec.boundary else 1
    if len(cfg.guidance) not in (1, branches):
        expected = "one number, or two: high noise, low noise" if branches == 2 else "one number"
        raise UserError(f"--guidance: expected {expected}, got {len(cfg.guidance)}")
    if not cfg.size:
        raise UserError("--size: expected at least one size such as 480x832")
    buckets(cfg)
    if cfg.boundary:
        raise UserError(f"--boundary is for toy2d; that of {cfg.teacher} is known; drop it")
    if cfg.images and not spec.is_i2v:
        raise UserError(f"--images is for image to video, and {cfg.teacher} is not; drop it")
    if cfg.teacher_lora and is_random(cfg):
        raise UserError("--teacher-lora needs published weights; give --weights")
    if cfg.base == "int8" and "full" in (cfg.train_student, cfg.train_fake):
        # they would start from rounded weights
        raise UserError("--base int8 needs --train-student lora and --train-fake lora")
    if topology.processes > 1:
        check_parallel(cfg, topology)


def check_parallel(cfg: Config, topology: Topology) -> None:
    """Raise UserError for settings that several processes cannot share evenly."""
    settings = teacher_spec(cfg.teacher).settings
    count = plan.num_micro_batches(cfg)
    ranks = topology.data_parallel
    if count % ranks:
        problem = f"{count} micro-batches, which cannot be split evenly over {ranks} ranks"
        raise UserError(f"--batch {cfg.batch} is {problem}; change --batch or --micro-batch")
    if cfg.depths == "mixed":
        raise UserError("--depths mixed does not work with several processes; use --depths drawn")
    if cfg.base == "int8":
        raise UserError("--base int8 runs in one process; several share the bases as they are")
    if cfg.compile and topology.context_parallel > 1:
        raise UserError("--compile does not work with --context-parallel; drop one of them")
    heads = settings.get("num_heads") or settings["num_attention_heads"]
    if heads % topology.context_parallel:
        expected = f"a divisor of {cfg.teacher}'s {heads} heads"
        raise UserError(f"--context-parallel: expected {expected}, got {topology.context_parallel}")


def boundary_of(cfg: Config) -> float | None:
    """The time at which the low-noise branch begins, from the weights if they are on disk."""
    boundary_t = teacher_spec(cfg.teacher).boundary
    folder = weights_folder(cfg) or weights.default_folder(cfg.teacher)
    if boundary_t is None or is_random(cfg) or not folder.exists():
        return boundary_t
    return weights.branch_paths(cfg.teacher, *cfg.weights)[1]


# -- input files ----------------------------------------------------------------------------------


def base_files(cfg: Config) -> list[Path]:
    """The files of the teacher's networks, high noise first. Checks their headers."""
    if is_random(cfg):
        return []
    files = []
    paths = weights.branch_paths(cfg.teacher, *cfg.weights)[0]
    for path, loras in zip(paths, weights.teacher_loras(cfg)):
        net, tensors = weights.inspect_files(path, torch.bfloat16, cfg.teacher)
        files += sorted({info.file for info in tensors.values()})
        weights.read_loras(net, loras)
        files += [file.path for file in loras]
    return files


def input_files(cfg: Config) -> list[Path]:
    """Every file that a run reads, those of its networks first. Checks their headers."""
    files = base_files(cfg)
    path = prompts_path(cfg)
    spec = teacher_spec(cfg.teacher)
    if cfg.images or (spec.is_i2v and not is_random(cfg)):
        check_captions(cfg, path)
        files.append(Path(cfg.images))
    if path is None:
        return files
    if not is_text(path):
        open_prompts(cfg, path)
    else:
        encoders.read_prompts(path)
        if is_random(cfg) or not spec.repository:
            raise UserError(f"--prompts: {cfg.teacher} has no text encoder here; give embeddings")
        for part in ("text_encoder", "tokenizer"):
            weights.subfolder(cfg.teacher, weights_folder(cfg), part)
    if path.is_dir():
        return files + (encoders.shards_in(path) or sorted(path.glob("*.txt")))
    return [*files, path]


def check_captions(cfg: Config, path: Path | None) -> None:
    """Raise UserError unless every caption of the first frames has an embedding in `path`."""
    if not (cfg.images and cfg.prompts and not is_text(path)):
        prompts = "--prompts, the embeddings of their captions"
        advice = "make both with python -m models.encoders"
        raise UserError(f"image to video needs --images and {prompts}; {advice}")
    captions = {text for texts in open_images(cfg).captions.values() for text in texts}
    absent = captions - set(open_prompts(cfg, path).prompts)
    if absent:
        raise UserError(f"{path} has no embedding of the caption {min(absent)!r}; add it")


def weights_folder(cfg: Config) -> Path | None:
    """The folder of the published weights, with text encoder and VAE; None for the default."""
    return Path(cfg.weights[0]) if cfg.weights else None


def prompts_path(cfg: Config) -> Path | None:
    """Prompts or embeddings: the user's, or the default ones; None for random embeddings."""
    folder = teacher_spec(cfg.teacher).folder
    if cfg.prompts or folder:
        return Path(cfg.prompts or folder / "prompts.safetensors")
    return None if is_random(cfg) else EXAMPLE_PROMPTS


def is_text(path: Path) -> bool:
    """Return whether a file of prompts must be embedded first."""
    return path.suffix.lower() != ".safetensors" and not encoders.shards_in(path)


def embeddings_path(cfg: Config, out: Path) -> Path | None:
    """The embeddings of a run: the user's, or those that it made from a text file."""
    path = prompts_path(cfg)
    return out / "prompts" if path and is_text(path) else path


def open_prompts(cfg: Config, path: Path) -> encoders.Embeddings:
    """Open embeddings and check that they fit the teacher's network."""
    prompts = encoders.open_embeddings(path)
    longest, channels = text_shape(cfg)
    teacher = str(prompts.metadata.get("teacher"))
    network = weights.TEACHERS[teacher].network if teacher in weights.TEACHERS else None
    if network is not teacher_spec(cfg.teacher).network or prompts.negative.shape[1] != channels:
        expected = f"embeddings of {channels} channels for {cfg.teacher}"
        line = f"{path}: expected {expected}, found {prompts.negative.shape[1]} for {teacher}"
        raise UserError(f"{line}; make them with python -m models.encoders")
    if prompts.max_length > longest:
        raise UserError(f"{path}: expected at most {longest} tokens, found {prompts.max_length}")
    return prompts


def open_images(cfg: Config) -> encoders.FirstFrames:
    """Open the first frames of --images and check that they have every size of the run."""
    return encoders.open_first_frames(Path(cfg.images), [shape[1:] for shape in buckets(cfg)])


@lru_cache(maxsize=8)
def text_shape(cfg: Config) -> tuple[int, int]:
    """Tokens of the longest prompt that the network takes, and channels of an embedding."""
    net = weights.meta_network(cfg, 1)
    return net.text_len, net.text_dim


def prepare(cfg: Config, out: Path, device: torch.device, progress: Callable) -> None:
    """Embed the prompts of a text file into the run's folder, unless that has been done."""
    if has_vae(cfg):  # what is wrong with it shows now, not at the first preview
        encoders.load_vae(cfg.teacher, weights_folder(cfg), "cpu")
    path = prompts_path(cfg)
    if path and is_text(path):
        prompts = encoders.read_prompts(path)
        folder = weights_folder(cfg)
        encoders.embed_prompts(cfg.teacher, folder, prompts, out / "prompts", str(device))
    if path:
        prompts = open_prompts(cfg, embeddings_path(cfg, out)).prompts
        print(f"prompts: {len(prompts)}, the first: {encoders.shorten(prompts[0])}")


# -- networks -------------------------------------------------------------------------------------


def make_roles(cfg: Config, phases: list[Phase], device: torch.device, out: Path) -> moe.Roles:
    """The roles of a run on the teacher's frozen networks, each of which is in memory once."""
    boundary_t = boundary_of(cfg)
    with_guidance = make_guidance(cfg, out)
    branch_of = moe.trained_names(phases, cfg.fake_per_depth, boundary_t)
    adapters = [name for name in branch_of if plan.role_kind(cfg, name) == "lora"]

    @cache
    def base(branch: int) -> nn.Module:  # loaded when first needed
        return load_base(cfg, branch, device, [x for x in adapters if branch_of[x] == branch])

    def adapter_role(name: str, branch: int) -> moe.Role:
        options = name, (cfg.seed, name, "adapter"), cfg.rank, cfg.alpha, device
        start = lambda: lora.start_adapter(base(branch), *options)
        velocity = lambda x_t, t, c=None: base(branch)(x_t, t, c, adapter=name)
        return moe.Role(name, velocity, start)

    def full_role(name: str, branch: int) -> moe.Role:
        net = None  # a copy of the teacher's network; later phases start it again in place

        def start() -> dict[str, nn.Parameter]:
            nonlocal net
            copy = weights.trainable_copy(base(branch), net, device, parallel.shard_and_allocate)
            net = net or configure(cfg, copy)
            return dict(net.named_parameters())

        return moe.Role(name, lambda x_t, t, c=None: net(x_t, t, c), start)

    def make_role(name: str) -> moe.Role:
        return (adapter_role if name in adapters else full_role)(name, branch_of[name])

    def make_teacher(branch: int) -> moe.Role:
        velocity = lambda x_t, t, c=None: with_guidance(branch, base(branch), x_t, t, c)
        return moe.Role(f"teacher{branch}", velocity)

    teacher = {branch: make_teacher(branch) for branch in ((1,) if boundary_t is None else (1, 2))}
    return moe.collect_roles(phases, cfg.fake_per_depth, teacher, make_role)


def load_base(
    cfg: Config,
    branch: int,
    device: torch.device,
    adapters: Iterable[str] = (),
    changes: dict | None = None,
) -> nn.Module:
    """The frozen network of a branch of the teacher.

    adapters: all that will be on it; FSDP2 shards a network once, with everything inside.
    changes: those of a LoRA (weights.read_loras), merged into published weights.
    """

    def allocate(net: nn.Module, device: torch.device) -> None:
        for name in adapters if parallel.topology.processes > 1 else ():
            lora.add_adapter(net, name, cfg.rank, cfg.alpha)
        parallel.shard_and_allocate(net, device)

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of an encoder, or of the network before
        q = torch.empty(1, 128, 8, 128, dtype=dtype_named(cfg.dtype), device=device)
        mask = torch.ones(1, 128, dtype=torch.bool, device=device)
        note(f"attention by {attention_backend(q)}, with a mask {attention_backend(q, mask)}")
    options = dict(dtype=dtype_named(cfg.dtype), allocate=allocate, device=device)
    options["int8"] = cfg.base == "int8"
    noise = f", {export.NOISE[branch]} noise" if teacher_spec(cfg.teacher).boundary else ""
    if is_random(cfg):
        print(f"{cfg.teacher}{noise}: random weights")
        return configure(cfg, weights.random_network(cfg.teacher, seed=branch, **options))
    paths, _ = weights.branch_paths(cfg.teacher, *cfg.weights)
    path = paths[branch - 1]
    loras = weights.teacher_loras(cfg)[branch - 1]
    print(f"{cfg.teacher}{noise}: {' + '.join(map(str, [path, *loras]))}")
    options |= dict(teacher=cfg.teacher, loras=loras, changes=changes)
    return configure(cfg, weights.load(path, **options))


def configure(cfg: Config, net: nn.Module) -> nn.Module:
    """Set activation checkpointing, and compile the blocks."""
    net.checkpointing = cfg.checkpointing
    if cfg.compile:
        torch._dynamo.config.recompile_limit = 64  # one graph per role and shape
        for block in parallel.blocks_of(net):
            block.forward = torch.compile(block.forward)  # FSDP2's hooks stay outside
    return net


def make_guidance(cfg: Config, out: Path) -> Callable[..., Tensor]:
    """with_guidance(branch, net, x_t, t, c): the velocity with CFG at the branch's scale."""
    guide = teacher_spec(cfg.teacher).network.guide
    null = null_text(cfg, out) if any(scale != 1 for scale in cfg.guidance) else None

    def with_guidance(branch: int, net: Callable, x_t: Tensor, t: Tensor, c: dict) -> Tensor:
        scale = cfg.guidance_of(branch)
        v = net(x_t, t, c)
        if scale == 1:
            return v
        null_c = {name: value for name, value in c.items() if name not in ("text", "mask")}
        null_c["text"] = moe.to_device(null, x_t.device).expand(len(x_t), -1, -1)
        return guide(v, net(x_t, t, null_c), scale)

    return with_guidance


def null_text(cfg: Config, out: Path) -> Tensor:
    """The negative prompt (1, L, D), which CFG leads away from."""
    path = embeddings_path(cfg, out)
    if path:
        return open_prompts(cfg, path).negative[None]
    return random_texts(cfg, 1, stream("null"))[0][None]


# -- data: prompts and first frames --------------------------------------------------------------


def make_data(cfg: Config, out: Path) -> Callable:
    """data(n, shared, rng) -> conditions of n samples, and the shape of one.

    The shape is drawn from `shared`, on which all ranks agree, and everything else from `rng`.
    """
    shapes = buckets(cfg)
    path = embeddings_path(cfg, out)
    probabilities = torch.tensor(list(shapes.values()))
    prompts = open_prompts(cfg, path) if path else None
    images = open_images(cfg) if cfg.images else None
    if images:  # of equal captions the first row
        row_of = {caption: i for i, caption in reversed([*enumerate(prompts.prompts)])}

    def data(n: int, shared: torch.Generator, rng: torch.Generator) -> tuple[dict, tuple]:
        shape = list(shapes)[torch.multinomial(probabilities, 1, generator=shared).item()]
        c = {}
        if images:
            c["image"], captions = captioned_frames(images, n, shape, rng)
            texts = [prompts.row(row_of[caption]) for caption in captions]
            return c | text_cond(cfg, texts), shape
        if teacher_spec(cfg.teacher).is_i2v:
            c["image"] = random_first_frames(n, shape, rng)
        if prompts:
            rows = torch.randint(len(prompts.prompts), (n,), generator=rng)
            texts = [prompts.row(i) for i in rows.tolist()]
        else:
            texts = random_texts(cfg, n, rng)
        return c | text_cond(cfg, texts), shape

    return data


def captioned_frames(
    images: encoders.FirstFrames, n: int, shape: tuple, rng: torch.Generator
) -> tuple[Tensor, list[str]]:
    """n first frames (n, 20, F, h, w) of this shape, and their captions."""
    key = images.key_of[shape[1:]]
    captions = images.captions[key]
    frames = images.file[key]
    rows = torch.randint(len(captions), (n,), generator=rng).tolist()
    return torch.cat([frames[i : i + 1] for i in rows]), [captions[i] for i in rows]


def text_cond(cfg: Config, texts: list[Tensor]) -> dict[str, Tensor]:
    """Embeddings (L_i, D) as the conditions of a batch."""
    c = encoders.batch(texts)
    return c if teacher_spec(cfg.teacher).network.takes_mask else {"text": c["text"]}


def random_texts(cfg: Config, n: int, rng: torch.Generator) -> list[Tensor]:
    """n random prompt embeddings (L, D) of random lengths."""
    longest, channels = text_shape(cfg)
    longest = longest if teacher_spec(cfg.teacher).repository else min(longest, 16)
    lengths = torch.randint(1, longest + 1, (n,), generator=rng).tolist()
    return [torch.randn(length, channels, generator=rng) for length in lengths]


def random_first_frames(n: int, shape: tuple, rng: torch.Generator) -> Tensor:
    """n random first frames (n, 20, F, h, w): a mask of 4 channels, 16 of latents."""
    return encoders.add_mask(torch.randn(n, 16, *shape[1:], generator=rng))


# -- previews, plan and speed ---------------------------------------------------------------------


@torch.no_grad()
def report(
    cfg: Config, phases, roles, k: int, device, out: Path, finished: bool
) -> tuple[dict, bytes]:
    """Metrics and a contact sheet of the student of phases[:k]: one prompt, eval_samples noises.

    A row each: x at the end of every phase; the x_0 that the student's last step predicts; the x_0
    that teacher and fake predict from the same re-noised x_s; when finished, the teacher's samples
    in as many steps. Networks get micro_batch samples at a time.
    """
    n = cfg.eval_samples
    key = (cfg.seed, "preview")
    phase = phases[k - 1]
    c, shape = make_data(cfg, out)(1, stream(*key, "shape"), stream(*key, "condition"))
    c = moe.cond_to(moe.index_cond(c, torch.zeros(n, dtype=torch.long)), device)
    z, eps = (normal((n, *shape), *key, name).to(device) for name in ("z", "eps"))
    in_chunks = partial(moe.chunked, size=cfg.micro_batch or n)
    nets = [in_chunks(role) for role in moe.student_nets(roles, phases[:k])]
    times = step_times(cfg.steps, cfg.shift)
    xs = list(trajectory(nets, times[: phase.end + 1], z, c))
    x_before, x_s = xs[-2:]
    rows = {f"student, t = {p.s:.3g}": xs[p.end] for p in phases[:k]}
    t = full_time(phase.t[-2], x_s)
    rows["student x_0"] = v_to_x0(x_before, t, nets[-1](x_before, t, c))
    interval = pick_interval(phase, 0.5)
    t = renoise_times(interval, torch.full((n,), 0.5), cfg.shift).to(device)
    x_t = diffuse(x_s, phase.s, t, eps)
    depth = phase.num_steps if cfg.fake_per_depth else 0  # that of the samples users will see
    networks = roles.teacher[interval.branch], roles.fakes[interval.branch, depth]
    for name, role in zip(("teacher", "fake"), networks):
        rows[f"{name} x_0 at t = {t[0]:.2f}"] = v_to_x0(x_t, t, in_chunks(role)(x_t, t, c))
    metrics = {"latent_distance": latent_distance(x_s)}
    if finished:
        branches = [branch_at(t, boundary_of(cfg)) for t in times[:-1]]
        *_, x = trajectory([in_chunks(roles.teacher[b]) for b in branches], times, z, c)
        rows[f"teacher, {cfg.steps} steps"] = x
        metrics["latent_distance_teacher_same_steps"] = latent_distance(x)
    return metrics, draw_preview(cfg, rows, device)


def draw_preview(cfg: Config, rows: dict[str, Tensor], device: torch.device) -> bytes:
    """The contact sheet of latents by name, decoded if there is a VAE and memory for it."""
    try:
        decode = None
        if is_rank0() and has_vae(cfg):
            vae = encoders.load_vae(cfg.teacher, weights_folder(cfg), str(device))
            decode = partial(decode_first_frames, vae)
        return media.sheet(rows, decode)
    except torch.OutOfMemoryError:  # the VAE's; a preview must not end a run
        return media.sheet(rows, None)


def latent_distance(x: Tensor) -> float | None:
    """Mean RMS distance of two samples (n, ...), over all pairs; None if it is not finite."""
    x = x.flatten(1).float()
    distance = (torch.pdist(x).mean() / x.shape[1] ** 0.5).item()
    return distance if math.isfinite(distance) else None


def decode_first_frames(vae, x: Tensor) -> Tensor:
    """RGB (n, h, w, 3) in [0, 1] of the first frames of latents."""
    first = x[:, :, :1] if x.ndim == 5 else x[:, :, None]
    pixels = [encoders.decode(vae, latent)[:, :, 0] for latent in first.split(1)]
    return ((torch.cat(pixels).float().cpu() + 1) / 2).movedim(1, -1)


def has_vae(cfg: Config) -> bool:
    """Return whether samples can be decoded: it takes published weights, and diffusers."""
    folder = weights.find_subfolder(cfg.teacher, weights_folder(cfg), "vae")
    has_diffusers = importlib.util.find_spec("diffusers") is not None
    return has_diffusers and folder is not None and not is_random(cfg)


def plan_text(cfg: Config, phases: list[Phase], device: torch.device, topology: Topology) -> str:
    """Memory, FLOPs and days of a run, and whether other tools could run its student."""
    active = active_roles(cfg, phases)
    text = plan.format_plan(cfg, phases, active, buckets(cfg), str(device), topology)
    try:
        export.check_exportable(phases, active[0].branch_of, boundary_of(cfg))
    except UserError as error:
        text += f"\nnote: {error}"
    return text


def active_roles(cfg: Config, phases: list[Phase]) -> list[moe.ActiveRoles]:
    """The active roles of each phase."""
    options = cfg.fake_per_depth, boundary_of(cfg)
    return [moe.active_roles(phases, phase.k, *options) for phase in phases]


def throughput(cfg: Config, phase: Phase, seconds: float, device: torch.device) -> dict:
    """Speed of an iteration (not of a warm-up) from its expected FLOPs.

    mfu: model FLOPs utilization. hfu: the same with the FLOPs that checkpointing recomputes.
    tokens_per_second: tokens of the samples that fakes and student learn from.
    """
    shapes = buckets(cfg)
    seconds = max(seconds, 1e-9)
    peak = plan.peak_flops(dtype_named(cfg.dtype), str(device)) * seconds
    peak *= parallel.topology.processes
    useful, recomputed = plan.step_flops(cfg, phase, shapes)
    mfu, hfu = round(useful / peak, 4), round((useful + recomputed) / peak, 4)
    tokens = sum(p * math.prod(shape[1:]) / 4 for shape, p in shapes.items())
    rate = round((cfg.fake_updates + 1) * cfg.batch * tokens / seconds)
    return {"tokens_per_second": rate, "mfu": mfu, "hfu": hfu}


def phase_summary(cfg: Config, phases: list[Phase], k: int, rows: list[dict]) -> str:
    """Time per micro-batch, peak memory and MFU of phase k, from its log rows."""
    rows = [row for row in rows if row["role"].startswith("student")]
    rows = rows[len(rows) // 2 :]  # the first iterations allocate memory and choose kernels
    keys = "seconds_iteration", "memory_gb", "mfu", "hfu"
    seconds, memory, mfu, hfu = (statistics.median(row[key] for row in rows) for key in keys)
    updates = cfg.fake_updates + 1
    ranks = parallel.topology.data_parallel
    forwards = updates * plan.num_micro_batches(cfg) / ranks
    speed = f"{seconds / forwards:.3g} s per micro-batch of an update"
    return f"phase {k}: {speed}, peak memory {memory:.4g} GB, MFU {mfu:.1%}, HFU {hfu:.1%}\n"


# -- sample.py ------------------------------------------------------------------------------------


def apply_flags(cfg: Config, args):
    """The settings with --frames and one size: --size, or that nearest to --image, or the first."""
    size = args.size or cfg.size[0].partition(":")[0]
    if args.image and not args.size:
        sizes = {parse_size(cfg, text)[0][-2:]: text.partition(":")[0] for text in cfg.size}
        size = sizes[encoders.nearest_size(args.image, list(sizes))]
    if args.frames is not None:
        cfg = replace(cfg, frames=args.frames)
        size = "x".join(size.split("x")[-2:])
    cfg = replace(cfg, size=(size,))
    check_config(cfg)
    return cfg


def check_inputs(cfg: Config, args) -> None:
    """Raise UserError now for what would be missing after the transformers have worked."""
    is_i2v = teacher_spec(cfg.teacher).is_i2v
    has_prompt = bool(args.prompt or args.prompts)
    if args.image and not is_i2v:
        raise UserError(f"--image is for image to video, and {cfg.teacher} is not; drop it")
    if args.image:
        encoders.read_rgb(args.image)
        if not has_prompt:
            raise UserError("--image needs a --prompt that says what happens")
    elif is_i2v and has_prompt and not is_random(cfg):
        raise UserError(f"{cfg.teacher} makes a video from an image; give --image")
    if teacher_spec(cfg.teacher).repository and not is_random(cfg):
        encoders.load_vae(cfg.teacher, weights_folder(cfg), "cpu")


def teacher_times(cfg: Config, shift: float | None) -> tuple[float, ...]:
    """The times of the published sampler in cfg.steps steps, or those of this shift."""
    default = teacher_spec(cfg.teacher).sampling_defaults[1]
    [shape] = buckets(cfg)
    # Qwen-Image shifts by e^mu, where mu grows with the tokens, and stretches to end at 0.02
    mu = 0.5 + 0.4 * (math.prod(shape[1:]) / 4 - 256) / 7936
    times = [
        shift_time(1 - i / cfg.steps, shift or default or math.exp(mu)) for i in range(cfg.steps)
    ]
    if not (shift or default) and cfg.steps > 1:
        times = [1 - (1 - t) * 0.98 / (1 - times[-1]) for t in times]
    return (*times, 0.0)


def sample_inputs(cfg: Config, args, out: Path, run_dir: Path, device: torch.device) -> tuple:
    """Settings, conditions, shape and names: args.n samples of each prompt, or of the run's own."""
    check_inputs(cfg, args)
    if not (args.prompt or args.prompts):
        path = embeddings_path(cfg, run_dir)
        if path and not path.exists():
            raise UserError('expected a prompt: give --prompt "A fox runs." or --prompts FILE')
        rngs = (stream(args.seed, "sample", name) for name in ("shape", "condition"))
        return cfg, *make_data(cfg, run_dir)(args.n, *rngs), [f"{j:03}" for j in range(args.n)]
    path = args.prompts if args.prompts and not is_text(args.prompts) else out / ".prompts"
    if path != args.prompts:
        if is_random(cfg):
            raise UserError("random weights have no text encoder; --prompts takes embeddings")
        texts = [args.prompt] if args.prompt else encoders.read_prompts(args.prompts)
        folder = weights_folder(cfg)
        encoders.embed_prompts(cfg.teacher, folder, texts, path, str(device), overwrite=True)
    cfg = replace(cfg, prompts=str(path), images="")
    prompts = open_prompts(cfg, path)
    [shape] = buckets(cfg)
    count = len(prompts.prompts)
    c = text_cond(cfg, [prompts.row(i) for i in range(count) for _ in range(args.n)])
    if teacher_spec(cfg.teacher).is_i2v:
        frame = first_frame(cfg, args, shape, device)
        c["image"] = frame.expand(count * args.n, *frame.shape[1:])
    return cfg, c, shape, [f"{i:03}-{j:02}" for i in range(count) for j in range(args.n)]


def first_frame(cfg: Config, args, shape: tuple, device: torch.device) -> Tensor:
    """The condition (1, 20, F, h, w) of the user's picture, or a random one."""
    if not args.image:
        return random_first_frames(1, shape, stream(args.seed, "sample", "image"))
    vae = encoders.load_vae(cfg.teacher, weights_folder(cfg), str(device))
    scale = teacher_spec(cfg.teacher).scale
    pixels = encoders.read_image(args.image, scale * shape[2], scale * shape[3])
    return encoders.encode_first_frames(vae, pixels[None], frames=4 * shape[1] - 3).cpu()


def make_sampler(
    cfg: Config, branch_of: dict[str, int], weights_of: Callable, device, run_dir: Path
) -> Callable[..., Tensor]:
    """velocity(name, x_t, t, c) of roles by name, loaded when first called.

    branch_of: name -> branch whose network the role is on. weights_of(name): weights.RoleWeights.
    One network is in memory at a time. Each is loaded once, since a role's steps follow each other.
    """
    with_guidance = make_guidance(cfg, run_dir)
    networks = {}
    roles = {}

    def load_role(name: str) -> Callable:
        with reading(f"the tensors of {name}", "train or download it again"):
            role = weights_of(name)
        key = name if role.full or role.changes else branch_of[name]
        if key not in networks:
            roles.clear()
            networks.clear()
            networks[key] = load_network(cfg, branch_of[name], role, device)
        if role.factors:
            with reading(f"the tensors of {name}", "train or download it again"):
                lora.attach(networks[key], name, role.factors, device)
        return partial(networks[key], adapter=name if role.factors else None)

    def velocity(name: str, x_t: Tensor, t: Tensor, c: dict | None = None) -> Tensor:
        if name not in roles:
            roles[name] = load_role(name)
        return with_guidance(branch_of[name], roles[name], x_t, t, c)

    return velocity


def load_network(cfg: Config, branch: int, role: weights.RoleWeights, device) -> nn.Module:
    """The network of a role: the teacher's with changes merged, or with all weights of the role."""
    if role.full:
        net = weights.meta_network(cfg, branch).requires_grad_(False)
        if cfg.base == "int8":
            lora.store_int8(net)
        with reading("the tensors of a student", "train or download it again"):
            return weights.load_tensors(net, role.full(), device)
    return load_base(cfg, branch, device, changes=role.changes)


def save_samples(
    cfg: Config, c, xs: list[Tensor], args, names: list[str], device
) -> tuple[dict, Iterator]:
    """Metrics of the samples xs, one x per time, and an iterator of (file name, bytes)."""
    metrics = {"latent_distance": latent_distance(xs[-1])} if len(xs[-1]) > 1 else {}
    return metrics, encode_samples(cfg, xs, args, names, device)


def encode_samples(cfg: Config, xs, args, names: list[str], device) -> Iterator[tuple[str, bytes]]:
    """Yield latents.safetensors, then a png or mp4 per sample and the contact sheet samples.png."""
    latents = {f"x{i}": x for i, x in enumerate(xs)} if args.trajectory else {"x": xs[-1]}
    metadata = {"kind": "latents", "teacher": cfg.teacher, "names": names} | args.metadata
    yield "latents.safetensors", save(latents, {"metadata": json.dumps(metadata)})
    if not has_vae(cfg):
        print("there is no VAE; samples.png is a preview of the latents")
        times = args.metadata["times"][-len(latents) :]
        rows = {f"t = {t:.4g}": x for t, x in zip(times, latents.values())}
        yield "samples.png", media.sheet(rows, None, args.title)
        return
    vae = encoders.load_vae(cfg.teacher, weights_folder(cfg), str(device))
    rows = {}
    for name, x in zip(tqdm(names, "decoding", disable=None), xs[-1].split(1)):
        frames = media.to_uint8(encoders.decode(vae, x)[0])  # (F, h, w, 3), or (h, w, 3)
        frames = frames[None] if frames.ndim == 3 else frames
        if len(frames) == 1:
            yield f"{name}.png", media.encode_png(frames[0])
        else:
            yield f"{name}.mp4", media.encode_mp4(frames, teacher_spec(cfg.teacher).fps)
        if len(rows) < SHEET_ROWS:
            rows[name] = media.pick_frames(frames)
    yield "samples.png", media.contact_sheet(rows, args.title)


PRESET = Preset(
    check_config=check_config,
    input_files=input_files,
    base_files=base_files,
    make_roles=make_roles,
    make_data=make_data,
    report=report,
    plan_text=plan_text,
    apply_flags=apply_flags,
    sample_inputs=sample_inputs,
    make_sampler=make_sampler,
    save_samples=save_samples,
    prepare=prepare,
    num_samples=4,
    boundary_of=boundary_of,
    throughput=throughput,
    phase_summary=phase_summary,
    device="auto",
    threads=0,
    keep_students=2,
)
