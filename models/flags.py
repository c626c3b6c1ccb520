"""Command lines from the fields of a dataclass, and errors that are one line."""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import field, fields

import torch

from models.files import UserError


def setting(default, help: str, choices=None, low=None, above=None, high=None):
    """A field of Config, with all that the command line needs to know of it."""
    return field(
        default=default, metadata=dict(help=help, choices=choices, low=low, above=above, high=high)
    )


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
        flag, about, kind = flag_of(f.name), f.metadata, type(f.default)
        if kind is bool:
            parser.add_argument(flag, action="store_true", default=None, help=about["help"])
            continue
        others = [
            f"{name}: {preset[f.name]}" for name, preset in presets.items() if f.name in preset
        ]
        default = f.default or None if kind is str else f.default
        help = f"{about['help']} ({'; '.join([f'default {default}', *others])})"
        metavar = None if about["choices"] else kind.__name__.upper()
        parser.add_argument(flag, type=kind, choices=about["choices"], help=help, metavar=metavar)


def flag_of(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def given(args, settings) -> dict:
    """The fields that the command line named, with their values."""
    values = {f.name: getattr(args, f.name) for f in fields(settings)}
    return {name: value for name, value in values.items() if value is not None}


def check(cfg) -> None:
    """Raise UserError for a value of the wrong type, or outside the limits of its field."""
    for f in fields(cfg):
        value, about, flag = getattr(cfg, f.name), f.metadata, flag_of(f.name)
        numbers = (int, float) if type(f.default) is float else type(f.default)
        if not isinstance(value, numbers) or (about["choices"] and value not in about["choices"]):
            raise UserError(f"{flag} {value!r} is none of {about['choices'] or f.type}")
        if about["high"] is not None and value > about["high"]:
            raise UserError(f"{flag} {value} is above {about['high']}")
        if about["low"] is not None and value < about["low"]:
            raise UserError(f"{flag} {value} is below {about['low']}")
        if about["above"] is not None and value <= about["above"]:
            raise UserError(f"{flag} {value} must be above {about['above']}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag} {value} is not a finite number")


def exit_status(script: str, work: Callable[[], None], memory: str = "") -> int:
    """0 after the work; 2 with one line where the user can mend it; 130 where they stopped it.

    memory: what to do where memory runs out.
    """
    try:
        work()
        return 0
    except UserError as error:
        line, status = error, 2
    except torch.OutOfMemoryError:
        line, status = f"out of memory; {memory or 'a smaller size, or --device cpu'}", 2
    except KeyboardInterrupt:
        line, status = "stopped; the same command goes on, or starts again", 130
    print(f"{script}: {line}", file=sys.stderr)
    return status


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
