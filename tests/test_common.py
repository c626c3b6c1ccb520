"""Claims about models/common.py: wrong input gets one line, a folder decides what is run, random
numbers are functions of their key. Files survive crashes: see tests/test_crash.py."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from config import Config
from models import cli, common, runs
from models.common import UserError


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool])
def test_a_stored_tensor_has_the_rows_of_the_tensor(tmp_path, dtype):
    """Of any dtype, without dimensions, and empty."""
    tensors = {"x": torch.arange(24).view(6, 2, 2).to(dtype), "scalar": torch.ones((), dtype=dtype)}
    tensors["empty"] = torch.empty(0, 3, dtype=dtype)
    common.write_tensors(tmp_path / "x", tensors, {"kind": "test"})
    file, metadata = common.open_tensors(tmp_path / "x", "test", "")
    assert file.keys() == tensors.keys() and metadata == {"kind": "test"}
    for key, x in tensors.items():
        assert torch.equal(file.get_tensor(key), x) and file[key].shape == x.shape
    for rows in (slice(0, 6), slice(2, 5), slice(5, 9), slice(3, 3), slice(None)):
        assert torch.equal(file["x"][rows], tensors["x"][rows])


def test_tensors_are_read_back_or_refused(tmp_path):
    """A truncated file, another kind and another run's file are refused in one line."""
    path, x = tmp_path / "a.safetensors", torch.randn(4, 6).T  # not contiguous
    common.write_tensors(path, {"x": x}, {"kind": "state", "settings": {"seed": 1}})
    tensors, _ = runs.read_tensors(path, "state", {"seed": 1}, "advice")
    assert torch.equal(tensors["x"], x)
    wrong = (("start", 1, "not a file of the kind 'start'"), ("state", 2, "other settings"))
    for kind, seed, expected in wrong:
        with pytest.raises(UserError, match=f"{expected}; advice"):
            runs.read_tensors(path, kind, {"seed": seed}, "advice")
    content = path.read_bytes()
    for damaged in (content[:-1], content[:20], b"", b"not weights " * 40):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"cannot read .*\); advice"):
            common.open_tensors(path, "state", "advice")


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path):
    log = runs.Log(tmp_path / "log.jsonl", 0)
    log.write([{"i": 0}])
    size = log.sync()
    log.write([{"i": 1}, {"i": 2}])
    runs.Log(tmp_path / "log.jsonl", size).write([{"i": 3}])
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows == [{"i": 0}, {"i": 3}]
    with pytest.raises(UserError, match="shorter than the checkpoint"):
        runs.Log(tmp_path / "log.jsonl", 1000)


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("steps", 1001, "at most 1000"),
        ("lr", 0.0, "more than 0"),
        ("lr", float("nan"), "a finite"),
        ("truncate", "maybe", "a value of type bool"),
        ("guidance", (1.0, -1), "at least 0"),
    ],
)
def test_a_wrong_value_is_answered_with_what_is_expected(name, value, expected):
    cli.check_values(Config(steps=1000, lr=1, guidance=(0, 2.0)))
    with pytest.raises(UserError, match=f"^--{name}: expected {expected}.*, got "):
        cli.check_values(Config(**{name: value}))


def test_flags_are_the_options_and_show_the_teachers_defaults(capsys):
    """Each flag once in --help, under its group; errors say what is expected."""
    parser = cli.Parser("a program")
    presets = {"ring": {}, "wan": {"steps": 8, "guidance": (4.0, 3.0)}}
    cli.add_flags(parser, Config, presets, "wan")["output"].add_argument("--out")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    for words in ("student (default 8)", "low noise (default 4.0 3.0)", "... (default wan)"):
        assert " ".join(text.split()).count(words) == 1
    assert [g for g in cli.GROUPS if f"\n{g}:\n" in text] == list(cli.GROUPS)
    args = parser.parse_args("--steps 2 --guidance 1 2.5 --compile".split())
    expected = {"steps": 2, "guidance": (1.0, 2.5), "compile": True}
    assert cli.explicit_flags(args, Config) == expected
    assert Config(**cli.from_json(cli.to_json(Config(**expected)))) == Config(**expected)
    with pytest.raises(UserError, match="^--steps: expected int, got '4.5'"):
        parser.parse_args(["--steps", "4.5"])
    with pytest.raises(UserError, match="^--depths: expected one of .*, got 'x'"):
        parser.parse_args(["--depths", "x"])


def resolve(out: Path, resume=False, overwrite=False, **explicit):
    """Resolve the run that these flags describe."""
    return runs.resolve_run(out, Config(**explicit), explicit, resume, overwrite)


@pytest.fixture
def unfinished(tmp_path):
    """The folder of a run of 8 steps that has a checkpoint and reads a file."""
    (tmp_path / "input").write_text("input")
    files = common.digest_files([tmp_path / "input"])
    settings = cli.to_json(Config(steps=8, points=str(tmp_path / "input")))
    config = {"settings": settings, "environment": {}, "files": files}
    common.write_json(tmp_path / "run" / "config.json", config)
    common.write_json(tmp_path / "run" / "state" / "state.json", {})
    return tmp_path / "run"


def test_a_run_is_new_resumed_finished_or_replaced(unfinished, tmp_path):
    new, saved = Config(steps=8), Config(steps=8, points=str(tmp_path / "input"))
    assert resolve(tmp_path / "new", steps=8) == (new, False)
    assert resolve(tmp_path / "new", resume=True, steps=8) == (new, False)
    assert resolve(unfinished, resume=True) == (saved, False)
    common.write_json(unfinished / "metrics.json", {})
    flags = dict(steps=8, points=str(tmp_path / "input"))
    assert resolve(unfinished, **flags) == (saved, True) == resolve(unfinished, resume=True)
    (unfinished / "notes.txt").write_text("not a run's file")
    assert resolve(unfinished, overwrite=True, steps=2) == (Config(steps=2), False)
    files = {p.name for p in unfinished.rglob("*") if p.is_file()}
    assert files == {"config.json", "notes.txt"}


def test_a_folder_that_does_not_fit_is_refused(unfinished, tmp_path):
    """Another run, an unfinished one, an input file that has changed, old settings."""
    with pytest.raises(UserError, match="expected an empty folder or a run, found input"):
        resolve(tmp_path, overwrite=True)
    with pytest.raises(UserError, match="unfinished run; continue it with --resume"):
        resolve(unfinished, steps=8)
    for resume in (True, False):
        with pytest.raises(UserError, match="--steps: expected 8 .*, got 2; choose another --out"):
            resolve(unfinished, resume=resume, steps=2)
    with pytest.raises(UserError, match="--iters: expected 400 .*, got 900; --resume trains"):
        resolve(unfinished, steps=8, iters=900)
    for settings in ({"steps": 0}, {"unknown": 1}, {"iters": "4"}, {"guidance": 1.0}, None):
        config = {"settings": settings, "files": {}, "environment": {"commit": "abc"}}
        common.write_json(unfinished / "config.json", config)
        with pytest.raises(UserError, match="does not fit .* the version that wrote it"):
            resolve(unfinished, resume=True)


def test_a_run_goes_on_with_moved_files_and_more_iterations(unfinished, tmp_path, capsys):
    """Files are told by their digests. Negative control: another file."""
    old, new = tmp_path / "input", tmp_path / "moved"
    old.rename(new)
    with pytest.raises(UserError, match="input is missing; .* --resume --points PATH"):
        resolve(unfinished, resume=True)
    common.write_json(unfinished / "metrics.json", {})
    assert resolve(unfinished, resume=True, points=str(new))[1]
    cfg, finished = resolve(unfinished, resume=True, points=str(new), iters=900)
    assert not finished and cfg == Config(steps=8, points=str(new), iters=900)
    runs.record_run(unfinished, cfg, {"commit": "abc"}, [new], False)
    assert "commit was None when the run began" in capsys.readouterr().out
    assert not (unfinished / "metrics.json").exists()
    assert resolve(unfinished, resume=True) == (cfg, False)  # and stays so without flags
    new.write_text("changed")
    with pytest.raises(UserError, match="moved has changed since the run began; restore it"):
        runs.record_run(unfinished, cfg, {}, [new], False)


KEPT = """notes.txt samples.txt previews/best-so-far.safetensors previews/mine.png prompts/mine.txt
previews/phase2-000002-copy.safetensors prompts/shard-00000-old.safetensors samples/000-best.mp4
samples/samples.bak state/backup.safetensors state/phase1-000200.safetensors config.json""".split()
OURS = """metrics.json log.jsonl student.safetensors previews/phase2-000002.safetensors
samples/000-01.mp4 previews/phase2-000002.png prompts/shard-00000.safetensors
samples/samples.npy state/state.json state/phase1-000200.1of2.safetensors state/state.json.tmp
curves.png samples/003.png""".split()


def test_a_run_removes_only_names_that_it_writes(tmp_path):
    """Each row of OURS is the negative control of KEPT. Of previews the newest remain."""
    for name in (*KEPT, *OURS):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "previews" / "phase10-000001.safetensors").write_text("")
    runs.remove_files(tmp_path / "previews", runs.STUDENT_FILES, keep=2)
    assert (tmp_path / "previews" / "phase2-000002.safetensors").exists()
    runs.clear_run(tmp_path)
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert files == set(KEPT)


def test_a_folder_belongs_to_one_command_at_a_time(tmp_path):
    """The second gets one line, the third the folder. What stays empty is removed."""
    out = tmp_path / "new" / "run"
    with runs.own_folder(out):
        with pytest.raises(UserError, match="another command is writing to .*run; wait"):
            with runs.own_folder(out):
                pass
        assert out.is_dir()
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with runs.own_folder(tmp_path / "old"):
        pass
    assert (tmp_path / "old").is_dir()  # it was there


def test_a_folder_with_leftovers_is_empty_and_a_link_to_nowhere_is_refused(tmp_path):
    for name in ("a.json.tmp", ".DS_Store", ".nfs01", "Thumbs.db", "nohup.out", "train.log"):
        (tmp_path / name).write_text("")
    assert resolve(tmp_path) == (Config(), False)
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="found thesis.txt"):
        resolve(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "unmounted")
    for name in ("link", "thesis.txt"):
        expected = f"cannot write .*{name}: File exists; .* another --out"
        with pytest.raises(UserError, match=expected):
            with runs.own_folder(tmp_path / name):
                pass


@pytest.mark.parametrize(
    "error, line",
    [
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "out of memory; try"),
        (MemoryError(), "out of memory; try"),
        (OSError(36, "File name too long", "a" * 5000), "File name too long; change it"),
    ],
)
def test_errors_of_the_machine_are_one_line(error, line, capsys):
    """Negative control: another RuntimeError is a bug, and keeps its traceback."""

    def work(error=error):
        raise error

    assert cli.exit_status("train.py", work) == 2
    printed = capsys.readouterr().err
    assert line in printed and printed.count("\n") == 1 and len(printed) < 500
    with pytest.raises(RuntimeError, match="shapes"):
        cli.exit_status("train.py", lambda: work(RuntimeError("shapes")))


def test_numbers_that_no_file_can_hold_and_files_that_cannot_be_read():
    """NaN in JSON; any failure to read a file."""
    values = {"a": [1.0, float("nan")], "b": {"c": float("-inf")}, "d": "nan"}
    assert common.finite(values) == {"a": [1.0, None], "b": {"c": None}, "d": "nan"}
    for content in ("[" * 10**5, '{"x": ' + "9" * 5000 + "}", "[1]", "\udce9"):
        path = Path("a.json")
        with pytest.raises(UserError, match=r"^cannot read a.json \(.*\); advice$"):
            with common.reading(path, "advice"):
                common.json.loads(content).keys()


def test_a_signal_waits_for_a_safe_moment_and_a_second_one_does_not():
    before = signal.getsignal(signal.SIGTERM)
    with runs.Stop() as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # the second one ends the process
        with pytest.raises(common.Interrupted):
            next(runs.with_progress(range(3), "steps", stop))
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_device_is_what_is_asked_for_or_the_best(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert cli.pick_device("auto", "auto") == "mps"
    assert cli.pick_device("auto", "cpu") == cli.pick_device("cpu", "auto") == "cpu"
    with pytest.raises(UserError, match="--device: expected mps or cpu, got cuda"):
        cli.pick_device("cuda", "cpu")


def test_random_numbers_are_functions_of_their_key():
    """The global seed does not matter; every part of the key does."""
    draws = []
    for key in ((0, 1, "z"), (0, 2, "z"), (1, 1, "z"), (0, 1, "eps"), (0, 11), (0, 1, 1)):
        draws.append(common.normal((3,), *key))
        torch.manual_seed(5)
        assert torch.equal(draws[-1], common.normal((3,), *key))
    assert len({tuple(x.tolist()) for x in draws}) == len(draws)
