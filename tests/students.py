"""Helpers of the tests: students of tiny teachers, LoRA files and embeddings."""

import builtins
import errno
import io
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import moe
import train
from models import lora, weights
from models.common import normal, open_tensors, write_tensors
from models.export import Student

QUICK = "--iters 1 --batch 1 --micro-batch 1 --fake-updates 1 --sample-every 0 --eval-samples 2"


def refusal(capsys, line, main=train.main) -> str:
    """Run a command, which must end with status 2, and return the one line of its error."""
    capsys.readouterr()
    assert main([*map(str, line)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.endswith("\n"), error
    return error


def error_of(a, b) -> float:
    """Relative error |a - b| / |b|."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


class FailingCall:
    """Counts open for writing, write, fsync and rename below a folder; the n-th call fails."""

    def __init__(self, monkeypatch, folder: Path, n: int):
        self.n, self.count, count = n, 0, self.add
        original, fsync, rename = builtins.open, os.fsync, os.replace

        class CountedFile(io.FileIO):
            def write(self, data):
                count()
                return super().write(data)

        def open_counted(file, mode="r", *args, **kwargs):
            if not str(file).startswith(str(folder)) or not set(mode) & set("wa"):
                return original(file, mode, *args, **kwargs)
            count()
            return CountedFile(file, mode.replace("b", ""))

        monkeypatch.setattr(builtins, "open", open_counted)
        monkeypatch.setattr(io, "open", open_counted)  # what pathlib calls
        monkeypatch.setattr(os, "fsync", lambda fd: (count(), fsync(fd))[1])
        monkeypatch.setattr(os, "replace", lambda a, b: (count(), rename(a, b))[1])

    def add(self):
        self.count += 1
        if self.count == self.n:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def wait_for_log(process, out, lines: int) -> None:
    """Wait until the log of a running command has so many lines."""
    log = out / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= lines):
        time.sleep(0.01)


def train_student(out, teacher, *flags):
    """Train for one iteration, move the experts far from the teacher, return the run's folder."""
    line = ["--teacher", teacher, "--out", out, *QUICK.split(), *flags]
    assert train.main([*map(str, line)]) == 0
    file, metadata = open_tensors(out / "student.safetensors", "student", "")
    tensors = {name: move(name, file.get_tensor(name)) for name in file.keys()}
    write_tensors(out / "student.safetensors", tensors, metadata)
    return out


def make_student(folder, teacher, **settings) -> Student:
    """Make a finished student with random experts, without training."""
    cfg = train.make_config(teacher, **dict(dtype="float32", rank=4) | settings)
    phases, boundary_t = train.phases_of(cfg), weights.TEACHERS[teacher].boundary
    branch_of = {f"student{phase.k}": moe.start_branch(phase, boundary_t) for phase in phases}
    tensors = {}
    for role, branch in branch_of.items():
        net = weights.random_network(teacher, torch.float32, seed=branch)
        named = dict(net.named_parameters())
        if cfg.train_student == "lora":
            named = lora.start_adapter(net, role, (role,), cfg.rank, cfg.alpha)
        for name, p in named.items():
            tensors[f"{role}/{name}"] = move(f"{role}/{name}", p.detach())
    write_tensors(folder / "student.safetensors", tensors, {"kind": "student"})
    file, _ = open_tensors(folder / "student.safetensors", "student", "")
    return Student(cfg, phases, boundary_t, branch_of, file)


def load_run(folder) -> train.Run:
    """Load a finished run with all of its roles, as training has them, at its first size."""
    settings = json.loads((folder / "config.json").read_text())["settings"]
    cfg = train.make_config(**train.cli.from_json(settings))
    run = train.make_run(replace(cfg, size=cfg.size[:1]), torch.device("cpu"), folder)
    run.k, tensors = len(run.phases), load_file(folder / "student.safetensors")
    for role in run.roles.student.values():
        role.start()
        for name, p in role.parameters.items():
            p.data.copy_(tensors[f"{role.name}/{name}"])
    return run


def move(name, x):
    """Add noise to a full network's tensor, or replace an adapter's. The result fits bf16."""
    noise = normal(x.shape, name)
    x = noise / 5 if name.endswith((".up", ".down")) else x + 0.01 * noise
    return x.bfloat16().float()


def write_base(folder, teacher, seed=1):
    """Write random weights of a Wan like published ones, in the original layout."""
    net = weights.random_network(teacher, torch.float32, seed=seed)
    folder.mkdir(exist_ok=True)
    save_file(dict(net.named_parameters()), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel"} | net.settings))
    return folder


def write_embeddings(path, teacher, prompts=("a", "b"), dim=64):
    """Write a file of embeddings of these prompts, 9 tokens each."""
    metadata = {"kind": "embeddings", "teacher": teacher, "prompts": list(prompts), "negative": ""}
    tensors = {
        "text": normal((9 * len(prompts), dim), "texts").bfloat16(),
        "offsets": torch.arange(len(prompts) + 1) * 9,
        "negative": normal((3, dim), "negative").bfloat16(),
    }
    write_tensors(path, tensors, metadata)
    return path


# published LoRA files: before the layer, which names (_: flat), after down and up, alpha, rank
FORMS = {
    "lightning": ("diffusion_model.", "ours", ".lora_down.weight", ".lora_up.weight", ".alpha"),
    "bare": ("", "ours", ".lora_down.weight", ".lora_up.weight", ".alpha"),
    "musubi": ("lora_unet_", "ours_", ".lora_down.weight", ".lora_up.weight", ".alpha"),
    "compiled": ("lora_unet__", "ours_", ".lora_down.weight", ".lora_up.weight", ".alpha"),
    "lycoris": ("lycoris_", "diffusers_", ".lora_down.weight", ".lora_up.weight", ".alpha"),
    "kohya": ("lora_transformer_", "diffusers_", ".lora_down.weight", ".lora_up.weight", ".alpha"),
    "A B": ("diffusion_model.", "ours", ".lora_A.default.weight", ".lora_B.default.weight"),
    "no alpha": ("diffusion_model.", "ours", ".lora_down.weight", ".lora_up.weight"),
    "diffusers": ("transformer.", "diffusers", ".lora_A.weight", ".lora_B.weight"),
    "lightx2v": ("transformer.", "diffusers", ".lora.down.weight", ".lora.up.weight"),
    "diffsynth": ("pipe.dit.", "ours", ".lora_A.default.weight", ".lora_B.default.weight"),
    "dit": ("dit.", "ours", ".lora_A", ".lora_B"),
    "old": ("unet.", "diffusers", "_lora.down.weight", "_lora.up.weight", ".alpha"),
    "linear": ("", "diffusers", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "fastvideo": ("", "diffusers", ".lora_A", ".lora_B", ".lora_alpha", ".lora_rank"),
}


def write_lora(path, form, net, seed=0, rank=2) -> float:
    """Write a LoRA of all adapted layers in one of the FORMS and return its alpha / rank."""
    prefix, names, down, up, *others = FORMS[form]
    tensors, metadata, scale = {}, None, 0.5 if others or form == "diffusers" else 1.0
    for i, (name, layer) in enumerate(lora.adapted_layers(net).items()):
        key = net.diffusers_name(name) if "diffusers" in names else name
        key = prefix + (key.replace(".", "_") if "_" in names else key)
        ends = (".lora_A.weight", ".lora_B.weight") if form == "lightx2v" and i % 2 else (down, up)
        tensors[key + ends[0]] = normal((rank, layer.in_features), seed, name, "down") / 3
        tensors[key + ends[1]] = normal((layer.out_features, rank), seed, name, "up") / 3
        for end, value in zip(others, (rank * scale, rank)):
            tensors[key + end] = torch.tensor(value)
    if form == "diffusers":
        metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": rank * scale})}
    save_file(tensors, path, metadata)
    return scale
