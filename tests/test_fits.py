"""Claims about what train.py says before a run, and when memory is short."""

import io
import itertools
import re
import shlex
import sys

import pytest
import torch

import train
from models import advice, cli, parallel, plan, runs

COMMAND = re.compile(r"(?:python|torchrun) [^;\n]*train\.py[^;\n]*")
MACHINES = [(1, 24), (1, 80), (8, 80), (8, 24), (0, 0)]  # GPUs, GB of each
TEACHERS = ["wan22 --phases 2", "wan21-1.3b", "qwen-image"]


def use_machine(patch, gpus: int, gigabytes: int) -> None:
    """Let train.py believe that it has these GPUs."""
    patch.setattr(plan, "find_gpus", lambda device: (gpus, plan.room_of_card(gigabytes)))
    patch.setattr(cli, "pick_device", lambda *_: "cuda" if gpus else "cpu")


def estimate_activations(patch) -> None:
    """Bytes in proportion to the tokens, as they nearly are: to count them takes seconds."""
    size = lambda shape: torch.Size(shape).numel() * 17.9e3
    cost = lambda measure, teacher, shape, *_: plan.Activations(size(shape) / 4, 0, size(shape))
    patch.setattr(plan, "cost", cost)


def run(line: str, capsys) -> tuple[int, str, str]:
    """Exit status and what is printed of `train.py line`."""
    capsys.readouterr()
    status = train.main(shlex.split(line))
    return status, *capsys.readouterr()


def planned(command: str) -> tuple[int, float]:
    """GPUs and planned bytes of a command. Raises UserError if it cannot make a run."""
    launch, flags = command.split("train.py")
    ranks = (re.findall(r"--nproc-per-node (\d+)", launch) or ["1"])[0]
    args, cfg = train.parse(shlex.split(flags))
    topology = parallel.make_topology(ranks, args.context_parallel)
    train.validate(cfg, topology)
    return int(ranks), advice.planned_peak(cfg, train.phases_of(cfg), topology)


def check(gpus: int, gigabytes: int, teacher: str, capsys) -> tuple[list[str], str]:
    """Check what a command prints on a machine. Returns the commands that it suggests."""
    status, out, error = run(f"--teacher {teacher}", capsys)
    assert status == 2 and error.count("\n") == 1  # there are no weights, at least
    if "does not exist" in error:  # it fits
        lines = COMMAND.findall(out)
        assert all(planned(line)[1] < plan.room_of_card(gigabytes) for line in lines)
        return lines, out + error
    assert out == "" and "--ignore-plan" in error
    if not gpus:
        assert "found none" in error
        tiny, *lines = COMMAND.findall(error)
        assert train.parse(shlex.split(tiny)[2:])[1].teacher in train.PRESETS
        cards = re.findall(r"on (\d) of (\d+) GB: ([^;]*)", error)
        assert [line for *_, line in cards] == lines and lines
        for count, size, line in cards:
            ranks, peak = planned(line)
            assert ranks <= int(count) and peak < plan.room_of_card(int(size))
        return lines, error
    found = re.search(r"needs ([\d.]+) GB on each GPU, there is room for ([\d.]+) GB", error)
    need, room = map(float, found.groups())
    assert need >= room == pytest.approx(plan.room_of_card(gigabytes) / 1e9, abs=0.05)
    lines = COMMAND.findall(error)
    assert len(lines) == 2
    for line in lines:
        ranks, peak = planned(line)
        assert peak < plan.room_of_card(gigabytes)
        assert ranks <= (8 if "on 8 such GPUs" in error else gpus)
    return lines, error


REFUSED = [(*machine, TEACHERS[0]) for machine in MACHINES[::2]] + [(0, 0, "qwen-image")]


@pytest.mark.parametrize("gpus,gigabytes,teacher", REFUSED)
def test_a_run_that_does_not_fit_is_refused_with_commands_that_do(
    gpus, gigabytes, teacher, tmp_path, monkeypatch, capsys
):
    """The headline command. Before weights are missed; nothing is written."""
    monkeypatch.chdir(tmp_path)
    use_machine(monkeypatch, gpus, gigabytes)
    estimate_activations(monkeypatch)
    lines, _ = check(gpus, gigabytes, teacher, capsys)
    assert lines and not list(tmp_path.iterdir())
    assert planned("python train.py --teacher wan22")[1] > plan.room_of_card(80)  # control


@pytest.mark.slow
@pytest.mark.parametrize("teacher", TEACHERS)
def test_the_same_with_every_byte_counted(teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for gpus, gigabytes in MACHINES:
        use_machine(monkeypatch, gpus, gigabytes)
        _, printed = check(gpus, gigabytes, teacher, capsys)
        with capsys.disabled():
            print(f"\n{gpus} x {gigabytes} GB, {teacher}:\n{printed}", end="")


def test_a_run_that_fits_says_so_and_names_idle_gpus(tmp_path, monkeypatch, capsys):
    """Then the weights are missing. With --ignore-plan they are so at once."""
    monkeypatch.chdir(tmp_path)
    estimate_activations(monkeypatch)
    line = "--teacher wan22 --size 1x720x1280 --seed 3"
    for gpus, note in ((1, False), (8, True)):
        use_machine(monkeypatch, gpus, 80)
        status, out, error = run(line, capsys)
        assert status == 2 and "does not exist; get it" in error
        assert "GB on each GPU, by the plan" in out and ("uses 1 of 8 GPUs" in out) == note
    [command] = COMMAND.findall(out)
    assert command == f"torchrun --standalone --nproc-per-node 8 train.py {line}"
    assert planned(command)[0] == 8
    use_machine(monkeypatch, 1, 24)
    assert "the plan needs" in run(line, capsys)[2]
    status, out, error = run(f"{line} --ignore-plan", capsys)
    assert status == 2 and "plan" not in out and "does not exist" in error


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    "flags",
    ["--size 1x720x1280 --base int8", "--size 1x720x1280 --micro-batch 2"],
)
def test_out_of_memory_gives_commands_that_need_less_and_differ(flags, monkeypatch, capsys):
    """At least a fifth less than the plan of the run that failed."""
    use_machine(monkeypatch, 1, 80)
    estimate_activations(monkeypatch)
    monkeypatch.setattr(train, "run_command", out_of_memory)
    status, _, error = run(f"--teacher wan22 {flags}", capsys)
    assert status == 2 and error.count("\n") == 1 and "out of memory; the plan was" in error
    before = planned(f"python train.py --teacher wan22 {flags}")[1]
    lines = COMMAND.findall(error)
    assert lines and all(planned(line)[1] < 0.8 * before for line in lines)


def test_a_suggested_command_does_not_contradict_itself():
    """Flags that it changes are left out, also those that say no."""
    argv = "--teacher wan22 --no-checkpointing --micro-batch 2 --seed 3".split()
    settings = dict(checkpointing=True, micro_batch=1)
    command = advice.command_line(argv, settings, parallel.SINGLE)
    words = "--teacher wan22 --seed 3 --checkpointing --micro-batch 1"
    assert command == f"python train.py {words}"


def test_example_prompts_are_warned_of_in_the_first_line_and_the_last(monkeypatch, capsys):
    """Not with own prompts, nor with random weights."""
    use_machine(monkeypatch, 1, 80)
    estimate_activations(monkeypatch)
    monkeypatch.setattr(train, "run_command", lambda *_: print("metrics"))
    line = "--teacher wan22 --size 1x720x1280"
    lines = run(line, capsys)[1].splitlines()
    assert lines[0] == lines[-1] == advice.EXAMPLES and "metrics" in lines
    for flags in ("--prompts mine.txt", "--weights random"):
        assert "warning" not in run(f"{line} {flags}", capsys)[1]


# -- a slow iteration ----------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stderr on which tqdm draws."""

    def isatty(self):
        return True


def test_an_iteration_has_a_bar_by_micro_batch_with_the_time_left(monkeypatch, capsys):
    """From the start, on a clock of ten seconds a call. Of toys it shows only if it is slow."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    list(runs.watch_update(list("ab"), 0, 6))
    assert terminal.getvalue() == ""
    items = runs.watch_update(list("abcd"), 0, 6)
    assert next(items) == "a" and "update 1 of 6:   0%" in terminal.getvalue()
    assert list(items) == list("bcd")
    clock = itertools.count(0, 10)
    monkeypatch.setattr("tqdm.std.time", lambda: float(next(clock)))
    list(runs.watch_update(list("abcd"), 1, 6))
    assert re.search(r"update 2 of 6: +21%.* 5/24 \[00:[1-4]0<0[1-9]:", terminal.getvalue())
    monkeypatch.undo()
    list(runs.watch_update(list("ab"), 1, 6))
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(runs, "SLOW_UPDATE", -1)  # where no bar is drawn, a line
    list(runs.watch_update(list("ab"), 1, 6))
    assert "update 2 of 6 took 0 s; about 0 minutes left" in capsys.readouterr().out
