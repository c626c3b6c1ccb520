"""The command line: flags from a dataclass, errors in one line, exit status, device."""

import argparse
import io
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import Field, asdict, field, fields
from itertools import pairwise
from operator import gt, le, lt
from pathlib import Path

import torch

from models.common import Interrupted, UserError, is_out_of_memory

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
        text += f" (default {format_value(defaults.get(f.name, f.default))})"
        if kind is bool:
            options = dict(action=argparse.BooleanOptionalAction)
        else:
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


def flag_words(name: str, value) -> list[str]:
    """The words of an option on the command line: --lr 0.001, --no-truncate."""
    if isinstance(value, bool):
        return [flag_name(name if value else f"no_{name}")]
    return [flag_name(name), *format_value(value).split()]


def format_value(value) -> str:
    """Format a value as one types it on the command line; "none" if it is empty."""
    if isinstance(value, bool):
        return "on" if value else "off"
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
        values = getattr(cfg, f.name)
        several = isinstance(f.default, tuple)
        if several and type(values) is not tuple:  # in a config.json
            raise UserError(f"{flag_name(f.name)}: expected a list, got {values!r}")
        for value in values if several else (values,):
            expected = expected_value(f, value)
            if expected:
                raise UserError(f"{flag_name(f.name)}: expected {expected}, got {value!r}")


def expected_value(f: Field, value) -> str:
    """Return what an option expects instead of this value, "" if the value is allowed."""
    choices = f.metadata["choices"]
    kind = f.metadata["kind"]
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
