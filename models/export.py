"""A student as files for other tools, and the LoRA files of all trainers as roles for sample.py.

A LoRA is written in the one format that diffusers, ComfyUI, LightX2V and Wan2.2-Lightning all load:
lora_down, lora_up and alpha in float32 under the published names, for Wan after "diffusion_model.".
What a LoRA cannot say becomes full weights: a student of all parameters, or one whose teacher has a
LoRA merged in. That is a bf16 file per expert under the original names, as ComfyUI reads them.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from string import Template
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from models import lora, weights
from models.common import (
    UserError,
    cannot_write,
    file_digest,
    format_value,
    read_json,
    write_json,
)
from models.qwen_image import QwenImage
from models.weights import RoleWeights, branch_paths, is_random, meta_network, teacher_spec

PAPER = "arXiv 2510.27684"
NOISE = {1: "high", 2: "low"}  # of a branch of the teacher
CARD = Path(__file__).with_name("export_card.md")
DIFFUSERS = {"WanTransformer3DModel", "QwenImageTransformer2DModel"}  # its classes


class Student(NamedTuple):
    """A finished student, as its run folder has it."""

    cfg: object  # train.Config
    phases: list  # of phases.Phase
    boundary_t: float | None  # of its teacher
    base_of: dict[str, int]  # role -> branch of the teacher that it is on
    file: object  # student.safetensors, open


# -- export --------------------------------------------------------------------------------------


def export_student(student: Student, out: Path) -> list[Path]:
    """Write a student's files and their card to a new folder. Returns their paths."""
    cfg, phases = student.cfg, student.phases
    check_exportable(phases, student.base_of, student.boundary_t)
    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise UserError(f"--export: {out} is not empty; choose another folder")
    is_full = cfg.generator == "full" or bool(cfg.teacher_lora)
    make_tensors = full_tensors if is_full else lora_tensors
    with whole_folder(out) as part:
        metadata = [file_metadata(student, phase) for phase in phases]
        for phase, entry in zip(phases, metadata):
            file = part / f"{file_stem(student, phase)}.safetensors"
            save_file(make_tensors(student, phase), file, entry)
        config = base_config(cfg)
        if is_full and config.get("_class_name") in DIFFUSERS:
            write_json(part / "config.json", config)
        (part / "README.md").write_text(make_card(student, metadata, is_full))
    return sorted(out.iterdir())


def check_exportable(phases: list, base_of: dict[str, int], boundary_t: float | None) -> None:
    """Raise UserError unless routing by t, as other tools do, is routing by step, as we do.

    They call the high-noise transformer for t >= boundary_t, and load one LoRA for each of the two.
    """
    noises = []
    for phase in phases if boundary_t else ():
        branch = base_of[f"student{phase.k}"]
        noises.append(NOISE[branch])
        strays = [t for t in phase.t[:-1] if (t >= boundary_t) != (branch == 1)]
        if strays:
            raise UserError(
                f"cannot export: phase {phase.k} takes the step at t x 1000 = "
                f"{1000 * strays[0]:.4g} with the {NOISE[branch]}-noise transformer, but other "
                f"tools take the high-noise one from {1000 * boundary_t:.4g} on; "
                "train with another --shift or --phases"
            )
        if noises[-1] in noises[:-1]:
            raise UserError(
                f"cannot export: phases {phase.k - 1} and {phase.k} are both on the {noises[-1]}"
                "-noise transformer, and other tools load one LoRA for each; train with --phases 2"
            )


def file_stem(student: Student, phase) -> str:
    """Name of an expert's file: high_noise_model, low_noise_model, as Lightning, or phase1, ..."""
    branch = student.base_of[f"student{phase.k}"]
    return f"{NOISE[branch]}_noise_model" if student.boundary_t else f"phase{phase.k}"


def lora_tensors(student: Student, phase) -> dict[str, Tensor]:
    """An expert's LoRA under the published names."""
    prefix = "" if teacher_spec(student.cfg.teacher).network is QwenImage else "diffusion_model."
    role, tensors = f"student{phase.k}", {}
    for name in student.file.keys():
        owner, _, parameter = name.partition("/")
        if owner == role:
            layer, part = parameter.rsplit(".", 1)
            tensors[f"{prefix}{layer}.lora_{part}.weight"] = student.file.get_tensor(name)
            tensors[f"{prefix}{layer}.alpha"] = torch.tensor(float(student.cfg.alpha))
    return tensors


def full_tensors(student: Student, phase) -> dict[str, Tensor]:
    """All parameters of an expert; bf16, but float32 where its port is, as in norms of Wan."""
    cfg, role = student.cfg, f"student{phase.k}"
    branch, own = student.base_of[role], weights.student_weights(cfg, student.file, role)
    if own.full:
        net = meta_network(cfg, branch, torch.bfloat16).requires_grad_(False)
        weights.load_tensors(net, own.full(), "cpu")
    else:
        path = branch_paths(cfg.teacher, *cfg.weights)[0][branch - 1]
        merged = lora.sort_high_low(cfg.teacher_lora)[branch - 1]
        deltas = {f"{layer}.weight": lora.delta_of(x) for layer, x in own.factors.items()}
        net = weights.load(path, teacher=cfg.teacher, teacher_lora=merged, deltas=deltas)
    return {name: p.data for name, p in net.named_parameters()}


def base_config(cfg) -> dict:
    """config.json of the base, {} if it has none."""
    if is_random(cfg):
        return {}
    path = branch_paths(cfg.teacher, *cfg.weights)[0][0]
    file = (path.parent if path.is_file() else path) / "config.json"
    return read_json(file, "download it again") if file.is_file() else {}


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to fill. It becomes `out` at the end, or is removed if anything fails."""
    part = out.resolve().with_name(out.name + ".part")
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise cannot_write(part, error) from error
    try:
        yield part
        if out.exists():
            out.rmdir()  # empty
        part.rename(out)
    except BaseException as error:  # Ctrl-C too
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise cannot_write(out, error) from error
        raise


# -- what a file says of itself ------------------------------------------------------------------


def file_metadata(student: Student, phase) -> dict[str, str]:
    """The header's strings: what sample.py --lora needs to know, and what a reader wants to."""
    cfg, branch = student.cfg, student.base_of[f"student{phase.k}"]
    ends = [u for interval in phase.intervals for u in interval.u]
    rounds = teacher_spec(cfg.teacher).network is QwenImage and cfg.dtype == "bf16"
    metadata = {
        "format": "pt",
        "paper": PAPER,
        "teacher": cfg.teacher,
        "base": base_name(cfg),
        "base_fingerprint": base_fingerprint(cfg, branch),
        "branch": str(branch),
        "phase": str(phase.k),
        "phases": str(cfg.phases),
        "steps": json.dumps(list(range(phase.first, phase.last))),
        "times": json.dumps([t for p in student.phases for t in p.t[:-1]] + [0.0]),
        "shift": str(cfg.shift),
        "interval": f"{cfg.interval}, unshifted {min(ends):.4g} to {max(ends):.4g}",
        "timestep_rounding": "bf16" if rounds else "none",
    }
    if student.boundary_t:
        metadata |= {"noise": NOISE[branch], "boundary": str(student.boundary_t)}
    if cfg.generator == "lora":
        metadata |= {"rank": str(cfg.rank), "alpha": str(cfg.alpha)}
    if cfg.teacher_lora:
        metadata["base_lora"] = Path(lora.sort_high_low(cfg.teacher_lora)[branch - 1]).name
    return metadata


def base_name(cfg) -> str:
    """The base as published, or the name of the user's folder."""
    repository = teacher_spec(cfg.teacher).repository
    if is_random(cfg) or not (cfg.weights or repository):
        return f"{cfg.teacher} ({'random weights' if is_random(cfg) else 'of this repository'})"
    name = Path(cfg.weights[0]).name if cfg.weights else ""
    return repository if name in ("", repository.split("/")[-1]) else name


def base_fingerprint(cfg, branch: int) -> str:
    """Digest of the files of a branch of the teacher; "" for random weights."""
    if is_random(cfg):
        return ""
    files = weights.shards(branch_paths(cfg.teacher, *cfg.weights)[0][branch - 1])
    return sha256(" ".join(map(file_digest, files)).encode()).hexdigest()


# -- the card ------------------------------------------------------------------------------------


def make_card(student: Student, metadata: list[dict[str, str]], is_full: bool) -> str:
    """Fill in the sections of export_card.md that fit: what the student is, how to run it."""
    cfg, spec, two = student.cfg, teacher_spec(student.cfg.teacher), bool(student.boundary_t)
    kind = "picture" if spec.network is QwenImage else "i2v" if spec.is_i2v else "video"
    sections = ["head", "diffusers", f"{'full' if is_full else 'lora'} {'two' if two else 'one'}"]
    sections += ["scheduler", kind, "comfyui"]
    if two and not is_full and 1000 % cfg.steps == 0:
        sections.append("lightx2v")
        if (cfg.steps, cfg.shift, student.boundary_t) == (4, 5.0, spec.boundary):
            sections.append("lightning")
    if spec.folder:  # no other tool has this base
        sections = ["head"] if is_full else ["head", "here"]
    text = dict(re.findall(r"<!-- (.+?) -->\n(.*?)(?=<!-- |\Z)", CARD.read_text(), re.S))
    values = {name: format_value(value) for name, value in vars(cfg).items()}
    card = "".join(text[name] for name in sections)
    return Template(card).substitute(values | card_values(student, metadata, is_full))


def card_values(student: Student, metadata: list[dict[str, str]], is_full: bool) -> dict[str, str]:
    """The placeholders of export_card.md that are not settings of the run."""
    cfg, spec, phases = student.cfg, teacher_spec(student.cfg.teacher), student.phases
    qwen, two = spec.network is QwenImage, bool(student.boundary_t)
    stems = [file_stem(student, phase) for phase in phases]
    *frames, height, width = cfg.size[0].partition(":")[0].split("x")
    frames, base = frames[0] if frames else cfg.frames, metadata[0]["base"]
    settings = f"num_inference_steps={cfg.steps}, height={height}, width={width}, "
    settings += "true_cfg_scale=1.0" if qwen else f"guidance_scale=1.0, num_frames={frames}"
    rows, nodes = [], []
    for phase, stem, entry in zip(phases, stems, metadata):
        steps = ", ".join(str(i + 1) for i in range(phase.first, phase.last))
        rows.append(f"| {stem}.safetensors | {phase.k} | {steps} | {entry['interval']} |")
        noise, leftover = ("enable" if x else "disable" for x in (phase.k == 1, phase.s > 0))
        nodes.append(f"| {stem} | {phase.first} | {phase.last} | {noise} | {leftover} |")
    pipeline = "QwenImage" if qwen else "WanImageToVideo" if spec.is_i2v else "Wan"
    return dict(
        base=base,
        base_model=f"base_model: {base}\n" * (base == spec.repository),
        merged=f" with {metadata[0]['base_lora']}" if cfg.teacher_lora else "",
        trained="all parameters"
        if cfg.generator == "full"
        else f"LoRA of rank {cfg.rank}, alpha {format_value(cfg.alpha)}",
        times=", ".join(f"{1000 * t:.6g}" for t in json.loads(metadata[0]["times"])[:-1]),
        rounding=metadata[0]["timestep_rounding"],
        paper=PAPER,
        rows="\n".join(rows),
        nodes="\n".join(nodes),
        pipeline=f"{pipeline}Pipeline",
        network="QwenImageTransformer2DModel" if qwen else "WanTransformer3DModel",
        experts=json.dumps([stem for p, stem in zip(phases, stems) for _ in p.t[:-1]]),
        settings=settings + ("" if two else ", callback_on_step_end=switch"),
        width_height=f"({width}, {height})",
        fps=str(spec.fps),
        loader="UNETLoader with" if is_full else "LoraLoaderModelOnly (strength 1) with",
        shift_node="ModelSamplingAuraFlow" if qwen else "ModelSamplingSD3",
        unshifted=json.dumps([1000 * (cfg.steps - i) // cfg.steps for i in range(cfg.steps)]),
        first_low=str(phases[0].last),
        task="i2v-A14B" if spec.is_i2v else "t2v-A14B",
    )


# -- LoRA files as roles -------------------------------------------------------------------------


class LoraPlan(NamedTuple):
    """LoRA files on a published base: which role takes which step."""

    roles: list[str]  # of each step
    times: tuple[float, ...]
    base_of: dict[str, int]  # role -> branch of the teacher that it is on
    weights_of: Callable[[str], RoleWeights]


def assign_loras(
    cfg, paths: list[Path], steps_given: bool, times: tuple[float, ...], boundary_t: float | None
) -> LoraPlan:
    """Which file takes which steps: by its metadata if we exported it, else by t.

    steps_given: the user asked for other steps than such metadata have.
    """
    files = []
    for path in paths:
        files += sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    metadata = [lora.read_metadata(file) for file in files]
    for file, entry in zip(files, metadata):
        if not file.is_file():
            raise UserError(f"--lora: {file} does not exist; name LoRA files or their folder")
        if entry.get("teacher", cfg.teacher) != cfg.teacher:
            raise UserError(f"{file} is for {entry['teacher']}, not for {cfg.teacher}")
    exported = bool(files) and all("times" in entry for entry in metadata)
    if exported and not steps_given:
        plan = lora.files_by_metadata(files, 2 if boundary_t else 1)
        for role, file in plan.files.items():
            digest = lora.read_metadata(file).get("base_fingerprint")
            if digest != base_fingerprint(cfg, plan.base_of[role]):
                print(f"note: {file.name} was made on other files of the base than these")
    else:
        if exported:
            print(f"note: these files are for t = {metadata[0]['times']}, not for the steps asked")
        plan = lora.files_by_time(files, times, boundary_t)

    def weights_of(role: str) -> RoleWeights:
        net = meta_network(cfg, plan.base_of[role])
        return RoleWeights(*lora.split_deltas(weights.read_lora(net, plan.files[role]), net))

    for role, file in plan.files.items():  # all of them, before a base is loaded
        if weights_of(role).deltas and is_random(cfg):
            raise UserError(f"{file} changes layers that have no adapters; use published weights")
    return LoraPlan(plan.roles, plan.times, plan.base_of, weights_of)
