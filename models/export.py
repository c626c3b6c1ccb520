"""A student as files that diffusers, ComfyUI, LightX2V and Wan2.2-Lightning take, with a card.

sample.py --student DIR --export DIR calls `export`. Students of adapters become LoRA files; with
--merge, and students of all parameters, full weights in the layout and the names of their base.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from models import card, files, folder, large, lora, weights
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


def experts_of(phases: list, homes: dict[str, int], boundary: float | None) -> list[Expert]:
    """The experts of a student. Raises UserError where other tools would ask the wrong one."""
    found = []
    for phase in phases:
        role = f"student{phase.k}"
        noise = ("high", "low")[homes[role] - 1] if boundary else ""
        found.append(Expert(phase, role, homes[role], noise))
    if boundary:
        check_routing(found, boundary)
    return found


def check_routing(experts: list[Expert], boundary: float) -> None:
    """Raise UserError unless routing by t, as all tools do, is routing by step, as ours."""
    for one in experts:
        strays = [t for t in one.phase.t[:-1] if (t >= boundary) != (one.noise == "high")]
        if strays:
            raise UserError(
                f"this student cannot be exported: phase {one.phase.k} takes the step at t x 1000 "
                f"= {1000 * strays[0]:.4g} with the {one.noise}-noise transformer, and other tools "
                f"choose by t, {1000 * boundary:.4g} and above is high noise; train with another "
                "--shift or --phases"
            )
    by_noise = [one.noise for one in experts]
    if len(set(by_noise)) < len(by_noise):
        k = next(one.phase.k for one in experts if by_noise.count(one.noise) > 1)
        raise UserError(
            f"this student cannot be exported: phases {k} and {k + 1} are both on the "
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
        "base_fingerprint": fingerprint(cfg, one.e), "phase": str(phase.k),
        "phases": str(cfg.phases), "steps": json.dumps(list(range(phase.first, phase.last))),
        "times": json.dumps(times), "shift": str(cfg.shift), "expert": str(one.e),
        "interval": f"{cfg.interval}, unshifted {low:.4g} to {high:.4g}",
        "timestep_rounding": "bf16" if rounds(cfg) else "none",
    }  # fmt: skip
    about |= {"noise": one.noise, "boundary": str(student.boundary)} if one.noise else {}
    if cfg.generator == "lora":
        about |= {"rank": str(cfg.rank), "alpha": str(cfg.alpha)}
    if cfg.teacher_lora:  # merged, with full weights
        about["base_lora"] = Path(lora.high_first(cfg.teacher_lora)[one.e - 1]).name
    return about


def base_name(cfg) -> str:
    """What a base is called: as published, or the user's folder."""
    published = weights.row_of(cfg.teacher).repository
    if large.is_random(cfg):
        return f"{cfg.teacher}, random"
    if not (cfg.weights or published):
        return f"{cfg.teacher}, of this repository"
    name = Path(cfg.weights[0]).name if cfg.weights else ""
    return published if name in ("", published.split("/")[-1]) else name


def fingerprint(cfg, e: int) -> str:
    """Of the files of the teacher's expert; nothing of random ones."""
    if large.is_random(cfg):
        return ""
    files = weights.shards(weights.locate(cfg.teacher, *cfg.weights)[0][e - 1])
    return sha256(" ".join(map(folder.fingerprint, files)).encode()).hexdigest()


def rounds(cfg) -> bool:
    """Whether the student saw times rounded to bf16, as the pipeline of Qwen-Image feeds them."""
    return weights.row_of(cfg.teacher).network is QwenImage and cfg.dtype == "bf16"


# -- adapters ------------------------------------------------------------------------------------


def lora_files(student: Student, one: Expert, bf16: bool) -> dict[Path, dict[str, Entry]]:
    """path -> entries of an expert's LoRA, and of its twin. Never what a consumer would refuse."""
    entries = lora_entries(student, one, torch.float32)
    wan = weights.row_of(student.cfg.teacher).network is Wan
    refused = lora.refusals(dict.fromkeys(entries, "F32"), wan)
    assert not any(refused.values()), refused
    name = f"{one.stem}.safetensors"
    twin = {Path("bf16") / name: lora_entries(student, one, torch.bfloat16)} if bf16 else {}
    return {Path(name): entries} | twin


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


# -- full weights --------------------------------------------------------------------------------


def full_files(student: Student, one: Expert, place: Path, bf16: bool) -> dict:
    """path -> entries of an expert's full weights: the base's files, names and dtypes, or bf16.

    A tensor is read when its turn comes: neither the base nor the result is ever in memory.
    """
    source = source_of(student, one)
    net, stored = weights.plan(source, torch.bfloat16, student.cfg.teacher)
    change, found = changed(student, one, net), {}
    for name, there in stored.items():
        path = place if source.is_file() else place / there.file.name
        dtype = weights.dtype_of(name, net) if bf16 else weights.DTYPES[there.dtype]
        entry = Entry(dtype, there.shape, partial(change, name, there))
        found.setdefault(path, {})[there.key] = entry
    return found


def source_of(student: Student, one: Expert) -> Path:
    """The base's folder, or file, of an expert."""
    return weights.locate(student.cfg.teacher, *student.cfg.weights)[0][one.e - 1]


def places_of(student: Student, experts: list[Expert]) -> list[Path]:
    """Where each expert's full weights go: as the base has them, in own folders if alike."""
    inside = {name for names in weights.LAYOUTS for name in names}
    places = []
    for one in experts:
        source = source_of(student, one)
        root = Path() if one.noise else Path(f"phase{one.phase.k}")
        named = source.is_file() or source.name in inside
        places.append(root / source.name if named else root)
    if len(set(places)) < len(places):
        places = [Path(one.stem) / place for one, place in zip(experts, places)]
    return places


def changed(student: Student, one: Expert, net) -> Callable:
    """change(name, where it is in the base) -> the parameter as the expert has it."""
    cfg, read = student.cfg, student.file.get_tensor
    if cfg.generator == "full":
        return lambda name, there: read(f"{one.role}/{name}")
    held, scale, merges = set(student.file.keys()), cfg.alpha / cfg.rank, []
    if cfg.teacher_lora:
        merges.append(weights.read_lora(net, Path(lora.high_first(cfg.teacher_lora)[one.e - 1])))

    def change(name: str, there) -> Tensor:
        with weights.opened(there.file) as shard:
            tensor = weights.merged(shard.get_tensor(there.key), name, merges)
        layer = f"{one.role}/{name.removesuffix('.weight')}"
        if f"{layer}.up" not in held or not name.endswith(".weight"):
            return tensor
        return tensor.float().addmm(read(f"{layer}.up"), read(f"{layer}.down"), alpha=scale)

    return change


def beside(source: Path, size: int) -> dict[str, dict]:
    """name -> contents of the config and the index of a base's folder; the index with its size."""
    found = {}
    for file in sorted(source.glob("*.json")) if source.is_dir() else ():
        found[file.name] = said = files.read_json(file, "download it again")
        if file.name.endswith(".index.json"):
            said["metadata"] = said.get("metadata", {}) | {"total_size": size}
    return found


# -- the whole -----------------------------------------------------------------------------------


def export(student: Student, out: Path, merge: bool, bf16: bool) -> list[Path]:
    """Write a student's files and their card, all or none; returns them. Raises UserError."""
    experts = experts_of(student.phases, student.homes, student.boundary)
    full = check_kind(student.cfg, merge)
    places = places_of(student, experts) if full else []
    said = [metadata(student, one) for one in experts]  # once: it reads pieces of the base
    planned = {}  # path -> entries, metadata
    for i, one in enumerate(experts):
        made = full_files(student, one, places[i], bf16) if full else lora_files(student, one, bf16)
        assert not planned.keys() & made.keys()
        planned |= {path: (entries, said[i]) for path, entries in made.items()}
    sizes = {path: sum(map(nbytes, entries.values())) for path, (entries, _) in planned.items()}
    check_place(out, sum(sizes.values()))
    with whole_folder(out) as part:
        for path, (entries, about) in planned.items():
            write_entries(part / path, entries, about)
        for one, place in zip(experts, places):
            size = sum(n for path, n in sizes.items() if place in path.parents)
            for name, content in beside(source_of(student, one), size).items():
                write_json(part / place / name, content)
        diffusers = full and is_diffusers(source_of(student, experts[0]))
        text = card.text(student, experts, said, places, diffusers)
        write(part / "README.md", text.encode())
    return sorted(path for path in out.rglob("*") if path.is_file())


def check_kind(cfg, merge: bool) -> bool:
    """Whether full weights are to be written. Raises UserError where that, or a LoRA, cannot be."""
    full = merge or cfg.generator == "full"
    if merge and cfg.generator == "full":
        raise UserError("--merge is for adapters; a full student is exported as full weights")
    if full and large.is_random(cfg):
        raise UserError("full weights follow the files of a base, and random ones have none")
    if cfg.teacher_lora and not full:
        raise UserError("this student belongs to its base with --teacher-lora, and other tools "
                        "would load it without; --merge writes all three as one")  # fmt: skip
    return full


def is_diffusers(source: Path) -> bool:
    """Whether the config of a base is of the layout of diffusers."""
    config = source / "config.json"
    kind = files.read_json(config, "").get("_class_name") if config.is_file() else None
    return kind in ("WanTransformer3DModel", "QwenImageTransformer2DModel")


def nbytes(entry: Entry) -> int:
    """Of a tensor in a file."""
    return entry.dtype.itemsize * torch.Size(entry.shape).numel()


def check_place(out: Path, size: int) -> None:
    """Raise UserError where the files would meet others, or a disk without room."""
    try:
        held = sorted(path.name for path in out.iterdir()) if out.exists() else []
    except OSError as error:
        raise UserError(f"--export {out}: {error.strerror}; choose another folder") from error
    if held or out.resolve() == Path.cwd():
        held = held or ["you"]
        raise UserError(f"--export {out} holds other things ({held[0]}); choose another folder")
    there = next(path for path in (out.resolve(), *out.resolve().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        raise UserError(f"--export {out} needs {size / 1e9:.4g} GB, {there} has {free / 1e9:.4g}")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` at the end, or is gone."""
    out = out.resolve()
    part = out.with_name(out.name + ".part")
    if part.exists():
        raise UserError(f"{part} is what a stopped export left; remove it")
    try:
        yield part
        if out.exists():
            out.rmdir()  # empty, as check_place saw
        part.rename(out)
    except BaseException as error:  # Ctrl-C too
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError):
            raise files.cannot_write(out, error) from error
        raise
