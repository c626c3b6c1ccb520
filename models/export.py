"""A student as files for other tools, and the LoRA files of all trainers as roles for sample.py.

A LoRA is written in the one format that diffusers, ComfyUI, LightX2V and Wan2.2-Lightning all load:
lora_down, lora_up and alpha in float32 under the published names, for Wan after "diffusion_model.".
What a LoRA cannot say becomes full weights: a student of all parameters, or one whose teacher has a
LoRA merged in. That is a bf16 file per expert under the original names, as ComfyUI reads them.
"""

import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from models import lora, weights
from models.common import UserError, format_value, reading, writing
from models.qwen_image import QwenImage
from models.weights import RoleWeights, meta_network, teacher_spec

NOISE = {1: "high", 2: "low"}  # of a branch of the teacher
CARD = Path(__file__).with_name("export_card.md")


class Student(NamedTuple):
    """A finished student, as its run folder has it."""

    cfg: object  # train.Config
    phases: list  # of phases.Phase
    boundary_t: float | None  # of its teacher
    base_of: dict[str, int]  # role -> branch of the teacher that it is on
    file: object  # student.safetensors, open

    @property
    def times(self) -> list[float]:
        """The times of the steps, from 1 to 0."""
        return [t for phase in self.phases for t in phase.t[:-1]] + [0.0]

    @property
    def is_full(self) -> bool:
        """Whether a LoRA on the published base cannot say what this student is."""
        return self.cfg.generator == "full" or bool(self.cfg.teacher_lora)


# -- export --------------------------------------------------------------------------------------


def export_student(student: Student, out: Path) -> list[Path]:
    """Write a student's files and their card to a new folder. Returns their paths."""
    check_exportable(student.phases, student.base_of, student.boundary_t)
    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise UserError(f"--export: {out} is not empty; choose another folder")
    make_tensors = full_tensors if student.is_full else lora_tensors
    with whole_folder(out) as part:
        for phase in student.phases:
            file = part / f"{file_stem(student, phase)}.safetensors"
            save_file(make_tensors(student, phase), file, file_metadata(student, phase))
        (part / "README.md").write_text(make_card(student))
    return sorted(out.iterdir())


def check_exportable(phases: list, base_of: dict[str, int], boundary_t: float | None) -> None:
    """Raise UserError unless routing by t, as other tools do, is routing by step, as we do.

    They call the high-noise transformer for t >= boundary_t, and load one LoRA for each of the two.
    """
    branches = []
    for phase in phases if boundary_t else ():
        branch = base_of[f"student{phase.k}"]
        strays = [t for t in phase.t[:-1] if (t >= boundary_t) != (branch == 1)]
        network = f"the {NOISE[branch]}-noise transformer"
        if strays:
            step = f"phase {phase.k} takes the step at t x 1000 = {1000 * strays[0]:.4g}"
            others = f"other tools take the high-noise one from {1000 * boundary_t:.4g} on"
            advice = "train with another --shift or --phases"
            raise UserError(f"cannot export: {step} with {network}, but {others}; {advice}")
        if branch in branches:
            found = f"phases {phase.k - 1} and {phase.k} are both on {network}"
            advice = "other tools load one LoRA for each; train with --phases 2"
            raise UserError(f"cannot export: {found}, and {advice}")
        branches.append(branch)


def file_stem(student: Student, phase) -> str:
    """Name of an expert's file: high_noise_model, low_noise_model, as Lightning, or phase1, ..."""
    branch = student.base_of[f"student{phase.k}"]
    return f"{NOISE[branch]}_noise_model" if student.boundary_t else f"phase{phase.k}"


def lora_tensors(student: Student, phase) -> dict[str, Tensor]:
    """An expert's LoRA under the published names."""
    cfg, tensors = student.cfg, {}
    prefix = "" if teacher_spec(cfg.teacher).network is QwenImage else "diffusion_model."
    own = weights.student_weights(cfg, student.file, f"student{phase.k}")
    for layer, (up, down, _) in own.factors.items():
        tensors[f"{prefix}{layer}.lora_up.weight"] = up
        tensors[f"{prefix}{layer}.lora_down.weight"] = down
        tensors[f"{prefix}{layer}.alpha"] = torch.tensor(float(cfg.alpha))
    return tensors


def full_tensors(student: Student, phase) -> dict[str, Tensor]:
    """All parameters of an expert; bf16, but float32 where its port is, as in norms of Wan."""
    cfg, role = student.cfg, f"student{phase.k}"
    branch, own = student.base_of[role], weights.student_weights(cfg, student.file, role)
    if own.full:
        net = meta_network(cfg, branch, torch.bfloat16).requires_grad_(False)
        weights.load_tensors(net, own.full(), "cpu")
    else:
        path = weights.branch_paths(cfg.teacher, *cfg.weights)[0][branch - 1]
        loras = weights.teacher_loras(cfg)[branch - 1]
        deltas = {f"{layer}.weight": lora.delta_of(x) for layer, x in own.factors.items()}
        net = weights.load(path, teacher=cfg.teacher, loras=loras, deltas=deltas)
    return {name: p.data for name, p in net.named_parameters()}


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to fill. It becomes `out` at the end, or is removed if anything fails."""
    part = out.resolve().with_name(out.name + ".part")
    with writing(part):
        part.mkdir(parents=True)
        handler = signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
        try:
            yield part
            if out.exists():
                out.rmdir()  # empty
            part.rename(out)
        finally:
            signal.signal(signal.SIGTERM, handler)
            shutil.rmtree(part, ignore_errors=True)  # after an error, and after Ctrl-C


# -- header and card -----------------------------------------------------------------------------


def file_metadata(student: Student, phase) -> dict[str, str]:
    """The header's strings: what sample.py --lora needs to know, and what a reader wants to."""
    cfg, branch = student.cfg, student.base_of[f"student{phase.k}"]
    steps = json.dumps(list(range(phase.first, phase.last)))
    metadata = dict(format="pt", teacher=cfg.teacher, base=base_name(cfg), branch=str(branch))
    metadata |= dict(phase=str(phase.k), steps=steps, times=json.dumps(student.times))
    metadata["shift"] = str(cfg.shift)
    if student.boundary_t:
        metadata |= {"noise": NOISE[branch], "boundary": str(student.boundary_t)}
    return metadata


def base_name(cfg) -> str:
    """The base as published, or the name of the user's folder."""
    repository = teacher_spec(cfg.teacher).repository
    name = Path(cfg.weights[0]).name if cfg.weights else repository or cfg.teacher
    return repository if name == repository.split("/")[-1] else name


def make_card(student: Student) -> str:
    """Fill in the sections of export_card.md that fit: what the student is, how to run it."""
    cfg, spec = student.cfg, teacher_spec(student.cfg.teacher)
    files = "full" if student.is_full else "lora"
    kind = "picture" if spec.network is QwenImage else "i2v" if spec.is_i2v else "video"
    if student.boundary_t:
        sections = ["head", "diffusers", f"{files} two", "scheduler", kind, "comfyui"]
        sections += [] if student.is_full else ["lightx2v"]
    else:
        sections = ["head", "diffusers", f"{files} one", "one", "scheduler", kind, "comfyui"]
    if spec.folder:  # no other tool has this base
        sections = ["head", "here"]
    text = dict(re.findall(r"<!-- (.+?) -->\n(.*?)(?=<!-- |\Z)", CARD.read_text(), re.S))
    values = {name: format_value(value) for name, value in vars(cfg).items()}
    card = "".join(text[name] for name in sections)
    return Template(card).substitute(values | card_values(student))


def card_values(student: Student) -> dict[str, str]:
    """The placeholders of export_card.md that are not settings of the run."""
    cfg, spec, phases = student.cfg, teacher_spec(student.cfg.teacher), student.phases
    qwen, base = spec.network is QwenImage, base_name(cfg)
    stems = [file_stem(student, phase) for phase in phases]
    rows = []
    for phase, stem in zip(phases, stems):
        noise, leftover = ("enable" if x else "disable" for x in (phase.k == 1, phase.s > 0))
        rows.append(f"| {stem} | {phase.first} | {phase.last} | {noise} | {leftover} |")
    *frames, height, width = cfg.size[0].partition(":")[0].split("x")
    settings = f"num_inference_steps={cfg.steps}, height={height}, width={width}, "
    frames = f"guidance_scale=1.0, num_frames={frames[0] if frames else cfg.frames}"
    settings += "true_cfg_scale=1.0" if qwen else frames
    teacher_loras = " and ".join(Path(file).name for file in cfg.teacher_lora)
    lora_kind = f"LoRA of rank {cfg.rank}, alpha {format_value(cfg.alpha)}"
    return dict(
        base=base,
        base_model=f"base_model: {base}\n" * (base == spec.repository),
        merged=f" with {teacher_loras}" if teacher_loras else "",
        trained="all parameters" if cfg.generator == "full" else lora_kind,
        times=", ".join(f"{1000 * t:.6g}" for t in student.times[:-1]),
        rows="\n".join(rows),
        pipeline=spec.pipeline,
        network="QwenImageTransformer2DModel" if qwen else "WanTransformer3DModel",
        experts=json.dumps([stem for p, stem in zip(phases, stems) for _ in p.t[:-1]]),
        settings=settings + ("" if student.boundary_t else ", callback_on_step_end=switch"),
        width_height=f"({width}, {height})",
        fps=str(spec.fps),
        loader="UNETLoader" if student.is_full else "LoraLoaderModelOnly (strength 1)",
        shift_node="ModelSamplingAuraFlow" if qwen else "ModelSamplingSD3",
        unshifted=json.dumps([round(1000 * (1 - i / cfg.steps)) for i in range(cfg.steps)]),
        first_low=str(phases[0].last),
    )


# -- LoRA files as roles -------------------------------------------------------------------------


def assign_loras(
    cfg, names: list[str], steps_given: bool, times: tuple[float, ...], boundary_t: float | None
) -> tuple[list[str], tuple, dict[str, int], Callable[[str], RoleWeights]]:
    """Roles of the steps, times, branches by role, and weights_of(role), of LoRA files.

    A file that we exported takes the steps in its metadata, and those without, such as a style
    LoRA, join it; else t decides. names: FILE, FILE:STRENGTH or a folder. steps_given: the user
    asked for other steps than such metadata have.
    """
    files = []
    for name in names:
        file = lora.parse_file(name)
        if not file.path.exists():
            raise UserError(f"--lora: {file.path} does not exist; name LoRA files or their folder")
        is_folder = file.path.is_dir()
        paths = weights.safetensors_in(file.path) if is_folder else [file.path]
        files += [lora.LoraFile(path, file.strength) for path in paths]
    metadata = {file: lora.read_metadata(file.path) for file in files}
    for file, entry in metadata.items():
        if entry.get("teacher", cfg.teacher) != cfg.teacher:
            raise UserError(f"{file.path} is for {entry['teacher']}, not for {cfg.teacher}")
    exported = {file: entry for file, entry in metadata.items() if "times" in entry}
    if exported and not steps_given:
        with reading(next(iter(exported)).path, "export the student again"):
            roles, times, base_of, files_of = assign_by_metadata(exported)
        for file in [file for file in files if file not in exported]:
            noise = lora.noise_of(file.path) if boundary_t else ""
            joined = [role for role, branch in base_of.items() if noise in ("", NOISE[branch])]
            print(f"{file}: {', '.join(joined)}, in addition")
            for role in joined:
                files_of[role].append(file)
    else:
        roles, base_of, files_of = assign_by_time(files, times, boundary_t)
        if any(sum(file in exported for file in part) > 1 for part in files_of.values()):
            files = ", ".join(map(str, exported))
            raise UserError(f"{files} have steps of their own; drop --steps and --shift")

    def weights_of(role: str) -> RoleWeights:
        net = meta_network(cfg, base_of[role])
        factors, rest = lora.split_deltas(weights.read_loras(net, files_of[role]), net)
        if rest and weights.is_random(cfg):
            raise UserError(f"--lora: {min(rest)} of random weights cannot change; give --weights")
        return RoleWeights(factors, rest)

    for role in files_of:
        weights_of(role)  # an error in any file shows before a base is loaded
    return roles, times, base_of, weights_of


def assign_by_metadata(metadata: dict[lora.LoraFile, dict]) -> tuple[list, tuple, dict, dict]:
    """Roles of the steps, times, branches and files by role, of a student that we exported."""
    steps, base_of, files_of = {}, {}, {}
    for file, entry in metadata.items():
        role = f"student{entry['phase']}"
        base_of[role], files_of[role] = int(entry["branch"]), [file]
        steps |= dict.fromkeys(json.loads(entry["steps"]), role)
        print(f"{file}: {role}, by its metadata")
    students = {(entry["times"], entry["base"]) for entry in metadata.values()}
    times = json.loads(entry["times"])
    is_whole = len(steps) == len(times) - 1 and len(files_of) == len(metadata)
    if not {*base_of.values()} <= {*NOISE} or times != sorted(map(float, times), reverse=True):
        raise ValueError("expected branches 1, 2 and times that fall")
    if len(students) > 1 or not is_whole:
        names = ", ".join(map(str, metadata))
        raise UserError(f"--lora: expected the files of all phases of one student, got {names}")
    return [steps[i] for i in range(len(steps))], tuple(times), base_of, files_of


def assign_by_time(
    files: list[lora.LoraFile], times: tuple[float, ...], boundary_t: float | None
) -> tuple[list, dict, dict]:
    """Roles of the steps, branches and files by role: those of each transformer, chosen by t."""
    branches = 2 if boundary_t else 1
    parts = lora.files_of_branches(files, branches)
    if boundary_t:
        is_named = any(lora.noise_of(file.path) for file in files)
        reason = "by metadata or name" if is_named else "in the order given"
        reason = "one file for both" if parts[0] == parts[1] else reason
        high, low = (" + ".join(map(str, part)) or "none" for part in parts)
        print(f"high noise: {high}, low noise: {low}, {reason}")
    files_of = {f"student{i}": part for i, part in enumerate(parts, 1)}
    roles = [f"student{1 if not boundary_t or t >= boundary_t else 2}" for t in times[:-1]]
    return roles, {role: int(role[-1]) for role in files_of}, files_of
