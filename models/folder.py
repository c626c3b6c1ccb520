"""The folder of a run: what is in it, its log, and the signals that end a run cleanly."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
from tqdm import tqdm

from models import files, parallel
from models.flags import check, flag_of, shown, tuples
from models.files import Interrupted, UserError, cannot_write, read_json

OURS = {
    "config.json",
    "curves.png",
    "log.jsonl",
    "looks",
    "metrics.json",
    "prompts.safetensors",
    "samples.png",
    "start.safetensors",
    "student.safetensors",
    "state",
}


def contents(out: Path) -> set[str]:
    """What a folder holds, but for temporary files that a crash left."""
    try:
        return {path.name for path in out.iterdir() if path.suffix != ".tmp"}
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; choose another --out") from error


def make(out: Path) -> None:
    """Make a folder that can be written to. Raises UserError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from error


def settle(args, cfg) -> tuple:
    """The settings to run with, and whether that run is finished already. Raises UserError."""
    held = contents(args.out)
    if args.overwrite and "config.json" in held:
        clear(args.out)
        return cfg, False
    if "config.json" not in held:
        if held:
            raise UserError(
                f"{args.out} holds other things ({', '.join(sorted(held)[:3])}); "
                "choose another --out"
            )
        return cfg, False
    config = read_json(args.out / "config.json", "start over with --overwrite")
    theirs = config_of(type(cfg), config, args.out)
    if args.resume:
        for name, value in args.given.items():
            if getattr(theirs, name) != value:
                held_value, flag = shown(getattr(theirs, name)), flag_of(name)
                raise UserError(
                    f"{args.out} runs with {flag} {held_value}, not {shown(value)}: "
                    "--resume keeps its settings; drop the flag, or choose another --out"
                )
        cfg = theirs
    elif cfg != theirs or "metrics.json" not in held:
        other = [f.name for f in fields(cfg) if getattr(cfg, f.name) != getattr(theirs, f.name)]
        if other:
            names = ", ".join(map(flag_of, other))
            raise UserError(
                f"{args.out} holds a run with other settings ({names}); "
                "choose another --out, or replace it with --overwrite"
            )
        raise UserError(
            f"{args.out} holds an unfinished run; continue it with --resume, "
            "replace it with --overwrite, or choose another --out"
        )
    compare(config["environment"], environment(args.device))
    check_files(config["files"])
    return cfg, "metrics.json" in held


def config_of(settings, config: dict, out: Path):
    """The settings in a config.json. Raises UserError if it is not one of this version."""
    try:
        cfg = settings(**tuples(config["settings"]))
        check(cfg)
        if not all(isinstance(config[name], dict) for name in ("environment", "files")):
            raise TypeError
        return cfg
    except (TypeError, KeyError, UserError):
        raise UserError(
            f"{out}/config.json is not of this version; start over with --overwrite"
        ) from None


def clear(out: Path) -> None:
    """Remove a run but for its config.json, which the new run replaces at once. Nothing else."""
    state = out / "state"
    inside = [state / "state.json", *state.glob("*.safetensors"), *state.glob("*.tmp")]
    samples = out / "samples"
    named = ("samples.png", "samples.npy", "latents.safetensors", "asked.safetensors")
    inside += [samples / name for name in named]
    inside += [*(out / name for name in OURS), *(out / "looks").glob("phase*-*")]
    try:
        for path in inside:
            if path.is_file() and path.name != "config.json":
                path.unlink()
    except OSError as error:
        raise cannot_write(out, error) from error
    clear_samples(samples)


def clear_samples(out: Path) -> None:
    """Remove numbered videos and pictures: new ones may be fewer."""
    try:
        for path in [*out.glob("[0-9]*.mp4"), *out.glob("[0-9]*.png")]:
            path.unlink()
    except OSError as error:
        raise cannot_write(out, error) from error


def environment(device: str) -> dict:
    """What besides the settings can change a number."""
    git = ["git", "-C", str(Path(__file__).parent.parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    python = sys.version.split()[0]
    return {
        "torch": torch.__version__,
        "python": python,
        "threads": torch.get_num_threads(),
        "device": device,
        "processes": parallel.here.processes,
        "context_parallel": parallel.here.context,
        "commit": commit or "unknown",
    }


def compare(then: dict, now: dict) -> None:
    """Say which parts of the environment differ: the numbers then may, too."""
    for name in now:
        if then.get(name) != now[name]:
            print(
                f"note: the run began with {name} {then.get(name)}, this is {now[name]}; "
                "numbers may differ"
            )


def hashes(files: list[Path]) -> dict[str, str]:
    """A digest of each file that a run reads."""
    return {str(file): fingerprint(file) for file in files}


def fingerprint(file: Path, piece: int = 2**20, pieces: int = 64) -> str:
    """sha256 of a file, or, since weights take minutes to read, of its size and 64 pieces."""
    total, size = hashlib.sha256(), file.stat().st_size
    with open(file, "rb") as opened:
        if size <= piece * pieces:
            total.update(opened.read())
        else:
            total.update(str(size).encode())
            for i in range(pieces):
                opened.seek(i * (size - piece) // (pieces - 1))
                total.update(opened.read(piece))
    return total.hexdigest()


def check_files(files: dict[str, str]) -> None:
    """Raise UserError where a file that the run was made from has changed."""
    for name, digest in files.items():
        if not Path(name).is_file() or fingerprint(Path(name)) != digest:
            raise UserError(
                f"{name} is gone or has changed since the run began; "
                "bring it back, or use --overwrite"
            )


def keep_newest(folder: Path, count: int) -> None:
    """Remove all safetensors of a folder but the newest, by their numbered names."""
    for path in sorted(folder.glob("*.safetensors"))[:-count]:
        path.unlink()


class Stop:
    """Turns signals into a flag that is read where stopping is safe; a second one stops at once."""

    def __enter__(self):
        self.signal = 0
        numbers = signal.SIGTERM, signal.SIGINT
        self.before = {number: signal.signal(number, self.receive) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number, _):
        """The handler."""
        self.signal = number
        if parallel.here.processes == 1:  # torchrun repeats what the terminal has sent already
            signal.signal(number, signal.SIG_DFL)

    def check(self):
        """Raise Interrupted if a signal came, to whomever: all processes must ask."""
        if number := parallel.any_of(self.signal):
            raise Interrupted(number)


class Log:
    """log.jsonl, one object a line, cut back to where the state was taken."""

    def __init__(self, path: Path, size: int):
        self.path = path
        if not files.writes:
            return
        with self.errors():
            self.file = open(path, "ab", buffering=0)  # nothing is kept back that could fail later
            if self.file.seek(0, os.SEEK_END) < size:
                raise UserError(f"{path} has lost lines that the state knows; use --overwrite")
            self.file.truncate(size)

    @contextmanager
    def errors(self):
        """Turns what the disk answers into one line."""
        try:
            yield
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def write(self, rows: list[dict]) -> None:
        """A line for each row."""
        left = b"".join(json.dumps(row).encode() + b"\n" for row in rows if files.writes)
        with self.errors():
            while left:
                left = left[self.file.write(left) :]

    def sync(self) -> int:
        """On the disk; returns the size."""
        if not files.writes:
            return 0
        with self.errors():
            os.fsync(self.file.fileno())
            return self.file.seek(0, os.SEEK_END)


def watch(steps, text: str, stop: Stop):
    """A progress bar over steps that also hears signals."""
    for item in tqdm(steps, text, disable=None):
        if stop.signal:
            raise Interrupted(stop.signal)
        yield item
