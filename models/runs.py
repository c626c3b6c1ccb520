"""A run on disk and on screen: preset, folder, log, signals, progress, metrics.

Crash safety: a file is replaced as a whole or not at all, and log.jsonl is cut back to the length
that the checkpoint knows. A run that is killed at any moment resumes to the same bits.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

try:
    import fcntl
    import resource
except ImportError:
    sys.exit("expected Linux or macOS; on Windows run this in WSL, the Windows Subsystem for Linux")

import torch
from tqdm import tqdm

from config import Config
from models.cli import check_values, flag_name, format_value, from_json, to_json
from models.common import (
    Interrupted,
    UserError,
    digest_files,
    first_line,
    is_rank0,
    open_tensors,
    read_json,
    reading,
    torchrun_ranks,
    write_json,
    writing,
)

SLOW_UPDATE = 60  # seconds from which an update is worth a line


@dataclass(frozen=True)
class Preset:
    """What a kind of teacher provides to train.py and sample.py.

    cfg is a config.Config, phases a list of phases.Phase, topology a parallel.Topology, out the
    run's folder, device a torch.device, args the parsed flags of sample.py. Settings that do not go
    together, and files that cannot be read, raise UserError.
    """

    check_config: Callable  # (cfg, topology); reads no file
    input_files: Callable  # (cfg) -> the files that a run reads
    base_files: Callable  # (cfg) -> those that the teacher is made of
    make_roles: Callable  # (cfg, phases, device, out) -> moe.Roles
    make_data: Callable  # (cfg, out) -> data(n, shared, rng) -> conditions of n, shape of one
    report: Callable  # (cfg, phases, roles, k, device, out, finished) -> metrics, png
    plan_text: Callable  # (cfg, phases, device, topology) -> the text of --dry-run
    apply_flags: Callable  # (cfg, args) -> cfg, for sampling
    sample_inputs: Callable  # (cfg, args, out, run_dir, device) -> cfg, conditions, shape, names
    make_sampler: Callable  # (cfg, branch_of, weights_of, device, run_dir) -> v(name, x, t, c)
    save_samples: Callable  # (cfg, c, xs, args, names, device) -> metrics, files
    prepare: Callable  # (cfg, out, device, progress): what a run needs before its first phase
    num_samples: int  # of sample.py
    boundary_of: Callable = lambda cfg: None  # -> where the teacher's branch changes, or None
    throughput: Callable = lambda *_: {}  # (cfg, phase, seconds, device) -> fields for the log
    phase_summary: Callable = lambda *_: ""  # (cfg, phases, k, rows) -> text after a phase
    device: str = "cpu"
    threads: int = 1  # 0: as many as there are
    keep_students: int = 0  # of the previews, the newest


# -- the folder of a run -------------------------------------------------------------------------

# names that we write; a file of any other name is never removed
SHARD_FILES = r"shard-\d{5,}\.safetensors"
STATE_FILES = r"phase\d+-\d{6,}\.\d+of\d+\.safetensors"
STUDENT_FILES = r"phase\d+-\d{6,}\.safetensors"
SAMPLE_FILES = r"\d{3,}(-\d\d+)?\.(mp4|png)|samples\.(npy|png)|latents\.safetensors"
RUN_FILES = (  # beside config.json; metrics.json marks a finished run
    r"(curves|samples)\.png|log\.jsonl|metrics\.json|(start|student)\.safetensors|"
    rf"state/(state\.json|{STATE_FILES})|previews/({STUDENT_FILES}|phase\d+-\d{{6,}}\.png)|"
    rf"prompts/{SHARD_FILES}|samples/({SAMPLE_FILES})"
)
LEFTOVERS = r"\..*|.*\.(tmp|log|out|err)|Thumbs\.db|desktop\.ini|lost\+found"  # of other programs
START_OVER = "start over with --overwrite"


def folder_contents(out: Path) -> set[str]:
    """Names in a folder without LEFTOVERS; none if it does not exist. Raises UserError."""
    with writing(out), contextlib.suppress(FileNotFoundError):
        return {path.name for path in out.iterdir() if not re.fullmatch(LEFTOVERS, path.name)}
    return set()


@contextlib.contextmanager
def own_folder(out: Path) -> Iterator[None]:
    """Make a folder, on rank 0, and keep other commands out of it. If it stays empty, remove it.

    On a network file system the lock may hold on one machine only. Raises UserError.
    """
    if not is_rank0():
        yield
        return
    new = [path for path in (out, *out.parents) if not path.exists()]
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            advice = "wait for it or choose another --out"
            raise UserError(f"another command is writing to {out}; {advice}") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)  # ends the lock, as the death of the process does
        with contextlib.suppress(OSError):
            for path in new:
                path.rmdir()  # fails unless it is empty


# settings that may change during a run: its files may move, and --iters may grow
MOVABLE = ("points", "weights", "teacher_lora", "prompts", "images")
CHANGEABLE = {"iters", *MOVABLE}


def is_same_run(a: dict, b: dict) -> bool:
    """Whether two settings belong to one run. One may lack settings of a later version."""
    return all(a[name] == b[name] for name in a.keys() & b.keys() - CHANGEABLE)


def resolve_run(out: Path, cfg: Config, explicit: dict, resume: bool, overwrite: bool):
    """Return the Config to run with, and whether that run is already finished.

    With --resume the settings are those of the folder; explicit flags must agree with them, except
    that files may have moved and that --iters may be larger.
    """
    contents = folder_contents(out)
    if contents and "config.json" not in contents:
        names = ", ".join(sorted(contents)[:3])
        raise UserError(f"--out {out}: expected an empty folder or a run, found {names}")
    if overwrite and contents:
        clear_run(out)
    if resume and not contents:
        print(f"{out} contains no run yet: a new one begins")
    if overwrite or not contents:
        return cfg, False
    saved = config_from_json(read_json(out / "config.json", START_OVER), out)
    finished = "metrics.json" in contents
    given = explicit if resume else vars(cfg)
    if resume and given.get("iters", 0) > saved.iters:
        finished = False
        saved = replace(saved, iters=given["iters"])
    check_agreement(saved, given, out)
    if not resume and not finished:
        advice = f"continue it with --resume, choose another --out, or {START_OVER}"
        raise UserError(f"{out} contains an unfinished run; {advice}")
    saved = replace(saved, **{name: given[name] for name in MOVABLE if name in given})
    check_inputs_exist(saved)
    return saved, finished


def check_agreement(saved: Config, given: dict, out: Path) -> None:
    """Raise UserError if settings differ from those of the run in `out`. Files may have moved."""
    for name, value in given.items():
        expected = getattr(saved, name)
        if name not in MOVABLE and value != expected:
            advice = f"choose another --out or {START_OVER}"
            if name == "iters" and value > expected:
                advice = f"--resume trains the last phase on; {advice}"
            expected = f"{format_value(expected)} as in the run in {out}"
            found = f"got {format_value(value)}"
            raise UserError(f"{flag_name(name)}: expected {expected}, {found}; {advice}")


def check_inputs_exist(cfg: Config) -> None:
    """Raise UserError if a file that the settings name is missing."""
    for name in MOVABLE:
        value = getattr(cfg, name)
        for path in value if isinstance(value, tuple) else (value,):
            is_there = os.path.exists(path) or os.path.exists(path.rpartition(":")[0])  # strength
            if path not in ("", "random") and not is_there:
                flag = f"--resume {flag_name(name)} PATH"
                raise UserError(f"{path} is missing; put it back or, if it has moved, give {flag}")


def record_run(out: Path, cfg, environment: dict, input_files: list[Path], overwrite: bool):
    """Write config.json. Of an old run check the input files, and print what else has changed."""
    file = out / "config.json"
    files = digest_files(input_files)
    if overwrite or not file.exists():
        config = {"settings": to_json(cfg), "environment": environment, "files": files}
        return write_json(file, config)
    config = read_json(file, START_OVER)
    if list(config["files"].values()) != list(files.values()):
        changed = [name for name, x in files.items() if x not in config["files"].values()]
        absent = [name for name, x in config["files"].items() if x not in files.values()]
        problem = f"{[*changed, *absent, 'the order of files'][0]} has changed since the run began"
        raise UserError(f"{problem}; restore it, choose another --out, or {START_OVER}")
    for name, value in environment.items():
        old = config["environment"].get(name)
        if old != value:
            print(f"note: {name} was {old} when the run began, is {value}; numbers may differ")
    if cfg.iters > config["settings"]["iters"]:
        decay = f"; rates fall in the last {cfg.lr_decay:.0%} of them" if cfg.lr_decay else ""
        print(f"training on to {cfg.iters} iterations per phase{decay}")
        remove_files(out, r"metrics\.json")  # first: the run is no longer finished
    if config["settings"] != to_json(cfg):
        write_json(file, config | {"settings": to_json(cfg), "files": files})


def config_from_json(config: dict, out: Path) -> Config:
    """Return the Config in the contents of config.json. Settings that it lacks have defaults."""
    try:
        cfg = Config(**from_json(config["settings"]))
        check_values(cfg)
        for name in ("files", "environment"):
            if not isinstance(config[name], dict):
                raise TypeError(f"{name} is not an object")
        return cfg
    except (AttributeError, TypeError, KeyError, UserError) as error:
        line = f"{out}/config.json does not fit this version of the code: {first_line(error)}"
        advice = f"continue with the version that wrote it (its commit is there), or {START_OVER}"
        raise UserError(f"{line}; {advice}") from error


def remove_files(folder: Path, names: str, keep: int = 0) -> None:
    """Remove the files in a folder whose path in it matches, but the last `keep` of them."""
    with writing(folder):
        paths = sorted([*folder.glob("*"), *folder.glob("*/*")])
        paths = [x for x in paths if re.fullmatch(names, x.relative_to(folder).as_posix())]
        for path in paths[: len(paths) - keep]:
            if path.is_file():
                path.unlink()


def clear_run(out: Path) -> None:
    """Remove the files of a run, except config.json, which the new run replaces."""
    remove_files(out, r"metrics\.json|state/state\.json")  # a crash must not leave these alone
    remove_files(out, rf"({RUN_FILES})(\.tmp)?")


def read_tensors(path: Path, kind: str, settings: dict, advice: str) -> tuple[dict, dict]:
    """Read the tensors and metadata of a file that belongs to a run with these settings."""
    file, metadata = open_tensors(path, kind, advice)
    with reading(path, advice):
        if not is_same_run(metadata["settings"], settings):
            raise UserError(f"{path} belongs to a run with other settings; {advice}")
        return {name: file.get_tensor(name) for name in file.keys()}, metadata


def environment(device: str, processes: int, context_parallel: int) -> dict:
    """Everything besides the settings that can change a number."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = ""
    with contextlib.suppress(OSError):  # git is not installed
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    versions = dict(torch=torch.__version__, python=sys.version.split()[0])
    ranks = dict(device=device, processes=processes, context_parallel=context_parallel)
    return versions | ranks | dict(threads=torch.get_num_threads(), commit=commit or "unknown")


# -- signals, log, progress, metrics --------------------------------------------------------------


def set_handlers(handlers: dict) -> dict:
    """Set handlers of signals, as only the main thread can. Returns those of before."""
    is_main = threading.current_thread() is threading.main_thread()
    return {number: signal.signal(number, f) for number, f in handlers.items() if is_main}


class Stop:
    """Catch SIGTERM and Ctrl-C until it is safe to stop. A second signal stops at once."""

    def __init__(self, advice: str = "", over_ranks: Callable[[int], int] = int):
        self.advice, self.over_ranks = advice, over_ranks  # how to continue; max over all ranks

    def __enter__(self):
        self.signal = 0
        numbers = (signal.SIGTERM, signal.SIGINT)
        self.handlers = set_handlers(dict.fromkeys(numbers, self._receive))
        return self

    def __exit__(self, *_):
        set_handlers(self.handlers)

    def _receive(self, number: int, _frame) -> None:
        self.signal = number
        if torchrun_ranks()[1] == 1:  # torchrun sends Ctrl-C twice
            signal.signal(number, signal.SIG_DFL)

    def received(self) -> int:
        """The signal that reached any rank, or 0. All ranks must call it together."""
        return self.over_ranks(self.signal)

    def check(self) -> None:
        """Raise Interrupted if a signal reached any rank. All ranks must call it together."""
        number = self.received()
        if number:
            raise Interrupted(number, self.advice)


class Log:
    """log.jsonl, one row per line. Rows that are newer than the checkpoint are cut off."""

    def __init__(self, path: Path, size: int):
        self.path = path
        if not is_rank0():
            return
        with writing(path):
            self.file = open(path, "ab", buffering=0)  # unbuffered: a full disk shows at once
            if self.file.seek(0, os.SEEK_END) < size:
                raise UserError(f"{path} is shorter than the checkpoint expects; {START_OVER}")
            self.file.truncate(size)

    def write(self, rows: list[dict]) -> None:
        """Append rows."""
        data = b"".join(json.dumps(row).encode() + b"\n" for row in rows if is_rank0())
        with writing(self.path):
            while data:
                data = data[self.file.write(data) :]  # an unbuffered write may be partial

    def sync(self) -> int:
        """Flush the log to disk. Returns its size in bytes."""
        if not is_rank0():
            return 0
        with writing(self.path):
            os.fsync(self.file.fileno())
            return self.file.seek(0, os.SEEK_END)


def watch_update(micro_batches: list, u: int, updates: int) -> Iterator:
    """Iterate over the micro-batches of update u, with a bar for the whole iteration.

    Where they are many, and so slow, the bar shows at once. Where no bar is drawn, a slow update
    prints a line.
    """
    n = len(micro_batches)
    text = f"update {u + 1} of {updates}"
    began = time.monotonic()
    options = dict(total=n * updates, initial=n * u, unit="micro-batch", disable=None)
    yield from tqdm(micro_batches, text, leave=False, delay=0 if n > 2 else 1, **options)
    seconds = time.monotonic() - began
    left = updates - u - 1
    if seconds > SLOW_UPDATE and not sys.stderr.isatty():
        minutes = f"about {left * seconds / 60:.0f} minutes"
        print(f"{text} took {seconds:.0f} s; {minutes} left in this iteration")


def with_progress(steps: Iterable, text: str, stop: Stop) -> Iterator:
    """Iterate over steps with a progress bar, on one rank. Raises Interrupted after a signal."""
    if not sys.stderr.isatty():  # where no bar is drawn
        print(text, flush=True)
    for item in tqdm(steps, text, disable=None):
        if stop.signal:
            raise Interrupted(stop.signal, stop.advice)
        yield item


def peak_memory(device: torch.device) -> dict[str, float]:
    """Most GB so far: in tensors, and what the allocator reserved; on a CPU, of the process."""
    if device.type == "cuda":
        peaks = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return {"memory_gb": round(peaks[0] / 1e9, 3), "reserved_gb": round(peaks[1] / 1e9, 3)}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory_gb": round(peak / 1e9, 3)}


MEANINGS = {  # of a metric, for print_metrics
    "energy": "energy distance to exact samples; 0: the same distribution",
    "energy_phases": "the same at the end of each phase",
    "energy_floor": "mean and sd of exact samples against other exact samples",
    "modes": "effective number of modes that the samples hit",
    "precision": "fraction of samples inside a mode (3 standard deviations)",
    "spread": "standard deviation within a mode, over that of exact samples",
    "class_accuracy": "fraction whose nearest mode is of their class",
    "accuracy": "fraction that the classifier recognises as their class",
    "frechet": "Frechet distance to the teacher's 40 steps; 0: the same",
    "frechet_classes": "the same within a class, mean over classes",
    "frechet_floor": "the teacher's 40 steps against themselves, other noise",
    "diversity": "mean distance of two samples of a class; teacher: 1",
    "coverage": "part of the teacher's samples with an accepted one nearby",
    "latent_distance": "mean RMS distance of two samples, as latents",
    "seconds": "s of training",
    "seconds_metrics": "s of measuring",
}
BASELINES = {"_teacher_same_steps": "the teacher in as many steps", "_exact": "exact samples"}


def print_metrics(metrics: dict, out: Path) -> None:
    """Print each metric with its meaning, and where the picture is."""
    width = max(map(len, metrics), default=0)
    for name, value in metrics.items():
        values = value if isinstance(value, list) else [value]
        text = " ".join("-" if v is None else f"{v:.4g}" for v in values)
        meanings = [words for end, words in BASELINES.items() if name.endswith(end)]
        print(f"{name:{width}}  {text:20} {MEANINGS.get(name, ''.join(meanings))}".rstrip())
    print(f"picture: {out / 'samples.png'}")
