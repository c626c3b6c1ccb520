"""Claims about what leaves the repository: other tools compute with it what we compute.

The tests with diffusers run its pipelines on tiny networks; they need models/requirements.txt.
"""

import json
import re
import signal
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from students import make_student, train_student, write_embeddings, write_lora

import sample
from models import encoders, export, lora, qwen_image, teachers, weights
from models.card import make_card
from models.common import UserError, normal
from models.qwen_image import QwenImage, pack
from phases import step_times, trajectory

TINY = ["wan22-tiny", "wan21-tiny", "wan22-i2v-tiny", "qwen-image-tiny"]
needs_diffusers = pytest.mark.skipif(not find_spec("diffusers"), reason="models/requirements.txt")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """exported(teacher): a student, made once, and the folder of its export."""

    @cache
    def make(teacher):
        folder = tmp_path_factory.mktemp(teacher)
        student = make_student(folder, teacher)
        export.export_student(student, folder / "out")
        return student, folder / "out"

    return make


# -- the files -----------------------------------------------------------------------------------


WAN_FILES = ("wan22-tiny", "blocks.0.self_attn.q", ["high_noise_model", "low_noise_model"])
QWEN_FILES = ("qwen-image-tiny", "transformer_blocks.0.attn.to_q", ["phase1", "phase2"])


@pytest.mark.parametrize("teacher,layer,stems", [WAN_FILES, QWEN_FILES])
def test_a_lora_is_in_the_one_format_that_all_four_tools_take(exported, teacher, layer, stems):
    """float32 lora_down, lora_up, alpha of no dimensions, published names; nothing else."""
    student, out = exported(teacher)
    assert [file.stem for file in sorted(out.glob("*.safetensors"))] == stems
    for k, stem in enumerate(stems, 1):
        tensors = load_file(out / f"{stem}.safetensors")
        layers = {re.sub(r"\.(lora_(down|up)\.weight|alpha)$", "", key) for key in tensors}
        assert len(tensors) == 3 * len(layers)
        assert {x.dtype for x in tensors.values()} == {torch.float32}
        alphas = [tensors[f"{name}.alpha"] for name in layers]
        assert {(x.shape, x.item()) for x in alphas} == {(torch.Size([]), 8.0)}
        up = student.file.get_tensor(f"student{k}/{layer}.up")
        assert torch.equal(tensors[f"diffusion_model.{layer}.lora_up.weight"], up)
        metadata = lora.read_metadata(out / f"{stem}.safetensors")
        assert json.loads(metadata["steps"]) == [2 * k - 2, 2 * k - 1]
        assert json.loads(metadata["times"]) == student.times


@pytest.mark.parametrize(
    "settings,expected",
    [
        (dict(phases=4), "phase 1 on high noise and phase 2 on high noise and phase 3 on low"),
        (dict(phases=1, depths="drawn"), "found phase 1 on low noise; train with --phases 2"),
    ],
)
def test_students_without_one_expert_per_transformer_are_not_exported(tmp_path, settings, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        export.export_student(make_student(tmp_path, "wan22-tiny", **settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_card_has_the_settings_of_the_other_tools(tmp_path):
    """LightX2V's names and steps, and boundaries. A note where steps do not divide 1000."""
    for shift, boundary in ((5.0, "0.875"), (7.0, "0.91477")):
        student = make_student(tmp_path, "wan22-tiny", shift=shift)
        card = make_card(student, ["high_noise_model", "low_noise_model"], "base")
        config = json.loads(re.search(r"LightX2V .*`(\{.*\})`", card)[1])
        assert [x["name"] for x in config["lora_configs"]] == [
            "high_noise_model",
            "low_noise_model",
        ]
        assert config["denoising_step_list"] == [1000, 750, 500, 250]
        assert config["boundary_step_index"] == 2 and config["sample_shift"] == shift
        assert f"boundary, or switch_DiT_boundary, {boundary}\n" in card
        assert ("register_to_config" in card) == (shift == 7) and "not a multiple" not in card
    student = make_student(tmp_path, "wan22-tiny", steps=6)
    assert "1000 is not a multiple of 6" in make_card(student, ["high", "low"], "base")


@pytest.mark.parametrize("kind", ["empty", "link", "here", "leftover", "disk"])
def test_an_export_goes_to_any_empty_folder(tmp_path, monkeypatch, kind):
    """What a killed export left there is removed; hidden files and lost+found are no matter."""
    student, out, folder = make_student(tmp_path, "wan22-tiny"), tmp_path / "out", tmp_path / "out"
    folder.mkdir()
    if kind == "link":
        out = tmp_path / "link"
        out.symlink_to(folder)
    if kind == "here":
        monkeypatch.chdir(folder)
        out = Path()
    if kind == "leftover":
        (folder / "unfinished-export").mkdir()
        (folder / "unfinished-export" / "low_noise_model.safetensors").write_bytes(b"half")
    if kind == "disk":
        (folder / "lost+found").mkdir()
        (folder / ".DS_Store").write_bytes(b"")
    files = export.export_student(student, out)
    names = {"README.md", "high_noise_model.safetensors", "low_noise_model.safetensors"}
    assert {file.name for file in files} == names and all(file.stat().st_size > 9 for file in files)
    assert {x.name for x in folder.iterdir()} - {"lost+found", ".DS_Store"} == names


@pytest.mark.parametrize("kind", ["file", "broken", "full", "below a file"])
def test_another_target_is_refused_before_a_tensor_is_read(tmp_path, kind):
    """In a line that names --export. What is there stays."""
    student, out = make_student(tmp_path, "wan22-tiny")._replace(file=None), tmp_path / "out"
    if kind == "file":
        out.write_bytes(b"mine")
    if kind == "broken":
        out.symlink_to(tmp_path / "nowhere")
    if kind == "full":
        out.mkdir()
        (out / "README.md").write_bytes(b"mine")
    if kind == "below a file":
        out = tmp_path / "student.safetensors" / "out"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="--export"):
        export.export_student(student, out)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_export_that_is_stopped_leaves_nothing(tmp_path, monkeypatch, number):
    """In the second expert's file. A folder that is not empty is never written."""
    student, calls = make_student(tmp_path, "wan22-tiny"), []

    def stop(*args):
        calls.append(args)
        if len(calls) == 2:
            signal.raise_signal(number)
        save_file(*args)

    # a shell's background jobs ignore Ctrl-C
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    handlers = [signal.getsignal(number), signal.signal(signal.SIGTERM, lambda *_: None)]
    monkeypatch.setattr(export, "save_tensors", stop)
    with pytest.raises(KeyboardInterrupt):
        export.export_student(student, tmp_path / "out")
    signal.signal(signal.SIGTERM, handlers[1])
    assert signal.getsignal(number) == handlers[0]
    signal.signal(signal.SIGINT, interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["student.safetensors"]
    with pytest.raises(UserError, match="not empty"):
        export.export_student(student, tmp_path)


def test_a_student_on_a_base_with_a_lora_leaves_as_merged_bf16_weights(tmp_path):
    """They compute what base, teacher LoRA and student LoRA do; base and student alone do not."""
    net, base = weights.random_network("wan21-tiny", torch.float32), tmp_path / "base.safetensors"
    save_file(dict(net.named_parameters()), base)
    write_lora(tmp_path / "teacher.safetensors", "lightning", net)
    teacher_lora = tmp_path / "teacher.safetensors"
    files = dict(weights=(str(base),), teacher_lora=(f"{teacher_lora}:0.5",))
    student = make_student(tmp_path, "wan21-tiny", **files)
    assert teachers.base_files(student.cfg) == [base, teacher_lora]
    export.export_student(student, tmp_path / "out")
    file = tmp_path / "out" / "phase2.safetensors"
    assert {x.dtype for x in load_file(file).values()} == {torch.bfloat16, torch.float32}
    factors = weights.student_weights(student.cfg, student.file, "student2").factors
    load = partial(weights.load, dtype=torch.float32, teacher="wan21-tiny")
    exported, merged = load(file), load(base, loras=[(teacher_lora, 0.5)])
    x, c, t = normal((2, 16, 1, 6, 8), "x"), {"text": normal((2, 9, 64), "c")}, torch.rand(2)
    lora.attach(net, "a", factors), lora.attach(merged, "a", factors)
    with torch.no_grad():
        expected = merged(x, t, c, adapter="a")
        assert error(exported(x, t, c), expected) < 2e-2
        assert error(net(x, t, c, adapter="a"), expected) > 0.1


# -- LoRA files on a base ------------------------------------------------------------------------


def assign(cfg, files):
    """Assign LoRA files to the steps of a sampler with 8 steps at shift 5."""
    boundary_t = weights.teacher_spec(cfg.teacher).boundary
    return export.assign_loras(cfg, files, False, step_times(8, 5.0), boundary_t)


@pytest.mark.parametrize("teacher", ["wan22-tiny", "qwen-image-tiny"])
def test_exported_files_are_assigned_as_the_student_was_trained(exported, teacher):
    """In any order, or as a folder; factors to the bit."""
    student, out = exported(teacher)
    for files in ([out], sorted(out.glob("*.safetensors"))[::-1]):
        roles, times, base_of, weights_of = assign(student.cfg, files)
        assert roles == ["student1", "student1", "student2", "student2"]
        assert list(times) == student.times and base_of == student.base_of
        for role in student.base_of:
            ours = weights.student_weights(student.cfg, student.file, role).factors
            theirs = weights_of(role).factors
            assert ours.keys() == theirs.keys()
            for name, x in ours.items():
                y = theirs[name]
                assert x.scale == y.scale
                assert torch.equal(x.up, y.up) and torch.equal(x.down, y.down)


def test_files_of_two_students_are_not_mixed(exported, tmp_path):
    student, out = exported("wan22-tiny")
    high, low = sorted(out.glob("*.safetensors"))
    other = lora.read_metadata(low) | {"times": "[1.0, 0.9, 0.75, 0.5, 0.0]"}
    save_file(load_file(low), tmp_path / "low", other)
    for files in ([low], [high, tmp_path / "low"]):
        with pytest.raises(UserError, match="all phases of one student"):
            assign(student.cfg, files)


@pytest.mark.parametrize("teacher", ["wan22-tiny", "qwen-image-tiny"])
def test_a_style_lora_joins_an_exported_student(exported, tmp_path, teacher):
    """The student's times stay, whatever the defaults are. A name may say which expert."""
    student, out = exported(teacher)
    net = weights.random_network(teacher, torch.float32)
    layer, style = next(iter(lora.adapted_layers(net))), tmp_path / "style_low.safetensors"
    write_lora(style, "lightning", net)
    _, times, _, weights_of = assign(student.cfg, [out, f"{style}:0.5"])
    assert list(times) == student.times
    for role in student.base_of:
        ours = weights_of(role).factors[layer].up.shape[1]
        assert ours == student.cfg.rank + 2 * (role == "student2" or "qwen" in teacher)


def test_phases_of_one_transformer_are_not_added_up(exported):
    """Steps of the user's own would do that."""
    student, out = exported("qwen-image-tiny")
    with pytest.raises(UserError, match="steps of their own; drop --steps, --shift"):
        export.assign_loras(student.cfg, [out], True, step_times(8, 5.0), None)


def test_what_random_weights_cannot_take_is_refused(tmp_path):
    """A bias was silently left out."""
    cfg = make_student(tmp_path, "wan21-tiny").cfg
    save_file({"blocks.0.ffn.0.diff_b": torch.ones(256)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="blocks.0.ffn.0.bias of random weights"):
        assign(cfg, [tmp_path / "x.safetensors"])


def test_a_folder_without_a_lora_says_what_is_in_it(tmp_path):
    cfg = make_student(tmp_path, "wan21-tiny").cfg
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "._style.safetensors").write_bytes(b"macOS")
    with pytest.raises(UserError, match="contains no .safetensors"):
        assign(cfg, [tmp_path / "lora"])
    (tmp_path / "lora" / "pytorch_lora_weights.BIN").write_bytes(b"PK")
    with pytest.raises(UserError, match="a pickle, which is never opened"):
        assign(cfg, [tmp_path / "lora"])


def test_train_export_and_sample_go_through_the_commands(tmp_path, capsys):
    """sample.py makes the same latents of a student and of its exported files."""
    run = train_student(tmp_path / "run", "wan22-tiny", "--dtype", "float32")
    assert sample.main(["--student", str(run), "--export", str(tmp_path / "out")]) == 0
    assert "high_noise_model.safetensors" in capsys.readouterr().out
    prompts = write_embeddings(tmp_path / "p.safetensors", "wan22-tiny", ["a fox"])
    line = ["--prompts", prompts, "--n", 1, "--size", "9x48x64", "--out"]
    for name, source in (
        ("a", ["--student", run]),
        ("b", ["--teacher", "wan22-tiny", "--dtype", "float32", "--lora", tmp_path / "out"]),
    ):
        assert sample.main([*map(str, [*source, *line, tmp_path / name])]) == 0
    a, b = (load_file(tmp_path / name / "latents.safetensors")["x"] for name in "ab")
    assert torch.equal(a, b)


def test_an_export_given_as_a_student_says_how_to_sample_it(exported, capsys):
    """A folder, or a file of it."""
    out = exported("qwen-image-tiny")[1]
    for path in (out, out / "phase1.safetensors"):
        assert sample.main(["--student", str(path)]) == 2
        assert f"got {path}; sample exported LoRA files with --teacher" in capsys.readouterr().err


# -- diffusers -----------------------------------------------------------------------------------


def error(a, b):
    """Relative error of a."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def diffusers_network(teacher, dtype, seed):
    """The network of diffusers with the weights of our random one."""
    import diffusers

    net = weights.random_network(teacher, dtype, seed=seed)
    if isinstance(net, QwenImage):
        model = diffusers.QwenImageTransformer2DModel(**net.settings)
    else:
        heads = dict(num_attention_heads=4, attention_head_dim=32)
        sizes = dict(ffn_dim=256, num_layers=2, text_dim=64)
        channels = net.patch_embedding.in_channels
        model = diffusers.WanTransformer3DModel(**heads, **sizes, in_channels=channels)
    model.load_state_dict({net.diffusers_name(name): p for name, p in net.named_parameters()})
    return model.to(dtype).eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """bases(teacher, dtype): the folder of a pipeline of diffusers with a small VAE."""
    import diffusers

    @cache
    def save(teacher, dtype):
        folder = tmp_path_factory.mktemp(teacher) / "base"
        spec, is_qwen = weights.TEACHERS[teacher], "qwen" in teacher
        torch.manual_seed(0)
        nets = [diffusers_network(teacher, dtype, branch) for branch in (1, 2)]
        make_vae = diffusers.AutoencoderKLQwenImage if is_qwen else diffusers.AutoencoderKLWan
        down = dict(dim_mult=[1, 1, 1, 1], temperal_downsample=[False, True, True])
        vae = make_vae(base_dim=4, z_dim=16, num_res_blocks=1, **down)
        parts = dict(tokenizer=None, text_encoder=None, transformer=nets[0], vae=vae)
        parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        if spec.boundary:
            parts |= dict(transformer_2=nets[1], boundary_ratio=spec.boundary)
        if spec.is_i2v:
            parts |= dict(image_encoder=None, image_processor=None)
        kind = "WanImageToVideo" if spec.is_i2v else "QwenImage" if is_qwen else "Wan"
        getattr(diffusers, f"{kind}Pipeline")(**parts).save_pretrained(folder)
        return folder

    return save


def run_card(out, base, dtype):
    """Run the card's own snippet on the CPU and return its pipeline and settings."""
    code = re.search(r"```python\n(.*?settings = .*?\n)", (out / "README.md").read_text(), re.S)[1]
    code = re.sub(r"base, here = .*", f"base, here = {str(base)!r}, {str(out)!r}", code)
    code = code.replace("(base, ", "(base, text_encoder=None, tokenizer=None, ")
    code = code.replace('"cuda"', '"cpu"')
    if dtype == torch.float32:
        code = code.replace("torch.bfloat16", "torch.float32")
    values = {}
    exec(code, values)
    values["pipe"].set_progress_bar_config(disable=True)
    return values["pipe"], values["settings"]


def run_pipeline(pipe, settings, z, text, image=None):
    """Run a pipeline of diffusers and return its latents after every step."""
    latents, switch = [], settings.get("callback_on_step_end")

    def record(pipe, i, t, kwargs):
        latents.append(kwargs["latents"].float())
        return switch(pipe, i, t, {}) if switch else {}

    settings = settings | dict(
        prompt_embeds=text.to(pipe.transformer.dtype),
        output_type="latent",
        latents=z if z.ndim == 5 else pack(z),
    )
    if z.ndim == 4:
        settings["prompt_embeds_mask"] = torch.ones(text.shape[:2], dtype=torch.long)
    if image is not None:
        settings["image"] = image
    with torch.no_grad():
        pipe(**settings | dict(callback_on_step_end=record))
    return latents


def our_latents(student, z, c):
    """x after every step of sample.py, packed as in diffusers."""
    weights_of = partial(weights.student_weights, student.cfg, student.file)
    cfg, device = replace(student.cfg, guidance=(1.0,)), torch.device("cpu")
    velocity = teachers.make_sampler(cfg, student.base_of, weights_of, device, None)
    nets = [partial(velocity, f"student{p.k}") for p in student.phases for _ in p.t[:-1]]
    with torch.no_grad():
        xs = list(trajectory(nets, student.times, z, c))[1:]
    return xs if z.ndim == 5 else [pack(x) for x in xs]


def compare(folder, base, teacher, dtype="float32", **settings):
    """A function that returns our latents and those of diffusers; the files; the pipeline."""
    size = ("64x96",) if "qwen" in teacher else ("9x48x64",)
    settings |= dict(dtype=dtype, weights=(str(base),), size=size)
    student = make_student(folder, teacher, **settings)
    files = export.export_student(student, folder / "out")
    pipe, flags = run_card(folder / "out", base, weights.dtype_named(dtype))
    text = normal((1, 9 if "qwen" in teacher else 512, 64), "text").bfloat16().float()
    z = normal((1, 16, 8, 12) if "qwen" in teacher else (1, 16, 3, 6, 8), "z")
    c, image = {"text": text}, None
    if "i2v" in teacher:
        image = normal((1, 3, 48, 64), "pixels").clamp(-1, 1)
        vae = encoders.load_vae(teacher, base, "cpu")
        c["image"] = encoders.encode_first_frames(vae, image, 9)
    run = lambda: (our_latents(student, z, c), run_pipeline(pipe, flags, z, text, image))
    return run, files, pipe


@needs_diffusers
@pytest.mark.parametrize(
    "teacher,dtype,generator,bound",
    [
        *[(teacher, "float32", "lora", 1e-5) for teacher in TINY],
        *[(teacher, "float32", "full", 1e-5) for teacher in TINY],
        ("qwen-image-tiny", "bf16", "lora", 3e-2),
    ],
)
def test_the_pipeline_set_as_the_card_says_makes_our_latents_step_by_step(
    bases, tmp_path, caplog, teacher, dtype, generator, bound
):
    """Every key is used. Negative control: another shift gives other latents."""
    import diffusers

    diffusers.utils.logging.enable_propagation()
    base = bases(teacher, weights.dtype_named(dtype))
    run, files, pipe = compare(tmp_path, base, teacher, dtype, generator=generator)
    assert not [r.message for r in caplog.records if "LoRA" in r.message or "key" in r.message]
    if generator == "lora":
        written = sum(len(load_file(file)) for file in files if file.suffix == ".safetensors")
        nets = [net for net in (pipe.transformer, getattr(pipe, "transformer_2", None)) if net]
        factors = [name for net in nets for name in net.state_dict() if "lora_" in name]
        assert written == 3 * len(factors) // 2  # two factors, and an alpha, per layer
    ours, theirs = run()
    worst = max(error(a, b) for a, b in zip(ours, theirs, strict=True))
    assert worst < bound
    assert torch.equal(run()[1][-1], theirs[-1])  # a second prompt begins with the first expert
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    assert error(ours[-1], run()[1][-1]) > 3 * bound


@needs_diffusers
def test_the_card_of_a_student_whose_phases_meet_at_the_boundary_routes_by_step(bases, tmp_path):
    """At shift 7 the low-noise expert takes t = 0.875. Negative control: the teacher's boundary."""
    base = bases("wan22-tiny", torch.float32)
    run, _, pipe = compare(tmp_path, base, "wan22-tiny", shift=7.0)
    ours, theirs = run()
    assert max(error(a, b) for a, b in zip(ours, theirs, strict=True)) < 1e-5
    pipe.register_to_config(boundary_ratio=0.875)
    assert error(ours[-1], run()[1][-1]) > 1e-3


@needs_diffusers
def test_a_prompt_becomes_a_video(bases, tmp_path):
    """With the right length, size and frame rate."""
    import imageio_ffmpeg

    base = bases("wan22-tiny", torch.float32)
    prompts = write_embeddings(tmp_path / "p.safetensors", "wan22-tiny", ["a fox"])
    line = ["--teacher", "wan22-tiny", "--weights", base, "--prompts", prompts]
    line += ["--n", 1, "--steps", 1, "--size"]
    assert sample.main([*map(str, [*line, "9x48x64", "--out", tmp_path / "out"])]) == 0
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "out" / "000-00.mp4"))
    metadata = next(reader)
    assert metadata["fps"] == 16 and tuple(metadata["size"]) == (64, 48) and len([*reader]) == 9


@needs_diffusers
def test_rounding_of_times_is_what_qwen_image_in_bf16_needs(bases, tmp_path, monkeypatch):
    """Negative control of the bf16 case above: with times in float32 the latents differ."""
    base = bases("qwen-image-tiny", torch.bfloat16)
    monkeypatch.setattr(qwen_image, "round_time", lambda t: t)
    ours, theirs = compare(tmp_path, base, "qwen-image-tiny", "bf16")[0]()
    assert error(ours[-1], theirs[-1]) > 5e-2
