"""Claims about sampling: students, teachers, LoRA files, one network in memory at a time."""

import weakref

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from students import load_run, refusal, train_student, write_base, write_embeddings, write_lora

import sample
import train
from models import teachers, weights
from models.common import normal, stream
from phases import step_times, trajectory

NUM_HIGH = sum(t >= 0.875 for t in step_times(8, 12.0)[:-1])  # steps of the high-noise branch


def run_sample(capsys, *line) -> str:
    """Run the command, which must succeed, and return what it prints."""
    capsys.readouterr()
    assert sample.main([*map(str, line)]) == 0
    return capsys.readouterr().out


def latents(folder) -> dict:
    """The latents that were sampled."""
    return load_file(folder / "latents.safetensors")


# -- students ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "teacher,flags",
    [
        ("wan22-tiny", ()),
        pytest.param("wan22-i2v-tiny", ("--train-student", "full"), marks=pytest.mark.slow),
    ],
)
def test_what_is_sampled_is_what_the_run_had_in_memory(runs, tmp_path, teacher, flags):
    """One network at a time computes what all roles together do; swapped experts do not."""
    folder = runs(teacher, *flags)
    line = ["--student", folder, "--n", "2", "--trajectory", "--out", tmp_path]
    assert sample.main([*map(str, line)]) == 0
    xs, run = latents(tmp_path), load_run(folder)
    c, shape = run.data(2, *(stream(0, "sample", name) for name in ("shape", "condition")))
    z = torch.stack([normal(shape, 0, "sample", j, "z") for j in range(2)])
    assert torch.equal(z, xs["x0"])
    with torch.no_grad():
        for i, x in enumerate(trajectory(run.nets, run.times, z, c)):
            assert torch.allclose(xs[f"x{i}"], x, atol=1e-5)
        *_, swapped = trajectory(run.nets[::-1], run.times, z, c)
    assert not torch.allclose(swapped, xs["x4"], atol=1e-2)


def test_one_network_is_in_memory_at_a_time(runs, tmp_path, monkeypatch):
    """Wan2.2's two bases, one after the other: the first is freed before the second is loaded."""
    load_base, refs, alive = teachers.load_base, [], []

    def load(*arguments, **options):
        alive.append(sum(ref() is not None for ref in refs))
        net = load_base(*arguments, **options)
        refs.append(weakref.ref(net))
        return net

    monkeypatch.setattr(teachers, "load_base", load)
    line = ["--student", runs("wan22-tiny"), "--n", 1, "--out", tmp_path]
    assert sample.main([*map(str, line)]) == 0
    assert alive == [0, 0]


def test_seeds_and_prompts_share_their_noises(runs, tmp_path):
    """Sample j of every prompt starts from the same noise; fewer samples are the first of more."""
    folder = runs("wan22-tiny")
    prompts = write_embeddings(tmp_path / "p.safetensors", "wan22-tiny")
    line = ["--student", folder, "--prompts", prompts, "--trajectory"]
    for n, seed in ((2, 0), (1, 0), (1, 1)):
        out = tmp_path / f"{n}{seed}"
        assert sample.main([*map(str, [*line, "--n", n, "--seed", seed, "--out", out])]) == 0
    two, one, other = (latents(tmp_path / name) for name in ("20", "10", "11"))
    assert torch.equal(two["x0"][:2], two["x0"][2:])
    assert not torch.allclose(two["x4"][:2], two["x4"][2:], atol=1e-3)
    assert torch.allclose(one["x4"], two["x4"][[0, 2]], atol=1e-5)
    assert not torch.allclose(one["x0"], other["x0"], atol=1e-3)


def test_a_moved_or_changed_base_is_noticed(tmp_path, capsys):
    """Other files given as --weights print a note; files that changed in place are an error."""
    base, other = (write_base(tmp_path / f"base{i}", "wan21-tiny", i) for i in (1, 2))
    prompts = write_embeddings(tmp_path / "p.safetensors", "wan21-tiny")
    flags = ["--weights", base, "--prompts", prompts, "--size", "1x32x32"]
    run = train_student(tmp_path / "run", "wan21-tiny", *flags)
    line = ["--student", run, "--n", 1, "--out", tmp_path / "samples", "--prompts", prompts]
    assert "trained on other files" in run_sample(capsys, *line, "--weights", other)
    assert "note" not in run_sample(capsys, *line)
    write_base(base, "wan21-tiny", 2)
    assert "has changed" in refusal(capsys, line, sample.main)


# -- teachers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line,nfe,solver",
    [
        ("wan22-tiny --n 1 --steps 8 --guidance 1 3", NUM_HIGH + 2 * (8 - NUM_HIGH), "UniPC"),
        ("qwen-image-tiny --n 1 --steps 3", 6, ""),
        ("toy2d --n 500", 40, "precision"),  # the exact teacher
    ],
)
def test_a_teacher_is_sampled_with_its_steps_and_guidance(tmp_path, capsys, line, nfe, solver):
    """A guided step is two network evaluations. A solver that is not the official one is said."""
    out = run_sample(capsys, "--teacher", *line.split(), "--out", tmp_path / "out")
    assert f"{nfe} network evaluations (NFE)" in out and solver in out
    assert solver == "UniPC" or "UniPC" not in out


def test_the_times_of_qwen_image_are_those_of_its_published_scheduler():
    """s = e^mu by size, stretched to end at 0.02; at 1328 x 1328 mu is 0.8343, s 2.303."""
    cfg = train.make_config("qwen-image", steps=50, size=("1328x1328",))
    times = teachers.teacher_times(cfg, None)
    s = 2.718281828**0.834296875
    shifted = lambda u: s * u / (1 + (s - 1) * u)
    expected = 1 - (1 - shifted(0.5)) * 0.98 / (1 - shifted(1 / 50))
    assert times[0] == 1 and times[-2:] == (pytest.approx(0.02), 0.0)
    assert times[25] == pytest.approx(expected, abs=1e-4)


# -- LoRA files ----------------------------------------------------------------------------------


def test_files_of_other_trainers_take_steps_by_their_names_or_order(tmp_path, capsys):
    """It says which. At times of their own, too: the transformer follows from t."""
    net = weights.build(*weights.TEACHERS["wan22-tiny"][:2], torch.float32)
    layer = "blocks.0.self_attn.q"
    for seed, name in enumerate(("a", "b", "my_high", "my_low")):
        write_lora(tmp_path / name, "lightning", net, seed)
    for names, seeds in (("a b", (0, 1)), ("b a", (1, 0)), ("my_low my_high", (2, 3))):
        files = [str(tmp_path / name) for name in names.split()]
        line = ["--teacher", "wan22-tiny", "--times", "1000", "752", "522", "--lora", *files]
        job = sample.teacher_job(sample.make_parser().parse_args(line))
        reason = "by metadata or name" if "my_low" in names else "in the order given"
        assert f"{reason}\n" in capsys.readouterr().out
        assert job.times == (1.0, 0.752, 0.522, 0.0)
        assert job.roles == ["student1", "student2", "student2"]
        for role, seed in zip(("student1", "student2"), seeds):
            up = job.weights_of(role).factors[layer].up
            assert torch.equal(up, normal(up.shape, seed, layer, "up") / 3)


# -- wrong commands and folders ------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags,expected",
    [
        ("--student RUN --size 50x64", "nearest: 48x64"),
        ("--student RUN --steps 4", "--steps is for --teacher"),
        ("--student RUN --prompt fox", "no text encoder"),
        ("--teacher wan22-tiny --lora x --times 1000 752 752", "fall from 1000, got 1000 752 752"),
        ("--teacher wan22-tiny --lora x --times 1000 nan", "fall from 1000, got 1000 nan"),
        ("--teacher wan22-tiny --lora x --times 1000 --steps 3", "in place of --steps"),
        ("--teacher wan22-tiny --times 1000 752", "--times is for --lora"),
    ],
)
def test_a_wrong_command_is_answered_in_one_line(runs, tmp_path, capsys, flags, expected):
    """Nothing is written."""
    line = flags.replace("RUN", str(runs("wan22-tiny"))).split()
    assert expected in refusal(capsys, [*line, "--out", tmp_path / "out"], sample.main)
    assert not (tmp_path / "out").exists()


def test_samples_never_overwrite_other_files(runs, tmp_path, capsys):
    """They replace earlier samples, of which none stays. Pictures that are numbered are others."""
    folder, old = runs("wan22-tiny"), tmp_path / "001-03.mp4"
    line = ["--student", folder, "--n", 1, "--out"]
    assert "contains config.json" in refusal(capsys, [*line, folder], sample.main)
    old.write_bytes(b"of a user")
    assert "contains 001-03.mp4" in refusal(capsys, [*line, tmp_path], sample.main)
    old.unlink()
    run_sample(capsys, *line, tmp_path)
    for path in (old, tmp_path / "best-003.mp4"):
        path.write_bytes(b"video")
    run_sample(capsys, *line, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["best-003.mp4", "latents.safetensors", "samples.png"]


@pytest.mark.parametrize("size,nearest", [((480, 832), "832x480"), ((832, 480), "480x832")])
def test_a_first_frame_is_sampled_at_the_nearest_size_of_the_run(tmp_path, size, nearest):
    """Of a portrait the landscape of the run would show less than half. --size is obeyed."""
    Image.new("RGB", size).save(tmp_path / "first.png")
    line = ["--teacher", "wan22-i2v", "--prompt", "rain", "--image", str(tmp_path / "first.png")]
    cfg = train.make_config("wan22-i2v", weights=("random",))
    for flags, expected in ((["--frames", "5"], nearest), (["--size", "720x1280"], "720x1280")):
        args = sample.make_parser().parse_args([*line, *flags])
        assert teachers.apply_flags(cfg, args).size == (expected,)


def test_a_preview_is_sampled_once_all_phases_have_begun(runs, capsys):
    previews = runs("wan22-tiny") / "previews"
    line = ["--student", previews / "phase1-000001.safetensors"]
    assert "1 of 2 phases" in refusal(capsys, line, sample.main)
    line = ["--student", previews / "phase2-000001.safetensors", "--n", 1]
    assert "samples-phase2-000001" in run_sample(capsys, *line)
