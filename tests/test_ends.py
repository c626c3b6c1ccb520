"""Claims about the frozen ends: embeddings and latents are those of the published pipelines.

Tiny encoders and VAEs of our own, held to diffusers' pipelines; needs requirements-full.txt.
"""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers", reason="needs requirements-full.txt")
diffusers = pytest.importorskip("diffusers", reason="needs requirements-full.txt")

from PIL import Image  # noqa: E402

import sample  # noqa: E402
import train  # noqa: E402
from models import text, vae, weights  # noqa: E402
from models.files import UserError  # noqa: E402

PROMPTS = [
    "A fox runs through snow, the camera follows.",
    "caf\u00c3\u00a9 &amp;amp; rain <3   at  night",  # mojibake, entities (ftfy leaves them beside <), spaces
    "A sign that says OPEN",
    "Ein sehr langer Satz " * 60,
]


def tokenizer_of(folder, template, specials):
    """A tokenizer of bytes, saved: every prompt has a known number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(token, vocab[token]) for token in specials]
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=specials[0], eos_token=specials[1]
    )
    fast.save_pretrained(folder)
    return fast


def small_vae(kind):
    torch.manual_seed(0)
    sizes = dict(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    return getattr(diffusers, kind)(**sizes, temperal_downsample=[False, True, True]).eval()


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory):
    """A tiny text_encoder, tokenizer and vae of Wan's kinds."""
    root = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    config = transformers.UMT5Config(
        vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    transformers.UMT5EncoderModel(config).save_pretrained(root / "text_encoder")
    tokenizer_of(root / "tokenizer", "$A </s>", ["<pad>", "</s>"])
    small_vae("AutoencoderKLWan").save_pretrained(root / "vae")
    return root


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory):
    """The same of Qwen-Image's kinds."""
    root = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(0)
    config = transformers.Qwen2_5_VLConfig(
        text_config=dict(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, vocab_size=300, bos_token_id=1, eos_token_id=1, pad_token_id=0,
            rope_scaling={"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"},
        ),
        vision_config=dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2,
                           out_hidden_size=32),
        image_token_id=290, video_token_id=291, vision_start_token_id=292, vision_end_token_id=293,
    )  # fmt: skip
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    model.save_pretrained(root / "text_encoder")
    tokenizer_of(root / "tokenizer", None, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    small_vae("AutoencoderKLQwenImage").save_pretrained(root / "vae")
    return root


def embed(tmp_path, folder, teacher, *flags, prompts=PROMPTS):
    """Run the command; returns the open file."""
    (tmp_path / "p.txt").write_text("# a comment\n" + "\n\n".join(prompts), encoding="utf-8")
    out = tmp_path / "p.safetensors"
    line = [
        "--teacher",
        teacher,
        "--weights",
        folder,
        "--prompts",
        tmp_path / "p.txt",
        "--out",
        out,
    ]
    assert text.main([str(word) for word in [*line, "--device", "cpu", *flags]]) == 0
    return text.open_embeddings(out)


def close(a, b):
    return a.shape == b.shape and (a.float() - b.float()).norm() < 1e-2 * b.float().norm()


def test_wans_embeddings_are_those_of_the_pipeline_and_its_negative_prompt_the_published(
    tmp_path, wan_folder
):
    """In bf16, batches of 2 against one at a time padded to 512."""
    held = embed(tmp_path, wan_folder, "wan22", "--batch", "2")
    encoder = text.load_encoder("wan22", wan_folder, "cpu")
    pipeline = diffusers.WanPipeline(
        tokenizer=encoder.tokenizer, text_encoder=encoder.model, vae=small_vae("AutoencoderKLWan"),
        scheduler=diffusers.UniPCMultistepScheduler(),
    )  # fmt: skip
    for i, prompt in enumerate([*PROMPTS, text.WAN_NEGATIVE]):
        wanted, _ = pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=512
        )
        row = held.row(i) if i < len(PROMPTS) else held.negative
        padded = torch.nn.functional.pad(row, (0, 0, 0, 512 - len(row)))
        assert close(padded, wanted[0]) and row.dtype == torch.bfloat16
    assert len(held.row(3)) == 512 and len(held.row(0)) == len(PROMPTS[0]) + 1  # cut; with EOS
    assert held.about["prompts"] == [prompt.strip() for prompt in PROMPTS]
    assert held.about["negative"] == text.WAN_NEGATIVE


def test_qwen_images_embeddings_are_those_of_the_pipeline(tmp_path, qwen_folder):
    """The template's beginning dropped; rows in a batch see none of its padding."""
    held = embed(tmp_path, qwen_folder, "qwen-image", "--batch", "4")
    encoder = text.load_encoder("qwen-image", qwen_folder, "cpu")
    pipeline = diffusers.QwenImagePipeline(
        tokenizer=encoder.tokenizer, text_encoder=encoder.model, transformer=None,
        vae=small_vae("AutoencoderKLQwenImage"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    for i, prompt in enumerate([*PROMPTS[:3], " "]):
        wanted, _ = pipeline.encode_prompt(prompt, device="cpu", max_sequence_length=512)
        row = held.row(i) if i < 3 else held.negative
        assert close(row, wanted[0])
    assert len(held.row(3)) == 512


def test_the_published_constants_are_what_is_stored_beside_the_repo():
    from tests.test_ports import PARITY

    if not PARITY.is_dir():
        pytest.skip("no stored references beside the repo")
    held = json.loads((PARITY / "text_constants.json").read_text())
    assert held["wan_sample_neg_prompt"] == text.WAN_NEGATIVE
    assert held["qwen_prompt_template"] == text.QWEN_TEMPLATE
    assert (held["qwen_drop_idx"], held["qwen_image_negative"]) == (text.QWEN_DROP, " ")


def test_an_interrupted_encoding_goes_on_and_makes_the_same_file(tmp_path, wan_folder, monkeypatch):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole = embed(tmp_path / "a", wan_folder, "wan22", "--batch", "1")
    calls, encode = [], text.encode

    def stops(encoder, rows):
        calls.append(rows)
        if len(calls) == 4:  # the negative prompt, then two of four
            raise KeyboardInterrupt
        return encode(encoder, rows)

    monkeypatch.setattr(text, "encode", stops)
    with pytest.raises(AssertionError):
        embed(tmp_path / "b", wan_folder, "wan22", "--batch", "1")
    assert not (tmp_path / "b" / "p.safetensors").exists()
    monkeypatch.setattr(text, "encode", lambda *a: calls.append(a) or encode(*a))
    calls.clear()
    again = embed(tmp_path / "b", wan_folder, "wan22", "--batch", "1")
    assert len(calls) == 3  # the negative prompt and the two that were left
    files = [tmp_path / side / "p.safetensors" for side in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes() and len(again.offsets) == 5
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"p.txt", "p.safetensors"}
    assert torch.equal(whole.row(1), again.row(1))


@pytest.mark.parametrize("damage,calls_left", [
    ("nothing", 3), ('{"done": 99}', 5), ("{}", 5), ('{"done": -1}', 5), ("garbage", 5)
])  # fmt: skip
def test_a_damaged_count_of_what_is_done_is_not_believed(
    tmp_path, wan_folder, monkeypatch, damage, calls_left
):
    stop_after(monkeypatch, 3)
    with pytest.raises(AssertionError):
        embed(tmp_path, wan_folder, "wan22", "--batch", "1")
    if damage != "nothing":
        (tmp_path / "p.safetensors.part.json").write_text(damage)
    calls = stop_after(monkeypatch, 99)
    held = embed(tmp_path, wan_folder, "wan22", "--batch", "1")
    assert len(calls) == calls_left and all(held.row(i).any() for i in range(4))


def stop_after(monkeypatch, number):
    """The encoder is interrupted at the call after so many; returns its calls."""
    calls, encode = (
        [],
        text.encode.__wrapped__ if hasattr(text.encode, "__wrapped__") else text.encode,
    )

    def counted(encoder, rows):
        if len(calls) == number:
            raise KeyboardInterrupt
        calls.append(rows)
        with torch.no_grad():
            return encode(encoder, rows)

    counted.__wrapped__ = encode
    monkeypatch.setattr(text, "encode", counted)
    return calls


def test_what_another_command_left_unfinished_is_not_overwritten(
    tmp_path, wan_folder, monkeypatch, capsys
):
    stop_after(monkeypatch, 3)
    with pytest.raises(AssertionError):
        embed(tmp_path, wan_folder, "wan22", "--batch", "1")
    stop_after(monkeypatch, 99)
    with pytest.raises(AssertionError):
        embed(tmp_path, wan_folder, "wan22", prompts=["another"])
    assert "left unfinished" in capsys.readouterr().err
    assert len(embed(tmp_path, wan_folder, "wan22", "--overwrite", prompts=["other"]).offsets) == 2


def without_a_tensor(folder):
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    tensors.pop(max(tensors, key=lambda key: tensors[key].numel()))
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_an_encoder_that_lacks_a_weight_is_refused(tmp_path, wan_folder, part):
    """The libraries would go on with random numbers in its place."""
    shutil.copytree(wan_folder, tmp_path / "w")
    without_a_tensor(tmp_path / "w" / part)
    with pytest.raises(UserError, match="lacks|cannot read"):
        if part == "vae":
            vae.load_vae("wan22", tmp_path / "w", "cpu")
        else:
            text.load_encoder("wan22", tmp_path / "w", "cpu")


def test_another_models_encoder_is_refused(wan_folder, qwen_folder):
    for teacher, folder in (("wan22", qwen_folder), ("qwen-image", wan_folder)):
        with pytest.raises(UserError, match="takes a"):
            text.load_encoder(teacher, folder, "cpu")


def test_a_batch_is_padded_with_zeros_and_says_where():
    rows = [torch.ones(2, 3), torch.ones(4, 3)]
    c = text.batch(rows)
    assert c["text"].shape == (2, 4, 3) and c["text"][0, 2:].abs().sum() == 0
    assert c["mask"].tolist() == [[True, True, False, False], [True] * 4]
    assert "mask" not in text.batch(rows[:1])


@pytest.mark.parametrize(
    "content,says", [(b"", "holds no prompt"), (b"# only\n", "holds no prompt"), (b"\xff\xfe\xff", "read")]
)  # fmt: skip
def test_prompts_that_are_none_are_refused_in_one_line(tmp_path, wan_folder, capsys, content, says):
    (tmp_path / "p.txt").write_bytes(content)
    out = tmp_path / "o.safetensors"
    flags = ["--weights", wan_folder, "--prompts", tmp_path / "p.txt", "--out", out]
    assert text.main([str(f) for f in flags]) == 2
    line = capsys.readouterr().err
    assert says in line and line.count("\n") == 1 and not out.exists()


def test_a_folder_without_an_encoder_says_how_to_get_one(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a fox")
    flags = ["--weights", str(tmp_path), "--prompts", str(tmp_path / "p.txt")]
    assert text.main(flags) == 2
    assert "holds no text_encoder/" in capsys.readouterr().err


def test_what_is_no_file_of_embeddings_is_refused(tmp_path):
    for content in (b"", b"{}", b"\x10" + bytes(40)):
        (tmp_path / "e.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="python -m models.text"):
            text.open_embeddings(tmp_path / "e.safetensors")


# -- VAEs ----------------------------------------------------------------------------------------


def test_latents_of_first_frames_are_those_of_the_pipeline(wan_folder):
    """Mask 4, latents 16; the mask is 1 on the first latent frame alone."""
    model = vae.load_vae("wan22-i2v", wan_folder, "cpu")
    pipeline = diffusers.WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=model,
        scheduler=diffusers.UniPCMultistepScheduler(),
    )  # fmt: skip
    image = torch.rand(2, 3, 32, 48) * 2 - 1
    where = 1, 16, 32, 48, 9, torch.float32, torch.device("cpu"), torch.Generator()
    wanted = torch.cat([pipeline.prepare_latents(row[None], *where)[1] for row in image])
    ours = vae.first_frame(model, image, 9)
    assert ours.shape == (2, 20, 3, 4, 6)
    assert torch.allclose(ours, wanted, atol=1e-5)


@pytest.mark.parametrize("teacher", ["wan22", "qwen-image"])
def test_decoding_undoes_the_scaling_of_encoding(wan_folder, qwen_folder, teacher):
    model = vae.load_vae(teacher, wan_folder if teacher == "wan22" else qwen_folder, "cpu")
    pixels = torch.rand(1, 3, 5 if teacher == "wan22" else 1, 32, 48) * 2 - 1
    latents = vae.encode(model, pixels)
    raw = model.encode(pixels).latent_dist.mode()
    with torch.no_grad():
        wanted = model.decode(raw).sample.clamp(-1, 1)
    assert torch.allclose(vae.decode(model, latents), wanted, atol=1e-4)
    if teacher == "qwen-image":  # a picture has no axis of frames
        assert torch.allclose(vae.decode(model, latents[:, :, 0]), wanted[:, :, 0], atol=1e-4)
    mean, std = vae.statistics(model)
    assert torch.allclose(latents * std + mean, raw, atol=1e-5) and not torch.equal(latents, raw)


def pictures(folder):
    """Two landscapes, one portrait, and their captions."""
    folder.mkdir()
    for name, size in [("a.png", (100, 60)), ("b.png", (40, 90)), ("c.jpg", (96, 64))]:
        Image.effect_noise(size, 90).convert("RGB").save(folder / name)
    (folder / "captions.csv").write_text('file,caption\na.png,"one, two"\nb.png,tall\nc.jpg,last\n')
    return folder


def images(tmp_path, folder, *flags):
    out = tmp_path / "i.safetensors"
    line = ["--weights", folder, "--images", tmp_path / "p", "--out", out, "--device", "cpu",
            "--frames", "5", "--size", "32x48", "48x32", *flags]  # fmt: skip
    return vae.main([str(word) for word in line]), out


def test_pictures_go_to_the_size_of_their_aspect_with_their_captions(tmp_path, wan_folder):
    pictures(tmp_path / "p")
    status, out = images(tmp_path, wan_folder)
    assert status == 0
    with safe_open(out, "pt") as file:
        held = {key: file.get_tensor(key) for key in file.keys()}
        about = json.loads(file.metadata()["about"])
    assert {k: tuple(v.shape) for k, v in held.items()} == {
        "image.32x48": (2, 20, 2, 4, 6), "image.48x32": (1, 20, 2, 6, 4)
    }  # fmt: skip
    assert about["captions"] == {"32x48": ["one, two", "last"], "48x32": ["tall"]}
    model = vae.load_vae("wan22-i2v", wan_folder, "cpu")
    image = vae.read_image(tmp_path / "p" / "c.jpg", 32, 48)[None]
    assert close(held["image.32x48"][1], vae.first_frame(model, image, 5)[0])
    assert images(tmp_path, wan_folder)[0] == 2  # it is there already


def test_interrupted_pictures_go_on_and_other_pictures_do_not(tmp_path, wan_folder, monkeypatch):
    pictures(tmp_path / "p")
    calls, first_frame = [], vae.first_frame

    def counted(*inputs):
        if len(calls) == limit:
            raise KeyboardInterrupt
        calls.append(inputs)
        return first_frame(*inputs)

    monkeypatch.setattr(vae, "first_frame", counted)
    limit = 2
    assert images(tmp_path, wan_folder)[0] == 130
    limit = 99
    assert images(tmp_path, wan_folder, "--tiles")[0] == 2  # another request
    assert images(tmp_path, wan_folder)[0] == 0 and len(calls) == 3
    with safe_open(tmp_path / "i.safetensors", "pt") as file:
        assert all(file.get_tensor(key).flatten(1).any(1).all() for key in file.keys())


def test_a_picture_lies_as_its_exif_says(tmp_path):
    image = Image.new("RGB", (60, 40))
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    image.save(tmp_path / "a.jpg", exif=exif)
    assert vae.aspect(tmp_path / "a.jpg") == 60 / 40


def damage_pictures(folder, what):
    if what == "no captions":
        (folder / "captions.csv").unlink()
    elif what == "other columns":
        (folder / "captions.csv").write_text("name,text\na.png,one\n")
    elif what == "an absent file":
        (folder / "captions.csv").write_text("file,caption\nz.png,one\n")
    elif what == "no picture":
        (folder / "a.png").write_bytes(b"not a picture")


@pytest.mark.parametrize("what", ["no captions", "other columns", "an absent file", "no picture"])
def test_pictures_that_are_none_are_refused_in_one_line(tmp_path, wan_folder, capsys, what):
    damage_pictures(pictures(tmp_path / "p"), what)
    status, out = images(tmp_path, wan_folder)
    line = capsys.readouterr().err.splitlines()
    assert status == 2 and line[-1].startswith("vae.py: ") and not out.exists()


@pytest.mark.parametrize("flags", [["--size", "33x48"], ["--size", "wide"], ["--frames", "4"]])
def test_sizes_that_make_no_latents_are_refused(tmp_path, wan_folder, flags):
    pictures(tmp_path / "p")
    assert images(tmp_path, wan_folder, *flags)[0] == 2


def test_a_run_embeds_its_prompts_and_decodes_what_it_shows(
    tmp_path, wan_folder, monkeypatch, capsys
):
    """train.py on a published folder and a text file: encoder, transformers, VAE, in that order.

    The folder is of small networks, so the teacher's row says so too. Embedded once: a run that
    goes on has no need of the encoder.
    """
    folder = tmp_path / "weights"
    row = weights.TEACHERS["wan22-tiny"]
    small = row._replace(
        settings=row.settings | {"text_dim": 32, "text_len": 512}, repository="nobody/small"
    )
    monkeypatch.setitem(weights.TEACHERS, "wan22-tiny", small)
    for e, name in ((1, "transformer"), (2, "transformer_2")):
        net = weights.random("wan22-tiny", torch.float32, seed=e)
        (folder / name).mkdir(parents=True)
        config = {"_class_name": "WanModel", "num_heads": 4, "text_len": 512}
        (folder / name / "config.json").write_text(json.dumps(config))
        tensors = {n: p.detach() for n, p in net.named_parameters()}
        save_file(tensors, folder / name / "diffusion_pytorch_model.safetensors")
    for part in ("text_encoder", "tokenizer", "vae"):
        shutil.copytree(wan_folder / part, folder / part)
    (tmp_path / "p.txt").write_text("A fox\nA sign\nSnow\n")
    decoded, kept = [], vae.decode
    monkeypatch.setattr(vae, "decode", lambda *a: decoded.append(kept(*a)) or decoded[-1])
    out = tmp_path / "run"
    flags = ["--teacher", "wan22-tiny", "--weights", folder, "--prompts", tmp_path / "p.txt",
             "--out", out, "--iters", "1", "--batch", "2", "--fake-updates", "1", "--eval-samples", "2",
             "--size", "48x64", "--guidance", "4", "3"]  # fmt: skip
    assert train.main([str(flag) for flag in flags]) == 0
    assert text.open_embeddings(out / "prompts.safetensors").about["prompts"] == [
        "A fox",
        "A sign",
        "Snow",
    ]
    assert decoded and all(x.shape == (1, 3, 1, 48, 64) for x in decoded)
    monkeypatch.setattr(text, "load_encoder", None)
    (out / "metrics.json").unlink()
    assert train.main(["--teacher", "wan22-tiny", "--resume", "--out", str(out)]) == 0
    (tmp_path / "p.txt").write_text("Another fox\n")
    capsys.readouterr()
    assert train.main(["--teacher", "wan22-tiny", "--resume", "--out", str(out)]) == 2
    assert "p.txt is gone or has changed" in capsys.readouterr().err


def test_a_prompt_becomes_a_video_by_one_command(tmp_path, wan_folder, capsys, monkeypatch):
    """Text encoder, guided teacher, VAE; asked again it does not embed again, another prompt does."""
    settings = weights.row_of("wan21-tiny").settings | dict(text_dim=32, text_len=512)
    net = weights.random_network(weights.Wan, settings, torch.float32)
    folder = tmp_path / "weights"
    shutil.copytree(wan_folder, folder)
    (folder / "transformer").mkdir()
    save_file(dict(net.named_parameters()), folder / "transformer" / "x.safetensors")
    config = {"_class_name": "WanModel"} | settings
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    encoders, plain = [], text.load_encoder
    monkeypatch.setattr(text, "load_encoder", lambda *a: encoders.append(a) or plain(*a))
    line = ["--teacher", "wan21-tiny", "--weights", folder, "--n", "1", "--steps", "2", "--guidance",
            "3", "--size", "48x64", "--frames", "5", "--out", tmp_path / "out"]  # fmt: skip
    found = []
    for prompt in ("A fox.", "A fox.", "A sign."):
        assert sample.main([*map(str, line), "--prompt", prompt]) == 0
        found.append(load_file(tmp_path / "out" / "latents.safetensors")["x"])
        assert "1 sample, 4 network evaluations each" in capsys.readouterr().out
    assert len(encoders) == 2 and (tmp_path / "out" / "000-00.mp4").stat().st_size > 500
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[1], found[2], atol=1e-4)
    (tmp_path / "p.txt").write_text("A fox.\nA sign.")
    assert sample.main([*map(str, line), "--prompts", str(tmp_path / "p.txt"), "--latents"]) == 0
    both = load_file(tmp_path / "out" / "latents.safetensors")["x"]
    assert close(both, torch.cat(found[1:]))  # the encoder's bf16, in a batch
