"""What train.py's table of presets asks of a large teacher: files, networks, data, pictures."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from models import lora, parallel, pictures, plan, qwen_image, text, vae, wan, weights
from models.bases import Bases
from models.draws import integers, normal, uniform
from models.files import UserError, first_line
from models.parallel import blocks_of
from models.meter import summary
from models.qwen_image import TEXT_LEN, QwenImage

PROMPTS = Path(__file__).parent.parent / "prompts.txt"  # to try with


# -- sizes ---------------------------------------------------------------------------------------


def buckets(cfg) -> dict[tuple, float]:
    """Shape of a sample (C, F, h, w), of a picture (C, h, w) -> its probability. Raises UserError.

    --size is [FRAMESx]HEIGHTxWIDTH[:PROBABILITY], in pixels; without probabilities all are equal.
    """
    found, row = {}, weights.row_of(cfg.teacher)
    channels = row.settings.get("out_dim", 16)
    scale = row.scale
    for given in cfg.size:
        size, _, share = given.partition(":")
        numbers = size.split("x")
        if len(numbers) not in (2, 3) or not all(n.isdecimal() and int(n) for n in numbers):
            raise UserError(f"--size {given} is not [FRAMESx]HEIGHTxWIDTH[:PROBABILITY]")
        *frames, height, width = map(int, numbers)
        frames = frames[0] if frames else cfg.frames
        if max(height, width) > 8192:
            raise UserError(f"--size {given}: a side is at most 8192 pixels")
        near = [max(1, round(n / (2 * scale))) * 2 * scale for n in (height, width)]
        if near != [height, width]:
            sides = f"sides are multiples of {2 * scale}"
            raise UserError(f"--size {given}: {sides}; nearest that fits is {near[0]}x{near[1]}")
        if frames < 1 or frames % 4 != 1:
            near = 4 * max(0, round((frames - 1) / 4)) + 1
            raise UserError(f"{frames} frames are not 4n + 1; nearest: {near}")
        if frames > 1 and row.network is QwenImage:
            raise UserError(f"{cfg.teacher} makes pictures; --frames 1")
        shape = (channels, (frames - 1) // 4 + 1, height // scale, width // scale)
        shape = (channels, *shape[2:]) if row.network is QwenImage else shape
        found[shape] = found.get(shape, 0) + probability(share, given)
    total = sum(found.values())
    return {shape: share / total for shape, share in found.items()}


def probability(share: str, given: str) -> float:
    """What follows the colon of a size, or 1. Raises UserError."""
    try:
        value = float(share or 1)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UserError(f"--size {given}: {share} is no probability")
    return value


def bucket(shapes: dict[tuple, float], r: float) -> tuple:
    """The shape that one draw r ~ U(0, 1) chooses."""
    for shape, share in shapes.items():
        r -= share
        if r < 0:
            return shape
    return shape


# -- what can be wrong ---------------------------------------------------------------------------


def check(cfg) -> None:
    """Raise UserError for settings that do not go together; reads no file."""
    row = weights.row_of(cfg.teacher)
    experts = 2 if row.boundary else 1
    if len(cfg.guidance) not in (1, experts):
        raise UserError(
            f"--guidance takes {'one number, or two: high low' if experts == 2 else 'one number'}; "
            f"{cfg.teacher} has {weights.words(experts)}"
        )
    if cfg.micro_batch < 1:
        raise UserError("--micro-batch of a large teacher is at least 1")
    if not cfg.size:
        raise UserError("--size names no size, as 480x832")
    buckets(cfg)
    if cfg.offload != "none" and cfg.record == "first":
        raise UserError(
            "--record first keeps two networks at work; with --offload use --record last"
        )
    if cfg.offload == "blocks" and cfg.checkpointing == "off":
        raise UserError("--offload blocks gives a block away when it is done: --checkpointing on")
    if cfg.toy != "ring" or cfg.points or cfg.bandwidth or cfg.classes == "on":
        raise UserError("--toy, --points, --bandwidth and --classes belong to --teacher toy2d")
    if cfg.images and not row.from_image:
        raise UserError(f"--images are for image to video; {cfg.teacher} takes none")
    if is_random(cfg) and cfg.teacher_lora:
        raise UserError("--teacher-lora changes published weights; random ones have none")
    if parallel.here.processes > 1:
        check_shared(cfg, parallel.here)


def check_shared(cfg, here: parallel.Layout) -> None:
    """Raise UserError for settings that these processes cannot share evenly."""
    passes, settings = -(-cfg.batch // cfg.micro_batch), weights.row_of(cfg.teacher).settings
    if passes % here.shares:
        who = "processes" if here.context == 1 else "groups of processes"
        raise UserError(
            f"--batch {cfg.batch} is {passes} {'passes' if passes > 1 else 'pass'} of "
            f"--micro-batch {cfg.micro_batch}, which {here.shares} {who} cannot share evenly"
        )
    if cfg.offload != "none":
        raise UserError("--offload is of one process; several share the bases: leave it out")
    if cfg.compile and here.context > 1:
        raise UserError("--compile does not go together with --context-parallel")
    if cfg.depths == "mixed":
        raise UserError("--depths mixed asks processes for unlike calls; several take drawn")
    number = settings.get("num_heads") or settings["num_attention_heads"]
    if number % here.context:
        raise UserError(f"--context-parallel {here.context} does not divide {number} heads")
    for shape in buckets(cfg):
        count = math.prod(shape[1:]) // 4  # tokens are 2 x 2 latents
        if count <= -(-count // here.context) * (here.context - 1):
            raise UserError(f"--context-parallel {here.context} leaves nothing of {count} tokens")


def is_random(cfg) -> bool:
    """Weights of no use but to size, to time and to test: asked for, or there are no others."""
    row = weights.row_of(cfg.teacher)
    return cfg.weights == ("random",) or (not cfg.weights and not row.repository and not row.folder)


def is_image(cfg) -> bool:
    """Whether the teacher goes from an image to a video."""
    return weights.row_of(cfg.teacher).from_image


def boundary(cfg) -> float | None:
    """Where the low-noise expert begins: what the weights say, where they are there."""
    row = weights.row_of(cfg.teacher)
    folder = Path(cfg.weights[0]) if cfg.weights else weights.default_folder(cfg.teacher)
    if row.boundary is None or is_random(cfg) or not folder.exists():
        return row.boundary
    return weights.locate(cfg.teacher, *cfg.weights)[1]


def base_files(cfg) -> list[Path]:
    """The files of the frozen networks, each looked at by its header. Raises UserError."""
    found = []
    if not is_random(cfg):
        paths, _ = weights.locate(cfg.teacher, *cfg.weights)
        if cfg.teacher_lora and len(cfg.teacher_lora) != len(paths):
            raise UserError(f"{cfg.teacher} takes {len(paths)} --teacher-lora, one an expert")
        for i, path in enumerate(paths):
            net, stored = weights.plan(path, torch.bfloat16, cfg.teacher)
            found += sorted({there.file for there in stored.values()})
            if cfg.teacher_lora:
                one = Path(lora.high_first(cfg.teacher_lora)[i])
                weights.read_lora(net, one)
                found.append(one)
    return found


def files(cfg) -> list[Path]:
    """Every file that a run reads, each looked at. Raises UserError."""
    found = base_files(cfg)
    prompts, images = prompts_of(cfg), Path(cfg.images) if cfg.images else None
    texts = texts_of(cfg, prompts) if prompts else []
    if is_image(cfg) and not is_random(cfg) and not (images and cfg.prompts):
        raise UserError(
            "image to video needs --images of models.vae, and --prompts, embeddings of its captions"
        )
    if images and not prompts:
        raise UserError(
            "--images needs --prompts, embeddings of its captions: python -m models.text"
        )
    if images:
        captions = {one for size in open_images(cfg, images)[2].values() for one in size}
        if captions - set(texts):
            raise UserError(f"{prompts} has not the caption {min(captions - set(texts))!r}")
    return found + [path for path in (prompts, images) if path]


def texts_of(cfg, path: Path) -> list[str]:
    """The prompts of embeddings that this teacher understands, or that it can embed. UserError."""
    if path.suffix == ".safetensors":
        return open_prompts(cfg, path).about["prompts"]
    texts = text.read_prompts(path)
    if is_random(cfg) and weights.row_of(cfg.teacher).repository:
        raise UserError("random weights have no text encoder; --prompts takes embeddings for them")
    if not weights.row_of(cfg.teacher).repository:
        raise UserError(f"{cfg.teacher} has no text encoder; --prompts takes embeddings for it")
    for part in ("text_encoder", "tokenizer"):
        weights.component(cfg.teacher, folder_of(cfg), part)
    return texts


def prompts_of(cfg) -> Path | None:
    """Embeddings, or a text file to be embedded; None: random ones."""
    row = weights.row_of(cfg.teacher)
    if cfg.prompts or row.folder:
        return Path(cfg.prompts or row.folder / "prompts.safetensors")
    return None if is_random(cfg) else PROMPTS


def folder_of(cfg) -> Path | None:
    """The folder of the published weights, where text encoder and VAE are."""
    return Path(cfg.weights[0]) if cfg.weights else None


def open_prompts(cfg, path: Path) -> text.Embeddings:
    """Embeddings that this teacher understands. Raises UserError."""
    found, row = text.open_embeddings(path), weights.row_of(cfg.teacher)
    other = found.about.get("teacher")
    theirs = weights.TEACHERS[other].network if other in weights.TEACHERS else None
    if theirs is not row.network:
        raise UserError(f"{path} was made for {other}, another encoder than {cfg.teacher}'s")
    wide, wanted = found.negative.shape[1], text_dim(cfg)
    if wide != wanted:
        raise UserError(f"{path} has {wide} channels, {cfg.teacher} takes {wanted}; make it anew")
    lengths = found.offsets.diff().tolist()
    longest, room = max([*lengths, len(found.negative)]), text_room(cfg)
    if longest > room:
        raise UserError(f"{path} has a text of {longest} tokens, {cfg.teacher} takes {room}")
    return found


def text_dim(cfg) -> int:
    """Channels of an embedding."""
    settings = settings_of(cfg)
    usual = 3584 if weights.row_of(cfg.teacher).network is QwenImage else 4096
    return settings.get("text_dim", settings.get("joint_attention_dim", usual))


def text_len(cfg) -> int:
    """Tokens of the longest prompt."""
    usual = plan.TEXT if weights.row_of(cfg.teacher).repository else 16
    return settings_of(cfg).get("text_len", usual)


def text_room(cfg) -> int:
    """Tokens that the network can take."""
    usual = TEXT_LEN if weights.row_of(cfg.teacher).network is QwenImage else plan.TEXT
    return settings_of(cfg).get("text_len", usual)


def settings_of(cfg) -> dict:
    """The settings of the network: a folder's own, where small ones may have any size."""
    row = weights.row_of(cfg.teacher)
    if is_random(cfg) or row.repository:
        return row.settings
    return weights.plan(weights.locate(cfg.teacher, *cfg.weights)[0][0], torch.bfloat16)[0].settings


def open_images(cfg, path: Path):
    """First frames of models/vae.py in every size that is asked for. Raises UserError."""
    try:
        file = safe_open(path, framework="pt")
        captions = json.loads(file.metadata()["about"])["captions"]
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds no first frames ({first_line(error)}); make them: "
                        "python -m models.vae") from error  # fmt: skip
    held = {shape[2:]: key for key, shape in shapes.items()}
    for _, *size in buckets(cfg):
        if tuple(size) not in held:
            there = ", ".join(map(size_text, held))
            raise UserError(f"{path} has no {size_text(size)}, but {there}; change --size")
        key = held[tuple(size)]
        named = captions.get(key.removeprefix("image.")) if isinstance(captions, dict) else None
        if shapes[key][1] != 20 or not named or len(named) != shapes[key][0]:
            raise UserError(
                f"{path}: {key} and its captions do not fit; make them: python -m models.vae"
            )
    return file, held, captions


def size_text(size) -> str:
    """(21, 60, 104) latents -> 81x480x832 pixels."""
    return f"{4 * size[0] - 3}x{8 * size[1]}x{8 * size[2]}"


# -- before the first iteration ------------------------------------------------------------------


def start(cfg, out: Path, watch, device) -> dict:
    """Embed the prompts of a text file into the run's folder, once. Nobody needs fitting."""
    path = prompts_of(cfg)
    if path and path.suffix != ".safetensors" and not embedded(out).exists():
        if path == PROMPTS:
            print(f"{path.name}: thirty prompts to try this with; --prompts takes your own")
        text.embed(
            SimpleNamespace(
                teacher=cfg.teacher, weights=folder_of(cfg), prompts=path, negative=None,
                out=embedded(out), batch=16, device=str(device), overwrite=True,
            )
        )  # fmt: skip
    return {}


def embedded(out: Path) -> Path:
    """The embeddings that a run made for itself."""
    return out / "prompts.safetensors"


def parts(cfg, device: torch.device, out: Path, expert, roles: list[str]) -> tuple:
    """The arguments of moe.shared_networks. expert(role): whose network it is on; roles: all."""
    adapt = lambda net, role: (
        None
        if plan.kind(cfg, role) == "full"
        else lora.start_adapter(net, role, (cfg.seed, role, "adapter"), cfg.rank, cfg.alpha, device)
    )
    copy = lambda net, old: dress(cfg, weights.copy(net, old, device, parallel.place), old is None)
    adapters = [role for role in roles if plan.kind(cfg, role) == "lora"]
    on = lambda e: [role for role in adapters if expert(role) == e]
    bases = Bases(lambda e: load(cfg, device, e, on(e)), device, cfg.offload)
    return bases, expert, adapt, copy, guided(cfg, null_of(cfg, out))


def load(cfg, device: torch.device, e: int, adapters: list[str], changes=None) -> nn.Module:
    """The teacher's expert e, frozen; where processes share it, with all that will hang on it.

    changes: of weights.read_lora, to be merged into published weights.
    """

    def make_room(net: nn.Module, device) -> None:
        for role in adapters if parallel.here.processes > 1 else ():
            lora.add_adapter(net, role, cfg.rank, cfg.alpha)
        parallel.place(net, device)

    where = device if cfg.offload == "none" else "cpu"
    how = dict(dtype=plan.dtype_named(cfg.dtype), device=where, make_room=make_room)
    if is_random(cfg):
        return dress(cfg, weights.random(cfg.teacher, **how, seed=e))
    path = weights.locate(cfg.teacher, *cfg.weights)[0][e - 1]
    one = lora.high_first(cfg.teacher_lora)[e - 1] if cfg.teacher_lora else None
    how |= dict(teacher_lora=one, teacher=cfg.teacher, changes=changes)
    return dress(cfg, weights.load(path, **how))


def dress(cfg, net: nn.Module, new: bool = True) -> nn.Module:
    """Checkpointing and compilation as asked for. A block's forward, so that hooks stay outside."""
    net.checkpointing = cfg.checkpointing == "on"
    if cfg.compile and new:
        torch._dynamo.config.recompile_limit = 64  # a graph a role and a shape
        for block in blocks_of(net):
            block.forward = torch.compile(block.forward)
    return net


def guided(cfg, null: dict):
    """guided(e): v = f(net, x_t, t, c) of expert e, guided away from the null conditions."""
    family = qwen_image if weights.row_of(cfg.teacher).network is QwenImage else wan

    def of(e: int):
        scale = cfg.guidance[min(e, len(cfg.guidance)) - 1]

        def teacher(net, x_t: Tensor, t: Tensor, c: dict) -> Tensor:
            v = net(x_t, t, c)
            if scale == 1:
                return v
            rest = {name: value for name, value in c.items() if name not in ("text", "mask")}
            nothing = {
                name: x.to(x_t.device).expand(len(x_t), *x.shape[1:]) for name, x in null.items()
            }
            return family.guide(v, net(x_t, t, rest | nothing), scale)

        return teacher

    return of


def null_of(cfg, out: Path) -> dict[str, Tensor]:
    """The conditions that guidance leads away from: the negative prompt, (1, L, D)."""
    path = prompts_of(cfg)
    if path is None:
        return {"text": random_text(cfg, "negative")[None]}
    return {"text": open_prompts(cfg, source(path, out)).negative[None]}


def source(path: Path, out: Path) -> Path:
    """The file of embeddings: the user's, or the one that the run made."""
    return path if path.suffix == ".safetensors" else embedded(out)


# -- data ----------------------------------------------------------------------------------------


def data(cfg, out: Path):
    """batch(n, *where, first) -> conditions of n samples, shape of one. No data but prompts.

    The shape is drawn without `first`, so that all samples of an update agree; the rest by sample.
    """
    shapes, path = buckets(cfg), prompts_of(cfg)
    prompts = open_prompts(cfg, source(path, out)) if path else None
    images = open_images(cfg, Path(cfg.images)) if cfg.images else None
    qwen = weights.row_of(cfg.teacher).network is QwenImage
    numbers = {prompt: i for i, prompt in enumerate(prompts.about["prompts"])} if prompts else {}

    def batch(n: int, *where):
        *update, first = where
        shape = bucket(shapes, uniform((), *update, "bucket").item())
        samples = [(*update, first + j) for j in range(n)]
        c, rows, texts = {}, [], prompts.about["prompts"] if prompts else []
        if images:
            c["image"], captions = draw_images(images, shape, samples)
            rows = [numbers[caption] for caption in captions]
        elif is_image(cfg):
            c["image"] = torch.stack([random_image(shape, *sample) for sample in samples])
        if prompts:
            rows = rows or [integers(1, len(texts), *one, "prompt").item() for one in samples]
            found = text.batch([prompts.row(i) for i in rows])
        else:
            found = text.batch([random_text(cfg, *sample) for sample in samples])
        # Wan attends to padding, and has no mask
        return c | (found if qwen else {"text": found["text"]}), shape

    return batch


def draw_images(images, shape: tuple, samples: list[tuple]) -> tuple[Tensor, list[str]]:
    """A first frame (20, F, h, w) of this size for each sample, and their captions."""
    file, held, captions = images
    key = held[shape[1:]]
    stored, named = file.get_slice(key), captions[key.removeprefix("image.")]
    rows = [integers(1, len(named), *sample, "image").item() for sample in samples]
    return torch.cat([stored[i : i + 1] for i in rows]), [named[i] for i in rows]


def random_text(cfg, *where) -> Tensor:
    """The embedding (L, D) of a prompt that nobody wrote."""
    length = 1 + integers(1, text_len(cfg), *where, "length").item()
    return normal((length, text_dim(cfg)), *where, "text")


def random_image(shape: tuple, *where) -> Tensor:
    """A first frame of nothing, (20, F, h, w): mask 4, 1 on the first latent frame, latents 16."""
    mask = torch.zeros(4, *shape[1:])
    mask[:, 0] = 1
    return torch.cat([mask, normal((16, *shape[1:]), *where, "image")])


# -- numbers and pictures ------------------------------------------------------------------------


def diversity(x: Tensor) -> float:
    """Mean over pairs of samples of the root mean square of their difference."""
    x = x.flatten(1).float()
    return number(torch.pdist(x).mean() / x.shape[1] ** 0.5)


def number(x: Tensor) -> float | None:
    """A number for JSON, which knows no NaN."""
    return x.item() if x.isfinite() else None


def report(run, look) -> tuple[dict, bytes]:
    """Numbers and a contact sheet of the student so far. look(run): latents by name, x at steps."""
    rows, xs = look(run)
    found = {"diversity": diversity(xs[-1])}
    teachers = [name for name in rows if name.startswith("teacher,")]
    if teachers:
        found["diversity_teacher_same_steps"] = diversity(rows[teachers[0]])
    found["x_means"] = [number(x.mean()) for x in xs]
    found["x_stds"] = [number(x.std()) for x in xs]
    try:
        decode = decoder(run.cfg, run.device) if parallel.here.index == 0 else None
        return found, pictures.sheet(rows, decode)
    except torch.OutOfMemoryError:  # a preview is no reason to end a run
        return found, pictures.sheet(rows, None)


def decoder(cfg, device):
    """decode(latents) -> RGB (n, h, w, 3) of the first frame, where the VAE is at hand; or None."""
    if is_random(cfg):
        return None
    try:
        model = vae.load_vae(cfg.teacher, folder_of(cfg), str(device))
    except UserError:
        return None

    def decode(x: Tensor) -> Tensor:
        pixels = [vae.decode(model, one[:, :, :1] if x.ndim == 5 else one) for one in x.split(1)]
        shown = (torch.cat(pixels).float().cpu() + 1) / 2
        return (shown[:, :, 0] if x.ndim == 5 else shown).movedim(1, -1)

    return decode


def record(cfg, held, device) -> str:
    """Which of the two ways to spend memory, by the plan."""
    return plan.record_of(cfg, held, buckets(cfg), device)


def plan_of(cfg, phases, held, device: str, rate: float) -> str:
    """Memory and time of a run."""
    return plan.report(cfg, phases, held, buckets(cfg), device, rate)


def closing(run, fake_lag) -> str:
    """What a phase took, beside the plan. The lag of the fakes would cost hours: see loss_by_t."""
    rows = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["phase"] == run.k]
    passes = -(-run.cfg.batch // run.cfg.micro_batch) // parallel.here.shares
    way = "last" if run.record_last else "first"
    planned = plan.memory(
        run.cfg, run.held[run.k - 1], plan.biggest(buckets(run.cfg)), run.cfg.offload, way
    )
    return (
        f"phase {run.k}: {summary(rows, passes)} (plan: {planned.peak / 1e9:.4g} GB on the device)"
    )


def speed(run, calls, seconds: float) -> dict:
    """How fast an iteration was, of the calls that a Meter counted.

    share: of the rate of a large product, by operations that are wanted; share_recomputed: with
    those that activation checkpointing, and recording last, repeat.
    """
    cfg, device = run.cfg, run.device
    tokens = wanted = again = 0.0
    own = {"student": cfg.generator == "full", "fake": cfg.fake == "full", "teacher": False}
    dtype, guided = plan.dtype_named(cfg.dtype), max(g != 1 for g in cfg.guidance)
    for (role, shape, recorded), n in calls.items():
        name = re.match("[a-z]+", role)[0]
        cost = plan.cost(cfg.teacher, shape, own[name], cfg.rank, dtype, cfg.checkpointing == "on")
        n *= 1 + (guided and name == "teacher")
        tokens += n * math.prod(shape[1:]) / 4
        wanted += n * (cost.training if recorded else cost.forward)
        again += n * cost.recomputed * recorded
        if run.record_last and recorded and name == "student":  # it had been asked before
            wanted -= n * cost.forward
            again += n * cost.forward
    here = parallel.here  # calls are of this process's share of samples, work of its tokens
    rate = plan.rate_of(dtype, str(device)) * seconds * here.context
    return {
        "tokens_per_second": round(tokens * here.shares / seconds),
        "share": round(wanted / rate, 4),
        "share_recomputed": round((wanted + again) / rate, 4),
    }
