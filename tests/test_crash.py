"""Claims about crashes: whatever fails, whenever the process dies, nothing is lost or torn."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from students import FailingCall, wait_for_log

import train
from models import common, media

ROOT = Path(__file__).parent.parent
SHORT = "--iters 2 --warmup 1 --batch 8 --fake-updates 1 --save-every 1 --eval-samples 50".split()
TINY = (
    "--teacher wan22-tiny --iters 1 --batch 2 --micro-batch 1 --fake-updates 1 --save-every 1 "
    "--sample-every 1 --eval-samples 2"
).split()
COMMANDS = {
    "toy2d": "--iters 40 --warmup 10 --batch 32 --save-every 7 --eval-samples 200".split(),
    "wan22-tiny": "--teacher wan22-tiny --iters 16 --batch 2 --save-every 3".split(),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch, quick_toys):
    """A start that costs nothing and pictures of nothing: files are what is tested here."""
    monkeypatch.setattr(media, "sheet", lambda *_: b"a picture")
    monkeypatch.setattr(media, "curves", lambda log: b"curves of " + log.name.encode())


def results(out: Path) -> dict:
    """What a run leaves, without what depends on the clock or the process."""
    timed = ("seconds", "tokens_per", "memory", "mfu", "hfu")
    keep = lambda row: {name: x for name, x in row.items() if not name.startswith(timed)}
    return {
        "student": (out / "student.safetensors").read_bytes(),
        "picture": (out / "samples.png").read_bytes(),
        "metrics": keep(json.loads((out / "metrics.json").read_bytes())),
        "previews": {p.name: p.read_bytes() for p in sorted(out.glob("previews/*"))},
        "log": [keep(json.loads(line)) for line in (out / "log.jsonl").read_text().splitlines()],
    }


@pytest.mark.parametrize(
    "flags,every",
    [
        pytest.param(SHORT, 7, id="toy2d, every seventh"),
        pytest.param(SHORT, 1, id="toy2d", marks=pytest.mark.slow),
        pytest.param(TINY, 1, id="wan22-tiny", marks=pytest.mark.slow),
    ],
)
def test_every_file_system_call_may_fail_and_the_resumed_run_is_bit_identical(
    tmp_path, monkeypatch, capsys, flags, every
):
    """From the first call to the last: one line, status 2, and --resume ends the same."""
    assert train.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    whole = results(tmp_path / "whole")
    n, failed = 1 - every, True
    while failed:
        n, out = n + every, tmp_path / str(n + every)
        with monkeypatch.context() as patch:
            calls = FailingCall(patch, out, n)
            capsys.readouterr()
            status = train.main([*flags, "--out", str(out)])
            failed = calls.count >= n
        if failed:
            error = capsys.readouterr().err
            assert status == 2 and error.count("\n") == 1 and "No space left" in error, (n, error)
            assert not list(out.rglob("*.tmp"))
            assert train.main([*flags, "--out", str(out), "--resume"]) == 0
        assert results(out) == whole, n
    assert n > 30  # opens, writes, fsyncs and renames of all files of the run


def test_the_crash_test_sees_a_torn_file(tmp_path, monkeypatch):
    """Negative control: written in place, a failing write leaves a run that cannot be resumed."""

    def replace_in_place(path, save):
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path)
        with open(path, "ab") as file:
            file.truncate(path.stat().st_size // 2)
            os.fsync(file.fileno())
        save(path)

    monkeypatch.setattr(common, "replace_file", replace_in_place)
    for n in range(1, 60, 4):
        out = tmp_path / str(n)
        with monkeypatch.context() as patch, suppress(OSError):
            FailingCall(patch, out, n)
            train.main([*SHORT, "--out", str(out)])
        if train.main([*SHORT, "--out", str(out), "--resume"]) != 0:
            return
    pytest.fail("every run could be resumed")


def begin(name: str, out: Path, *flags) -> subprocess.Popen:
    """Start the command in a process of its own."""
    command = [sys.executable, str(ROOT / "train.py"), *COMMANDS[name], "--out", str(out), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(name: str, out: Path, *flags) -> None:
    process = begin(name, out, *flags)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 0, error


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """undisturbed(name): the results of the run that was not killed, and its folder."""
    runs = {}

    def run(name):
        if name not in runs:
            out = tmp_path_factory.mktemp("kill") / "whole"
            finish(name, out)
            runs[name] = results(out), out
        return runs[name]

    return run


def copy_start(source: Path, out: Path) -> None:
    """Copy a run's folder as it is after preparing and before training."""
    out.mkdir()
    for name in {"config.json", "start.safetensors"} & {path.name for path in source.iterdir()}:
        shutil.copy(source / name, out)


@pytest.mark.slow
@pytest.mark.parametrize("name,kills", [("toy2d", 10), ("wan22-tiny", 3)])
def test_killed_at_random_moments_a_run_resumes_bit_identical(tmp_path, undisturbed, name, kills):
    """SIGKILL at moments drawn over the run, the last one while it is being evaluated."""
    whole, first = undisturbed(name)
    out, rng = tmp_path / "run", random.Random(0)
    copy_start(first, out)
    moments = sorted(rng.sample(range(len(whole["log"])), kills - 1)) + [len(whole["log"])]
    alive = []
    for moment in moments:
        process = begin(name, out, "--resume")
        wait_for_log(process, out, moment)
        alive.append(process.poll() is None)
        process.kill()
        process.communicate()
    assert all(alive[:-1])  # the last one may have ended already
    finish(name, out, "--resume")
    assert results(out) == whole


@pytest.mark.slow
@pytest.mark.parametrize("number,status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_continue(tmp_path, undisturbed, number, status):
    """SIGTERM and Ctrl-C: exit 143 and 130; the printed command ends bit-identical."""
    whole, first = undisturbed("toy2d")
    out = tmp_path / "a run"
    copy_start(first, out)
    process = begin("toy2d", out, "--resume")
    wait_for_log(process, out, 60)
    process.send_signal(number)
    _, error = process.communicate(timeout=600)
    assert process.returncode == status and "Traceback" not in error
    command = error.splitlines()[-1].split("continue with: ")[1]
    state = json.loads((out / "state" / "state.json").read_text())
    assert state["log_bytes"] == (out / "log.jsonl").stat().st_size  # saved just then
    assert command.startswith(f"python {ROOT}/train.py --resume --out '")  # as it was typed
    command = command.replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, capture_output=True)
    assert results(out) == whole
