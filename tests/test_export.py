"""Claims about what leaves the repository: other tools compute with it what we compute.

The tests with diffusers run its pipelines on tiny networks; they need models/requirements.txt.
"""

import json
import re
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from students import make_student, train_student, write_embeddings, write_lora

import sample
from models import encoders, export, lora, qwen_image, teachers, weights
from models.common import UserError, normal
from models.qwen_image import QwenImage, pack
from phases import step_times, trajectory

TINY = ["wan22-tiny", "wan21-tiny", "wan22-i2v-tiny", "qwen-image-tiny"]
needs_diffusers = pytest.mark.skipif(not find_spec("diffusers"), reason="models/requirements.txt")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """exported(teacher, **settings): a student, made once, and the folder of its export."""
    made = {}

    def make(teacher, **settings):
        key = teacher, *settings.items()
        if key not in made:
            folder = tmp_path_factory.mktemp(teacher)
            student = make_student(folder, teacher, **settings)
            export.export_student(student, folder / "out")
            made[key] = student, folder / "out"
        return made[key]

    return make


# -- the files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "teacher,layer,stems",
    [
        ("wan22-tiny", "blocks.0.self_attn.q", ["high_noise_model", "low_noise_model"]),
        ("qwen-image-tiny", "transformer_blocks.0.attn.to_q", ["phase1", "phase2"]),
    ],
)
def test_a_lora_is_in_the_one_format_that_all_four_tools_take(exported, teacher, layer, stems):
    """float32 lora_down, lora_up, alpha of no dimensions, published names; nothing else."""
    student, out = exported(teacher)
    prefix = "diffusion_model." if "wan" in teacher else ""
    assert [file.stem for file in sorted(out.glob("*.safetensors"))] == stems
    for k, stem in enumerate(stems, 1):
        tensors = load_file(out / f"{stem}.safetensors")
        layers = {re.sub(r"\.(lora_(down|up)\.weight|alpha)$", "", key) for key in tensors}
        assert len(tensors) == 3 * len(layers)
        assert {x.dtype for x in tensors.values()} == {torch.float32}
        alphas = [tensors[f"{name}.alpha"] for name in layers]
        assert {(x.shape, x.item()) for x in alphas} == {(torch.Size([]), 8.0)}
        up = student.file.get_tensor(f"student{k}/{layer}.up")
        assert torch.equal(tensors[f"{prefix}{layer}.lora_up.weight"], up)


@pytest.mark.parametrize(
    "teacher,tensors,size",
    [
        ("wan22", 1200, 1_226_000_000),
        ("wan22-i2v", 1200, 1_226_000_000),
        ("qwen-image", 2160, 1_698_951_104),
    ],
)
def test_full_size_files_have_the_number_of_tensors_and_bytes_of_lightning_files(
    teacher, tensors, size
):
    """At rank 64 in float32. The header, which is not counted here, has a few hundred kB."""
    spec = weights.teacher_spec(teacher)
    layers = lora.adapted_layers(weights.build(spec.network, spec.settings, torch.bfloat16))
    count = sum(64 * (layer.in_features + layer.out_features) for layer in layers.values())
    assert 3 * len(layers) == tensors and abs(4 * count - size) < 3e6


def test_metadata_says_what_a_student_needs_to_be_run(exported):
    metadata = lora.read_metadata(exported("wan22-tiny")[1] / "low_noise_model.safetensors")
    assert json.loads(metadata["times"]) == list(step_times(4, 5.0))
    assert json.loads(metadata["steps"]) == [2, 3]
    expected = {
        "noise": "low",
        "phase": "2",
        "boundary": "0.875",
        "shift": "5.0",
        "branch": "2",
        "base": "wan22-tiny",
    }
    assert expected.items() <= metadata.items()


@pytest.mark.parametrize(
    "settings,expected",
    [
        (dict(shift=7.0), "takes the step at t x 1000 = 875 with the low-noise transformer"),
        (dict(phases=4), "phases 1 and 2 are both on the high-noise transformer"),
        (dict(phases=1), "phase 1 takes the step at t x 1000 = 1000 with the low-noise"),
    ],
)
def test_students_that_routing_by_t_would_break_are_not_exported(tmp_path, settings, expected):
    """At shift 7 other tools take 3 + 1 steps where we take 2 + 2; shift 5 is exported above."""
    with pytest.raises(UserError, match=re.escape(expected)):
        export.export_student(make_student(tmp_path, "wan22-tiny", **settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch, error):
    """In the second expert's file. Files of others are never overwritten."""
    student, calls = make_student(tmp_path, "wan22-tiny"), []

    def fail(*args):
        calls.append(args)
        if len(calls) == 2:
            raise error
        save_file(*args)

    monkeypatch.setattr(export, "save_file", fail)
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt):
        export.export_student(student, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["student.safetensors"]
    monkeypatch.undo()
    assert len(export.export_student(student, tmp_path / "out")) == 3
    with pytest.raises(UserError, match="not empty"):
        export.export_student(student, tmp_path / "out")


def test_a_student_on_a_base_with_a_lora_leaves_as_merged_bf16_weights(tmp_path):
    """They compute what base, teacher LoRA and student LoRA do; base and student alone do not."""
    net, base = weights.random_network("wan21-tiny", torch.float32), tmp_path / "base.safetensors"
    save_file(dict(net.named_parameters()), base)
    write_lora(tmp_path / "teacher.safetensors", "lightning", net)
    student = make_student(
        tmp_path,
        "wan21-tiny",
        weights=(str(base),),
        teacher_lora=(str(tmp_path / "teacher.safetensors"),),
    )
    export.export_student(student, tmp_path / "out")
    file = tmp_path / "out" / "phase2.safetensors"
    assert {x.dtype for x in load_file(file).values()} == {torch.bfloat16, torch.float32}
    assert "base.safetensors with teacher.safetensors" in (tmp_path / "out/README.md").read_text()
    factors = weights.student_weights(student.cfg, student.file, "student2").factors
    merged = weights.load(
        base, torch.float32, teacher="wan21-tiny", teacher_lora=tmp_path / "teacher.safetensors"
    )
    exported = weights.load(file, torch.float32, teacher="wan21-tiny")
    x, c, t = normal((2, 16, 1, 6, 8), "x"), {"text": normal((2, 9, 64), "c")}, torch.rand(2)
    lora.attach(net, "a", factors), lora.attach(merged, "a", factors)
    with torch.no_grad():
        expected = merged(x, t, c, adapter="a")
        assert error(exported(x, t, c), expected) < 2e-2
        assert error(net(x, t, c, adapter="a"), expected) > 0.1


# -- LoRA files on a base ------------------------------------------------------------------------


def assign(cfg, files, steps_given=False):
    boundary_t = weights.teacher_spec(cfg.teacher).boundary
    return export.assign_loras(cfg, files, steps_given, step_times(8, 5.0), boundary_t)


@pytest.mark.parametrize("teacher", ["wan22-tiny", "qwen-image-tiny"])
def test_exported_files_are_assigned_as_the_student_was_trained(exported, teacher):
    """In any order, or as a folder; factors to the bit."""
    student, out = exported(teacher)
    for files in ([out], sorted(out.glob("*.safetensors"))[::-1]):
        plan = assign(student.cfg, files)
        assert plan.roles == ["student1", "student1", "student2", "student2"]
        assert list(plan.times) == student.times and plan.base_of == student.base_of
        for role in student.base_of:
            ours = weights.student_weights(student.cfg, student.file, role).factors
            theirs = plan.weights_of(role).factors
            assert {name: x.scale for name, x in ours.items()} == {
                name: x.scale for name, x in theirs.items()
            }
            assert all(torch.equal(x.up, theirs[name].up) for name, x in ours.items())
            assert all(torch.equal(x.down, theirs[name].down) for name, x in ours.items())


def test_other_files_are_assigned_by_t(tmp_path, exported):
    cfg, net = exported("wan22-tiny")[0].cfg, weights.random_network("wan22-tiny", torch.float32)
    files = [tmp_path / "my_low.safetensors", tmp_path / "my_high.safetensors"]
    for seed, file in enumerate(files):
        write_lora(file, "A B", net, seed)
    plan, high = assign(cfg, files), sum(t >= 0.875 for t in step_times(8, 5.0)[:-1])
    assert plan.roles == ["student1"] * high + ["student2"] * (8 - high) and 0 < high < 8
    name, factors = next(iter(plan.weights_of("student1").factors.items()))
    key = f"diffusion_model.{name}.lora_B.default.weight"
    assert torch.equal(factors.up, load_file(files[1])[key])


@pytest.mark.parametrize(
    "names,changes,expected",
    [
        (["low"], {}, "all phases of one student, got low"),
        (["absent"], {}, "does not exist"),
        (["high", "low"], {"times": "[1.0, 0.9, 0.75, 0.5, 0.0]"}, "all phases of one student"),
        (["high", "low"], {"teacher": "wan22-i2v-tiny"}, "is for wan22-i2v-tiny"),
        (["high", "low"], {"times": None}, "both for high noise"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(
    exported, tmp_path, names, changes, expected
):
    student, out = exported("wan22-tiny")
    high, low = sorted(out.glob("*.safetensors"))
    for name, source in (("high", high), ("low", low)):
        metadata = lora.read_metadata(source) | (changes if name == "low" else {})
        if metadata["times"] is None:  # not one of our files
            metadata = {"noise": "high"}
        save_file(load_file(source), tmp_path / name, metadata)
    with pytest.raises(UserError, match=expected):
        assign(student.cfg, [tmp_path / name for name in names])


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


# -- diffusers -----------------------------------------------------------------------------------


def error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def diffusers_network(teacher, dtype, seed):
    """The network of diffusers with the weights of our random one."""
    import diffusers

    net = weights.random_network(teacher, dtype, seed=seed)
    if isinstance(net, QwenImage):
        model = diffusers.QwenImageTransformer2DModel(**net.settings)
    else:
        model = diffusers.WanTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=32,
            ffn_dim=256,
            num_layers=2,
            text_dim=64,
            in_channels=net.patch_embedding.in_channels,
        )
    model.load_state_dict({net.diffusers_name(name): p for name, p in net.named_parameters()})
    return model.to(dtype).eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """bases(teacher, dtype): the folder of a pipeline of diffusers with a small VAE."""
    import diffusers

    saved = {}

    def save(teacher, dtype):
        if (teacher, dtype) not in saved:
            saved[teacher, dtype] = folder = tmp_path_factory.mktemp(teacher) / "base"
            spec, qwen = weights.TEACHERS[teacher], "qwen" in teacher
            torch.manual_seed(0)
            nets = [diffusers_network(teacher, dtype, branch) for branch in (1, 2)]
            vae = diffusers.AutoencoderKLQwenImage if qwen else diffusers.AutoencoderKLWan
            vae = vae(
                base_dim=4,
                z_dim=16,
                dim_mult=[1, 1, 1, 1],
                num_res_blocks=1,
                temperal_downsample=[False, True, True],
            )
            parts = dict(tokenizer=None, text_encoder=None, transformer=nets[0], vae=vae)
            parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
            if spec.boundary:
                parts |= dict(transformer_2=nets[1], boundary_ratio=spec.boundary)
            if spec.is_i2v:
                parts |= dict(image_encoder=None, image_processor=None)
            kind = "WanImageToVideo" if spec.is_i2v else "QwenImage" if qwen else "Wan"
            getattr(diffusers, f"{kind}Pipeline")(**parts).save_pretrained(folder)
        return saved[teacher, dtype]

    return save


def run_card(out, base, dtype):
    """The pipeline and the settings that the card's own snippet makes, on the CPU."""
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
    """The latents of diffusers after every step."""
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
        *[(teacher, "float32", "full", 1e-5) for teacher in TINY if "i2v" not in teacher],
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
    print(f"{teacher} {dtype} {generator}: worst of {len(ours)} steps {worst:.1e}")
    assert worst < bound
    assert torch.equal(run()[1][-1], theirs[-1])  # a second prompt begins with the first expert
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    assert error(ours[-1], run()[1][-1]) > 3 * bound


@needs_diffusers
def test_a_prompt_becomes_a_video_or_a_picture(bases, tmp_path):
    """Of the right length, size and rate; the latents are kept."""
    import imageio_ffmpeg

    base = bases("wan22-tiny", torch.float32)
    prompts = write_embeddings(tmp_path / "p.safetensors", "wan22-tiny", ["a fox"])
    line = [
        "--teacher",
        "wan22-tiny",
        "--weights",
        base,
        "--prompts",
        prompts,
        "--n",
        1,
        "--steps",
        1,
        "--size",
    ]
    for size, name in (("9x48x64", "000-00.mp4"), ("1x48x64", "000-00.png")):
        out = tmp_path / size
        assert sample.main([*map(str, [*line, size, "--out", out])]) == 0
        names = {path.name for path in out.iterdir()}
        assert {name, "latents.safetensors", "samples.png"} <= names
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "9x48x64" / "000-00.mp4"))
    metadata = next(reader)
    assert metadata["fps"] == 16 and tuple(metadata["size"]) == (64, 48) and len([*reader]) == 9


@needs_diffusers
def test_rounding_of_times_is_what_qwen_image_in_bf16_needs(bases, tmp_path, monkeypatch):
    """Negative control of the line above: with times in float32 the latents are others."""
    base = bases("qwen-image-tiny", torch.bfloat16)
    monkeypatch.setattr(qwen_image, "round_time", lambda t: t)
    ours, theirs = compare(tmp_path, base, "qwen-image-tiny", "bf16")[0]()
    assert error(ours[-1], theirs[-1]) > 5e-2
