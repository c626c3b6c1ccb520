"""Claims about the commands: what they leave, what they refuse, and how politely."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
import train
from toy import toy2d

ROOT = Path(__file__).parent.parent
FIT = toy2d.fit
QUICK = "--iters 2 --warmup 1 --batch 8 --fake-updates 1 --eval-samples 50".split()


@pytest.fixture(autouse=True)
def fitted(monkeypatch, start):
    """The short fit of conftest: commands are what is tested here."""
    monkeypatch.setattr(toy2d, "fit", lambda cfg, bar: start(cfg))


@pytest.fixture
def finished(tmp_path):
    out = tmp_path / "run"
    assert train.main([*QUICK, "--out", str(out)]) == 0
    return out


def tree(folder: Path) -> dict:
    return {str(p.relative_to(folder)): p.is_dir() or p.read_bytes() for p in folder.rglob("*")}


def refused(capsys, argv, main=train.main) -> str:
    """One line on standard error, exit status 2, nothing else said."""
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.err.endswith("\n") and said.out == "", said
    return said.err


def test_a_run_leaves_everything_that_is_promised(finished):
    names = {
        "config.json",
        "log.jsonl",
        "metrics.json",
        "samples.png",
        "start.safetensors",
        "student.safetensors",
        "state",
    }
    assert {p.name for p in finished.iterdir()} == names and (
        finished / "samples.png"
    ).read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((finished / "metrics.json").read_text())
    promised = (
        "energy energy_floor energy_teacher_same_steps modes modes_exact precision seconds".split()
    )
    assert set(promised) <= set(metrics) and len(metrics["energy_floor"]) == 2
    rows = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    ran = [(row["phase"], row["iteration"], row["role"]) for row in rows]
    once = [(-1, "fake1"), (0, "fake1"), (0, "student"), (1, "fake1"), (1, "student")]
    assert ran == [
        (k, i, role if role == "fake1" else f"student{k}") for k in (1, 2) for i, role in once
    ]
    promised = {"phase", "iteration", "role", "loss", "grad_norm", "seconds"}
    assert promised <= set(rows[0]) and {"distance"} | promised <= set(rows[2])


def test_a_finished_run_prints_its_numbers_again(finished, capsys):
    """The same settings, or --resume: status 0 and nothing changes."""
    before = tree(finished)
    capsys.readouterr()
    for argv in (QUICK, ["--resume"]):
        assert train.main([*argv, "--out", str(finished)]) == 0
        assert "energy" in capsys.readouterr().out
    assert tree(finished) == before


def test_a_resumed_run_says_what_differs_in_its_environment(finished, capsys):
    """Nothing in the same environment; the version of torch where it was another."""
    capsys.readouterr()
    assert train.main(["--resume", "--out", str(finished)]) == 0
    assert "note:" not in capsys.readouterr().out
    config = json.loads((finished / "config.json").read_text())
    config["environment"]["torch"] = "1.0"
    (finished / "config.json").write_text(json.dumps(config))
    assert train.main(["--resume", "--out", str(finished)]) == 0
    assert "note: the run began with torch 1.0" in capsys.readouterr().out


def test_a_resumed_run_goes_on_with_its_own_teachers_device(finished, monkeypatch):
    """--resume names no teacher: auto is what its own preset means, not the default preset's."""
    asked = []
    monkeypatch.setattr(train, "pick_device", lambda asked_for, usual: asked.append(usual) or "cpu")
    config = json.loads((finished / "config.json").read_text())
    train.parse(["--resume", "--out", str(finished)])
    config["settings"]["teacher"] = "wan22-tiny"
    (finished / "config.json").write_text(json.dumps(config))
    train.parse(["--resume", "--out", str(finished)])
    assert asked == ["cpu", "auto"]


def test_overwrite_replaces_a_run_and_touches_nothing_else(finished):
    (finished / "notes.txt").write_text("mine")
    assert train.main([*QUICK, "--seed", "5", "--overwrite", "--out", str(finished)]) == 0
    assert json.loads((finished / "config.json").read_text())["settings"]["seed"] == 5
    assert (finished / "notes.txt").read_text() == "mine"


def test_a_dry_run_prints_phases_and_counts_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--dry-run", "--phases", "4", "--fake-per-depth"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"student4 +[\d,]+ parameters", printed) and not list(tmp_path.iterdir())


def test_help_has_a_line_for_every_setting(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    shown = capsys.readouterr().out
    assert all("--" + f.name.replace("_", "-") in shown for f in fields(train.Config))


WRONG = {
    "--teacher toy2e": "toy2d",
    "--teacher wan99": "nearest",
    "--phases 3": "use one of [1, 2, 4]",
    "--phases 0": "below 1",
    "--steps -4": "below 1",
    "--steps 4.5": "invalid int",
    "--iters zero": "invalid int",
    "--lr nan": "finite",
    "--lr inf": "above 1",
    "--lr 0": "above 0",
    "--lr 5": "above 1",
    "--shift 1e17": "above 100",
    "--batch 100000000000000": "above 1000000",
    f"--iters 1{'0' * 400}": "above",
    "--bandwidth 0.1": "--points",
    "--truncate off --phases 1 --fake-per-depth": "needs truncation",
    "--resume --overwrite": "one of them",
    "--fake-lr -1": "above 0",
    "--shift 0": "below 0.01",
    "--batch 0": "below 1",
    "--micro-batch -1": "below 0",
    "--fake-updates 0": "below 1",
    "--lr-decay 2": "above 1",
    "--seed -1": "below 0",
    "--bandwidth -0.1": "below 0",
    "--guidance nan": "finite",
    "--guidance 2": "--classes on",
    "--fix-t 0.3": "where phase 1 ends",
    "--fix-t 1": "above 0.999",
    "--eval-samples 1": "below 2",
    "--steps 60 --phases 60": "no room",
    "--device tpu": "invalid choice",
    "--toy rings": "invalid choice",
    "--points nowhere.csv": "No such file",
    "--points .": "directory",
    "--nonsense": "unrecognized",
    "--resum": "unrecognized",
}


def test_resume_takes_flags_that_are_the_runs_own(tmp_path, capsys):
    """Also such as make no sense beside the defaults: 3 phases do, of 6 steps."""
    out = str(tmp_path / "run")
    assert train.main([*QUICK, "--steps", "6", "--phases", "3", "--out", out]) == 0
    assert train.main(["--resume", "--phases", "3", "--out", out]) == 0
    refused(capsys, ["--resume", "--phases", "2", "--out", out])


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_is_answered_in_one_line(line, tmp_path, monkeypatch, capsys):
    """Exit status 2, no traceback, nothing written; the line says what to do."""
    monkeypatch.chdir(tmp_path)
    assert WRONG[line] in refused(capsys, line.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without cuda")
def test_an_absent_device_is_refused(tmp_path, capsys):
    assert "not available" in refused(capsys, ["--device", "cuda", "--out", tmp_path / "x"])


def test_a_folder_that_cannot_take_a_run_is_refused(finished, tmp_path, capsys):
    """A file, another run, an unfinished run, somebody's folder: each is left as it is."""
    before = tree(tmp_path)
    assert "Not a directory" in refused(capsys, [*QUICK, "--out", finished / "config.json"])
    assert "Not a directory" in refused(capsys, [*QUICK, "--out", finished / "config.json" / "x"])
    assert "(--seed)" in refused(capsys, [*QUICK, "--seed", 1, "--out", finished])
    assert "seed 0, not 1" in refused(capsys, ["--resume", "--seed", 1, "--out", finished])
    assert "other things" in refused(capsys, [*QUICK, "--out", tmp_path])
    assert "other things" in refused(capsys, [*QUICK, "--out", tmp_path, "--overwrite"])
    assert tree(tmp_path) == before
    (finished / "metrics.json").unlink()
    assert "unfinished" in refused(capsys, [*QUICK, "--out", finished])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_rights_is_refused(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert "Permission denied" in refused(capsys, [*QUICK, "--out", tmp_path / "run"])


def damage(file: Path, how: str):
    content = file.read_bytes()
    flipped = content[:-9] + bytes([content[-9] ^ 64]) + content[-8:]
    made = {"cut": content[: len(content) // 2], "empty": b"", "text": b"not weights " * 40}
    file.write_bytes((made | {"flipped": flipped})[how])


def part_of_state(out: Path) -> str:
    """The one file of tensors of a state that one process wrote."""
    [file] = out.glob("state/*.safetensors")
    return f"state/{file.name}"


HOW = ["cut", "empty", "text", "flipped"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["state/state.json", "state", "start.safetensors"])
def test_a_damaged_run_is_refused_by_train(finished, capsys, name, how):
    """Cut, emptied, replaced by text, or one bit of a weight flipped."""
    (finished / "metrics.json").unlink()
    name = part_of_state(finished) if name == "state" else name
    damage(finished / name, how)
    capsys.readouterr()
    assert train.main(["--resume", "--out", str(finished)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and name in error


@pytest.mark.parametrize("how", HOW)
def test_a_damaged_student_is_refused_by_sample(finished, capsys, how):
    damage(finished / "student.safetensors", how)
    assert "student.safetensors" in refused(capsys, ["--student", finished], sample.main)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.pop("files"),
        lambda config: config.pop("settings"),
        lambda config: config["settings"].update(phases="x"),
        lambda config: config["settings"].update(teacher="foo"),
        lambda config: config["settings"].update(lr=-1.0),
        lambda config: config["settings"].update(unknown=1),
        lambda config: config.clear(),
    ],
)
def test_a_config_that_was_edited_into_nonsense_is_refused(finished, capsys, change):
    """By both commands, and garbled JSON too."""
    file = finished / "config.json"
    config = json.loads(file.read_text())
    change(config)
    for text in (json.dumps(config), file.read_text()[:50], "[]"):
        file.write_text(text)
        refused(capsys, ["--resume", "--out", finished])
        refused(capsys, ["--student", finished], sample.main)


def test_one_kind_of_file_in_the_place_of_another_is_refused(finished, capsys):
    """Start, student and state hold tensors of the same shapes, and are not the same thing."""
    state = part_of_state(finished)
    files = ["start.safetensors", "student.safetensors", state]
    contents = {name: (finished / name).read_bytes() for name in files}
    (finished / "metrics.json").unlink()
    for name in ("start.safetensors", state):
        for other in set(files) - {name}:
            (finished / name).write_bytes(contents[other])
            capsys.readouterr()
            assert train.main(["--resume", "--out", str(finished)]) == 2
            assert capsys.readouterr().err.count("\n") == 1
        (finished / name).write_bytes(contents[name])
    for other in ("start.safetensors", state):
        (finished / "student.safetensors").write_bytes(contents[other])
        refused(capsys, ["--student", finished], sample.main)


def test_a_state_of_the_version_before_is_not_thrown_away(finished, capsys):
    """state.safetensors, and no state.json: one line, and all stays as it is."""
    (finished / "metrics.json").unlink()
    (finished / "state" / "state.json").unlink()
    old, log = finished / "state" / "state.safetensors", (finished / "log.jsonl").read_bytes()
    (finished / part_of_state(finished)).rename(old)
    assert train.main(["--resume", "--out", str(finished)]) == 2
    assert "another version" in capsys.readouterr().err
    assert old.exists() and (finished / "log.jsonl").read_bytes() == log


def test_a_log_that_lost_lines_is_not_padded(finished, capsys):
    (finished / "metrics.json").unlink()
    (finished / "log.jsonl").unlink()
    capsys.readouterr()
    assert train.main(["--resume", "--out", str(finished)]) == 2
    assert "lost lines" in capsys.readouterr().err


def test_files_of_another_run_are_refused(finished, tmp_path, capsys):
    """A state and a student that fit in shape but come from other settings."""
    other = tmp_path / "other"
    assert train.main([*QUICK, "--seed", "1", "--out", str(other)]) == 0
    for name in ("state/state.json", part_of_state(other), "student.safetensors"):
        (finished / name).write_bytes((other / name).read_bytes())
    assert "another run" in refused(capsys, ["--student", finished], sample.main)
    (finished / "metrics.json").unlink()
    capsys.readouterr()
    assert train.main(["--resume", "--out", str(finished)]) == 2
    assert "another run" in capsys.readouterr().err


def test_sampling_draws_what_the_run_would(finished, tmp_path, capsys):
    """The same seed, the same samples; a trajectory holds every step and ends in them."""
    for name, more in (("a", []), ("b", ["--trajectory"]), ("c", ["--seed", "1"])):
        assert (
            sample.main(
                ["--student", str(finished), "--n", "100", "--out", str(tmp_path / name), *more]
            )
            == 0
        )
    assert "energy" in capsys.readouterr().out
    a, b, c = (np.load(tmp_path / name / "samples.npy") for name in "abc")
    assert a.shape == (100, 2) and b.shape == (5, 100, 2)
    assert np.array_equal(a, b[-1]) and not np.array_equal(a, c)
    for wrong in (["--n", "0"], ["--seed", "-1"], ["--student", "nowhere"], ["--nonsense"]):
        refused(capsys, ["--student", finished, *wrong], sample.main)


def test_what_sample_writes_over_is_never_a_run_or_a_file(finished, capsys):
    other = finished / "config.json"
    assert "holds a run" in refused(capsys, ["--student", finished, "--out", finished], sample.main)
    assert "irectory" in refused(capsys, ["--student", finished, "--out", other], sample.main)


def test_a_conditional_student_is_asked_for_its_class(tmp_path):
    """class_accuracy is there with classes, and a dry run with them is one."""
    flags = [*QUICK, "--classes", "on", "--guidance", "2"]
    assert train.main([*flags, "--dry-run"]) == 0
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 0.5 < metrics["class_accuracy"] <= 1 and "class_accuracy_teacher_same_steps" in metrics
    assert sample.main(["--student", str(tmp_path / "run"), "--n", "100"]) == 0


def test_points_of_ones_own_run_and_are_watched_for_changes(tmp_path, capsys, monkeypatch):
    """Samples come back in the file's unit; a file that changed since is refused."""
    file, out = tmp_path / "p.csv", tmp_path / "run"
    np.savetxt(file, np.random.default_rng(0).normal(100, 5, (50, 3)), delimiter=",")
    flags = [*QUICK, "--points", str(file), "--out", str(out)]
    monkeypatch.setattr(toy2d, "fit", lambda cfg, bar: FIT(cfg, bar, steps=20))
    assert train.main(flags) == 0 and sample.main(["--student", str(out), "--n", "500"]) == 0
    assert abs(np.load(out / "samples" / "samples.npy").mean() - 100) < 5
    file.write_text(file.read_text().replace("1", "2"))
    assert "has changed" in refused(capsys, ["--student", out], sample.main)
    assert "has changed" in refused(capsys, flags)


@pytest.mark.slow
def test_the_default_run_does_what_the_readme_says(tmp_path):
    """Seed 0: energy at most 0.006, at least 7.9 of 8 modes, precision at least 0.85."""
    out = tmp_path / "run"
    subprocess.run([sys.executable, "train.py", "--out", str(out)], cwd=ROOT, check=True)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["energy"] <= 0.006 < 2 * metrics["energy_teacher_same_steps"]
    assert metrics["modes"] >= 7.9 and metrics["precision"] >= 0.85


@pytest.mark.slow
def test_figure_2_comes_out_as_in_the_paper(tmp_path):
    """(b) within 0.01 of (a), (c) at least ten times as far."""
    command = [sys.executable, "toy/figure2.py", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    b, c = map(
        float, re.fullmatch(r"distance b (\S+) c (\S+)", done.stdout.splitlines()[-1]).groups()
    )
    assert b <= 0.01 and c >= 10 * b and (tmp_path / "figure2.png").stat().st_size > 10_000


def test_a_closed_pipe_is_no_traceback():
    """| head, of a dry run."""
    line = [sys.executable, "train.py", "--teacher", "wan22-tiny", "--dry-run"]
    run = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.close()
    assert run.stderr.read() == b"" and run.wait() == 141


def test_scripts_run_from_the_root_as_the_readme_writes_them():
    for script in ("train.py", "sample.py", "toy/figure2.py", "toy/seeds.py"):
        done = subprocess.run(
            [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0 and "usage" in done.stdout, done.stderr
