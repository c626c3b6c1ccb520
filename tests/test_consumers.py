"""Claims about what leaves the repository: diffusers makes of it what we make, videos are whole.

Tiny pipelines of diffusers with random weights; needs requirements-full.txt.
"""

import json
import logging
import re
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

diffusers = pytest.importorskip("diffusers", reason="needs requirements-full.txt")

import imageio_ffmpeg  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

import sample  # noqa: E402
import train  # noqa: E402
from models import vae, video, weights  # noqa: E402
from models.files import UserError  # noqa: E402
from models.qwen_image import pack  # noqa: E402
from models.speed import theirs  # noqa: E402
from phases import step_times  # noqa: E402
from students import embeddings, student  # noqa: E402

KINDS = {
    "wan22-tiny": diffusers.WanPipeline, "wan21-tiny": diffusers.WanPipeline,
    "wan22-i2v-tiny": diffusers.WanImageToVideoPipeline,
    "qwen-image-tiny": diffusers.QwenImagePipeline,
}  # fmt: skip


def error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def small_vae(kind):
    torch.manual_seed(0)
    sizes = dict(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    return getattr(diffusers, kind)(**sizes, temperal_downsample=[False, True, True]).eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(teacher, dtype): a pipeline's folder, a student's, what was exported of it."""
    held = {}

    def of(teacher, dtype="float32", *flags):
        key = teacher, dtype, flags
        if key not in held:
            root = tmp_path_factory.mktemp(teacher)
            pipeline(root / "base", teacher, train.large.plan.dtype_named(dtype))
            run = student(root / "run", teacher, "--dtype", dtype, *flags)
            assert sample.main(["--student", str(run), "--export", str(root / "out")]) == 0
            held[key] = root
        return held[key]

    return of


def pipeline(folder, teacher, dtype):
    """Save diffusers' pipeline of the teacher's random networks, with a small VAE."""
    row, kind = weights.row_of(teacher), KINDS[teacher]
    nets = [weights.random(teacher, dtype, seed=e) for e in ((1, 2) if row.boundary else (1,))]
    nets = [theirs(net, net.settings) for net in nets]
    parts = dict(tokenizer=None, text_encoder=None, transformer=nets[0])
    parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts["vae"] = small_vae("AutoencoderKLQwenImage" if "qwen" in teacher else "AutoencoderKLWan")
    if row.boundary:
        parts |= dict(transformer_2=nets[1], boundary_ratio=row.boundary)
    if "i2v" in teacher:
        parts |= dict(image_encoder=None, image_processor=None)
    kind(**parts).save_pretrained(folder)


def carded(root, card, dtype):
    """The pipeline and the settings that the card's own snippet makes."""
    code = re.search(r"```python\n(.*?)```", card.read_text(), re.S)[1]
    code = re.sub(
        r"base, here = .*", f"base, here = {str(root / 'base')!r}, {str(card.parent)!r}", code
    )
    code = code.replace(
        "from_pretrained(base,", "from_pretrained(base, text_encoder=None, tokenizer=None,"
    )
    code = code.replace('"cuda"', '"cpu"')
    before, after = re.split(r'^pipe\.to\("cpu"\) .*$', code, flags=re.M)
    if dtype == "float32":
        before = before.replace("torch.bfloat16", "torch.float32")
    held = {}
    exec(before + 'pipe.to("cpu")', held)
    exec(re.search(r"settings = .*", after)[0], held)
    held["pipe"].set_progress_bar_config(disable=True)
    return held["pipe"], held["settings"]


def run_pipeline(pipe, settings, teacher, z, text, image=None):
    """The latents of diffusers after every step."""
    seen, switch = [], settings.pop("callback_on_step_end", None)

    def record(p, i, t, kwargs):
        seen.append(kwargs["latents"].float())
        return switch(p, i, t, {}) if switch else {}

    qwen = "qwen" in teacher
    settings |= dict(prompt_embeds=text, latents=pack(z) if qwen else z, output_type="latent")
    if qwen:
        settings["prompt_embeds_mask"] = torch.ones(text.shape[:2], dtype=torch.long)
    if image:
        settings["image"] = image
    with torch.no_grad():
        pipe(**settings, callback_on_step_end=record)
    return seen


def ours(root, teacher, dtype, tmp_path, *source):
    """x at every step of sample.py on the pipeline's folder, from an embedded prompt."""
    prompt = embeddings(tmp_path / "p.safetensors", teacher, ["a fox"])
    flags = ["--weights", root / "base", "--prompts", prompt, "--n", "1", "--trajectory",
             "--dtype", dtype, "--out", tmp_path / "samples"]  # fmt: skip
    image = None
    if "i2v" in teacher:
        pixels = (np.random.default_rng(0).random((48, 64, 3)) * 255).astype("uint8")
        image = Image.fromarray(pixels)
        image.save(tmp_path / "first.png")
        flags += ["--image", tmp_path / "first.png"]
    assert sample.main([*map(str, [*source, *flags])]) == 0
    xs = load_file(tmp_path / "samples" / "latents.safetensors")
    return [xs[f"x{i}"] for i in range(len(xs))], load_file(prompt)["text"][None], image


@pytest.mark.parametrize("teacher,dtype,bound", [
    *[(name, "float32", 1e-4) for name in KINDS], ("qwen-image-tiny", "bf16", 3e-2),
])  # fmt: skip
def test_the_pipeline_set_as_the_card_says_makes_our_latents_step_by_step(
    made, tmp_path, caplog, teacher, dtype, bound
):
    """Every key is consumed, and without the adapters, or with other times, it does not."""
    root = made(teacher, dtype)
    diffusers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        pipe, settings = carded(root, root / "out" / "README.md", dtype)
    assert not [r.message for r in caplog.records if "LoRA" in r.message or "key" in r.message]
    count_keys(pipe, root / "out")
    xs, text, image = ours(root, teacher, dtype, tmp_path, "--student", root / "run")
    if "qwen" not in teacher:
        text = torch.nn.functional.pad(text, (0, 0, 0, 512 - text.shape[1]))
    text = text.to(pipe.transformer.dtype)
    seen = run_pipeline(pipe, dict(settings), teacher, xs[0], text, image)
    same = pack if "qwen" in teacher else lambda x: x
    worst = max(error(same(x), y) for x, y in zip(xs[1:], seen, strict=True))
    print(f"{teacher} {dtype}: worst of {len(seen)} steps {worst:.1e}")
    assert worst < bound
    again = run_pipeline(pipe, dict(settings), teacher, xs[0], text, image)
    assert torch.equal(again[-1], seen[-1])  # a second prompt begins with the first expert
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    seen = run_pipeline(pipe, dict(settings), teacher, xs[0], text, image)
    assert error(same(xs[-1]), seen[-1]) > 3 * bound


def count_keys(pipe, folder):
    """As many factors in the pipeline as in the files, and the same numbers."""
    held = sum(len(load_file(file)) for file in folder.glob("*.safetensors"))
    nets = [pipe.transformer, getattr(pipe, "transformer_2", None)]
    inside = [n for net in nets if net is not None for n in net.state_dict() if "lora_" in n]
    assert held == 3 * len(inside) // 2  # two factors, and an alpha, of each layer


def test_rounding_of_times_is_what_qwen_image_in_bf16_needs(made, tmp_path, monkeypatch):
    """The control of the line above: with times in float32 the latents are others."""
    from models import qwen_image

    root = made("qwen-image-tiny", "bf16")
    pipe, settings = carded(root, root / "out" / "README.md", "bf16")
    monkeypatch.setattr(qwen_image, "rounded", lambda t: t)
    xs, text, _ = ours(root, "qwen-image-tiny", "bf16", tmp_path, "--student", root / "run")
    seen = run_pipeline(pipe, dict(settings), "qwen-image-tiny", xs[0], text.bfloat16())
    assert error(pack(xs[-1]), seen[-1]) > 5e-2


@pytest.mark.parametrize("teacher", [*KINDS])
def test_our_own_reading_of_exported_files_is_the_student_to_the_bit(made, tmp_path, teacher):
    """On the base that a pipeline was saved with; scaled by half it would not be."""
    root = made(teacher)
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    xs, *_ = ours(root, teacher, "float32", tmp_path / "a", "--student", root / "run")
    files = sorted((root / "out").glob("*.safetensors"))[::-1]  # the wrong way round
    size = ["--size", "48x64" if "wan" in teacher else "64x96"]
    size += ["--frames", "9"] if "wan" in teacher else []
    again, *_ = ours(
        root, teacher, "float32", tmp_path / "b", "--teacher", teacher, *size, "--lora", *files
    )
    assert all(torch.equal(x, y) for x, y in zip(xs, again, strict=True))


# -- the scheduler -------------------------------------------------------------------------------


def pipeline_times(pipe, steps, qwen):
    """t x 1000 that the pipeline would ask its network at."""
    if qwen:
        pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=1.0)
    else:
        pipe.scheduler.set_timesteps(steps)
    return [*pipe.scheduler.timesteps.tolist(), 1000 * pipe.scheduler.sigmas[-1].item()]


@pytest.mark.parametrize("teacher,shift", [("wan22-tiny", 5.0), ("qwen-image-tiny", 3.0)])
def test_default_schedulers_give_other_times_and_the_cards_give_ours(made, teacher, shift):
    root, qwen = made(teacher), "qwen" in teacher
    pipe, _ = carded(root, root / "out" / "README.md", "float32")
    wanted = [1000 * t for t in step_times(4, shift)]
    assert pipeline_times(pipe, 4, qwen) == pytest.approx(wanted, rel=1e-6)
    published = dict(
        shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02,
        max_image_seq_len=8192,
    ) if qwen else dict(shift=shift)  # fmt: skip
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**published)
    found = pipeline_times(pipe, 4, qwen)
    print(teacher, "default", [round(t, 1) for t in found], "ours", [round(t, 1) for t in wanted])
    assert max(abs(a - b) for a, b in zip(found, wanted)) > 50


def test_unipc_at_order_one_gives_nearly_our_times_as_whole_numbers():
    """The official solver's, in diffusers: for the eye, not for tests."""
    s = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", flow_shift=5, use_flow_sigmas=True, solver_order=1,
        disable_corrector=[0, 1, 2, 3],
    )  # fmt: skip
    s.set_timesteps(4)
    ours = [1000 * t for t in step_times(4, 5.0)[:-1]]
    assert [abs(a - b) <= 1.5 for a, b in zip(s.timesteps.tolist(), ours)] == [True] * 4


# -- full weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", ["wan22-tiny", "qwen-image-tiny", "wan21-tiny"])
@pytest.mark.parametrize("generator", ["lora", "full"])
def test_full_weights_load_in_the_pipeline_as_their_card_says(made, tmp_path, teacher, generator):
    """--merge of adapters, and a student of all parameters; diffusers makes our latents of both."""
    root = made(teacher)
    run = root / "run"
    if generator == "full":
        run = student(tmp_path / "full", teacher, "--dtype", "float32", "--generator", "full")
    flags = ["--merge"] if generator == "lora" else []
    export = ["--student", run, "--weights", root / "base", "--export", tmp_path / "out", *flags]
    assert sample.main([*map(str, export)]) == 0
    pipe, settings = carded(root, tmp_path / "out" / "README.md", "float32")
    xs, text, _ = ours(root, teacher, "float32", tmp_path, "--student", run)
    if "qwen" not in teacher:
        text = torch.nn.functional.pad(text, (0, 0, 0, 512 - text.shape[1]))
    seen = run_pipeline(pipe, dict(settings), teacher, xs[0], text.float())
    same = pack if "qwen" in teacher else lambda x: x
    assert max(error(same(x), y) for x, y in zip(xs[1:], seen, strict=True)) < 1e-4
    again = run_pipeline(pipe, dict(settings), teacher, xs[0], text.float())
    assert torch.equal(again[-1], seen[-1])


# -- videos and pictures -------------------------------------------------------------------------


def test_a_prompt_becomes_videos_of_the_right_length_size_and_rate(made, tmp_path, capsys):
    """Read back; their pixels are the decoded ones, the sheet is there, latents come first."""
    root = made("wan22-tiny")
    prompt = embeddings(tmp_path / "p.safetensors", "wan22-tiny", ["a fox", "a sign"])
    flags = ["--student", root / "run", "--weights", root / "base", "--prompts", prompt, "--n", "2",
             "--size", "48x64", "--frames", "9", "--out", tmp_path / "out"]  # fmt: skip
    assert sample.main([*map(str, flags)]) == 0
    assert "4 samples, 4 network evaluations each" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [*[f"00{i}-0{j}.mp4" for i in (0, 1) for j in (0, 1)], "latents.safetensors",
                     "samples.png"]  # fmt: skip
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "out" / "001-00.mp4"))
    about = next(reader)
    frames = [np.frombuffer(f, np.uint8).reshape(48, 64, 3) for f in reader]
    assert about["fps"] == 16 and tuple(about["size"]) == (64, 48) and len(frames) == 9
    x = load_file(tmp_path / "out" / "latents.safetensors")["x"]
    assert x.shape == (4, 16, 3, 6, 8)
    model = vae.load_vae("wan22-tiny", root / "base", "cpu")
    wanted = video.to_bytes(vae.decode(model, x[2:3])[0])
    difference = lambda a, b: np.abs(np.stack(a).astype(float) - b).mean()
    assert difference(frames, wanted) < 6 < difference(frames, wanted[::-1])


def test_latents_are_decoded_later_to_the_same_pictures(made, tmp_path, capsys):
    """By another command; what is no latents, or another VAE's, is one line."""
    root = made("wan22-tiny")
    prompt = embeddings(tmp_path / "p.safetensors", "wan22-tiny", ["a fox"])
    line = ["--student", root / "run", "--weights", root / "base"]
    for name, flags in (("a", []), ("b", ["--latents"])):
        more = ["--prompts", prompt, "--n", "1", "--size", "1x48x64", "--out", tmp_path / name]
        assert sample.main([*map(str, [*line, *more, *flags])]) == 0
    assert not (tmp_path / "b" / "000-00.png").exists()
    latents = tmp_path / "b" / "latents.safetensors"
    assert sample.main([*map(str, [*line, "--out", tmp_path / "b", "--decode", latents])]) == 0
    first, second = ((tmp_path / name / "000-00.png").read_bytes() for name in "ab")
    assert first == second
    assert "holds no latents" in refused(capsys, [*line, "--decode", prompt])
    qwen = made("qwen-image-tiny")
    other = ["--student", qwen / "run", "--weights", qwen / "base", "--decode", latents]
    assert "whose VAE is not" in refused(capsys, other)


@pytest.mark.parametrize("fps,channels", [(24, 48), (16, 16)])
def test_the_5b_model_plays_at_24_frames_a_second(monkeypatch, fps, channels):
    from models import sampling

    seen = []
    monkeypatch.setattr(vae, "load_vae", lambda *_: None)
    monkeypatch.setattr(vae, "decode", lambda model, x: torch.zeros(1, 3, 5, 16, 16))
    monkeypatch.setattr(video, "mp4", lambda frames, rate: seen.append(rate) or b"")
    cfg = train.config("wan22-5b" if channels == 48 else "wan22")
    args = type(
        "Args",
        (),
        dict(trajectory=False, latents=False, decode=None, title="", about={}, tiles=False),
    )
    xs = [torch.zeros(1, channels, 2, 1, 1)]
    list(sampling.written(cfg, xs, args, ["000-00"], "cpu"))
    assert seen == [fps]


def test_one_frame_of_wan_and_qwen_image_become_png(made, tmp_path):
    for teacher, flags in (("wan22-tiny", ["--size", "1x48x64"]), ("qwen-image-tiny", [])):
        root, out = made(teacher), tmp_path / teacher
        prompt = embeddings(tmp_path / f"{teacher}.safetensors", teacher, ["a fox"])
        line = ["--student", root / "run", "--weights", root / "base", "--prompts", prompt, "--n",
                "1", "--out", out, *flags]  # fmt: skip
        assert sample.main([*map(str, line)]) == 0
        picture = Image.open(out / "000-00.png")
        assert picture.size == ((64, 48) if flags else (96, 64)) and (out / "samples.png").is_file()


def test_the_first_frame_is_in_the_first_latent_frame_of_the_condition(made, tmp_path):
    """And nowhere else: its mask, its latents; a later frame given in its place shows."""
    root = made("wan22-i2v-tiny")
    model = vae.load_vae("wan22-i2v-tiny", root / "base", "cpu")
    picture = torch.rand(1, 3, 48, 64) * 2 - 1
    c = vae.first_frame(model, picture, 9)
    alone = vae.encode(model, picture[:, :, None])
    assert c.shape == (1, 20, 3, 6, 8)
    assert c[:, :4, 0].eq(1).all() and c[:, :4, 1:].eq(0).all()
    assert torch.allclose(c[:, 4:, :1], alone, atol=1e-5)
    assert not torch.allclose(c[:, 4:, 1:2], alone, atol=1e-1)


def test_one_large_thing_is_in_memory_at_a_time(made, tmp_path, monkeypatch):
    """One transformer, then the other, then the VAE; two at once would be seen."""
    import gc

    root, seen = made("wan22-tiny"), []
    prompt = embeddings(tmp_path / "p.safetensors", "wan22-tiny", ["a fox"])

    def alive(kind):
        nets = [x for x in gc.get_objects() if isinstance(x, kind)]
        return sum(not next(x.parameters()).is_meta for x in nets)

    before = {kind: alive(kind) for kind in (weights.Wan, diffusers.AutoencoderKLWan)}

    def watch(module, name):
        plain = getattr(module, name)

        def watched(*args, **how):
            seen.append((name, *(alive(kind) - held for kind, held in before.items())))
            return plain(*args, **how)

        monkeypatch.setattr(module, name, watched)

    watch(weights, "load")
    watch(vae, "load_vae")
    line = ["--student", root / "run", "--weights", root / "base", "--prompts", prompt, "--n", "1",
            "--out", tmp_path / "out"]  # fmt: skip
    assert sample.main([*map(str, line)]) == 0
    assert seen == [("load", 0, 0), ("load", 0, 0), ("load_vae", 0, 0)]


# -- what can be wrong ---------------------------------------------------------------------------


def refused(capsys, line):
    """The one line of the error."""
    assert sample.main([str(word) for word in line]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1, shown.err
    return shown.err


def test_images_prompts_and_extras_that_are_wrong_are_one_line(made, tmp_path, capsys, monkeypatch):
    """Before a transformer is loaded, and nothing is written."""
    root = made("wan22-i2v-tiny")
    prompt = embeddings(tmp_path / "p.safetensors", "wan22-i2v-tiny", ["a fox"])
    out = tmp_path / "out"
    line = [
        "--student",
        root / "run",
        "--weights",
        root / "base",
        "--prompts",
        prompt,
        "--out",
        out,
    ]
    assert "give --image" in refused(capsys, line)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    assert "cannot read" in refused(capsys, [*line, "--image", tmp_path / "broken.png"])
    assert "cannot read" in refused(capsys, [*line, "--image", tmp_path / "absent.png"])
    t2v = ["--student", made("wan22-tiny") / "run", "--prompt", "a fox"]
    assert "takes none" in refused(capsys, [*t2v, "--image", tmp_path / "broken.png"])
    assert "not both" in refused(capsys, [*t2v, "--prompts", prompt])
    assert "no text encoder" in refused(capsys, t2v)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    Image.new("RGB", (64, 48)).save(tmp_path / "fine.png")
    said = refused(capsys, [*line, "--image", tmp_path / "fine.png"])
    assert "requirements-full.txt" in said and "--latents" in said
    assert not out.exists()


def test_a_full_disk_while_a_video_is_written_is_one_line_and_leaves_no_part(
    made, tmp_path, capsys, monkeypatch
):
    """Both ffmpeg's own, and the file that it goes to; the latents are there already."""
    root = made("wan22-tiny")
    prompt = embeddings(tmp_path / "p.safetensors", "wan22-tiny", ["a fox"])
    line = ["--student", root / "run", "--weights", root / "base", "--prompts", prompt, "--n", "1"]
    monkeypatch.setattr(imageio_ffmpeg, "count_frames_and_secs", lambda path: (3, 0.2))
    assert "disk" in refused(capsys, [*line, "--out", tmp_path / "a"])
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["latents.safetensors"]
    monkeypatch.undo()
    plain = sample.write

    def full(path, *content):
        if path.suffix == ".mp4":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space")))
                return plain(path, *content)
        return plain(path, *content)

    monkeypatch.setattr(sample, "write", full)
    assert "No space" in refused(capsys, [*line, "--out", tmp_path / "b"])
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["latents.safetensors"]


def test_ffmpeg_that_fails_is_a_user_error(monkeypatch, tmp_path):
    """A disk with no room for it: /dev/full where there is one."""
    monkeypatch.setattr(
        imageio_ffmpeg, "write_frames", partial(write_to_full, imageio_ffmpeg.write_frames)
    )
    with pytest.raises(UserError, match="disk"):
        video.mp4(np.zeros((5, 32, 32, 3), np.uint8), 16)


def write_to_full(plain, path, *args, **how):
    """ffmpeg, whose output does not fit."""
    from pathlib import Path

    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    Path(path).symlink_to("/dev/full")
    return plain(path, *args, **how)


def test_metadata_says_what_a_student_needs_to_be_run(made):
    """Of both files: times, steps, base, rank, rounding."""
    from models import lora

    said = lora.metadata(made("wan22-tiny") / "out" / "low_noise_model.safetensors")
    assert json.loads(said["times"]) == list(step_times(4, 5.0)) and json.loads(said["steps"]) == [
        2,
        3,
    ]
    wanted = {"noise": "low", "phase": "2", "boundary": "0.875", "rank": "4", "alpha": "8.0",
              "shift": "5.0", "timestep_rounding": "none", "paper": "arXiv 2510.27684"}  # fmt: skip
    assert wanted.items() <= said.items()
    said = lora.metadata(made("qwen-image-tiny", "bf16") / "out" / "phase1.safetensors")
    assert said["timestep_rounding"] == "bf16" and "noise" not in said
