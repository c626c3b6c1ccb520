"""Command lines from the fields of a dataclass, and errors that are one line."""

import argparse
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, field, fields

import torch

from models.files import UserError


def setting(default, help: str, choices=None, low=None, above=None, high=None, kind=None):
    """A field of Config, with all that the command line needs to know of it.

    A tuple as default: the flag takes several values, each of this `kind`.
    """
    about = dict(help=help, choices=choices, low=low, above=above, high=high)
    return field(default=default, metadata=about | {"kind": kind or type(default)})


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and which takes no abbreviations."""

    def __init__(self, doc: str):
        super().__init__(
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message):
        raise UserError(f"{message}; see --help")


def add_flags(parser: Parser, settings, presets: dict[str, dict]) -> None:
    """A flag for every field; the help says the default, and which presets have another."""
    for f in fields(settings):
        flag, about, kind = flag_of(f.name), f.metadata, f.metadata["kind"]
        if kind is bool:
            parser.add_argument(flag, action="store_true", default=None, help=about["help"])
            continue
        help = f"{about['help']} (default {defaults(f, presets)})"
        metavar = None if about["choices"] else kind.__name__.upper()
        many = "+" if isinstance(f.default, tuple) else None
        parser.add_argument(
            flag, type=kind, choices=about["choices"], help=help, metavar=metavar, nargs=many
        )


def shown(value) -> str:
    """A value as one would give it."""
    text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text or "none"


def defaults(f, presets: dict[str, dict]) -> str:
    """A field's default, then those of presets that have another: each value once."""
    names: dict[str, list[str]] = {shown(f.default): []}
    for name, preset in presets.items():
        if f.name in preset:
            names.setdefault(shown(preset[f.name]), []).append(name)
    usual, *others = names
    return "; ".join([usual, *(f"{', '.join(names[value])}: {value}" for value in others)])


def flag_of(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def given(args, settings) -> dict:
    """The fields that the command line named, with their values."""
    values = {f.name: getattr(args, f.name) for f in fields(settings)}
    return tuples({name: value for name, value in values.items() if value is not None})


def tuples(settings: dict) -> dict:
    """Settings as argparse or JSON has them -> as Config has them: tuples, not lists."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}


def plain(cfg) -> dict:
    """Settings as JSON will give them back."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(cfg).items()}


def check(cfg) -> None:
    """Raise UserError for a value of the wrong type, or outside the limits of its field."""
    for f in fields(cfg):
        values, flag = getattr(cfg, f.name), flag_of(f.name)
        if isinstance(values, tuple) != isinstance(f.default, tuple):
            raise UserError(f"{flag} {values!r} is none of {f.type}")
        for value in values if isinstance(values, tuple) else (values,):
            check_value(flag, value, f)


def check_value(flag: str, value, f) -> None:
    """One value of a field."""
    about, kind = f.metadata, f.metadata["kind"]
    numbers = (int, float) if kind is float else kind
    if not isinstance(value, numbers) or (about["choices"] and value not in about["choices"]):
        raise UserError(f"{flag} {value!r} is none of {about['choices'] or kind.__name__}")
    if about["high"] is not None and value > about["high"]:
        raise UserError(f"{flag} {value} is above {about['high']}")
    if about["low"] is not None and value < about["low"]:
        raise UserError(f"{flag} {value} is below {about['low']}")
    if about["above"] is not None and value <= about["above"]:
        raise UserError(f"{flag} {value} must be above {about['above']}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{flag} {value} is not a finite number")


def closed_pipe() -> int:
    """Nobody reads on: what is left to print goes nowhere, and the status is a pipe's."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


def exit_status(
    script: str,
    work: Callable[[], None],
    memory: str = "",
    again: str = "the same command goes on, or starts again",
) -> int:
    """0 after the work; 2 with one line where the user can mend it; 130 where they stopped it.

    memory: what to do where memory runs out; again: what to do after a stop.
    """
    try:
        work()
        return 0
    except UserError as error:
        line, status = error, 2
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        line, status = f"out of memory; {memory or 'a smaller size, or --device cpu'}", 2
    except KeyboardInterrupt:
        line, status = f"stopped; {again}", 130
    except BrokenPipeError:  # | head
        return closed_pipe()
    print(f"{script}: {line}", file=sys.stderr)
    return status


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the host, has no room left."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def pick_device(asked: str, usual: str) -> str:
    """cuda, else mps, else cpu, unless the preset has a usual one or the user asks."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    asked = usual if asked == "auto" else asked
    if asked == "auto":
        return next(name for name, here in there.items() if here)
    if not there[asked]:
        raise UserError(f"--device {asked} is not available to this torch; use --device cpu")
    return asked
