"""Claims about the commands: what they leave, what they refuse, and in how many words."""

import json
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from students import refusal

import sample
import train
from models import cli, common
from models.common import UserError
from toy import toy2d

ROOT = Path(__file__).parent.parent
QUICK = "--iters 2 --warmup 1 --batch 8 --fake-updates 1 --eval-samples 50".split()


DRAW_PICTURE, FIT = toy2d.draw_picture, toy2d.fit_start
pytestmark = pytest.mark.usefixtures("quick_toys")


@pytest.fixture
def finished(tmp_path):
    out = tmp_path / "run"
    assert train.main([*QUICK, "--out", str(out)]) == 0
    return out


def tree(folder: Path) -> dict:
    return {str(p.relative_to(folder)): p.is_dir() or p.read_bytes() for p in folder.rglob("*")}


def test_a_run_leaves_everything_that_is_promised(tmp_path, monkeypatch):
    monkeypatch.setattr(toy2d, "draw_picture", DRAW_PICTURE)
    finished = tmp_path / "run"
    assert train.main([*QUICK, "--out", str(finished)]) == 0
    promised = "config.json log.jsonl metrics.json samples.png start.safetensors state"
    assert {p.name for p in finished.iterdir()} == {*promised.split(), "student.safetensors"}
    assert (finished / "samples.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((finished / "metrics.json").read_text())
    promised = "energy energy_floor energy_teacher_same_steps modes modes_exact precision seconds"
    assert set(promised.split()) <= set(metrics)
    rows = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    phase = [(-1, "fake1"), (0, "fake1"), (0, "student"), (1, "fake1"), (1, "student")]
    expected = [(k, i, r if r == "fake1" else f"{r}{k}") for k in (1, 2) for i, r in phase]
    assert [(row["phase"], row["iteration"], row["role"]) for row in rows] == expected
    assert {"loss", "grad_norm", "seconds"} <= set(rows[0])
    assert {"distance", "grad_norm", "seconds"} <= set(rows[2])


def test_a_finished_run_prints_its_metrics_again(finished, capsys):
    """The same settings, or --resume: status 0 and nothing changes."""
    before = tree(finished)
    for argv in (QUICK, ["--resume"]):
        capsys.readouterr()
        assert train.main([*argv, "--out", str(finished)]) == 0
        assert "energy" in capsys.readouterr().out
    assert tree(finished) == before


def test_a_dry_run_prints_the_phases_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--dry-run", "--phases", "4", "--fake-rollout", "per-depth"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"student4 +[\d,]+ parameters", printed) and not list(tmp_path.iterdir())


WRONG = {
    "--teacher wan99": "expected one of toy2d, mnist",
    "--phases 3": "a divisor of --steps 4 [1, 2, 4], got 3",
    "--shift 1e17": "at most 100",
    "--guidance 2": "--classes",
    "--fix-t 0.3": "where phase 1 ends",
    "--steps 60 --phases 60": "no room",
    "--depths mixed --micro-batch 100": "multiple of 2",
    "--no-truncate --phases 1 --fake-rollout per-depth": "needs --truncate",
    "--resume --overwrite": "one of them",
    "--processes 8": "--dry-run",
    "--points nowhere.csv": "No such file",
    "--train-student lora": "toy2d",
    "--resum": "unrecognized",
    "--teacher wan22-tiny --guidance 4 3 2": "high noise, low noise, got 3",
    "--teacher wan22-tiny --size 50x64": "nearest: 48x64",
    f"--teacher wan22-tiny --size {'9' * 5000}x64": "--size: expected",
    "--teacher wan22-tiny --base int8 --train-fake full": "--train-fake lora",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_is_answered_in_one_line(line, tmp_path, monkeypatch, capsys):
    """Exit status 2, no traceback, nothing written; the line says what to do."""
    monkeypatch.chdir(tmp_path)
    assert WRONG[line] in refusal(capsys, line.split())
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_take_a_run_is_left_as_it_is(finished, tmp_path, capsys):
    """Other settings, other files, more iterations than any run has. More: tests/test_common.py."""
    before = tree(tmp_path)
    for line, expected in (
        ([*QUICK, "--seed", 1, "--out", finished], "--seed: expected 0"),
        ([*QUICK, "--overwrite", "--out", tmp_path], "expected an empty folder or a run"),
        (["--resume", "--iters", 2**31, "--out", finished], "--iters: expected at most"),
    ):
        assert expected in refusal(capsys, line)
    assert tree(tmp_path) == before


def test_files_of_another_run_or_kind_are_refused(finished, tmp_path, capsys):
    """They fit in shape: it is the metadata that tells them apart."""
    other = tmp_path / "other"
    assert train.main([*QUICK, "--seed", "1", "--out", str(other)]) == 0
    for source in (other / "student.safetensors", finished / "start.safetensors"):
        (finished / "student.safetensors").write_bytes(source.read_bytes())
        assert "student" in refusal(capsys, ["--student", finished], sample.main)
    (finished / "metrics.json").unlink()
    shutil.copytree(other / "state", finished / "state", dirs_exist_ok=True)
    capsys.readouterr()
    assert train.main(["--resume", "--out", str(finished)]) == 2
    assert "another run" in capsys.readouterr().err


def test_sampling_repeats_itself_and_a_trajectory_ends_in_the_samples(finished, tmp_path, capsys):
    for name, flags in (("a", []), ("b", ["--trajectory"]), ("c", ["--seed", "1"])):
        out = ["--n", "100", "--out", str(tmp_path / name)]
        assert sample.main(["--student", str(finished), *out, *flags]) == 0
    assert "energy" in capsys.readouterr().out
    a, b, c = (np.load(tmp_path / name / "samples.npy") for name in "abc")
    assert a.shape == (100, 2) and b.shape == (5, 100, 2)
    assert np.array_equal(a, b[-1]) and not np.array_equal(a, c)
    for wrong in (["--n", "0"], ["--student", "nowhere"], ["--out", finished], ["--nonsense"]):
        refusal(capsys, ["--student", finished, *wrong], sample.main)


def test_a_conditional_student_is_measured_by_class(tmp_path):
    flags = [*QUICK, "--classes", "--guidance", "2", "--out", str(tmp_path / "run")]
    assert train.main(flags) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 0.5 < metrics["class_accuracy"] <= 1
    assert sample.main(["--student", str(tmp_path / "run"), "--n", "100"]) == 0


def test_points_run_in_their_own_unit(tmp_path, monkeypatch):
    file, out = tmp_path / "p.csv", tmp_path / "run"
    np.savetxt(file, np.random.default_rng(0).normal(100, 5, (50, 3)), delimiter=",")
    flags = [*QUICK, "--points", str(file), "--out", str(out)]
    monkeypatch.setattr(toy2d, "fit_start", lambda cfg, progress: toy2d.MLP(3).state_dict())
    assert train.main(flags) == 0 and sample.main(["--student", str(out), "--n", "500"]) == 0
    assert np.load(out / "samples" / "samples.npy").shape == (500, 3)


@pytest.mark.slow
def test_a_closed_pipe_is_not_a_traceback():
    """train.py | head."""
    line = [sys.executable, "train.py", "--dry-run"]
    run = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.close()
    assert run.stderr.read() == b"" and run.wait() == 141


@pytest.mark.slow
def test_the_default_run_does_what_the_readme_says(tmp_path, monkeypatch):
    """Seed 0: energy at most 0.006, at least 7.9 of 8 modes, precision at least 0.85."""
    out = tmp_path / "run"
    monkeypatch.setattr(toy2d, "fit_start", FIT)
    assert train.main(["--out", str(out)]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["energy"] <= 0.006 < 2 * metrics["energy_teacher_same_steps"]
    assert metrics["modes"] >= 7.9 and metrics["precision"] >= 0.85


@pytest.mark.slow
def test_figure_2_comes_out_as_in_the_paper(tmp_path):
    """(b) within 0.005 of (a), (c) at least ten times as far."""
    command = [sys.executable, "toy/figure2.py", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    b, c = map(float, re.search(r"distance b (\S+) c (\S+)", done.stdout).groups())
    assert b <= 0.005 and c >= 10 * b and (tmp_path / "figure2.png").stat().st_size > 10_000


def test_a_resumed_run_takes_the_device_of_its_own_preset(tmp_path, monkeypatch):
    """Under torchrun the ranks meet before the settings are read; no --teacher is given."""
    settings = cli.to_json(train.make_config("wan22-tiny"))
    config = {"settings": settings, "files": {}, "environment": {}}
    common.write_json(tmp_path / "config.json", config)
    devices = []
    monkeypatch.setattr(cli, "pick_device", lambda requested, default: default)
    monkeypatch.setattr(train, "run_command", lambda *_: None)
    join = lambda device, *_: devices.append(device) or nullcontext()
    monkeypatch.setattr(train.parallel, "distributed", join)
    assert train.main(["--resume", "--out", str(tmp_path)]) == 0
    assert train.main(["--resume", "--out", str(tmp_path / "new")]) == 0
    assert devices == [train.PRESETS["wan22-tiny"][0].device, toy2d.PRESET.device]
    assert devices[0] != devices[1]


def test_a_checkpoint_is_written_by_time_as_well(tmp_path, monkeypatch):
    """Control: with half an hour between two, only after the last iteration of each phase."""
    saved, save_state = [], train.save_state
    keep = lambda run, *rest: saved.append((run.k, run.i)) or save_state(run, *rest)
    monkeypatch.setattr(train, "save_state", keep)
    flags = [*QUICK, "--iters", "2", "--save-every", "1000"]
    assert train.main([*flags, "--out", str(tmp_path / "a")]) == 0
    assert saved == [(1, 2), (2, 2)]
    saved.clear()
    monkeypatch.setattr(train, "SAVE_SECONDS", -1)
    assert train.main([*flags, "--out", str(tmp_path / "b")]) == 0
    assert {(1, 1), (1, 2), (2, 1), (2, 2)} <= set(saved)


def test_a_batch_without_truncation_has_no_depths_to_share():
    """Control: with truncation, one micro-batch cannot hold four depths."""
    settings = dict(phases=1, micro_batch=256)
    train.validate(train.make_config(truncate=False, **settings))
    with pytest.raises(UserError, match="--depths mixed"):
        train.validate(train.make_config(**settings))
