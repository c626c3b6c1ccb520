"""Does a run fit the GPUs, and if not, which command would? Asked before weights are read.

The plan (models/plan.py) says what a run needs. Smaller runs are tried in turn, the cheapest change
first, and the first that fit are printed as whole commands.
"""

import math
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import torch
from tqdm import tqdm

from config import Config
from models import cli, parallel, plan, teachers, weights
from models.common import UserError, is_out_of_memory
from models.parallel import SINGLE, Topology
from phases import Phase

EXAMPLES = (
    "warning: the thirty example prompts of models/prompts.txt are for a trial of the pipeline; a "
    "student needs tens of thousands: --prompts FILE"
)
SMALL = 1e9  # bytes of a network that needs neither a plan nor a GPU


class Request(NamedTuple):
    """The run that the user asks for."""

    argv: list[str]  # after train.py
    cfg: Config
    phases: list[Phase]
    is_resumed: bool  # then its settings cannot change


class GPUs(NamedTuple):
    """The GPUs of this machine."""

    count: int
    room: float  # bytes to plan with, on the one that has the fewest free


@contextmanager
def watch_memory(request: Request, device: str, is_planned: bool):
    """Plan a run before it reads weights, and say what to change if it runs out of memory.

    is_planned: False skips the plan. Raises UserError if the run does not fit.
    """
    cfg = request.cfg
    if is_small(cfg):
        yield
        return
    count, room = plan.find_gpus(torch.device(device))
    gpus = GPUs(count, min(parallel.gather(room)))
    warning = ""
    if teachers.prompts_path(cfg) == teachers.EXAMPLE_PROMPTS:
        warning = f"{EXAMPLES}\n"
    text = ""
    if is_planned:
        with tqdm(desc="planning memory", bar_format="{desc}", leave=False, disable=None):
            text = parallel.on_rank0(lambda: check_memory(request, gpus))
    print(warning + text, end="")
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or not gpus.count:
            raise
        peak = planned_peak(cfg, request.phases, parallel.topology)
        found = f"the plan was {in_gb(peak)} on each GPU, with room for {in_gb(gpus.room)}"
        # the plan was wrong, or was ignored
        smaller = GPUs(gpus.count, min(gpus.room, 0.8 * peak))
        raise UserError(f"out of memory; {found}; {suggest(request, smaller)}") from error
    print(warning, end="")


def is_small(cfg: Config) -> bool:
    """Whether the teacher is a toy or a small network, which fits anywhere."""
    if cfg.teacher not in weights.TEACHERS:
        return True
    return plan.role_bytes(cfg.teacher, False, cfg.rank, torch.bfloat16, SINGLE).base < SMALL


def in_gb(size: float) -> str:
    """Bytes as text."""
    return f"{size / 1e9:.1f} GB"


def check_memory(request: Request, gpus: GPUs) -> str:
    """The plan in one line, and a note if GPUs are idle. Raises UserError if it does not fit."""
    go_on = "or go on all the same with --ignore-plan"
    if not gpus.count:
        raise UserError(f"{suggest_without_gpu(request)}; {go_on}")
    peak = planned_peak(request.cfg, request.phases, parallel.topology)
    if peak >= gpus.room:
        found = f"the plan needs {in_gb(peak)} on each GPU, there is room for {in_gb(gpus.room)}"
        raise UserError(f"{found}; {suggest(request, gpus)}; {go_on}")
    text = f"memory: {in_gb(peak)} of {in_gb(gpus.room)} on each GPU, by the plan\n"
    return text + note_idle_gpus(request, gpus)


def note_idle_gpus(request: Request, gpus: GPUs) -> str:
    """A line with the command that uses more of the GPUs, if there is one."""
    used = parallel.topology.shard_group
    for settings, wider in changes(request.cfg, gpus.count, parallel.topology):
        if wider.shard_group > used:
            with suppress(UserError):
                teachers.check_config(replace(request.cfg, **settings), wider)
                command = command_line(request.argv, settings, wider)
                note = f"note: this uses {used} of {gpus.count} GPUs; {wider.shard_group} of them:"
                return f"{note} {command}\n"
    return ""


def suggest(request: Request, gpus: GPUs) -> str:
    """The two cheapest changes that fit by the plan, as commands; on eight GPUs if none does."""
    for count, where in ((gpus.count, ""), (8, " on 8 such GPUs")):
        lines = list(islice(fitting_commands(request, GPUs(count, gpus.room)), 2))
        if lines:
            return f"try{where}: {'; or: '.join(lines)}"
    return "nothing smaller fits on 8 such GPUs; models/README.md has a table of what fits"


def suggest_without_gpu(request: Request) -> str:
    """What runs here in place of a large teacher, and the GPUs on which it runs itself."""
    teacher = request.cfg.teacher
    family = teacher if f"{teacher}-tiny" in weights.TEACHERS else teacher.split("-")[0]
    advice = f"{teacher} needs a GPU, found none; here: python train.py --teacher {family}-tiny"
    cards = {}  # command -> the smallest of these machines on which it fits
    for count, gigabytes in ((1, 24), (1, 80), (8, 80)):
        gpus = GPUs(count, plan.room_of_card(gigabytes))
        cheapest = next(fitting_commands(request, gpus), None)
        if cheapest:
            cards.setdefault(cheapest, f"on {count} of {gigabytes} GB: {cheapest}")
    return "; ".join([advice, *cards.values()])


def fitting_commands(request: Request, gpus: GPUs) -> Iterator[str]:
    """The cheapest command that fits by the plan, for each of smaller_sizes that has one."""
    cfg = request.cfg
    for size in smaller_sizes(cfg):
        for settings, topology in changes(cfg, gpus.count, parallel.topology):
            if size != cfg.size:
                settings = settings | {"size": size}
            if settings and request.is_resumed:
                continue
            with suppress(UserError):
                changed = replace(cfg, **settings)
                if planned_peak(changed, request.phases, topology, gpus.room) < gpus.room:
                    yield command_line(request.argv, settings, topology)
                    break


def smaller_sizes(cfg: Config) -> list[tuple[str, ...]]:
    """The sizes of a run, then smaller ones: the smallest of its own, one picture."""
    tokens = lambda text: math.prod(teachers.parse_size(cfg, text)[0])
    smallest = min(map(tokens, cfg.size))
    choices = [tuple(text for text in cfg.size if tokens(text) == smallest)]
    if not cfg.images:  # its first frames were made for its own sizes
        largest = max(cfg.size, key=tokens).partition(":")[0].split("x")[-2:]
        choices += [("x".join(["1", *largest]),), ("1x480x832",)]
    result = [cfg.size]
    for size in choices:
        if max(map(tokens, size)) < max(map(tokens, result[-1])):
            result.append(size)
    return result


def changes(cfg: Config, most: int, now: Topology) -> Iterator[tuple[dict, Topology]]:
    """Settings that differ, and ranks, that save memory at the same sizes, the cheapest first.

    most: how many GPUs may be used. now: the present ranks, which come first.
    """
    differing = lambda **new: {name: x for name, x in new.items() if getattr(cfg, name) != x}
    on_ranks = lambda ranks, context: Topology(now.nodes * ranks, now.nodes, context)
    saving = differing(micro_batch=1, checkpointing=True)
    no_int8 = differing(base="float")
    adapters = differing(train_student="lora", train_fake="lora")
    for settings in ({}, saving, saving | adapters):
        ranks = min(now.shard_group, most)
        yield settings, on_ranks(ranks, math.gcd(now.context_parallel, ranks))
        count = plan.num_micro_batches(replace(cfg, **settings))
        for context in (1, 2, 4, 8):
            counts = range(context, most + 1, context)
            counts = [n for n in counts if count % (n * now.nodes // context) == 0]
            if max(counts, default=1) > 1:  # several processes share no int8
                yield settings | no_int8, on_ranks(max(counts), context)
    yield saving | adapters | differing(base="int8"), on_ranks(1, 1)


def command_line(argv: list[str], settings: dict, topology: Topology) -> str:
    """The command `train.py argv` with these settings on these ranks, on the GPU."""
    flags = {"--device", "--context-parallel", *map(cli.flag_name, settings)}
    flags |= {cli.flag_name(f"no_{name}") for name in settings}  # of those that are on or off
    words = []
    keep = True
    for word in argv:
        if word.startswith("--"):
            keep = word.partition("=")[0] not in flags
        if keep:
            words.append(word)
    for name, value in settings.items():
        words += cli.flag_words(name, value)
    return f"{parallel.launch_command(topology, 'train.py')} {shlex.join(words)}".strip()


def planned_peak(
    cfg: Config, phases: list[Phase], topology: Topology, room: float = math.inf
) -> float:
    """Bytes that a process of the run needs at most. Where weights alone exceed the room, theirs.

    Raises UserError for settings that cannot make a run on these ranks.
    """
    teachers.check_config(cfg, topology)
    active = teachers.active_roles(cfg, phases)
    peak_at = lambda shape: max(plan.phase_memory(cfg, x, shape, topology).peak for x in active)
    without_activations = peak_at(None)
    if without_activations >= room:
        return without_activations
    return peak_at(max(teachers.buckets(cfg), key=math.prod))
