"""What every command needs: errors, atomic files, flags from a dataclass, run folders, randomness.

Crash safety: a file is replaced as a whole or not at all, and log.jsonl is cut back to the length
that the checkpoint knows. A run that is killed at any moment resumes to the same bits.
"""

import argparse
import contextlib
import errno
import hashlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import Field, asdict, dataclass, field, fields, replace
from itertools import pairwise
from operator import gt, le, lt
from pathlib import Path

try:
    import fcntl
    import resource
except ImportError:
    sys.exit("expected Linux or macOS; on Windows run this in WSL, the Windows Subsystem for Linux")

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import _TYPES, save_file
from torch import Tensor
from tqdm import tqdm

# as PyTorch, CUDA, cuBLAS and NCCL say it
OUT_OF_MEMORY = re.compile("out of memory|allocate memory|ALLOC_FAILED|CUDA malloc", re.I)

SLOW_UPDATE = 60  # seconds from which an update is worth a line


class UserError(Exception):
    """An error the user can fix. Printed as one line; the exit status is 2."""


class Interrupted(Exception):
    """SIGTERM or Ctrl-C stopped the run between two iterations."""

    def __init__(self, number: int, advice: str = ""):
        self.number, self.advice = number, advice


def first_line(error: BaseException) -> str:
    """First line of an error's text, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory is short, on any device."""
    return isinstance(error, MemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


def torchrun_ranks() -> tuple[int, int, int, int]:
    """This rank, the number of ranks, and both within the node. Raises UserError."""
    if os.environ.get("WORLD_SIZE", "") in ("", "1"):  # whatever the other variables are
        return 0, 1, 0, 1
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    values = [os.environ.get(name, "") for name in names]
    if not all(map(str.isdecimal, values)):
        found = ", ".join(f"{name}={value}" for name, value in zip(names, values))
        advice = "start the processes with torchrun, or unset WORLD_SIZE for one process"
        raise UserError(f"expected the variables of torchrun, found {found}; {advice}")
    return tuple(map(int, values))


def is_rank0() -> bool:
    """Whether this process writes the files that ranks share: it is rank 0, or the only one."""
    return torchrun_ranks()[0] == 0


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
    make_sampler: Callable  # (cfg, base_of, weights_of, device, run_dir) -> velocity(name, x, t, c)
    save_samples: Callable  # (cfg, c, xs, args, names, device) -> metrics, files
    prepare: Callable  # (cfg, out, device, progress): what a run needs before its first phase
    num_samples: int  # of sample.py
    boundary_of: Callable = lambda cfg: None  # -> where the teacher's branch changes, or None
    throughput: Callable = lambda *_: {}  # (cfg, phase, seconds, device) -> fields for the log
    phase_summary: Callable = lambda *_: ""  # (cfg, phases, k, rows) -> text after a phase
    device: str = "cpu"
    threads: int = 1  # 0: as many as there are
    keep_students: int = 0  # of the previews, the newest


# -- files ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: Path, flag: str = "--out"):
    """Turn a full disk or a missing permission into a UserError. flag: names the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        advice = f"fix this or choose another {flag}"
        raise UserError(f"cannot write {path}: {reason}; {advice}") from error


@contextlib.contextmanager
def reading(path: Path | str, advice: str):
    """Turn whatever goes wrong while a file is read into a UserError that ends with the advice."""
    try:
        yield
    except Exception as error:  # a broken file makes parsers raise nearly any kind
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot read {path} ({reason}); {advice}") from error


def replace_file(path: Path, save: Callable[[Path], object]) -> None:
    """Let save(temporary path) write a file, then move it to path in one step."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())  # the contents must be on disk before the name is
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            with contextlib.suppress(OSError):  # the temporary file of a failed write
                temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk. Without it a power cut can undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write a file, on rank 0: a crash leaves the old file or the new one, never a part."""
    if is_rank0():
        replace_file(path, lambda temporary: temporary.write_bytes(content))


def write_json(path: Path, value) -> None:
    """Write JSON."""
    write_file(path, (json.dumps(value, indent=1) + "\n").encode())


def finite(value):
    """The same JSON value with None in place of NaN and infinity, which JSON lacks."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


def write_tensors(path: Path, tensors: dict, metadata: dict) -> None:
    """Write safetensors, with metadata as JSON in the header, on the ranks that call it."""
    tensors = {name: x.detach().contiguous() for name, x in tensors.items()}
    header = {"metadata": json.dumps(metadata)}
    replace_file(path, lambda temporary: save_tensors(tensors, temporary, header))


def save_tensors(tensors: dict, path: Path, header: dict) -> None:
    """Write safetensors with the permissions of other new files, where 0.8 makes them private."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, header)
    path.chmod(mode)


def read_json(path: Path, advice: str) -> dict:
    """Read a JSON object. If that fails, the error ends with the advice."""
    with reading(path, advice):
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("expected a JSON object")
        return value


class FileTensor:
    """A tensor in a safetensors file: x[a:b] reads these rows, and no other bytes."""

    def __init__(self, file: Path, key: str, entry: dict, data: int):
        self.file, self.key, self.dtype = file, key, entry["dtype"]  # "F32", "BF16", ...
        self.shape, self.start = tuple(entry["shape"]), data + entry["data_offsets"][0]

    def __getitem__(self, rows: slice) -> Tensor:
        count, *row = self.shape or (1,)
        first, end, _ = rows.indices(count)
        dtype, shape = _TYPES[self.dtype], self.shape and (max(0, end - first), *row)
        size = math.prod(row) * dtype.itemsize  # bytes of a row
        content = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
        with open(self.file, "rb") as file:
            file.seek(self.start + first * size)
            if file.readinto(content.numpy()) < len(content):
                raise OSError(f"{self.file} is shorter than its header says")
        return content.view(dtype).view(shape)


class TensorFile(dict):
    """Key -> tensor of a safetensors file, which may be larger than RAM: it is not mapped.

    safe_open for torch maps it as memory to write to, as much as the system must be able to give.
    """

    def __init__(self, path: Path):
        safe_open(path, framework="np")  # mapped to read; fails unless the file is whole
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
        self.metadata = entries.pop("__metadata__", {})
        super().__init__({key: FileTensor(path, key, x, 8 + length) for key, x in entries.items()})

    def get_tensor(self, key: str) -> Tensor:
        """The whole tensor of a key."""
        return self[key][:]


def open_tensors(path: Path, kind: str, advice: str) -> tuple[TensorFile, dict]:
    """Open a file of write_tensors whose metadata has this kind. Returns the file and metadata."""
    with reading(path, advice):
        file = TensorFile(path)  # fails if the file is truncated
        header = file.metadata
        metadata = json.loads(header.get("metadata") or header.get("about") or "{}")  # old: about
        metadata.keys()  # fails unless it is a JSON object
    if metadata.get("kind") != kind:
        raise UserError(f"{path} is not a file of the kind {kind!r}; {advice}")
    return file, metadata


def read_tensors(path: Path, kind: str, settings: dict, advice: str) -> tuple[dict, dict]:
    """Read the tensors and metadata of a file that belongs to a run with these settings."""
    file, metadata = open_tensors(path, kind, advice)
    with reading(path, advice):
        if not is_same_run(metadata["settings"], settings):
            raise UserError(f"{path} belongs to a run with other settings; {advice}")
        return {name: file.get_tensor(name) for name in file.keys()}, metadata


def file_digest(path: Path, piece: int = 2**20) -> str:
    """sha256 of a file. Of one larger than 64 MB, such as weights, of about 64 pieces."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as file:
        for offset in range(0, size, max(piece, size // 64)):
            file.seek(offset)
            digest.update(file.read(piece))
    return digest.hexdigest()


def digest_files(paths: Iterable[Path]) -> dict[str, str]:
    """Digest of every input file of a run, by its path."""
    return {str(path): file_digest(path) for path in paths}


# -- flags ---------------------------------------------------------------------------------------

GROUPS = ("data", "method", "training", "memory", "output")  # of --help, in this order
LIMITS = (("low", "at least", lt), ("above", "more than", le), ("high", "at most", gt))


def option(default, help, choices=None, low=None, above=None, high=None, kind=None, group="method"):
    """Return a dataclass field that is also a flag. Its limits: low <= x <= high, above < x."""
    kind = kind or type(default)  # a tuple as default: one or more values of this kind
    high = 2**31 - 1 if kind is int and high is None else high
    limits = dict(choices=choices, low=low, above=above, high=high)
    return field(default=default, metadata=dict(help=help, group=group, kind=kind) | limits)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, and without abbreviations."""

    def __init__(self, description: str):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def parse_args(self, args=None, namespace=None):
        expand = lambda x: re.sub("^(--[a-z-]+=)?~(?=/|$)", rf"\g<1>{Path.home()}", x)  # --out=~/x
        args = [expand(x) for x in (sys.argv[1:] if args is None else args)]
        for flag, text in pairwise(["", *args]):
            flag = text[:-1] if re.fullmatch("--.+=", text) else flag
            if text in ("", f"{flag}=") and flag != "--negative":  # a prompt that may be empty
                raise UserError(f"{flag}: expected a value, got an empty one; give it or drop it")
        return super().parse_args(args, namespace)

    def error(self, message: str):
        message = re.sub(r"invalid (\w+) value: ", r"expected \1, got ", message)
        choice = r"invalid choice: (.*) \(choose from (.*)\)"
        message = re.sub(choice, r"expected one of \2, got \1", message)
        raise UserError(f"{message.removeprefix('argument ')[:400]}; see --help")


def add_flags(parser: Parser, Config: type, presets: dict[str, dict], teacher: str) -> dict:
    """Add a flag for every option of Config, with this teacher's defaults. Returns the groups."""
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    defaults = presets.get(teacher, {}) | {"teacher": teacher}
    for f in fields(Config):
        kind, choices, text = (f.metadata[name] for name in ("kind", "choices", "help"))
        if kind is bool:
            options = dict(action="store_true", default=None)
        else:
            text += f" (default {format_value(defaults.get(f.name, f.default))})"
            metavar = None if choices else {int: "N", float: "X"}.get(kind, "TEXT")
            nargs = "+" if isinstance(f.default, tuple) else None
            options = dict(type=kind, choices=choices, metavar=metavar, nargs=nargs)
        groups[f.metadata["group"]].add_argument(flag_name(f.name), help=text, **options)
    return groups


def add_run_flags(groups: dict) -> None:
    """Add the flags that are about a command and its folder, not about the run's settings."""
    add = groups["output"].add_argument
    add("--out", type=Path, help="the run's folder (default out/TEACHER)")
    add("--resume", action="store_true", help="continue the run in --out, or begin it")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--dry-run", action="store_true", help="print phases, memory and time; write nothing")
    add = groups["memory"].add_argument
    add("--ignore-plan", action="store_true", help="start even if the plan says it does not fit")
    devices = ("auto", "cpu", "cuda", "mps")
    add("--device", default="auto", choices=devices, help="auto: the fastest; toys: cpu")
    help = "under torchrun: ranks that share the tokens of a sample (default 1)"
    add("--context-parallel", type=int, default=1, metavar="P", help=help)
    help = "--dry-run: plan for 8 ranks, or 4x8 for 4 nodes (default: those of torchrun)"
    add("--processes", default="", metavar="[NODESx]N", help=help)


def absolute_paths(paths):
    """A path, or several, made absolute without following links; `random` is not a path."""
    if isinstance(paths, tuple):
        return tuple(map(absolute_paths, paths))
    return paths if paths in ("", "random") else os.path.abspath(paths)


def explicit_flags(args: argparse.Namespace, Config: type) -> dict:
    """Return the options that the command line names, with their values."""
    values = {f.name: getattr(args, f.name) for f in fields(Config)}
    return from_json({name: value for name, value in values.items() if value is not None})


def flag_name(name: str) -> str:
    """Flag of an option: "fake_lr" -> "--fake-lr"."""
    return "--" + name.replace("_", "-")


def format_value(value) -> str:
    """Format a value as one types it on the command line; "none" if it is empty."""
    return (" ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)) or "none"


def to_json(cfg) -> dict:
    """Convert a Config to JSON values: lists in place of tuples."""
    return {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(cfg).items()}


def from_json(settings: dict) -> dict:
    """Convert JSON values to those of Config: tuples in place of lists."""
    return {name: tuple(x) if isinstance(x, list) else x for name, x in settings.items()}


def check_values(cfg) -> None:
    """Raise UserError for a value outside the choices or limits of its option."""
    for f in fields(cfg):
        values, several = getattr(cfg, f.name), isinstance(f.default, tuple)
        if several and type(values) is not tuple:  # in a config.json
            raise UserError(f"{flag_name(f.name)}: expected a list, got {values!r}")
        for value in values if several else (values,):
            expected = expected_value(f, value)
            if expected:
                raise UserError(f"{flag_name(f.name)}: expected {expected}, got {value!r}")


def expected_value(f: Field, value) -> str:
    """Return what an option expects instead of this value, "" if the value is allowed."""
    choices, kind = f.metadata["choices"], f.metadata["kind"]
    if type(value) is not kind and (type(value), kind) != (int, float):  # in a config.json
        return f"a value of type {kind.__name__}"
    if choices and value not in choices:
        return "one of " + ", ".join(map(str, choices))
    if kind is float and not math.isfinite(value):
        return "a finite number"
    for name, words, is_outside in LIMITS:
        limit = f.metadata[name]
        if limit is not None and is_outside(value, limit):
            return f"{words} {limit}"
    return ""


# -- commands ------------------------------------------------------------------------------------


def exit_status(
    program: str,
    work: Callable[[], int | None],
    memory_advice: str = "try a smaller size or --device cpu",
    restart_advice: str = "run the same command again to continue or restart",
) -> int:
    """Run work() and return the exit status: 0, 2 for a user's error, 130 or 143 for a signal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook has others
            # a log has every line at once; what a terminal cannot show is escaped
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        return work() or 0
    except UserError as error:
        line, status = str(error), 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        line, status = f"out of memory; {memory_advice}", 2
    except (KeyboardInterrupt, Interrupted) as error:
        advice = getattr(error, "advice", "") or restart_advice
        line, status = f"stopped; {advice}", 128 + getattr(error, "number", signal.SIGINT)
    except BrokenPipeError:  # stdout was closed, e.g. by `head`: discard what is still printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:  # of a path: too long, links in a circle, no permission, ...
        if error.filename is None:
            raise
        line, status = f"cannot use {str(error.filename)[:300]}: {error.strerror}; change it", 2
    print(f"{program}: {line}", file=sys.stderr)
    return status


def pick_device(requested: str, default: str) -> str:
    """Resolve --device. "auto" is the preset's default, and if that is "auto" too, the best."""
    requested = default if requested == "auto" else requested
    backends = {"cuda": torch.cuda, "mps": torch.backends.mps}
    available = [name for name, backend in backends.items() if backend.is_available()] + ["cpu"]
    if requested not in ("auto", *available):
        raise UserError(f"--device: expected {' or '.join(available)}, got {requested}")
    device = available[0] if requested == "auto" else requested
    if device == "cuda" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
        # the allocator reads it when it is first used; without it, unequal sizes leave gaps
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    return device


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


def resolve_run(out: Path, cfg, explicit: dict, resume: bool, overwrite: bool, Config: type):
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
    if overwrite or not contents:
        return cfg, False
    saved = config_from_json(Config, read_json(out / "config.json", START_OVER), out)
    finished, given = "metrics.json" in contents, explicit if resume else vars(cfg)
    if resume and given.get("iters", 0) > saved.iters:
        finished, saved = False, replace(saved, iters=given["iters"])
    for name, value in given.items():
        expected = getattr(saved, name)
        if name not in MOVABLE and value != expected:
            advice = f"choose another --out or {START_OVER}"
            if name == "iters" and value > expected:
                advice = f"--resume trains the last phase on; {advice}"
            expected = f"{format_value(expected)} as in the run in {out}"
            found = f"got {format_value(value)}"
            raise UserError(f"{flag_name(name)}: expected {expected}, {found}; {advice}")
    if not resume and not finished:
        advice = f"continue it with --resume, choose another --out, or {START_OVER}"
        raise UserError(f"{out} contains an unfinished run; {advice}")
    saved = replace(saved, **{name: given[name] for name in MOVABLE if name in given})
    for name in MOVABLE:
        value = getattr(saved, name)
        for path in value if isinstance(value, tuple) else (value,):
            is_there = os.path.exists(path) or os.path.exists(path.rpartition(":")[0])  # strength
            if path not in ("", "random") and not is_there:
                flag = f"--resume {flag_name(name)} PATH"
                raise UserError(f"{path} is missing; put it back or, if it has moved, give {flag}")
    return saved, finished


def record_run(out: Path, cfg, environment: dict, input_files: list[Path], overwrite: bool):
    """Write config.json. Of an old run check the input files, and print what else has changed."""
    file, files = out / "config.json", digest_files(input_files)
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


def config_from_json(Config: type, config: dict, out: Path):
    """Return the Config in the contents of config.json. Settings that it lacks have defaults."""
    try:
        cfg = Config(**from_json(config["settings"]))
        check_values(cfg)
        config["files"].values(), config["environment"].keys()
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


def environment(device: str, processes: int, context_parallel: int) -> dict:
    """Everything besides the settings that can change a number."""
    git, commit = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"], ""
    with contextlib.suppress(OSError):  # git is not installed
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    versions = dict(torch=torch.__version__, python=sys.version.split()[0])
    ranks = dict(device=device, processes=processes, context_parallel=context_parallel)
    return versions | ranks | dict(threads=torch.get_num_threads(), commit=commit or "unknown")


def set_handlers(handlers: dict) -> dict:
    """Set handlers of signals, as only the main thread can. Returns those of before."""
    is_main = threading.current_thread() is threading.main_thread()
    return {number: signal.signal(number, f) for number, f in handlers.items() if is_main}


class Stop:
    """Catch SIGTERM and Ctrl-C until it is safe to stop. A second signal stops at once."""

    def __init__(self, advice: str = "", over_ranks: Callable[[int], int] = int):
        self.advice, self.over_ranks = advice, over_ranks  # how to continue; max over all ranks

    def __enter__(self):
        self.signal, numbers = 0, (signal.SIGTERM, signal.SIGINT)
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
    n, text, began = len(micro_batches), f"update {u + 1} of {updates}", time.monotonic()
    options = dict(total=n * updates, initial=n * u, unit="micro-batch", disable=None)
    yield from tqdm(micro_batches, text, leave=False, delay=0 if n > 2 else 1, **options)
    seconds, left = time.monotonic() - began, updates - u - 1
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


# -- random numbers ------------------------------------------------------------------------------


def stream(*key) -> torch.Generator:
    """Random stream that is a function of its key, e.g. (seed, phase, iteration, update).

    There is no global random state, so a resumed run needs its counters only. The stream is on
    the CPU: a seed gives the same numbers on every device.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def normal(shape, *key) -> Tensor:
    """Standard normal numbers of the stream `key`, float32 on the CPU."""
    return torch.randn(shape, generator=stream(*key))


def uniform(shape, *key) -> Tensor:
    """Uniform numbers in [0, 1) of the stream `key`, float32 on the CPU."""
    return torch.rand(shape, generator=stream(*key))


def integers(n: int, count: int, *key) -> Tensor:
    """n integers in 0 ... count - 1 of the stream `key`, int64 on the CPU."""
    return torch.randint(count, (n,), generator=stream(*key))
