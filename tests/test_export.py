"""Claims about what leaves the repository: other tools compute with it what we compute.

The test with diffusers runs its pipeline on a tiny network; it needs models/requirements.txt.
"""

import json
import re
import signal
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from students import error_of, make_student, refusal, train_student, write_embeddings, write_lora

import sample
from models import export, lora, teachers, weights
from models.card import make_card
from models.common import UserError, normal
from phases import step_times
from train import phases_of


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


@pytest.fixture
def student(exported):
    """A student of wan22-tiny, which others do not change."""
    return exported("wan22-tiny")[0]


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


def test_the_card_has_the_settings_of_the_other_tools(student, tmp_path):
    """LightX2V's names and steps, and boundaries. A note where steps do not divide 1000."""
    for shift, boundary in ((5.0, "0.875"), (7.0, "0.91477")):
        cfg, names = replace(student.cfg, shift=shift), ["high_noise_model", "low_noise_model"]
        card = make_card(student._replace(cfg=cfg, phases=phases_of(cfg)), names, "base")
        config = json.loads(re.search(r"LightX2V .*`(\{.*\})`", card)[1])
        assert [x["name"] for x in config["lora_configs"]] == names
        assert config["denoising_step_list"] == [1000, 750, 500, 250]
        assert config["boundary_step_index"] == 2 and config["sample_shift"] == shift
        assert f"boundary, or switch_DiT_boundary, {boundary}\n" in card
        assert ("register_to_config" in card) == (shift == 7) and "not a multiple" not in card
    cfg = replace(student.cfg, steps=6)
    student = student._replace(cfg=cfg, phases=phases_of(cfg))
    assert "1000 is not a multiple of 6" in make_card(student, ["high", "low"], "base")


def test_an_export_goes_to_any_empty_folder(student, tmp_path):
    """What a killed export left there is removed; hidden files and lost+found are no matter."""
    out, folder = tmp_path / "link", tmp_path / "out"
    for name in ("unfinished-export", "lost+found"):
        (folder / name).mkdir(parents=True)
    for name in ("unfinished-export/low_noise_model.safetensors", "README.md", ".DS_Store"):
        (folder / name).write_bytes(b"half")
    out.symlink_to(folder)
    files = export.export_student(student, out)
    names = {"README.md", "high_noise_model.safetensors", "low_noise_model.safetensors"}
    assert {file.name for file in files} == names and all(file.stat().st_size > 9 for file in files)
    assert {x.name for x in folder.iterdir()} - {"lost+found", ".DS_Store"} == names


def test_another_target_is_refused_before_a_tensor_is_read(student, tmp_path):
    """A file, a link to nowhere, a folder with other files, in a line that names --export."""
    student = student._replace(file=None)
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "README.md").write_bytes(b"mine")
    before = sorted(tmp_path.rglob("*"))
    for name in ("file", "file/below", "broken", "full"):
        with pytest.raises(UserError, match="--export"):
            export.export_student(student, tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("owner,name", [(export, "save_tensors"), (Path, "rename")])
def test_an_export_that_is_stopped_leaves_nothing(student, tmp_path, monkeypatch, owner, name):
    """By SIGTERM, at the second file written or moved. The signal's handler is as before."""
    calls, work = [], getattr(owner, name)

    def stop(*args):
        calls.append(args)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        work(*args)

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(owner, name, stop)
    with pytest.raises(KeyboardInterrupt):
        export.export_student(student, tmp_path / "out")
    assert signal.getsignal(signal.SIGTERM) == handler and not list(tmp_path.iterdir())


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
        assert error_of(exported(x, t, c), expected) < 2e-2
        assert error_of(net(x, t, c, adapter="a"), expected) > 0.1


# -- LoRA files on a base ------------------------------------------------------------------------


def assign(cfg, files):
    """Assign LoRA files to the steps of a sampler with 8 steps at shift 5."""
    boundary_t = weights.teacher_spec(cfg.teacher).boundary
    plan = export.assign_loras(cfg, files, False, step_times(8, 5.0), boundary_t)
    return plan, partial(export.lora_weights, cfg, plan)


@pytest.mark.parametrize("teacher", ["wan22-tiny", "qwen-image-tiny"])
def test_exported_files_are_assigned_as_the_student_was_trained(exported, teacher):
    """In any order, or as a folder; factors to the bit."""
    student, out = exported(teacher)
    for files in ([out], sorted(out.glob("*.safetensors"))[::-1]):
        plan, weights_of = assign(student.cfg, files)
        assert plan.roles == ["student1", "student1", "student2", "student2"]
        assert list(plan.times) == student.times and plan.branch_of == student.branch_of
        for role in student.branch_of:
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
    plan, weights_of = assign(student.cfg, [out, f"{style}:0.5"])
    assert list(plan.times) == student.times
    for role in student.branch_of:
        ours = weights_of(role).factors[layer].up.shape[1]
        assert ours == student.cfg.rank + 2 * (role == "student2" or "qwen" in teacher)


def test_phases_of_one_transformer_are_not_added_up(exported):
    """Steps of the user's own would do that."""
    student, out = exported("qwen-image-tiny")
    with pytest.raises(UserError, match="steps of their own; drop --steps, --shift"):
        export.assign_loras(student.cfg, [out], True, step_times(8, 5.0), None)


def test_train_export_and_sample_go_through_the_commands(runs, tmp_path, monkeypatch, capsys):
    """sample.py makes the same latents of a student and of its files, exported where it runs."""
    run = runs("wan22-tiny")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert sample.main(["--student", str(run), "--export", "."]) == 0
    assert "high_noise_model.safetensors" in capsys.readouterr().out
    prompts = write_embeddings(tmp_path / "p.safetensors", "wan22-tiny", ["a fox"])
    line = ["--prompts", prompts, "--n", 1, "--size", "1x32x32", "--out"]
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
        error = refusal(capsys, ["--student", path], sample.main)
        assert f"got {path}; sample exported LoRA files with --teacher" in error


# -- diffusers -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("student", ["lora", "full"])
def test_diffusers_samples_a_student_of_shift_7_as_its_card_says(student, tmp_path, monkeypatch):
    """There the card routes by step. Control: the low-noise expert takes all steps."""
    pytest.importorskip("diffusers", reason="needs models/requirements.txt")
    pytest.importorskip("transformers", reason="needs models/requirements.txt")
    from published import save_diffusers, small_spec
    from test_published import PROMPT, run_pipeline

    monkeypatch.setitem(weights.TEACHERS, "wan22", small_spec("wan22"))
    base, prompts = tmp_path / "base", tmp_path / "p.txt"
    save_diffusers(base, "wan22")
    prompts.write_text(PROMPT)
    flags = f"--train-student {student} --shift 7 --dtype float32 --size 5x32x48 --device cpu"
    flags = [*flags.split(), "--weights", base, "--prompts", prompts]
    line = ["--student", str(train_student(tmp_path / "run", "wan22", *flags)), "--device", "cpu"]
    samples = ["--n", "1", "--prompt", PROMPT, "--out", str(tmp_path / "samples")]
    assert sample.main([*line, *samples]) == 0
    assert sample.main([*line, "--export", str(tmp_path / "export")]) == 0
    x = load_file(tmp_path / "samples" / "latents.safetensors")["x"]
    z = normal(x.shape[1:], 0, "sample", 0, "z")[None]
    theirs, _ = run_pipeline(tmp_path, base, z, (5, 32, 48))
    high, low = sorted((tmp_path / "export").glob("*.safetensors"))
    high.write_bytes(low.read_bytes())
    control, _ = run_pipeline(tmp_path, base, z, (5, 32, 48))
    print(f"error {error_of(theirs, x):.1e}, of one expert {error_of(control, x):.1e}")
    assert error_of(theirs, x) < 1e-5 and error_of(control, x) > 1e-2
