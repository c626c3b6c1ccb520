"""A student as files for other tools, and the LoRA files of all trainers as roles for sample.py.

A LoRA is written in the one format that diffusers, ComfyUI, LightX2V and Wan2.2-Lightning all load:
lora_down, lora_up and alpha in float32 under the published names, after "diffusion_model.".
What a LoRA cannot say becomes full weights: a student of all parameters, or one whose teacher has a
LoRA merged in. That is a bf16 file per expert under the original names, as ComfyUI reads them.
"""

import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from config import Config
from models import lora, weights
from models.card import make_card
from models.common import UserError, reading, save_tensors, writing
from models.runs import set_handlers
from models.weights import RoleWeights, meta_network, teacher_spec

NOISE = {1: "high", 2: "low"}  # of a branch of the teacher


class Student(NamedTuple):
    """A finished student, as its run folder has it."""

    cfg: Config
    phases: list  # of phases.Phase
    boundary_t: float | None  # of its teacher
    branch_of: dict[str, int]  # role -> branch of the teacher that it is on
    file: object  # student.safetensors, open

    @property
    def times(self) -> list[float]:
        """The times of the steps, from 1 to 0."""
        return [t for phase in self.phases for t in phase.t[:-1]] + [0.0]

    @property
    def is_full(self) -> bool:
        """Whether a LoRA on the published base cannot say what this student is."""
        return self.cfg.train_student == "full" or bool(self.cfg.teacher_lora)


# -- export --------------------------------------------------------------------------------------


def export_student(student: Student, out: Path) -> list[Path]:
    """Write a student's files and their card to a new or empty folder. Returns their paths."""
    check_exportable(student.phases, student.branch_of, student.boundary_t)
    stems = [f"phase{phase.k}" for phase in student.phases]
    if student.boundary_t:  # high_noise_model and low_noise_model, as Lightning names them
        branches = [student.branch_of[f"student{phase.k}"] for phase in student.phases]
        stems = [f"{NOISE[branch]}_noise_model" for branch in branches]
    names = {"README.md", *(f"{stem}.safetensors" for stem in stems)}
    with whole_folder(out, names) as part:
        for phase, stem in zip(student.phases, stems):
            file = part / f"{stem}.safetensors"
            save_tensors(expert_tensors(student, phase), file, file_metadata(student, phase))
        card = make_card(student, stems, base_name(student.cfg))
        (part / "README.md").write_text(card, encoding="utf-8")
    return sorted(out / name for name in names)


def check_exportable(phases: list, branch_of: dict[str, int], boundary_t: float | None) -> None:
    """Raise UserError unless each transformer has one expert."""
    branches = [branch_of[f"student{phase.k}"] for phase in phases]
    if boundary_t and branches != [1, 2]:
        found = " and ".join(f"phase {k} on {NOISE[x]} noise" for k, x in enumerate(branches, 1))
        advice = "train with --phases 2 and another --shift"
        expected = "one phase on each transformer, as other tools load one LoRA for each"
        raise UserError(f"cannot export: expected {expected}, found {found}; {advice}")


def expert_tensors(student: Student, phase) -> dict[str, Tensor]:
    """An expert's LoRA under the published names, or all its parameters if student.is_full.

    These are bf16, but float32 where the port is, as in norms of Wan.
    """
    cfg = student.cfg
    role = f"student{phase.k}"
    branch = student.branch_of[role]
    own = weights.student_weights(cfg, student.file, role)
    if not student.is_full:
        return lora_tensors(own.factors, cfg.alpha)
    if own.full:
        net = meta_network(cfg, branch, torch.bfloat16).requires_grad_(False)
        weights.load_tensors(net, own.full(), "cpu")
    else:  # a LoRA on a teacher that was merged with another one
        path = weights.branch_paths(cfg.teacher, *cfg.weights)[0][branch - 1]
        loras = weights.teacher_loras(cfg)[branch - 1]
        changes = {f"{layer}.weight": [x] for layer, x in own.factors.items()}
        net = weights.load(path, teacher=cfg.teacher, loras=loras, changes=changes)
    return {name: p.data for name, p in net.named_parameters()}


def lora_tensors(factors: dict[str, lora.Factors], alpha: float) -> dict[str, Tensor]:
    """The factors of each layer under the published names."""
    tensors = {}
    for layer, (up, down, _) in factors.items():
        tensors[f"diffusion_model.{layer}.lora_up.weight"] = up
        tensors[f"diffusion_model.{layer}.lora_down.weight"] = down
        tensors[f"diffusion_model.{layer}.alpha"] = torch.tensor(float(alpha))
    return tensors


@contextmanager
def whole_folder(out: Path, names: set[str]) -> Iterator[Path]:
    """A folder inside `out` to fill. The files move up at the end; if anything fails, none is left.

    out may be a mount, a link, the current folder. names: those of our files. Raises UserError
    unless out is new, empty, or what a killed export left.
    """
    part = out / "unfinished-export"
    is_new = not out.exists()
    with writing(out, "--export"):
        if not is_new:
            check_empty(out, part.name, names)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        handlers = set_handlers({signal.SIGTERM: signal.default_int_handler})  # like Ctrl-C
        try:
            yield part
            for file in part.iterdir():
                file.rename(out / file.name)
        except BaseException:  # KeyboardInterrupt, too
            for name in names:
                (out / name).unlink(missing_ok=True)
            raise
        finally:
            set_handlers(handlers)
            shutil.rmtree(part, ignore_errors=True)  # after an error, and after Ctrl-C
            if is_new:
                with suppress(OSError):  # not empty: the files are there
                    out.rmdir()


def check_empty(out: Path, part: str, names: set[str]) -> None:
    """Raise UserError unless a folder is empty, or has what a killed export left: part, names."""
    found = {path.name for path in out.iterdir() if path.name[0] != "."}
    leftovers = names if part in found else set()
    others = found - {"lost+found", part} - leftovers
    if others:
        line = f"expected a new or empty folder, {out} is not empty: {min(others)}"
        raise UserError(f"--export: {line}; choose another folder")


# -- header ----------------------------------------------------------------------------------------


def file_metadata(student: Student, phase) -> dict[str, str]:
    """The header's strings: what sample.py --lora needs to know, and what a reader wants to."""
    cfg = student.cfg
    branch = student.branch_of[f"student{phase.k}"]
    metadata = dict(format="pt", teacher=cfg.teacher, base=base_name(cfg), branch=str(branch))
    metadata |= dict(phase=str(phase.k), shift=str(cfg.shift), times=json.dumps(student.times))
    metadata["steps"] = json.dumps(list(range(phase.first, phase.end)))
    if student.boundary_t:
        metadata |= {"noise": NOISE[branch], "boundary": str(student.boundary_t)}
    return metadata


def base_name(cfg: Config) -> str:
    """The base as published, or the name of the user's folder."""
    repository = teacher_spec(cfg.teacher).repository
    name = Path(cfg.weights[0]).name if cfg.weights else repository or cfg.teacher
    return repository if name == repository.split("/")[-1] else name


# -- LoRA files as roles -------------------------------------------------------------------------


class Assignment(NamedTuple):
    """Which role takes which step, and the LoRA files of each role."""

    roles: list[str]  # the role of each step
    times: tuple[float, ...]
    branch_of: dict[str, int]  # role -> branch of the teacher
    files_of: dict[str, list[lora.LoraFile]]


def assign_loras(
    cfg: Config,
    names: list[str],
    steps_given: bool,
    times: tuple[float, ...],
    boundary_t: float | None,
) -> Assignment:
    """Assign LoRA files to the steps.

    A file that we exported takes the steps in its metadata, and those without, such as a style
    LoRA, join it; else t decides. names: FILE, FILE:STRENGTH or a folder. steps_given: the user
    asked for other steps than such metadata have.
    """
    files = find_loras(names)
    metadata = {file: lora.read_metadata(file.path) for file in files}
    for file, entry in metadata.items():
        if entry.get("teacher", cfg.teacher) != cfg.teacher:
            raise UserError(f"{file.path} is for {entry['teacher']}, not for {cfg.teacher}")
    exported = {file: entry for file, entry in metadata.items() if "times" in entry}
    if exported and not steps_given:
        with reading(next(iter(exported)).path, "export the student again"):
            assignment = assign_by_metadata(exported)
        join_others(assignment, [file for file in files if file not in exported], boundary_t)
    else:
        assignment = assign_by_time(files, times, boundary_t)
        if any(sum(file in exported for file in part) > 1 for part in assignment.files_of.values()):
            files = ", ".join(map(str, exported))
            raise UserError(f"{files} have steps of their own; drop --steps, --shift, --times")
    for role in assignment.files_of:
        lora_weights(cfg, assignment, role)  # an error in any file shows before a base is loaded
    return assignment


def lora_weights(cfg: Config, assignment: Assignment, role: str) -> RoleWeights:
    """The weights of a role, read from its LoRA files. Raises UserError."""
    net = meta_network(cfg, assignment.branch_of[role])
    changes = weights.read_loras(net, assignment.files_of[role])
    factors, rest = lora.split_changes(changes, net)
    if rest and weights.is_random(cfg):
        raise UserError(f"--lora: {min(rest)} of random weights cannot change; give --weights")
    return RoleWeights(factors, rest)


def find_loras(names: list[str]) -> list[lora.LoraFile]:
    """The files that FILE, FILE:STRENGTH and folders name. Raises UserError."""
    files = []
    for name in names:
        path, strength = lora.parse_file(name)
        if not path.exists():
            raise UserError(f"--lora: {path} does not exist; name LoRA files or their folder")
        paths = weights.safetensors_in(path) if path.is_dir() else [path]
        files += [lora.LoraFile(path, strength) for path in paths]
    return files


def join_others(
    assignment: Assignment, files: list[lora.LoraFile], boundary_t: float | None
) -> None:
    """Add files that a student has beside its own to the roles that their names allow."""
    for file in files:
        noise = lora.noise_of(file.path) if boundary_t else ""
        branches = assignment.branch_of.items()
        joined = [role for role, branch in branches if noise in ("", NOISE[branch])]
        print(f"{file}: {', '.join(joined)}, in addition")
        for role in joined:
            assignment.files_of[role].append(file)


def assign_by_metadata(metadata: dict[lora.LoraFile, dict]) -> Assignment:
    """Assign the files of a student that we exported, by their metadata."""
    steps = {}  # step -> role
    branch_of = {}
    files_of = {}
    for file, entry in metadata.items():
        role = f"student{entry['phase']}"
        branch_of[role] = int(entry["branch"])
        files_of[role] = [file]
        steps |= dict.fromkeys(json.loads(entry["steps"]), role)
        print(f"{file}: {role}, by its metadata")
    students = {(entry["times"], entry["base"]) for entry in metadata.values()}
    times = json.loads(entry["times"])
    is_whole = len(steps) == len(times) - 1 and len(files_of) == len(metadata)
    if any(branch not in NOISE for branch in branch_of.values()):
        raise ValueError("expected branches 1, 2")
    if times != sorted(map(float, times), reverse=True):
        raise ValueError("expected times that fall")
    if len(students) > 1 or not is_whole:
        names = ", ".join(map(str, metadata))
        raise UserError(f"--lora: expected the files of all phases of one student, got {names}")
    return Assignment([steps[i] for i in range(len(steps))], tuple(times), branch_of, files_of)


def assign_by_time(
    files: list[lora.LoraFile], times: tuple[float, ...], boundary_t: float | None
) -> Assignment:
    """Assign the files of each transformer to the steps at which t chooses it."""
    parts = lora.files_of_branches(files, 2 if boundary_t else 1)
    if boundary_t:
        is_named = any(lora.noise_of(file.path) for file in files)
        reason = "by metadata or name" if is_named else "in the order given"
        reason = "one file for both" if parts[0] == parts[1] else reason
        high, low = (" + ".join(map(str, part)) or "none" for part in parts)
        print(f"high noise: {high}, low noise: {low}, {reason}")
    files_of = {f"student{i}": part for i, part in enumerate(parts, 1)}
    roles = [f"student{1 if not boundary_t or t >= boundary_t else 2}" for t in times[:-1]]
    return Assignment(roles, times, {role: int(role[-1]) for role in files_of}, files_of)
