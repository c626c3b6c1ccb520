"""A student as files that diffusers, ComfyUI, LightX2V and Wan2.2-Lightning take, with a card.

sample.py --student DIR --export DIR calls `export`. Students of adapters become LoRA files; with
--merge, and students of all parameters, full weights in the layout and the names of their base.
"""

import json
import shutil
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from models import card, files, lora, weights
from models.files import Entry, UserError, write, write_entries, write_json
from models.qwen_image import QwenImage
from models.wan import Wan

PAPER = "arXiv 2510.27684"


class Student(NamedTuple):
    """A finished student, as its folder holds it."""

    cfg: object  # train.Config
    phases: list  # phases.Phase
    boundary: float | None  # of its teacher
    homes: dict[str, int]  # role -> the teacher's expert whose network it is on
    file: object  # student.safetensors, open
    config: dict  # config.json


class Expert(NamedTuple):
    """One phase of a student, on its way out."""

    phase: object
    role: str
    e: int  # the teacher's expert
    noise: str  # high or low, where the base is two transformers

    @property
    def stem(self) -> str:
        """Name of its file."""
        return f"{self.noise}_noise_model" if self.noise else f"phase{self.phase.k}"


def experts_of(student: Student) -> list[Expert]:
    """The experts of a student. Raises UserError where other tools would ask the wrong one."""
    found = []
    for phase in student.phases:
        role = f"student{phase.k}"
        e = student.homes[role]
        noise = ("high", "low")[e - 1] if student.boundary else ""
        found.append(Expert(phase, role, e, noise))
    if student.boundary:
        check_routing(found, student.boundary)
    return found


def check_routing(experts: list[Expert], boundary: float) -> None:
    """Raise UserError unless routing by t, as all tools do, is routing by step, as ours."""
    for one in experts:
        strays = [t for t in one.phase.t[:-1] if (t >= boundary) != (one.noise == "high")]
        if strays:
            raise UserError(
                f"this student cannot leave: phase {one.phase.k} takes the step at t x 1000 = "
                f"{1000 * strays[0]:.4g} with the {one.noise}-noise transformer, and other tools "
                f"choose by t, {1000 * boundary:.4g} and above is high noise; train with another "
                "--shift or --phases"
            )
    by_noise = [one.noise for one in experts]
    if len(set(by_noise)) < len(by_noise):
        k = next(one.phase.k for one in experts if by_noise.count(one.noise) > 1)
        raise UserError(
            f"this student cannot leave: phases {k} and {k + 1} are both on the "
            f"{by_noise[k - 1]}-noise transformer, and other tools load one LoRA for each; "
            f"sample it here, or train with --phases 2"
        )


# -- what a file says of itself ------------------------------------------------------------------


def metadata(student: Student, one: Expert) -> dict[str, str]:
    """Strings for the header of an expert's file."""
    cfg, phase = student.cfg, one.phase
    times = [t for p in student.phases for t in p.t[:-1]] + [0.0]
    low, high = min(p.u[0] for p in phase.parts), max(p.u[1] for p in phase.parts)
    about = {
        "format": "pt", "paper": PAPER, "teacher": cfg.teacher, "base": base_name(cfg),
        "base_fingerprint": fingerprint(student, one.e), "phase": str(phase.k),
        "phases": str(cfg.phases), "steps": json.dumps(list(range(phase.first, phase.last))),
        "times": json.dumps(times), "shift": str(cfg.shift), "expert": str(one.e),
        "interval": f"{cfg.interval}, unshifted {low:.4g} to {high:.4g}",
        "timestep_rounding": "bf16" if rounds(cfg) else "none",
    }  # fmt: skip
    about |= {"noise": one.noise, "boundary": str(student.boundary)} if one.noise else {}
    if cfg.generator == "lora":
        about |= {"rank": str(cfg.rank), "alpha": str(cfg.alpha)}
    if cfg.teacher_lora:
        about["base_lora"] = Path(lora.high_first(cfg.teacher_lora)[one.e - 1]).name
    return about


def base_name(cfg) -> str:
    """What a base is called: as published, or the user's folder."""
    published = weights.row_of(cfg.teacher).repository
    if cfg.weights == ("random",) or not (cfg.weights or published):
        return f"{cfg.teacher}, random"
    name = Path(cfg.weights[0]).name if cfg.weights else ""
    return published if name in ("", published.split("/")[-1]) else name


def fingerprint(student: Student, e: int) -> str:
    """Of the files of the teacher's expert, as config.json has them; nothing where it has none."""
    cfg = student.cfg
    if not student.config["files"] or base_name(cfg).endswith(", random"):
        return ""
    folder = weights.locate(cfg.teacher, *cfg.weights)[0][e - 1].resolve()
    held = student.config["files"].items()
    mine = [digest for name, digest in held if folder in (Path(name).resolve(), *parents(name))]
    return sha256(" ".join(mine).encode()).hexdigest() if mine else ""


def parents(name: str):
    """The folders that a file is in."""
    return Path(name).resolve().parents


def rounds(cfg) -> bool:
    """Whether the student saw times rounded to bf16, as the pipeline of Qwen-Image feeds them."""
    return weights.row_of(cfg.teacher).network is QwenImage and cfg.dtype == "bf16"


# -- adapters ------------------------------------------------------------------------------------


def lora_entries(student: Student, one: Expert, dtype: torch.dtype) -> dict[str, Entry]:
    """The keys that every consumer takes: lora_down, lora_up, alpha, under published names."""
    wan = weights.row_of(student.cfg.teacher).network is Wan
    prefix, entries = "diffusion_model." if wan else "", {}
    alpha = torch.tensor(float(student.cfg.alpha))
    for name in student.file.keys():
        role, _, parameter = name.partition("/")
        if role == one.role:
            layer, part = parameter.rsplit(".", 1)
            shape = tuple(student.file.get_slice(name).get_shape())
            read = partial(student.file.get_tensor, name)
            entries[f"{prefix}{layer}.lora_{part}.weight"] = Entry(dtype, shape, read)
            entries[f"{prefix}{layer}.alpha"] = Entry(torch.float32, (), lambda: alpha)
    return entries


def export_lora(student: Student, one: Expert, out: Path, dtype: torch.dtype) -> list[Path]:
    """An expert as a LoRA file. Never one that a consumer would refuse."""
    entries = lora_entries(student, one, dtype)
    kinds = {key: "F32" for key in entries}  # the twin is for those who take bf16
    wan = weights.row_of(student.cfg.teacher).network is Wan
    refused = {who: why for who, why in lora.refusals(kinds, wan).items() if why}
    assert not refused, refused
    path = out / f"{one.stem}.safetensors"
    write_entries(path, entries, metadata(student, one))
    return [path]


# -- full weights --------------------------------------------------------------------------------


def export_full(student: Student, one: Expert, out: Path, bf16: bool) -> list[Path]:
    """An expert as full weights: the base's files, names, shards and dtypes, or bf16.

    Tensor by tensor: neither the base nor the result is ever in memory.
    """
    source, home = source_of(student, one), place_of(source_of(student, one), one, out)
    net, stored = weights.plan(source, torch.bfloat16, student.cfg.teacher)
    change = changed(student, one, net)
    sizes, written = 0, []
    for file in sorted({there.file for there in stored.values()}):
        with weights.opened(file) as shard:
            entries = {}
            for name, there in stored.items():
                if there.file == file:
                    dtype = weights.dtype_of(name, net) if bf16 else weights.DTYPES[there.dtype]
                    read = partial(change, name, partial(shard.get_tensor, there.key))
                    entries[there.key] = Entry(dtype, there.shape, read)
                    sizes += dtype.itemsize * torch.Size(there.shape).numel()
            path = home / file.name if source.is_dir() else home
            write_entries(path, entries, metadata(student, one))
            written.append(path)
    return written + beside(source, home, sizes)


def source_of(student: Student, one: Expert) -> Path:
    """The base's folder, or file, of an expert."""
    return weights.locate(student.cfg.teacher, *student.cfg.weights)[0][one.e - 1]


def homes(student: Student, experts: list[Expert], out: Path) -> list[Path]:
    """Where each expert's weights go."""
    return [place_of(source_of(student, one), one, out) for one in experts]


def place_of(source: Path, one: Expert, out: Path) -> Path:
    """Where an expert's weights go: as the base has them, or a folder a phase of one base."""
    root = out if one.noise else out / f"phase{one.phase.k}"
    inside = {name for names in weights.LAYOUTS for name in names}
    return root / source.name if source.is_file() or source.name in inside else root


def changed(student: Student, one: Expert, net):
    """change(name, read) -> the parameter as the expert has it."""
    if student.cfg.generator == "full":
        return lambda name, read: student.file.get_tensor(f"{one.role}/{name}")
    merges = []
    if student.cfg.teacher_lora:
        file = lora.high_first(student.cfg.teacher_lora)[one.e - 1]
        merges.append(weights.read_lora(net, Path(file)))

    def change(name: str, read) -> Tensor:
        tensor, stem = weights.merged(read(), name, merges), f"{one.role}/{name[:-7]}"
        if not name.endswith(".weight") or f"{stem}.up" not in held:
            return tensor
        up, down = (student.file.get_tensor(f"{stem}.{part}") for part in ("up", "down"))
        return tensor.float().addmm_(up, down, alpha=student.cfg.alpha / student.cfg.rank)

    held = set(student.file.keys())
    return change


def beside(source: Path, home: Path, size: int) -> list[Path]:
    """The config and the index of a base's folder, copied; the index with its new size."""
    if source.is_file():
        return []
    written = []
    for file in sorted(source.glob("*.json")):
        said = files.read_json(file, "download it again")
        if file.name.endswith(".index.json"):
            said["metadata"] = said.get("metadata", {}) | {"total_size": size}
        write_json(home / file.name, said)
        written.append(home / file.name)
    return written


# -- the whole -----------------------------------------------------------------------------------


def export(student: Student, out: Path, merge: bool, bf16: bool) -> list[Path]:
    """Write a student's files and their card; returns them. Raises UserError."""
    cfg, experts = student.cfg, experts_of(student)
    full = merge or cfg.generator == "full"
    if merge and cfg.generator == "full":
        raise UserError("--merge is for adapters; a full student is exported as full weights")
    if full and base_name(cfg).endswith(", random"):
        raise UserError("full weights follow the files of a base, and random ones have none")
    check_place(out, student, experts, full, bf16)
    written = []
    for one in experts:
        if full:
            written += export_full(student, one, out, bf16)
        else:
            written += export_lora(student, one, out, torch.float32)
            written += export_lora(student, one, out / "bf16", torch.bfloat16) if bf16 else []
    said = [metadata(student, one) for one in experts]
    places = [place.relative_to(out) for place in homes(student, experts, out)] if full else []
    write(out / "README.md", card.text(student, experts, said, places).encode())
    return [*written, out / "README.md"]


def check_place(out: Path, student: Student, experts, full: bool, bf16: bool) -> None:
    """Raise UserError where the files would meet others, or a disk without room."""
    try:
        held = sorted(path.name for path in out.iterdir()) if out.exists() else []
    except OSError as error:
        raise UserError(f"--export {out}: {error.strerror}; choose another folder") from error
    if held:
        raise UserError(f"--export {out} holds other things ({held[0]}); choose another folder")
    numbers = 0  # bytes
    for one in experts:
        if full:
            net, stored = weights.plan(source_of(student, one), torch.bfloat16, student.cfg.teacher)
            wide = {name: weights.DTYPES[there.dtype] for name, there in stored.items()}
            numbers += sum(
                p.numel() * (p if bf16 else wide[name]).itemsize
                for name, p in net.named_parameters()
            )
        else:
            entries = lora_entries(student, one, torch.float32)
            numbers += sum(4 * torch.Size(e.shape).numel() for e in entries.values())
    there = next(path for path in (out.resolve(), *out.resolve().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if numbers > free:
        raise UserError(
            f"--export {out} needs {numbers / 1e9:.4g} GB, and {there} has {free / 1e9:.4g}"
        )
