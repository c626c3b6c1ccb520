"""Claims about the frozen encoders: embeddings and latents are those of the published pipelines.

Tiny encoders and VAEs are compared with diffusers' pipelines; needs models/requirements.txt.
"""

import contextlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers", reason="needs models/requirements.txt")
diffusers = pytest.importorskip("diffusers", reason="needs models/requirements.txt")

from PIL import Image  # noqa: E402
from published import save_qwen_vl, save_umt5, small_vae  # noqa: E402
from students import QUICK, error_of, refusal, write_base  # noqa: E402

import sample  # noqa: E402
import train  # noqa: E402
from models import encoders, teachers, weights  # noqa: E402
from models.common import UserError, write_tensors  # noqa: E402

PROMPTS = [
    "A fox runs through snow, the camera follows.",
    "caf\u00c3\u00a9 &amp;amp; rain <3   at  night",  # mojibake, entities, spaces
    "A sign that says OPEN",
    "Ein sehr langer Satz " * 60,
]


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory):
    """A tiny text_encoder, tokenizer and vae of Wan's kinds."""
    root = tmp_path_factory.mktemp("wan")
    save_umt5(root)
    small_vae("AutoencoderKLWan").save_pretrained(root / "vae")
    return root


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory):
    """The same of Qwen-Image's kinds."""
    root = tmp_path_factory.mktemp("qwen")
    save_qwen_vl(root)
    small_vae("AutoencoderKLQwenImage").save_pretrained(root / "vae")
    return root


def embed(tmp_path, folder, teacher, *flags, prompts=PROMPTS):
    """Run the command. Returns its exit status and its folder."""
    (tmp_path / "p.txt").write_text("# a comment\n" + "\n\n".join(prompts), encoding="utf-8")
    line = ["text", "--teacher", teacher, "--weights", folder, "--prompts", tmp_path / "p.txt"]
    line += ["--out", tmp_path / "p", "--device", "cpu", *flags]
    return encoders.main([str(word) for word in line]), tmp_path / "p"


def is_close(a, b):
    return a.shape == b.shape and error_of(a, b) < 1e-2


def test_wans_embeddings_are_those_of_the_pipeline(tmp_path, wan_folder):
    """In bf16, batches of 2 against one at a time padded to 512. The negative prompt is Wan's."""
    status, out = embed(tmp_path, wan_folder, "wan22", "--batch", "2")
    embeddings = encoders.open_embeddings(out)
    encoder = encoders.load_encoder("wan22", wan_folder, "cpu")
    pipeline = diffusers.WanPipeline(
        tokenizer=encoder.tokenizer,
        text_encoder=encoder.model,
        vae=small_vae("AutoencoderKLWan"),
        scheduler=diffusers.UniPCMultistepScheduler(),
    )
    rows = [embeddings.row(i) for i in range(len(PROMPTS))] + [embeddings.negative]
    for prompt, row in zip([*PROMPTS, encoders.WAN_NEGATIVE], rows):
        expected, _ = pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=512
        )
        padded = torch.nn.functional.pad(row, (0, 0, 0, 512 - len(row)))
        assert is_close(padded, expected[0]) and row.dtype == torch.bfloat16
    assert len(rows[3]) == 512 and len(rows[0]) == len(PROMPTS[0]) + 1  # truncated; with EOS
    assert status == 0 and embeddings.prompts == [prompt.strip() for prompt in PROMPTS]


def test_qwen_images_embeddings_are_those_of_the_pipeline(tmp_path, qwen_folder):
    """The template's beginning is dropped; rows in a batch see none of its padding."""
    embeddings = encoders.open_embeddings(embed(tmp_path, qwen_folder, "qwen-image")[1])
    encoder = encoders.load_encoder("qwen-image", qwen_folder, "cpu")
    pipeline = diffusers.QwenImagePipeline(
        tokenizer=encoder.tokenizer,
        text_encoder=encoder.model,
        transformer=None,
        vae=small_vae("AutoencoderKLQwenImage"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    rows = [embeddings.row(i) for i in range(3)] + [embeddings.negative]
    for prompt, row in zip([*PROMPTS[:3], " "], rows):
        expected, _ = pipeline.encode_prompt(prompt, device="cpu", max_sequence_length=512)
        assert is_close(row, expected[0])
    assert len(embeddings.row(3)) == embeddings.max_length == 512


def test_the_published_constants_are_the_stored_ones():
    from tests.test_ports import PARITY

    if not PARITY.is_dir():
        pytest.skip("no stored references beside the repo")
    stored = json.loads((PARITY / "text_constants.json").read_text())
    assert stored["wan_sample_neg_prompt"] == encoders.WAN_NEGATIVE
    assert stored["qwen_prompt_template"] == encoders.QWEN_TEMPLATE
    assert stored["qwen_drop_idx"] == encoders.QWEN_DROP
    assert stored["qwen_image_negative"] == encoders.QWEN_NEGATIVE


def test_an_interrupted_command_continues_at_the_first_missing_shard(
    tmp_path, wan_folder, monkeypatch, capsys
):
    """Two prompts per shard; the second shard is interrupted. The files are those of one run."""
    monkeypatch.setattr(encoders, "SHARD", 2)
    _, out = embed(tmp_path, wan_folder, "wan22", "--batch", "1")
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    shutil.rmtree(out)
    calls, embed_tokens = [], encoders.embed_tokens

    def count(encoder, rows):
        if len(calls) == limit:
            raise KeyboardInterrupt
        calls.append(rows)
        return embed_tokens(encoder, rows)

    monkeypatch.setattr(encoders, "embed_tokens", count)
    limit = 4  # the negative prompt, then three of four
    status, out = embed(tmp_path, wan_folder, "wan22", "--batch", "1")
    assert status == 130 and [path.name for path in out.iterdir()] == ["shard-00000.safetensors"]
    with pytest.raises(UserError, match="2 of 4 prompts"):
        encoders.open_embeddings(out)
    limit = 99
    calls.clear()
    assert embed(tmp_path, wan_folder, "wan22", "--batch", "1")[0] == 0 and len(calls) == 3
    assert whole == {path.name: path.read_bytes() for path in out.iterdir()}
    assert embed(tmp_path, wan_folder, "wan22")[0] == 0 and len(calls) == 3  # complete
    assert embed(tmp_path, wan_folder, "wan22", prompts=["another"])[0] == 2
    assert "other prompts" in capsys.readouterr().err
    assert embed(tmp_path, wan_folder, "wan22", "--overwrite", prompts=["another"])[0] == 0
    assert encoders.open_embeddings(out).prompts == ["another"]


ROWS = {"text": torch.ones(6, 2), "offsets": torch.tensor([0, 2, 6]), "negative": torch.ones(1, 2)}


def test_a_single_file_is_as_good_as_a_folder(tmp_path):
    """Rows come from the right places. Anything else is an error."""
    tensors = ROWS | {"text": torch.arange(12.0).view(6, 2)}
    metadata = {"kind": "embeddings", "teacher": "mnist", "negative": "", "prompts": ["a", "b"]}
    write_tensors(tmp_path / "e.safetensors", tensors, metadata)
    embeddings = encoders.open_embeddings(tmp_path / "e.safetensors")
    assert embeddings.row(1).tolist() == [[4, 5], [6, 7], [8, 9], [10, 11]]
    assert embeddings.max_length == 4 and embeddings.metadata["teacher"] == "mnist"
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("a fox")
    for name in ("empty", "text.safetensors", "missing"):
        with pytest.raises(UserError, match="python -m models.encoders text"):
            encoders.open_embeddings(tmp_path / name)


DAMAGES = {  # of the embeddings ROWS: tensors, prompts
    "whole numbers": (dict(text=torch.ones(6, 2).long()), ["a", "b"]),
    "other channels": (dict(negative=torch.ones(1, 3)), ["a", "b"]),
    "falling offsets": (dict(offsets=torch.tensor([0, 5, 2, 6])), ["a", "b", "c"]),
    "an empty prompt": (dict(offsets=torch.tensor([0, 2, 2, 6])), ["a", "b", "c"]),
    "prompts as numbers": ({}, [1, 2]),
    "a prompt less": ({}, ["a"]),
    "nothing": ({}, ["a", "b"]),  # negative control
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_embeddings_are_checked_when_they_are_opened(tmp_path, damage):
    """Not when a run draws the row, days later."""
    tensors, prompts = DAMAGES[damage]
    metadata = {"kind": "embeddings", "teacher": "wan22", "prompts": prompts}
    write_tensors(tmp_path / "e.safetensors", ROWS | tensors, metadata)
    refused = pytest.raises(UserError, match="run python -m models.encoders text")
    with refused if damage != "nothing" else contextlib.nullcontext():
        encoders.open_embeddings(tmp_path / "e.safetensors")


DAMAGED_WEIGHTS = {  # the tensors in place of the largest one of a file
    "lacks": lambda x: {},
    "float8": lambda x: {"": x.to(torch.float8_e4m3fn), "scale_weight": torch.ones(1)},
    "int8": lambda x: {"": x.to(torch.int8)},
    "scales alone": lambda x: {"": x, "scale_weight": torch.ones(1)},
    "nothing": lambda x: {"": x.half()},  # negative control: another float
}


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
@pytest.mark.parametrize("damage", DAMAGED_WEIGHTS)
def test_an_encoder_that_lacks_a_weight_or_is_quantised_is_refused(
    tmp_path, wan_folder, damage, part
):
    """The libraries would take random numbers, or cast the weights and ignore their scales."""
    shutil.copytree(wan_folder, tmp_path / "w")
    [file] = (tmp_path / "w" / part).glob("*.safetensors")
    tensors = load_file(file)
    key = max(tensors, key=lambda key: tensors[key].numel())
    for name, x in DAMAGED_WEIGHTS[damage](tensors.pop(key)).items():
        tensors[key.removesuffix("weight") + name if name else key] = x
    save_file(tensors, file, {"format": "pt"})
    load = encoders.load_vae if part == "vae" else encoders.load_encoder
    quantised = f"{file}: expected F32, BF16, F16 without scales"
    refused = pytest.raises(UserError, match="lacks" if damage == "lacks" else quantised)
    with refused if damage != "nothing" else contextlib.nullcontext():
        load("wan22", tmp_path / "w", "cpu")


def test_another_models_encoder_is_refused(wan_folder, qwen_folder):
    for teacher, folder in (("wan22", qwen_folder), ("qwen-image", wan_folder)):
        with pytest.raises(UserError, match="needs a"):
            encoders.load_encoder(teacher, folder, "cpu")


PROMPT_FILES = {
    "p.txt": b"\xef\xbb\xbfA fox, running\r\n\r\n# a comment\r\nA sign\r\n",
    "p": b"A fox, running\nA sign\n",
    "caption.csv": b'\xef\xbb\xbfurl,caption,text\r\n1,"A fox, running",no\r\n\r\n2,A sign,no\r\n',
    "text.tsv": b"text\tn\nA fox, running\t1\nA sign\t2\n",
    "p.jsonl": b'{"caption": "A fox, running", "text": "no"}\n\n"A sign"\n',
}


@pytest.mark.parametrize("name", PROMPT_FILES)
def test_prompts_are_read_by_the_suffix_of_the_name_that_is_given(tmp_path, name):
    """A cache of downloads links this name to a file whose name is a digest."""
    (tmp_path / "0a1b2c").write_bytes(PROMPT_FILES[name])
    (tmp_path / name).symlink_to("0a1b2c")
    assert encoders.read_prompts(tmp_path / name) == ["A fox, running", "A sign"]


def test_a_folder_of_captions_has_one_prompt_per_file(tmp_path):
    """As trainers of LoRA take them, beside the pictures. An empty folder is refused."""
    with pytest.raises(UserError, match="no prompt; .* or one .txt per prompt"):
        encoders.read_prompts(tmp_path)
    for name, text in (("b.txt", "A sign"), ("a.txt", "\ufeffA fox,\nrunning\n"), ("c.txt", "")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "a.jpg").write_bytes(b"a picture")
    assert encoders.read_prompts(tmp_path) == ["A fox, running", "A sign"]
    assert teachers.is_text(tmp_path)
    (tmp_path / "shard-00000.safetensors").write_bytes(b"")
    assert not teachers.is_text(tmp_path)  # a folder of embeddings


@pytest.mark.parametrize(
    "name,content,error",
    [
        ("p.txt", b"# only\n", "no prompt"),
        ("p.csv", b"text,text\na fox,1\n", "expected columns of different names"),
        ("p.csv", b"caption\nA fox, running\n", "line 2: expected 1 cells, found 2); expected"),
        ("p.csv", b"n,caption\n1,\n2,a\n", "line 2: expected caption or prompt or text, found {"),
        ("p.csv", b'caption\na\n"A fox\nb\nc\n', "line 3: unexpected end of data"),
        ("p.csv", b"caption\na\ncaf\xe9\n", "line 3: 'utf-8' codec can't decode"),
        ("p.jsonl", b'"a"\n{"caption": " "}\n', "line 2: expected caption or prompt or text"),
        ("p.jsonl", b'"a"\n\n{"caption": "b"\n', "line 3: Expecting ',' delimiter"),
        ("p.json", b'["a"]', "suffix is .json); expected UTF-8 as .txt, .csv, .tsv or .jsonl"),
    ],
)
def test_a_file_without_prompts_is_one_line(tmp_path, capsys, name, content, error):
    (tmp_path / name).write_bytes(content)
    line = ["text", "--teacher", "wan22", "--prompts", tmp_path / name, "--out", tmp_path / "o"]
    assert error in refusal(capsys, line, encoders.main) and not (tmp_path / "o").exists()


# -- VAE -----------------------------------------------------------------------------------------


def test_first_frames_are_those_of_the_pipeline(wan_folder):
    """Mask 4, latents 16; the mask is 1 on the first latent frame only."""
    vae = encoders.load_vae("wan22-i2v", wan_folder, "cpu")
    pipeline = diffusers.WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=diffusers.UniPCMultistepScheduler()
    )
    image = torch.rand(2, 3, 32, 48) * 2 - 1
    options = 1, 16, 32, 48, 9, torch.float32, torch.device("cpu"), torch.Generator()
    expected = torch.cat([pipeline.prepare_latents(row[None], *options)[1] for row in image])
    condition = encoders.encode_first_frames(vae, image, 9)
    assert condition.shape == (2, 20, 3, 4, 6)
    assert torch.allclose(condition, expected, atol=1e-5)


@pytest.mark.parametrize("teacher", ["wan22", "qwen-image"])
def test_decoding_undoes_the_scaling_of_encoding(wan_folder, qwen_folder, teacher):
    vae = encoders.load_vae(teacher, wan_folder if teacher == "wan22" else qwen_folder, "cpu")
    pixels = torch.rand(1, 3, 5 if teacher == "wan22" else 1, 32, 48) * 2 - 1
    latents = encoders.encode(vae, pixels)
    raw = vae.encode(pixels).latent_dist.mode()
    with torch.no_grad():
        expected = vae.decode(raw).sample.clamp(-1, 1)
    assert torch.allclose(encoders.decode(vae, latents), expected, atol=1e-4)
    if teacher == "qwen-image":  # a picture has no axis of frames
        picture = encoders.decode(vae, latents[:, :, 0])
        assert torch.allclose(picture, expected[:, :, 0], atol=1e-4)
    assert not torch.equal(latents, raw)


def test_where_memory_is_short_the_vae_works_in_tiles(monkeypatch, capsys):
    """It says so, once. The same pixels up to the borders; another error is not caught."""
    vae = small_vae("AutoencoderKLWan")
    pixels = torch.rand(1, 3, 5, 64, 96) * 2 - 1
    latents = encoders.encode(vae, pixels)
    whole, decode = encoders.decode(vae, latents), vae.decode
    vae.enable_tiling(32, 32, 24, 24)
    vae.use_tiling = False

    def decode_if_tiled(z):
        if not vae.use_tiling:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(z)

    monkeypatch.setattr(vae, "decode", decode_if_tiled)
    tiled = [encoders.decode(vae, latents) for _ in range(2)]
    assert capsys.readouterr().out.count("works in tiles") == 1
    assert torch.equal(*tiled) and tiled[0].shape == whole.shape
    assert 0 < (tiled[0] - whole).abs().mean() < 0.2 * whole.abs().mean()
    monkeypatch.setattr(vae, "decode", lambda z: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encoders.decode(vae, latents)


def write_pictures(folder):
    """Write two landscapes, one portrait, and their captions."""
    folder.mkdir()
    for name, size in [("a.png", (100, 60)), ("b.png", (40, 90)), ("c.jpg", (96, 64))]:
        Image.effect_noise(size, 90).convert("RGB").save(folder / name)
    (folder / "captions.csv").write_text('file,caption\na.png,"one, two"\nb.png,tall\nc.jpg,last\n')


def encode_images(tmp_path, folder, *flags):
    """Run the command. Returns its exit status and its file."""
    out = tmp_path / "i.safetensors"
    line = "images --teacher wan22-i2v --device cpu --frames 5 --size 32x48 48x32".split()
    line += ["--weights", folder, "--images", tmp_path / "p", "--out", out, *flags]
    return encoders.main([str(word) for word in line]), out


def test_pictures_go_to_the_nearest_size_with_their_captions(tmp_path, wan_folder):
    write_pictures(tmp_path / "p")
    status, out = encode_images(tmp_path, wan_folder)
    assert status == 0
    frames = encoders.open_first_frames(out, [(2, 4, 6), (2, 6, 4)])
    assert frames.key_of == {(2, 4, 6): "image.32x48", (2, 6, 4): "image.48x32"}
    assert frames.captions == {"image.32x48": ["one, two", "last"], "image.48x32": ["tall"]}
    vae = encoders.load_vae("wan22-i2v", wan_folder, "cpu")
    image = encoders.read_image(tmp_path / "p" / "c.jpg", 32, 48)[None]
    stored = frames.file["image.32x48"][1:2]
    assert is_close(stored, encoders.encode_first_frames(vae, image, 5))
    with pytest.raises(UserError, match="expected 9x32x48, it has 5x32x48, 5x48x32"):
        encoders.open_first_frames(out, [(3, 4, 6)])
    assert encode_images(tmp_path, wan_folder)[0] == 2  # exists
    for flags in (["--frames", "4"], ["--size", "33x48"]):
        assert encode_images(tmp_path, wan_folder, "--overwrite", *flags)[0] == 2
    assert encode_images(tmp_path, wan_folder, "--overwrite")[0] == 0


def test_pictures_are_read_upright_on_white_and_in_8_bits(tmp_path):
    """As EXIF turns them; whatever colour invisible pixels have. Control: a visible one."""
    image = Image.new("RGB", (60, 40))
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    image.save(tmp_path / "a.jpg", exif=exif)
    assert encoders.read_rgb(tmp_path / "a.jpg").size == (40, 60)
    image = Image.new("RGBA", (2, 1), (200, 200, 200, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    for mode in ("RGBA", "P"):
        image.convert(mode).save(tmp_path / "a.png")
        rgb = encoders.read_rgb(tmp_path / "a.png")
        assert [rgb.getpixel((x, 0)) for x in (0, 1)] == [(255,) * 3, (200,) * 3]
    Image.new("I;16", (4, 4), 1000).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="expected 8 bits per channel"):
        encoders.read_rgb(tmp_path / "a.tif")


@pytest.mark.parametrize(
    "name,content,error",
    [
        ("captions.csv", None, "captions.csv (No such file"),
        ("captions.csv", "name,text\na.png,one\n", "expected file and caption or prompt or text"),
        ("captions.csv", "file,caption\na.png,one\nb.png,\n", "line 3: expected file and caption"),
        ("a.png", "not a picture", "cannot read"),
    ],
)
def test_damaged_pictures_are_one_line(tmp_path, wan_folder, capsys, name, content, error):
    write_pictures(tmp_path / "p")
    (tmp_path / "p" / name).unlink()
    if content:
        (tmp_path / "p" / name).write_text(content)
    status, out = encode_images(tmp_path, wan_folder)
    line = capsys.readouterr().err.splitlines()
    assert status == 2 and error in line[-1] and str(tmp_path / "p") in line[-1]
    assert not out.exists()


# -- in the programs -----------------------------------------------------------------------------


def write_teacher(folder, wan_folder):
    """Write a published folder of a small network that fits the small encoders."""
    spec = weights.TEACHERS["wan21-tiny"]
    spec = spec._replace(settings=spec.settings | dict(text_dim=32, text_len=512))
    shutil.copytree(wan_folder, folder)
    write_base(folder / "transformer", spec)
    return spec


def test_a_run_embeds_its_prompts_and_decodes_its_previews(
    tmp_path, wan_folder, monkeypatch, capsys
):
    """Encoder, transformers, VAE, in that order. A resumed run does not need the encoder again."""
    folder, out = tmp_path / "weights", tmp_path / "run"
    spec = write_teacher(folder, wan_folder)
    monkeypatch.setitem(weights.TEACHERS, "wan21-tiny", spec._replace(repository="example/small"))
    (tmp_path / "p.txt").write_text("A fox\nA sign\nSnow\n")
    decoded, decode = [], encoders.decode
    monkeypatch.setattr(encoders, "decode", lambda *a: decoded.append(decode(*a)) or decoded[-1])
    flags = f"--teacher wan21-tiny {QUICK} --size 1x32x32 --device cpu".split()
    flags += ["--weights", folder, "--prompts", tmp_path / "p.txt", "--out", out]
    assert train.main([str(flag) for flag in flags]) == 0
    assert encoders.open_embeddings(out / "prompts").prompts == ["A fox", "A sign", "Snow"]
    assert "prompts: 3, the first: 'A fox'\n" in capsys.readouterr().out
    assert decoded and all(x.shape == (1, 3, 1, 32, 32) for x in decoded)
    monkeypatch.setattr(encoders, "load_encoder", None)
    (out / "metrics.json").unlink()
    resume = ["--teacher", "wan21-tiny", "--resume", "--out", str(out), "--device", "cpu"]
    assert train.main(resume) == 0
    (tmp_path / "p.txt").write_text("Another fox\n")
    capsys.readouterr()
    assert train.main(resume) == 2 and "p.txt" in capsys.readouterr().err


def test_a_prompt_becomes_a_video_by_one_command(tmp_path, wan_folder, capsys, monkeypatch):
    """Text encoder, guided teacher, VAE. The same prompt is not embedded twice."""
    write_teacher(tmp_path / "weights", wan_folder)
    loads, load_encoder = [], encoders.load_encoder
    monkeypatch.setattr(encoders, "load_encoder", lambda *a: loads.append(a) or load_encoder(*a))
    line = "--teacher wan21-tiny --n 1 --steps 2 --guidance 3 --size 5x32x32 --device cpu".split()
    line += ["--weights", tmp_path / "weights", "--out", tmp_path / "out"]
    latents = []
    for prompt in ("A fox.", "A fox."):
        assert sample.main([*map(str, line), "--prompt", prompt]) == 0
        latents.append(load_file(tmp_path / "out" / "latents.safetensors")["x"])
    assert len(loads) == 1 and (tmp_path / "out" / "000-00.mp4").stat().st_size > 500
    assert torch.equal(*latents)
    (tmp_path / "p.txt").write_text("A fox.\nA sign.")
    assert sample.main([*map(str, line), "--prompts", str(tmp_path / "p.txt")]) == 0
    both = load_file(tmp_path / "out" / "latents.safetensors")["x"]
    assert is_close(both[:1], latents[0])  # the encoder's bf16, in a batch
    assert not is_close(both[1:], latents[0])
