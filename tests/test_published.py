"""Every large preset from folders as published to files that other tools run. Small networks.

Needs models/requirements.txt.
"""

import re

import numpy
import pytest
import torch
from safetensors.torch import load_file

diffusers = pytest.importorskip("diffusers", reason="needs models/requirements.txt")
pytest.importorskip("transformers", reason="needs models/requirements.txt")

from PIL import Image  # noqa: E402
from published import save_diffusers, save_original, small_spec  # noqa: E402
from students import error_of, train_student  # noqa: E402

import sample  # noqa: E402
from models import encoders, media, weights  # noqa: E402
from models.common import normal  # noqa: E402
from models.qwen_image import pack, unpack  # noqa: E402

PROMPT = "A fox runs through snow."
SIZES = {"qwen-image": (1, 64, 96), "wan22-5b": (5, 64, 96)}
PRESETS = [name for name, spec in weights.TEACHERS.items() if spec.repository]


def run(command, *line):
    """Run a command, which must succeed."""
    assert command([*map(str, line)]) == 0


@pytest.fixture
def decoded(monkeypatch):
    """The pictures of previews, which are not drawn."""
    pictures = []

    def sheet(rows, decode, title=""):
        pictures.extend(decode(x) for x in rows.values())
        return b"\x89PNG"

    monkeypatch.setattr(media, "sheet", sheet)
    return pictures


def train_and_sample(out, name, size, flags, decoded):
    """Prompts to a student, a preview, a sample and an export, in folders of `out`."""
    frames, height, width = size
    (out / "p.txt").write_text(f"{PROMPT}\nA dog\n")
    inputs, image = ["--prompts", out / "p.txt"], []
    if small_spec(name).is_i2v:  # first frames and captions are encoded before
        pictures, (text, first) = out / "pictures", ("captions", "first.safetensors")
        pictures.mkdir()
        Image.radial_gradient("L").resize((width, height)).convert("RGB").save(pictures / "a.png")
        (pictures / "captions.csv").write_text(f"file,caption\na.png,{PROMPT}\n")
        common = ["--teacher", name, *flags, "--device", "cpu"]
        lines = ["--images", pictures, "--size", f"{height}x{width}", "--frames", frames]
        run(encoders.main, "images", *common, *lines, "--out", out / first)
        lines = ["--prompts", pictures / "captions.csv"]
        run(encoders.main, "text", *common, *lines, "--out", out / text)
        inputs = ["--prompts", out / text, "--images", out / first]
        image = ["--image", pictures / "a.png"]
    flags = [*flags, *inputs, "--dtype", "float32", "--size", f"{frames}x{height}x{width}"]
    student = train_student(out / "run", name, *flags, "--sample-every", 1, "--device", "cpu")
    assert {x.shape[1:] for x in decoded} == {(height, width, 3)}
    line = ["--student", student, "--n", 1, "--device", "cpu"]
    run(sample.main, *line, "--prompt", PROMPT, *image, "--out", out / "samples")
    run(sample.main, *line, "--export", out / "export")


def run_pipeline(out, base, z, size):
    """The latents of diffusers' own pipeline with the export, as the card says; and of the base."""
    card, places = (out / "export/README.md").read_text(), (str(base), str(out / "export"))
    code = re.search(r"```python\n(.*?settings = .*?\n)", card, re.S)[1]
    code = re.sub(r"base, here = .*", f"base, here = {places}", code)
    code = code.replace("torch.bfloat16", "torch.float32").replace('"cuda"', '"cpu"')
    assert "dict(default=" in code  # the text encoder is bf16 here as there
    code = code.replace("dict(default=", "dict(text_encoder=torch.bfloat16, default=")
    values = {}
    exec(code, values)
    pipe, settings = values["pipe"], values["settings"]
    pipe.set_progress_bar_config(disable=True)
    settings |= dict(prompt=PROMPT, output_type="latent", latents=z if z.ndim == 5 else pack(z))
    if z.ndim == 4:  # the pipeline would continue in the dtype of its text encoder
        text, mask = pipe.encode_prompt(settings.pop("prompt"), device="cpu")
        settings |= dict(prompt_embeds=text.float(), prompt_embeds_mask=mask)
    if "ImageToVideo" in type(pipe).__name__:
        settings["image"] = Image.open(out / "pictures" / "a.png")
    results = [pipe(**settings)[0]]
    pipe.unload_lora_weights()
    settings.pop("callback_on_step_end", None)
    results.append(pipe(**settings)[0])
    return [x if z.ndim == 5 else unpack(x, z.shape[-2] // 2) for x in results]


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_goes_from_published_folders_to_diffusers(name, tmp_path, monkeypatch, decoded):
    """Of both layouts, to equal students. Negative control: the base alone makes other latents."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(weights.TEACHERS, name, small_spec(name))
    size, base = SIZES.get(name, (5, 32, 48)), weights.default_folder(name).absolute()
    save_diffusers(base, name)
    layouts = {"diffusers": []}  # of the default folder
    if "qwen" not in name:
        save_original(tmp_path / "original", name)
        layouts["original"] = ["--weights", tmp_path / "original"]
    for layout, flags in layouts.items():
        (tmp_path / layout).mkdir(exist_ok=True)
        (tmp_path / "out" / layout).mkdir(parents=True)
        train_and_sample(tmp_path / "out" / layout, name, size, flags, decoded)
    results = [tmp_path / "out" / layout for layout in layouts]
    for file in ("run/student.safetensors", "samples/latents.safetensors"):
        files = [load_file(result / file) for result in results]
        assert all(torch.equal(x, files[-1][key]) for key, x in files[0].items())
    x = load_file(results[0] / "samples" / "latents.safetensors")["x"]
    z = normal(x.shape[1:], 0, "sample", 0, "z")[None]
    theirs, control = run_pipeline(results[0], base, z, size)
    print(f"{name}: error {error_of(theirs, x):.1e}, of the base alone {error_of(control, x):.1e}")
    assert error_of(theirs, x) < 1e-5 and error_of(control, x) > 1e-2
    suffix = "png" if size[0] == 1 else "mp4"
    frames, fps = media.read_video(results[0] / "samples" / f"000-00.{suffix}")
    assert numpy.stack(frames).shape == (*size, 3)
    assert size[0] == 1 or fps == small_spec(name).fps
