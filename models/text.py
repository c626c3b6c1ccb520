"""Prompts -> embeddings, once, before training: UMT5-XXL for Wan, Qwen2.5-VL for Qwen-Image.

    python -m models.text --teacher wan22 --prompts prompts.txt --out prompts.safetensors

Needs the extras (pip install -r requirements-full.txt) and the folders text_encoder and tokenizer
of the published weights. Interrupted, the same command goes on where it stopped.
"""

import csv
import html
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from models.files import Part, UserError, check_out, first_line, read_json
from models.flags import Parser, exit_status, pick_device
from models.weights import TEACHERS, component, how_to_get, needs_extras, published
from models.wan import Wan

# what is published with the models, as data
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
LENGTH = 512  # tokens kept of a prompt, as the published pipelines do


# -- the encoders --------------------------------------------------------------------------------


class Encoder(NamedTuple):
    """A frozen language model with its tokenizer; `wan` tells the family."""

    model: torch.nn.Module
    tokenizer: object
    wan: bool
    device: str

    @property
    def dim(self) -> int:
        """Channels of an embedding."""
        config = self.model.config
        return config.d_model if self.wan else config.get_text_config().hidden_size


def load_encoder(teacher: str, folder: Path | None, device: str) -> Encoder:
    """The encoder of a teacher, bf16, from text_encoder/ and tokenizer/. Raises UserError."""
    wan = TEACHERS[teacher].network is Wan
    weights = component(teacher, folder, "text_encoder")
    words = component(teacher, folder, "tokenizer")
    with needs_extras("transformers"):
        import transformers
    kind = "UMT5EncoderModel" if wan else "Qwen2_5_VLForConditionalGeneration"
    wanted = "umt5" if wan else "qwen2_5_vl"
    found = read_json(weights / "config.json", how_to_get(teacher)).get("model_type")
    if found != wanted:
        raise UserError(f"{weights} is of a {found}, {teacher} takes a {wanted}")
    try:
        model, report = getattr(transformers, kind).from_pretrained(
            weights, dtype=torch.bfloat16, use_safetensors=True, local_files_only=True,
            output_loading_info=True,
        )  # fmt: skip
        tokenizer = transformers.AutoTokenizer.from_pretrained(words, local_files_only=True)
    except Exception as error:  # transformers raises many kinds; all are a wrong or broken folder
        raise UserError(f"cannot read {weights} or {words} ({first_line(error)})") from error
    whole(weights, report)
    tokenizer.padding_side = "right"  # then padding changes nothing before it
    return Encoder(model.eval().to(device), tokenizer, wan, device)


def whole(folder: Path, report: dict) -> None:
    """Raise UserError where a library would go on with random weights for those it lacks."""
    lacks = sorted(map(str, {*report["missing_keys"], *report["mismatched_keys"]}))
    if lacks:
        raise UserError(f"{folder} lacks {lacks[0]}, or its shape; download it again")


def clean(prompt: str) -> str:
    """Wan's cleaning: mended encoding, no HTML entities, single spaces. Case is kept."""
    with needs_extras("ftfy"):
        import ftfy
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


def tokens(encoder: Encoder, prompts: list[str]) -> list[list[int]]:
    """Token numbers of each prompt: cleaned for Wan, in the template for Qwen-Image."""
    if encoder.wan:
        texts, length = [clean(prompt) for prompt in prompts], LENGTH
    else:
        texts, length = [QWEN_TEMPLATE.format(prompt) for prompt in prompts], LENGTH + QWEN_DROP
    return encoder.tokenizer(texts, truncation=True, max_length=length)["input_ids"]


@torch.no_grad()
def encode(encoder: Encoder, rows: list[list[int]]) -> list[Tensor]:
    """Tokens -> (L_i, D) bf16 each, without padding, after the encoder's last norm."""
    batch = encoder.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(encoder.device)
    model = encoder.model if encoder.wan else encoder.model.model
    states = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    if not states.last_hidden_state.isfinite().all():
        raise UserError("the text encoder computes no finite numbers; download it again")
    drop = 0 if encoder.wan else QWEN_DROP  # the template's part before the prompt
    return [state[drop : len(row)].bfloat16() for state, row in zip(states.last_hidden_state, rows)]


# -- the file ------------------------------------------------------------------------------------


def write(
    out: Path, encoder: Encoder, prompts: list[str], negative: str, about: dict, size: int,
    replace: bool = False,
):  # fmt: skip
    """Encode prompts, longest first, into a safetensors file; goes on where it was stopped.

    text (sum of L_i, D) bf16, offsets (n + 1) int64, negative (L, D) bf16.
    """
    *rows, last = tokens(encoder, [*prompts, negative])
    drop = 0 if encoder.wan else QWEN_DROP
    lengths = torch.tensor([0] + [len(row) - drop for row in rows])
    offsets = lengths.cumsum(0)
    shapes = {
        "offsets": (torch.int64, (len(offsets),)),
        "text": (torch.bfloat16, (int(offsets[-1]), encoder.dim)),
        "negative": (torch.bfloat16, (len(last) - drop, encoder.dim)),
    }
    about = about | {"prompts": prompts, "negative": negative}
    part = Part(out, shapes, about, len(rows), replace)
    part.tensors["offsets"].copy_(offsets)
    part.tensors["negative"].copy_(encode(encoder, [last])[0])
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # batches of like lengths
    with tqdm(total=len(rows), initial=part.done, unit=" prompts", disable=None) as bar:
        for start in range(part.done, len(rows), size):
            chosen = order[start : start + size]
            for i, state in zip(chosen, encode(encoder, [rows[i] for i in chosen])):
                part.tensors["text"][offsets[i] : offsets[i + 1]] = state.cpu()
            part.save(start + len(chosen))
            bar.update(len(chosen))
    part.finish()


class Embeddings(NamedTuple):
    """A file of embeddings, open: rows are read from disk when asked for."""

    text: object  # (sum of L_i, D), read by slices
    offsets: Tensor  # (n + 1,)
    negative: Tensor  # (L, D)
    about: dict  # prompts, negative, teacher, encoder

    def row(self, i: int) -> Tensor:
        """Embedding of prompt i, (L_i, D)."""
        return self.text[self.offsets[i] : self.offsets[i + 1]]


def open_embeddings(path: Path) -> Embeddings:
    """The file that `write` made. Raises UserError."""
    try:
        file = safe_open(path, framework="pt")
        about = json.loads(file.metadata()["about"])
        offsets, text = file.get_tensor("offsets"), file.get_slice("text")
        if len(about["prompts"]) + 1 != len(offsets) or text.get_shape()[0] != offsets[-1]:
            raise ValueError("prompts, offsets and text disagree")
        return Embeddings(text, offsets, file.get_tensor("negative"), about)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} holds no embeddings ({first_line(error)}); make them: python -m models.text"
        ) from error


def batch(rows: list[Tensor]) -> dict[str, Tensor]:
    """Embeddings (L_i, D) -> {"text" (B, L, D), "mask" (B, L)}, padded with zeros to the longest.

    Wan attends to the zeros and knows no mask; Qwen-Image does not see them. Without padding there
    is no mask: attention is faster without.
    """
    text = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    if len(lengths.unique()) == 1:
        return {"text": text}
    return {"text": text, "mask": torch.arange(text.shape[1]) < lengths[:, None]}


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file, one a line (# starts a comment), or of a csv's column `caption`."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                lines = [row["caption"] for row in csv.DictReader(file)]
            else:
                lines = [line for line in file if not line.lstrip().startswith("#")]
    except KeyError:
        raise UserError(f"{path} has no column caption") from None
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(
            f"cannot read {path} ({first_line(error)}); name a UTF-8 text file"
        ) from None
    prompts = [line.strip() for line in lines if line and line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompt; write one a line")
    return prompts


# -- the command ---------------------------------------------------------------------------------


def main(argv=None) -> int:
    """Prompts in, embeddings out; exit status 0, or 2 with one line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--teacher", default="wan22", choices=published(), help="whose encoder (default wan22)")
    add("--weights", type=Path, help="folder of the published weights (default weights/NAME)")
    add("--prompts", type=Path, required=True, help="text, one a line, or csv with `caption`")
    add("--negative", help="the negative prompt (default: the published one)")
    add("--out", type=Path, default=Path("prompts.safetensors"), help="(default %(default)s)")
    add("--batch", type=int, default=16, help="prompts at a time (default %(default)s)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    add("--overwrite", action="store_true", help="replace --out if it is there")
    memory = "a smaller --batch, or --device cpu"
    return exit_status("text.py", lambda: embed(parser.parse_args(argv)), memory)


def embed(args) -> None:
    """The command's work. Raises UserError."""
    prompts = read_prompts(args.prompts)
    check_out(args.out, args.overwrite)
    if args.batch < 1:
        raise UserError(f"--batch {args.batch} is below 1")
    embed_all(
        args.teacher, args.weights, prompts, args.negative, args.out, args.batch,
        pick_device(args.device, "auto"), args.overwrite,
    )  # fmt: skip
    print(f"{args.out}: {len(prompts)} prompts")


def embed_all(
    teacher: str, folder: Path | None, prompts: list[str], negative: str | None, out: Path,
    size: int, device: str, replace: bool,
) -> None:  # fmt: skip
    """Prompts -> a file of embeddings; then the encoder is gone. negative None: the published."""
    encoder = load_encoder(teacher, folder, device)
    usual = WAN_NEGATIVE if encoder.wan else QWEN_NEGATIVE
    negative = usual if negative is None else negative
    held = str(component(teacher, folder, "text_encoder").resolve())
    about = {"kind": "embeddings", "teacher": teacher, "encoder": held}
    write(out, encoder, prompts, negative, about, size, replace)


if __name__ == "__main__":
    sys.exit(main())
