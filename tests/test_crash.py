"""Claims about crashes: whatever fails, whenever the process dies, nothing is lost or torn."""

import builtins
import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch

import train
from toy import toy2d
from models import files, pictures
from models.folder import OURS
from models.files import digest

ROOT = Path(__file__).parent.parent
SHORT = "--iters 2 --warmup 1 --batch 8 --fake-updates 1 --save-every 1 --eval-samples 50".split()
TINY = (
    "--teacher wan22-tiny --iters 1 --batch 2 --fake-updates 1 --save-every 1 --sample-every 1 "
    "--keep 1 --eval-samples 2"
).split()


@pytest.fixture(autouse=True)
def quick(monkeypatch, start):
    """A start that costs nothing and a picture of a few points: files are what is tested here."""
    monkeypatch.setattr(toy2d, "fit", lambda cfg, bar: start(cfg))
    monkeypatch.setattr(toy2d, "picture", lambda *_: b"a picture")
    monkeypatch.setattr(pictures, "sheet", lambda *_: b"a picture")
    monkeypatch.setattr(train, "curves", lambda log: b"curves of " + log.name.encode())


def results(out: Path) -> dict:
    """What a run leaves, without the seconds."""
    timed = ("seconds", "samples_per", "tokens_per", "memory", "share")
    drop = lambda row: {name: x for name, x in row.items() if not name.startswith(timed)}
    return {
        "student": (out / "student.safetensors").read_bytes(),
        "picture": (out / "samples.png").read_bytes(),
        "metrics": drop(json.loads((out / "metrics.json").read_bytes())),
        "looks": {p.name: p.read_bytes() for p in sorted(out.glob("looks/*"))},
        "log": [drop(json.loads(line)) for line in (out / "log.jsonl").read_text().splitlines()],
    }


class FailingCall:
    """Counts calls of open for writing, write, fsync, rename below a folder; the n-th fails."""

    def __init__(self, monkeypatch, folder: Path, n: int):
        self.folder, self.n, self.count = str(folder), n, 0
        open_, fsync, rename = builtins.open, os.fsync, os.replace
        outer = self

        class Written(io.FileIO):
            def write(self, data):
                outer.tick()
                return super().write(data)

        def opened(file, mode="r", *rest, **kw):
            if not str(file).startswith(outer.folder) or not set(mode) & set("wa+"):
                return open_(file, mode, *rest, **kw)
            outer.tick()
            return Written(file, mode.replace("b", ""))

        monkeypatch.setattr(builtins, "open", opened)
        monkeypatch.setattr(io, "open", opened)  # what pathlib calls
        monkeypatch.setattr(os, "fsync", lambda fd: (outer.tick(), fsync(fd))[1])
        monkeypatch.setattr(os, "replace", lambda a, b: (outer.tick(), rename(a, b))[1])

    def tick(self):
        self.count += 1
        if self.count == self.n:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "flags", [SHORT, pytest.param(TINY, marks=pytest.mark.slow)], ids=["toy2d", "wan22-tiny"]
)
def test_every_file_system_call_may_fail_and_the_resumed_run_is_bit_identical(
    tmp_path, monkeypatch, capsys, flags
):
    """n = 1, 2, ... to the last call of the run: one line, status 2, and --resume ends the same."""
    assert train.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    whole = results(tmp_path / "whole")
    n, failed = 0, True
    while failed:
        n, out = n + 1, tmp_path / str(n + 1)
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
    assert n > 40  # opens, writes, fsyncs and renames of all files of the run


def test_the_crash_test_sees_a_torn_file(tmp_path, monkeypatch):
    """Negative control: written in place, a failing write leaves a state that cannot be resumed."""
    monkeypatch.setattr(files, "write_tensors", in_place)
    monkeypatch.setattr(
        files, "write_json", lambda path, value: path.write_bytes(json.dumps(value).encode())
    )
    broken = 0
    for n in range(1, 60):
        out = tmp_path / str(n)
        with monkeypatch.context() as patch:
            calls = FailingCall(patch, out, n)
            try:
                train.main([*SHORT, "--out", str(out)])
            except OSError:
                pass
        if calls.count < n:
            break
        broken += train.main([*SHORT, "--out", str(out), "--resume"]) != 0
    assert broken


def in_place(path, tensors, about, everyone=False):
    """write_tensors without its care: half of the file, then the rest."""
    about = about | {"digest": digest(tensors)}
    content = safetensors.torch.save(tensors, metadata={"about": json.dumps(about)})
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as file:
        file.write(content[: len(content) // 2])
        file.write(content[len(content) // 2 :])
    return about["digest"]


COMMANDS = {
    "toy2d": "--iters 60 --warmup 20 --batch 32 --save-every 7 --eval-samples 200".split(),
    "wan22-tiny": "--teacher wan22-tiny --iters 16 --batch 2 --save-every 3".split(),
}


def begin(name: str, out: Path, *more) -> subprocess.Popen:
    """The command in a process of its own."""
    command = [sys.executable, str(ROOT / "train.py"), *COMMANDS[name], "--out", str(out), *more]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """undisturbed(name): the run that was not killed, and its folder; made once."""
    made = {}

    def of(name):
        if name not in made:
            out = tmp_path_factory.mktemp("kill") / "whole"
            process = begin(name, out)
            _, error = process.communicate(timeout=300)
            assert process.returncode == 0, error
            made[name] = results(out), out
        return made[name]

    return of


def wait_for_log(process, out: Path, lines: int):
    """Until the training has begun: a signal before has nothing to save."""
    while process.poll() is None and (
        not (out / "log.jsonl").exists() or (out / "log.jsonl").read_bytes().count(b"\n") < lines
    ):
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_random_moments_a_run_resumes_bit_identical(tmp_path, undisturbed, name):
    """SIGKILL at moments drawn over the run, the last one while it is being evaluated."""
    whole, first = undisturbed(name)
    out, draws = tmp_path / "run", random.Random(0)
    shutil.copytree(first, out, ignore=lambda *_: set(OURS) - {"config.json", "start.safetensors"})
    often = 4 if name == "toy2d" else 3
    moments = sorted(draws.sample(range(len(whole["log"])), often)) + [len(whole["log"])]
    for moment in moments:
        process = begin(name, out, "--resume")
        wait_for_log(process, out, moment)
        assert process.poll() is None  # it was alive
        process.kill()
        process.communicate()
    process = begin(name, out, "--resume")
    process.communicate(timeout=300)
    assert process.returncode == 0
    assert results(out) == whole


@pytest.mark.parametrize("number,status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, undisturbed, number, status):
    """SIGTERM and Ctrl-C: exit 143 and 130, the printed command ends bit-identical."""
    out = tmp_path / "a run"
    keep = set(OURS) - {"config.json", "start.safetensors"}
    whole, first = undisturbed("toy2d")
    shutil.copytree(first, out, ignore=lambda *_: keep)  # as after fitting its start
    process = begin("toy2d", out, "--resume")
    wait_for_log(process, out, 60)
    process.send_signal(number)
    printed, error = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in error
    command = printed.splitlines()[-1].split("continue with: ")[1]
    state = json.loads((out / "state" / "state.json").read_text())
    assert state["log_bytes"] == (out / "log.jsonl").stat().st_size  # saved just then
    assert command.startswith("python train.py --resume --out '")
    subprocess.run(
        command.replace("python train.py", f"{sys.executable} {ROOT}/train.py", 1),
        shell=True,
        check=True,
        capture_output=True,
    )
    assert results(out) == whole
