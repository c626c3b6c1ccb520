"""Prompts -> embeddings, pixels <-> latents, first frames: the frozen networks beside a teacher.

    python -m models.encoders text --teacher wan22 --prompts prompts.txt --out prompts
    python -m models.encoders images --teacher wan22-i2v --images FOLDER --out images.safetensors

text embeds prompts once, before training: UMT5-XXL for Wan, Qwen2.5-VL for Qwen-Image. OUT is a
folder of shards; after an interruption the same command continues at the first missing shard.
images encodes the first frames of image to video. FOLDER holds pictures and captions.csv with the
columns file, caption. Each picture is scaled and cropped to the --size of the nearest aspect ratio.

Both need pip install -r models/requirements.txt and the published weights: text_encoder and
tokenizer, or vae.
"""

import contextlib
import csv
import hashlib
import html
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from models import cli, common, lora, parallel, runs, weights
from models.cli import Parser
from models.common import UserError, open_tensors, read_json, reading, write_tensors
from models.qwen_image import QwenImage
from models.wan import Wan

# as published with the models
WAN_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
QWEN_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
QWEN_DROP = 34  # tokens of the template before the prompt
QWEN_NEGATIVE = " "
MAX_TOKENS = 512  # tokens kept of a prompt, as in the published pipelines

CAPTIONS = ("caption", "prompt", "text")  # columns, or keys, that a prompt may have
SHARD = 512  # prompts per file of embeddings
FORMATS = "expected UTF-8 as .txt, .csv, .tsv or .jsonl; put cells with commas in quotes"
NO_PROMPT = "contains no prompt; write one per line, or one .txt per prompt"
MAKE_TEXT = "run python -m models.encoders text"
MAKE_IMAGES = "run python -m models.encoders images"
QUANTISED = re.compile(r"scaled_fp8|scale_(weight|input)|(weight|input)_scale")
OVERWRITE = "give --overwrite or choose another --out"


def from_pretrained(path: Path, cls, **options):
    """A frozen network in eval mode: cls.from_pretrained of local files. Raises UserError."""
    for file in weights.shards(path):
        for key, x in lora.open_safetensors(file).items():
            is_float = x.dtype in weights.FLOATS
            if not is_float or QUANTISED.search(key):  # the libraries would ignore scales
                expected = f"expected {', '.join(weights.FLOATS)} without scales"
                raise UserError(f"{file}: {expected}, found {key} {x.dtype}; {weights.DOWNLOAD}")
    options |= dict(local_files_only=True, use_safetensors=True, output_loading_info=True)
    with reading(path, weights.DOWNLOAD):
        net, report = cls.from_pretrained(path, **options)
    missing = sorted(map(str, {*report["missing_keys"], *report["mismatched_keys"]}))
    if missing:  # the libraries would continue with random numbers
        raise UserError(f"{path} lacks {missing[0]}, or it has another shape; {weights.DOWNLOAD}")
    return net.requires_grad_(False).eval()


# -- text ----------------------------------------------------------------------------------------


def clean_prompt(prompt: str) -> str:
    """Clean a prompt as Wan does: repair mojibake, resolve HTML entities, single spaces."""
    with weights.needs_extras("ftfy"):
        import ftfy
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


class EncoderSpec(NamedTuple):
    """The text encoder of a network, as published."""

    model_class: str  # of transformers
    to_text: Callable[[str], str]  # what the encoder reads for a prompt
    negative: str
    drop: int = 0  # tokens before the prompt, whose embeddings are left out


ENCODERS = {
    Wan: EncoderSpec("UMT5EncoderModel", clean_prompt, WAN_NEGATIVE),
    QwenImage: EncoderSpec(
        "Qwen2_5_VLForConditionalGeneration", QWEN_TEMPLATE.format, QWEN_NEGATIVE, QWEN_DROP
    ),
}


class Encoder(NamedTuple):
    """A frozen language model with its tokenizer."""

    model: torch.nn.Module
    tokenizer: object
    spec: EncoderSpec


def load_encoder(teacher: str, folder: Path | None, device: str) -> Encoder:
    """Load the text encoder of a teacher in bf16. Raises UserError."""
    spec = ENCODERS[weights.teacher_spec(teacher).network]
    path = weights.subfolder(teacher, folder, "text_encoder")
    tokenizer_path = weights.subfolder(teacher, folder, "tokenizer")
    with weights.needs_extras("transformers"):
        import transformers
    config = read_json(path / "config.json", weights.download_hint(teacher))
    model_type = config.get("model_type")
    model_class = getattr(transformers, spec.model_class)
    expected = model_class.config_class.model_type
    if model_type != expected:  # transformers would make a network of its default size
        raise UserError(f"{path}: {teacher} needs a {expected}, this is a {model_type}")
    model = from_pretrained(path, model_class, dtype=torch.bfloat16)
    with reading(tokenizer_path, weights.DOWNLOAD):
        load_tokenizer = transformers.AutoTokenizer.from_pretrained
        tokenizer = load_tokenizer(tokenizer_path, local_files_only=True)
    tokenizer.padding_side = "right"  # then padding changes nothing before it
    return Encoder(model.to(device), tokenizer, spec)


def tokenize(encoder: Encoder, prompts: list[str], cut: list[str]) -> list[list[int]]:
    """Token ids of each prompt. Those that are too long are cut, and appended to `cut`."""
    texts = [encoder.spec.to_text(prompt) for prompt in prompts]
    length = encoder.spec.drop + MAX_TOKENS
    rows = encoder.tokenizer(texts, verbose=False)["input_ids"]
    for i, row in enumerate(rows):
        if len(row) > length:
            rows[i] = encoder.tokenizer(texts[i], truncation=True, max_length=length)["input_ids"]
            cut.append(prompts[i])
    return rows


@torch.no_grad()
def embed_tokens(encoder: Encoder, rows: list[list[int]]) -> list[Tensor]:
    """Embeddings (L_i, D) bf16 on the CPU, without padding, after the encoder's last norm."""
    model = encoder.model.base_model  # without the layer that predicts tokens, if it has one
    batch = encoder.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(model.device)
    states = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    states = states.last_hidden_state.bfloat16().cpu()
    if not states.isfinite().all():
        raise UserError("the text encoder returned NaN or inf; download it again")
    return [state[encoder.spec.drop : len(row)] for state, row in zip(states, rows)]


def embed_shard(encoder: Encoder, tokens: list, batch_size: int, bar: tqdm) -> dict[str, Tensor]:
    """Embed prompts, as token ids, in batches: text (sum of L_i, D), offsets (n + 1)."""
    rows = {}
    order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))  # batches of equal lengths
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        rows |= zip(batch, embed_tokens(encoder, [tokens[i] for i in batch]))
        bar.update(len(batch))
    lengths = torch.tensor([0] + [len(rows[i]) for i in range(len(tokens))])
    return {"text": torch.cat([rows[i] for i in sorted(rows)]), "offsets": lengths.cumsum(0)}


def embed_prompts(
    teacher: str,
    folder: Path | None,
    prompts: list[str],
    out: Path,
    device: str,
    negative: str | None = None,
    batch_size: int = 16,
    overwrite: bool = False,
) -> None:
    """Write the embeddings of prompts into the folder out, SHARD prompts per file.

    Existing shards of the same prompts are kept, and the encoder is loaded only if one is missing.
    overwrite: replace shards of other prompts. negative None: the published one. UserError.
    """
    if negative is None:
        negative = ENCODERS[weights.teacher_spec(teacher).network].negative
    path = Path(folder or weights.default_folder(teacher)).resolve() / "text_encoder"
    name = "/".join(path.parts[-2:])  # the weights may move
    metadata = {"kind": "embeddings", "teacher": teacher, "encoder": name}
    metadata |= {"negative": negative, "total": len(prompts)}
    missing, others = compare_shards(out, prompts, metadata)
    if others and not overwrite:
        raise UserError(f"{others[0]} has other prompts or another encoder; {OVERWRITE}")
    if not missing:
        return
    encoder = load_encoder(teacher, folder, device)
    for file in others:
        file.unlink()
    with reading(path, weights.DOWNLOAD):  # tokenizer and encoder may not fit each other
        cut = write_shards(encoder, missing, negative, batch_size)
    if cut:
        print(f"longer than {MAX_TOKENS} tokens and cut: {len(cut)}, the first: {shorten(cut[0])}")


def compare_shards(
    out: Path, prompts: list[str], metadata: dict
) -> tuple[dict[Path, dict], list[Path]]:
    """Missing shards with their metadata, and files in the folder that have something else."""
    missing = {
        out / f"shard-{i // SHARD:05}.safetensors": metadata | {"prompts": prompts[i : i + SHARD]}
        for i in range(0, len(prompts), SHARD)
    }
    others = []
    for file in shards_in(out):
        stored = {}
        with contextlib.suppress(UserError):  # a broken file is replaced as well
            stored = open_tensors(file, "embeddings", OVERWRITE)[1]
        if stored == missing.get(file):
            del missing[file]
        else:
            others.append(file)
    return missing, others


def write_shards(
    encoder: Encoder, shards: dict[Path, dict], negative: str, batch_size: int
) -> list[str]:
    """Embed the prompts in the metadata of shards. Returns those that were too long."""
    cut = []
    count = sum(len(metadata["prompts"]) for metadata in shards.values())
    [negative_row] = embed_tokens(encoder, tokenize(encoder, [negative], cut))
    with tqdm(total=count, unit=" prompts", disable=None) as bar:
        for file, metadata in shards.items():
            tokens = tokenize(encoder, metadata["prompts"], cut)
            tensors = embed_shard(encoder, tokens, batch_size, bar)
            write_tensors(file, tensors | {"negative": negative_row}, metadata)
    return cut


def shards_in(folder: Path) -> list[Path]:
    """The files in a folder that embed_prompts wrote."""
    return [x for x in sorted(folder.glob("*")) if re.fullmatch(runs.SHARD_FILES, x.name)]


class Embeddings(NamedTuple):
    """Embeddings of prompts on disk. A row is read when it is asked for."""

    spans: list[tuple]  # for each prompt: a file's text (sum of L_i, D), its first row, the next's
    negative: Tensor  # (L, D)
    prompts: list[str]
    metadata: dict  # teacher, encoder, negative

    def row(self, i: int) -> Tensor:
        """Embedding of prompt i, (L_i, D)."""
        text, start, end = self.spans[i]
        return text[start:end]

    @property
    def max_length(self) -> int:
        """Tokens of the longest text, the negative prompt included."""
        return max(len(self.negative), *(end - start for _, start, end in self.spans))


def open_embeddings(path: Path) -> Embeddings:
    """Open a folder of embed_prompts, or a single file of that format. Raises UserError."""
    files = shards_in(path) if path.is_dir() else [path]
    spans = []
    prompts = []
    metadata = {}
    negative = None
    channels = 0
    for name in files:
        file, metadata = open_tensors(name, "embeddings", MAKE_TEXT)
        with reading(name, MAKE_TEXT):
            for key in ("text", "negative"):
                x = file[key]
                channels = channels or x.shape[-1]
                if x.dtype not in weights.FLOATS or x.shape != (x.shape[0], channels):
                    raise ValueError(f"{key} is {x.dtype} {x.shape}, not float (L, {channels})")
            negative = file.get_tensor("negative")
            offsets = read_offsets(file)
            check_texts(metadata["prompts"], len(offsets) - 1)
            spans += [(file["text"], start, end) for start, end in pairwise(offsets)]
            prompts += metadata["prompts"]
    total = metadata.get("total", len(prompts))
    if not prompts or total != len(prompts):
        raise UserError(f"{path} has {len(prompts)} of {total} prompts; {MAKE_TEXT}")
    return Embeddings(spans, negative, prompts, metadata)


def read_offsets(file) -> list[int]:
    """First rows of the prompts in the text of a shard, and its number of rows. ValueError."""
    offsets = file.get_tensor("offsets")
    rows = offsets.tolist()
    if offsets.dtype != torch.int64 or rows != sorted({0, file["text"].shape[0], *rows}):
        raise ValueError("expected int64 offsets that increase from 0 to the rows of text")
    return rows


def check_texts(texts, count: int) -> None:
    """Raise ValueError unless a value from a header is a list of `count` strings."""
    if not isinstance(texts, list) or [*map(type, texts)] != [str] * count:
        raise ValueError(f"expected a list of {count} texts in its header")


def batch(rows: list[Tensor]) -> dict[str, Tensor]:
    """Embeddings (L_i, D) -> {"text" (B, L, D), "mask" (B, L)}, padded with zeros."""
    text = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    if len(lengths.unique()) == 1:  # they need no mask, and attention is faster without one
        return {"text": text}
    return {"text": text, "mask": torch.arange(text.shape[1]) < lengths[:, None]}


def read_prompts(path: Path) -> list[str]:
    """Read prompts: text, one per line (# starts a comment), or csv, tsv or jsonl.

    In a folder each .txt is one prompt, as the captions of trainers are. Raises UserError.
    """
    if not path.is_dir():
        return [prompt for (prompt,) in read_rows(path, CAPTIONS)]
    texts = []
    for file in sorted(path.glob("*.txt")):
        with reading(file, FORMATS):
            texts.append(" ".join(file.read_text(encoding="utf-8-sig").split()))
    if not any(texts):
        raise UserError(f"{path} {NO_PROMPT}")
    return [text for text in texts if text]


def read_rows(path: Path, *columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Read columns of a file, each under the first of its names that is there. UserError."""
    suffix = path.suffix.lower()  # what the name links to may have none
    rows = []
    line = 0
    with reading(path, FORMATS), open(path, "rb") as file:
        if suffix not in PARSERS:
            raise ValueError(f"its suffix is {suffix}")
        try:
            for last_line, row in PARSERS[suffix](x.decode("utf-8-sig") for x in file):
                if row is not None:
                    rows.append(read_cells(row, columns))
                line = last_line
        except (csv.Error, ValueError) as error:
            raise ValueError(f"line {line + 1}: {getattr(error, 'msg', error)}") from error
    if not rows:
        raise UserError(f"{path} {NO_PROMPT}")
    return rows


def read_cells(row: dict, columns: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    """The texts of a row in these columns. Raises ValueError if one is absent or blank."""
    texts = [next((row[x] for x in names if x in row), "") for names in columns]
    if not all(isinstance(x, str) and x.strip() for x in texts):
        expected = " and ".join(" or ".join(names) for names in columns)
        raise ValueError(f"expected {expected}, found {row}"[:200])
    "".join(texts).encode()  # fails if one has half of a surrogate pair
    return tuple(text.strip() for text in texts)


def parse_lines(lines: Iterable[str], load: Callable = str) -> Iterator[tuple[int, dict]]:
    """Yield each line's number and what load makes of it; None if it is blank or a # comment."""
    for number, line in enumerate(lines, 1):
        row = load(line) if line.strip() and line.strip()[0] != "#" else None
        yield number, row if row is None or isinstance(row, dict) else {"text": row}


def parse_csv(lines: Iterable[str], delimiter: str = ",") -> Iterator[tuple[int, dict]]:
    """Yield the number of each row's last line and its cells by column; None if it is blank."""
    rows = csv.reader(lines, strict=True, delimiter=delimiter)
    header = [name.strip() for name in next(rows, [])]
    if len(set(header)) < len(header):
        raise ValueError(f"expected columns of different names, found {header}")
    yield rows.line_num, None
    for cells in rows:
        if cells and len(cells) != len(header):
            raise ValueError(f"expected {len(header)} cells, found {len(cells)}")
        yield rows.line_num, dict(zip(header, cells)) if cells else None


PARSERS = {"": parse_lines, ".txt": parse_lines, ".jsonl": partial(parse_lines, load=json.loads)}
PARSERS |= {".csv": parse_csv, ".tsv": partial(parse_csv, delimiter="\t")}


def shorten(text: str) -> str:
    """A text in quotes, of at most 60 characters."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


# -- VAE -----------------------------------------------------------------------------------------


def load_vae(teacher: str, folder: Path | None, device: str):
    """Load the VAE of a teacher in float32. Raises UserError."""
    path = weights.subfolder(teacher, folder, "vae")
    with weights.needs_extras("diffusers"):
        import diffusers
    spec = weights.teacher_spec(teacher)
    vae = from_pretrained(path, getattr(diffusers, spec.network.vae_class)).to(device)
    with reading(path, weights.DOWNLOAD):
        found = [vae.config.z_dim, *(x.shape[1] for x in latent_statistics(vae))]
        if found != [spec.channels] * 3:
            expected = f"{spec.channels} latent channels"
            raise ValueError(f"expected {expected}, found {found} in config.json")
    return vae


def latent_statistics(vae) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents per channel, (1, C, 1, 1, 1) each."""
    values = vae.config.latents_mean, vae.config.latents_std
    return tuple(torch.tensor(v, device=vae.device).view(1, -1, 1, 1, 1) for v in values)


def in_tiles_if_short(vae, call: Callable[[], Tensor]) -> Tensor:
    """Call the VAE; where memory is short once more in tiles, its own, with blended borders."""
    try:
        return call()
    except (RuntimeError, MemoryError) as error:
        if not common.is_out_of_memory(error) or vae.use_tiling:
            raise
    vae.enable_tiling()
    vae.clear_cache()  # features of the frames before
    if vae.device.type == "cuda":
        torch.cuda.empty_cache()
    print("note: memory is short, so the VAE works in tiles; their borders are blended")
    return call()


@torch.no_grad()
def encode(vae, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, 4n + 1, H, W) in [-1, 1] -> normalised latents (B, C, n + 1, h, w)."""
    mean, std = latent_statistics(vae)
    encode_mean = lambda: vae.encode(pixels.to(vae.device)).latent_dist.mode()  # nothing is drawn
    latents = in_tiles_if_short(vae, encode_mean)
    return (latents - mean) / std


@torch.no_grad()
def decode(vae, latents: Tensor) -> Tensor:
    """Latents (B, C, F, h, w), or (B, C, h, w) of a picture -> pixels in [-1, 1], same axes."""
    is_picture = latents.ndim == 4
    latents = latents[:, :, None] if is_picture else latents
    mean, std = latent_statistics(vae)
    z = latents.to(vae.device).float() * std + mean
    pixels = in_tiles_if_short(vae, lambda: vae.decode(z).sample).clamp(-1, 1)
    return pixels[:, :, 0] if is_picture else pixels


def encode_first_frames(vae, image: Tensor, frames: int = 81) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] -> I2V's condition (B, 20, F, h, w): mask 4, latents 16."""
    video = F.pad(image[:, :, None], (0, 0, 0, 0, 0, frames - 1))  # grey after the first frame
    return add_mask(encode(vae, video))


def add_mask(latents: Tensor) -> Tensor:
    """Latents (B, 16, F, h, w) of a first frame and grey -> I2V's condition (B, 20, F, h, w)."""
    mask = torch.zeros_like(latents[:, :4])
    mask[:, :, 0] = 1  # the latent frame that is given
    return torch.cat([mask, latents], 1)


# -- features of samples -------------------------------------------------------------------------


def load_dino(folder: Path, device: str) -> tuple[str, Callable]:
    """Load a DINO: a name with its digest, pictures (n, h, w, 3) -> CLS (n, D). UserError."""
    expected = "--dino: expected the folder of a DINOv2 or DINOv3, as transformers saves it"
    kind = read_json(folder / "config.json", expected).get("model_type")
    if not str(kind).startswith("dino"):
        raise UserError(f"{expected}, {folder} is a {kind}")
    with weights.needs_extras("transformers"):
        from transformers import AutoImageProcessor, AutoModel
    net = from_pretrained(folder, AutoModel, dtype=torch.float32).to(device)
    with reading(folder, weights.DOWNLOAD):
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)

    @torch.no_grad()
    def embed(pictures: numpy.ndarray) -> Tensor:
        inputs = processor(images=[Image.fromarray(x) for x in pictures], return_tensors="pt")
        return net(**inputs.to(device)).pooler_output.cpu().double()

    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".safetensors")]
    digest = hashlib.sha256("".join(map(common.file_digest, files)).encode()).hexdigest()
    return f"dino-{digest[:16]}", embed


def load_lpips(device: str) -> Callable | None:
    """Load LPIPS: frames (F, h, w, 3) of each sample -> mean over pairs of samples.

    None without the package or AlexNet's weights: nothing is downloaded.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", "alexnet-owt-7be5be79.pth")
    try:
        import lpips
    except Exception:  # a torchvision that does not fit raises others than ImportError
        lpips = None
    if not lpips or not path.is_file():
        print(f"note: no LPIPS, which needs pip install lpips torchvision, and {path}")
        return None
    net = lpips.LPIPS(net="alex", verbose=False).to(device)

    @torch.no_grad()
    def distance(samples: list[numpy.ndarray]) -> Tensor:
        xs = [torch.from_numpy(x).movedim(3, 1).to(device) / 127.5 - 1 for x in samples]
        xs = [F.interpolate(x, xs[0].shape[2:], mode="bilinear", antialias=True) for x in xs]
        bar = tqdm([*combinations(xs, 2)], "LPIPS", leave=False, disable=None)
        return torch.stack([net(a, b).mean() for a, b in bar]).mean().cpu()

    return distance


# -- first frames --------------------------------------------------------------------------------


def read_rgb(path: Path):
    """Read a picture as RGB, turned upright, on white. Returns a PIL image. Raises UserError."""
    with reading(path, "replace it"), Image.open(path) as file:
        if file.mode.startswith(("I", "F", "LAB")):
            raise ValueError(f"expected 8 bits per channel, RGB or grey; found mode {file.mode}")
        image = ImageOps.exif_transpose(file).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def read_image(path: Path, height: int, width: int) -> Tensor:
    """Read a picture as (3, height, width) in [-1, 1], scaled and cropped at the centre."""
    image = ImageOps.fit(read_rgb(path), (width, height), Image.Resampling.BICUBIC)
    return rearrange(torch.from_numpy(numpy.array(image)).float() / 127.5 - 1, "h w c -> c h w")


def nearest_size(path: Path, sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The size (height, width) whose aspect ratio is nearest to the picture's."""
    image = read_rgb(path)
    ratio = image.height / image.width
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1] / ratio)))


def encode_images(vae, folder: Path, sizes: list, frames: int) -> tuple[dict, dict]:
    """Encode the pictures of captions.csv, each at its nearest size.

    Returns image.HxW (n, 20, F, h, w) for each size, in bf16 as a bf16 network takes them, and
    the captions of each.
    """
    rows = read_rows(folder / "captions.csv", ("file",), CAPTIONS)
    nearest = [nearest_size(folder / file, sizes) for file, _ in rows]  # reads all before the work
    conditions, captions = defaultdict(list), defaultdict(list)
    bar = tqdm(rows, unit=" pictures", disable=None)
    for (height, width), (file, caption) in zip(nearest, bar):
        image = read_image(folder / file, height, width)
        key = f"image.{height}x{width}"
        conditions[key].append(encode_first_frames(vae, image[None], frames).bfloat16().cpu())
        captions[key].append(caption)
    return {key: torch.cat(xs) for key, xs in conditions.items()}, captions


class FirstFrames(NamedTuple):
    """First frames on disk."""

    file: object  # safetensors: key -> (n, 20, F, h, w), read by slices
    key_of: dict[tuple[int, int, int], str]  # (F, h, w) -> key
    captions: dict[str, list[str]]  # key -> n captions


def open_first_frames(path: Path, sizes: Iterable[tuple[int, int, int]]) -> FirstFrames:
    """Open a file of encode_images that has all of these sizes (F, h, w). Raises UserError."""
    file, metadata = open_tensors(path, "first frames", MAKE_IMAGES)
    shapes = {key: x.shape for key, x in file.items()}
    with reading(path, MAKE_IMAGES):
        captions = metadata["captions"]
        for key, shape in shapes.items():
            dtype = file[key].dtype
            if dtype not in weights.FLOATS or len(shape) != 5 or shape[1] != 20 or not shape[0]:
                raise ValueError(f"{key}: expected float (n, 20, F, h, w), found {dtype} {shape}")
            check_texts(captions[key], shape[0])
    key_of = {shape[2:]: key for key, shape in shapes.items()}
    for size in sizes:
        if tuple(size) not in key_of:
            found = ", ".join(map(format_size, key_of))
            raise UserError(f"{path}: expected {format_size(size)}, it has {found}; change --size")
    return FirstFrames(file, key_of, captions)


def format_size(size: tuple[int, int, int]) -> str:
    """(21, 60, 104) latents -> 81x480x832 pixels."""
    return f"{4 * size[0] - 3}x{8 * size[1]}x{8 * size[2]}"


# -- the command ---------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    published = [name for name, spec in weights.TEACHERS.items() if spec.repository]
    parser = Parser(__doc__)
    add = parser.add_argument
    add("task", choices=TASKS)
    add("--teacher", required=True, choices=published, help="its encoders are used")
    add("--weights", type=Path, help="folder of the published weights (default weights/NAME)")
    add("--out", type=Path, required=True, help="text: a folder, images: a .safetensors file")
    add("--overwrite", action="store_true", help="replace what is in --out")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    add = parser.add_argument_group("text").add_argument
    add("--prompts", type=Path, help="txt, one per line, csv, tsv, jsonl, or a folder of .txt")
    add("--negative", help="negative prompt (default: the published one)")
    add("--batch", type=int, default=16, help="prompts at a time (default 16)")
    add = parser.add_argument_group("images").add_argument
    add("--images", type=Path, help="folder of pictures and captions.csv")
    add("--size", nargs="+", default=["480x832", "832x480"], help="HEIGHTxWIDTH, one or more")
    add("--frames", type=int, default=81, help="of the video, 4n + 1 (default 81)")

    def run_task() -> None:
        parallel.require_single_process("-m models.encoders")
        args = parser.parse_args(argv)
        TASKS[args.task](args)

    advice = "try a smaller --batch, --size or --device cpu"
    return cli.exit_status("encoders.py", run_task, advice)


def run_text(args) -> None:
    """Embed the prompts of a file. Raises UserError."""
    if not args.prompts or args.batch < 1:
        raise UserError("text: expected --prompts FILE and --batch of at least 1")
    prompts = read_prompts(args.prompts)
    device = cli.pick_device(args.device, "auto")
    options = args.negative, args.batch, args.overwrite
    with runs.own_folder(args.out):
        embed_prompts(args.teacher, args.weights, prompts, args.out, device, *options)
    print(f"{args.out}: prompts: {len(prompts)}, the first: {shorten(prompts[0])}")


def run_images(args) -> None:
    """Encode the pictures of a folder. Raises UserError."""
    if not args.images or not weights.TEACHERS[args.teacher].is_i2v:
        raise UserError("images: expected --images FOLDER and a --teacher such as wan22-i2v")
    if args.frames < 1 or args.frames % 4 != 1:
        raise UserError(f"--frames: expected 4n + 1 such as 81, got {args.frames}")
    if args.out.is_dir() or (args.out.exists() and not args.overwrite):
        raise UserError(f"{args.out} exists; {OVERWRITE}")
    sizes = [parse_height_width(text) for text in args.size]
    vae = load_vae(args.teacher, args.weights, cli.pick_device(args.device, "auto"))
    tensors, captions = encode_images(vae, args.images, sizes, args.frames)
    metadata = {"kind": "first frames", "teacher": args.teacher, "captions": captions}
    write_tensors(args.out, tensors, metadata)
    print(f"{args.out}: {sum(map(len, captions.values()))} pictures")


TASKS = {"text": run_text, "images": run_images}


def parse_height_width(text: str) -> tuple[int, int]:
    """480x832 -> (480, 832), height first. Raises UserError."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    size = tuple(int(side) for side in match.groups()) if match else (0, 0)
    if 0 in size or math.gcd(16, *size) < 16:
        expected = "HEIGHTxWIDTH, multiples of 16 such as 480x832"
        raise UserError(f"--size: expected {expected}, got {text}")
    return size


if __name__ == "__main__":
    sys.exit(main())
