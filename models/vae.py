"""Pixels <-> latents, through the published VAEs: decoding for sampling, first frames for I2V.

    python -m models.vae --teacher wan22-i2v --images FOLDER --out images.safetensors --size 480x832

FOLDER holds pictures and captions.csv with the columns file, caption. Each picture goes to the size
of the nearest aspect ratio, scaled and cropped at the centre. Needs the extras
(pip install -r requirements-full.txt) and the folder vae of the published weights. Interrupted, the
same command goes on where it stopped.
"""

import csv
import math
import sys
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from models.files import Part, UserError, check_out, first_line
from models.flags import Parser, exit_status, pick_device
from models.text import whole
from models.wan import Wan
from models.weights import TEACHERS, component, needs_extras


def load_vae(teacher: str, folder: Path | None, device: str, tiles: bool = False):
    """The VAE of a teacher in float32, from vae/; tiles: less memory, other edges. UserError."""
    path = component(teacher, folder, "vae")
    with needs_extras("diffusers"):
        import diffusers
    kind = "AutoencoderKLWan" if TEACHERS[teacher].network is Wan else "AutoencoderKLQwenImage"
    try:
        vae, report = getattr(diffusers, kind).from_pretrained(
            path, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # diffusers raises many kinds; all are a wrong or broken folder
        raise UserError(f"cannot read {path} ({first_line(error)})") from error
    whole(path, report)
    if tiles:
        vae.enable_tiling()
    return vae.requires_grad_(False).eval().to(device)


def statistics(vae) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, by channel, (1, C, 1, 1, 1)."""
    shaped = [torch.tensor(v).view(1, -1, 1, 1, 1) for v in
              (vae.config.latents_mean, vae.config.latents_std)]  # fmt: skip
    return tuple(v.to(vae.device) for v in shaped)


@torch.no_grad()
def encode(vae, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, 4n + 1, H, W) in [-1, 1] -> latents (B, C, n + 1, h, w), normalised.

    The posterior's mean: nothing is drawn.
    """
    mean, std = statistics(vae)
    return (vae.encode(pixels.to(vae.device)).latent_dist.mode() - mean) / std


@torch.no_grad()
def decode(vae, latents: Tensor) -> Tensor:
    """Latents (B, C, F, h, w), or (B, 16, h, w) of a picture -> pixels in [-1, 1], axes alike."""
    picture = latents.ndim == 4
    latents = latents[:, :, None] if picture else latents
    mean, std = statistics(vae)
    pixels = vae.decode(latents.to(vae.device).float() * std + mean).sample.clamp(-1, 1)
    return pixels[:, :, 0] if picture else pixels


def first_frame(vae, image: Tensor, frames: int = 81) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] -> I2V's condition (B, 20, F, h, w): mask 4, latents 16.

    The video is the picture, then grey; the mask is 1 on the latent frame that holds the picture.
    """
    video = F.pad(image[:, :, None], (0, 0, 0, 0, 0, frames - 1))  # (B, 3, frames, H, W)
    latents = encode(vae, video)
    mask = torch.zeros_like(latents[:, :4])
    mask[:, :, 0] = 1
    return torch.cat([mask, latents], 1)


# -- pictures on disk ----------------------------------------------------------------------------


def opened(path: Path) -> Image.Image:
    """A picture as RGB, upright. Raises UserError."""
    try:
        with Image.open(path) as file:
            if file.mode.startswith("I"):
                raise ValueError("16 bits a channel")
            return ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        what = f"cannot read {path} ({first_line(error)}); mend it, or leave it out"
        raise UserError(what) from error


def read_image(path: Path, height: int, width: int) -> Tensor:
    """A picture as (3, height, width) in [-1, 1]: scaled, bicubic, and cropped at the centre."""
    image = ImageOps.fit(opened(path), (width, height), Image.Resampling.BICUBIC)
    return rearrange(torch.from_numpy(numpy.array(image)).float() / 127.5 - 1, "h w c -> c h w")


def aspect(path: Path) -> float:
    """Height / width. Reads the whole picture: a broken one shows before the work begins."""
    image = opened(path)
    return image.height / image.width


def buckets(paths: list[Path], sizes: list[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
    """size -> the numbers of its pictures: each goes to the nearest aspect ratio."""
    held = {size: [] for size in sizes}
    for i, path in enumerate(paths):
        ratio = aspect(path)
        held[min(sizes, key=lambda s: abs(math.log(s[0] / s[1] / ratio)))].append(i)
    return {size: numbers for size, numbers in held.items() if numbers}


def read_captions(folder: Path, file: Path) -> tuple[list[Path], list[str]]:
    """Paths and captions of a csv with the columns file and caption. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"--images {folder} is no folder")
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            rows = [(folder / row["file"], row["caption"].strip()) for row in csv.DictReader(lines)]
    except (KeyError, AttributeError, TypeError):
        raise UserError(f"{file} needs the columns file and caption in every row") from None
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(
            f"cannot read {file} ({first_line(error)}); columns: file, caption"
        ) from None
    absent = [path for path, _ in rows if not path.is_file()]
    if absent or not rows:
        what = f"names {absent[0].name}, which {folder} has not" if absent else "names no picture"
        raise UserError(f"{file} {what}")
    return [path for path, _ in rows], [caption for _, caption in rows]


def write(
    out: Path, vae, paths: list[Path], captions: list[str], sizes, frames: int, about: dict,
    replace: bool = False,
):  # fmt: skip
    """Encode pictures, size by size, into a safetensors file; goes on where it was stopped.

    image.HEIGHTxWIDTH (n, 20, F, h, w) bf16 for each size, its files and captions in `about`.
    """
    held = buckets(paths, sizes)
    few = (frames - 1) // 4 + 1
    names = {size: f"{size[0]}x{size[1]}" for size in held}
    shapes = {
        f"image.{names[s]}": (torch.bfloat16, (len(held[s]), 20, few, s[0] // 8, s[1] // 8))
        for s in held
    }
    about = about | {"frames": frames}
    about["captions"] = {names[s]: [captions[i] for i in held[s]] for s in held}
    about["files"] = {names[s]: [str(paths[i].resolve()) for i in held[s]] for s in held}
    about["bytes"] = [path.stat().st_size for path in paths]  # other pictures: another request
    work = [(size, j, i) for size in held for j, i in enumerate(held[size])]
    part = Part(out, shapes, about, len(work), replace)
    with tqdm(total=len(work), initial=part.done, unit=" pictures", disable=None) as bar:
        for done, (size, j, i) in enumerate(work[part.done :], part.done + 1):
            image = read_image(paths[i], *size)[None]
            part.tensors[f"image.{names[size]}"][j] = first_frame(vae, image, frames)[0].cpu()
            part.save(done)
            bar.update()
    part.finish()


# -- the command ---------------------------------------------------------------------------------


def size_of(text: str) -> tuple[int, int]:
    """480x832 -> (480, 832), height first; both divisible by 16."""
    parts = text.split("x")
    if len(parts) != 2 or not all(p.isdecimal() and int(p) and int(p) % 16 == 0 for p in parts):
        raise UserError(f"--size {text} is not HEIGHTxWIDTH with both divisible by 16, as 480x832")
    return int(parts[0]), int(parts[1])


def main(argv=None) -> int:
    """Pictures in, conditions out; exit status 0, or 2 with one line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    teachers = [name for name, row in TEACHERS.items() if row.from_image]
    teachers = [name for name in teachers if TEACHERS[name].repository]
    add("--teacher", default="wan22-i2v", choices=teachers, help="(default %(default)s)")
    add("--weights", type=Path, help="folder of the published weights (default weights/NAME)")
    add("--images", type=Path, required=True, help="folder of pictures")
    add("--captions", type=Path, help="csv: file, caption (default IMAGES/captions.csv)")
    add(
        "--size",
        nargs="+",
        default=["480x832", "832x480"],
        help="pixels, HEIGHTxWIDTH, one or more",
    )
    add("--frames", type=int, default=81, help="of the video, 4n + 1 (default %(default)s)")
    add("--out", type=Path, default=Path("images.safetensors"), help="(default %(default)s)")
    add("--tiles", action="store_true", help="encode in tiles: less memory, slightly other edges")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    add("--overwrite", action="store_true", help="replace --out if it is there")
    memory = "--tiles, a smaller --size, or --device cpu"
    return exit_status("vae.py", lambda: condition(parser.parse_args(argv)), memory)


def condition(args) -> None:
    """The command's work. Raises UserError."""
    sizes = [size_of(text) for text in args.size]
    if args.frames < 1 or args.frames % 4 != 1:
        raise UserError(f"--frames {args.frames} is not 4n + 1, as 81")
    check_out(args.out, args.overwrite)
    paths, captions = read_captions(args.images, args.captions or args.images / "captions.csv")
    device = pick_device(args.device, "auto")
    vae = load_vae(args.teacher, args.weights, device, args.tiles)
    folder = str(component(args.teacher, args.weights, "vae").resolve())
    about = {"kind": "images", "teacher": args.teacher, "vae": folder, "tiles": args.tiles}
    write(args.out, vae, paths, captions, sizes, args.frames, about, args.overwrite)
    print(f"{args.out}: {len(paths)} pictures")


if __name__ == "__main__":
    sys.exit(main())
