"""Students of tiny teachers, LoRA files and embeddings, for tests of what is made of them."""

import contextlib
import io
import json

import torch
from safetensors.torch import save_file

import moe
import train
from models import lora, weights
from models.common import normal, open_tensors, write_tensors
from models.export import Student

QUICK = [
    "--iters",
    "1",
    "--batch",
    "1",
    "--micro-batch",
    "1",
    "--fake-updates",
    "1",
    "--sample-every",
    "0",
    "--save-every",
    "9",
    "--eval-samples",
    "2",
]


def train_student(out, teacher, *flags):
    """The folder of a run of one iteration, whose experts are then moved far from the teacher."""
    with contextlib.redirect_stdout(io.StringIO()):
        line = ["--teacher", teacher, "--out", out, *QUICK, *flags]
        assert train.main([*map(str, line)]) == 0
    file, metadata = open_tensors(out / "student.safetensors", "student", "")
    tensors = {name: far(name, file.get_tensor(name)) for name in file.keys()}
    write_tensors(out / "student.safetensors", tensors, metadata)
    return out


def make_student(folder, teacher, **settings) -> Student:
    """A finished student with random experts, without training."""
    settings = dict(dtype="float32", rank=4) | settings
    cfg = train.make_config(teacher, **settings)
    phases, boundary_t = train.phases_of(cfg), weights.TEACHERS[teacher].boundary
    base_of = {f"student{phase.k}": moe.base_of(phase, boundary_t) for phase in phases}
    tensors = {}
    for role, branch in base_of.items():
        net = weights.random_network(teacher, torch.float32, seed=branch)
        named = dict(net.named_parameters())
        if cfg.generator == "lora":
            named = lora.start_adapter(net, role, (role,), cfg.rank, cfg.alpha)
        for name, p in named.items():
            tensors[f"{role}/{name}"] = far(f"{role}/{name}", p.detach())
    write_tensors(folder / "student.safetensors", tensors, {"kind": "student"})
    file, _ = open_tensors(folder / "student.safetensors", "student", "")
    return Student(cfg, phases, boundary_t, base_of, file)


def far(name, x):
    """Adapters of a size that shows; of a full network, all parameters moved. Exact in bf16."""
    noise = normal(x.shape, name)
    x = noise / 5 if name.endswith((".up", ".down")) else x + 0.01 * noise
    return x.bfloat16().float()


def write_embeddings(path, teacher, prompts=("a", "b"), dim=64, length=9):
    """A file of embeddings of these prompts."""
    metadata = {"kind": "embeddings", "teacher": teacher, "prompts": list(prompts), "negative": ""}
    tensors = {
        "text": normal((length * len(prompts), dim), "texts").bfloat16(),
        "offsets": torch.arange(len(prompts) + 1) * length,
        "negative": normal((3, dim), "negative").bfloat16(),
    }
    write_tensors(path, tensors, metadata)
    return path


PREFIXES = {"bare": "", "diffusers": "transformer.", "musubi": "lora_unet_"}
FACTORS = {  # names of down and up
    "A B": ("lora_A.default", "lora_B.default"),
    "diffusers": ("lora_A", "lora_B"),
}
FORMS = ("lightning", "A B", "diffusers", "bare", "musubi", "no alpha")  # of LoRA files


def write_lora(path, form, net, seed=0, rank=2) -> float:
    """A LoRA of all adapted layers in one of the published forms. Returns its alpha / rank."""
    tensors, metadata, scale = {}, None, 1.0 if form in ("A B", "no alpha") else 0.5
    for name, layer in lora.adapted_layers(net).items():
        key = {"diffusers": net.diffusers_name(name), "musubi": name.replace(".", "_")}
        key = PREFIXES.get(form, "diffusion_model.") + key.get(form, name)
        down, up = FACTORS.get(form, ("lora_down", "lora_up"))
        for word, shape in ((down, (rank, layer.in_features)), (up, (layer.out_features, rank))):
            tensors[f"{key}.{word}.weight"] = normal(shape, seed, name, word[:6]) / 3
        if form in ("lightning", "bare", "musubi"):
            tensors[f"{key}.alpha"] = torch.tensor(rank * scale)
    if form == "diffusers":
        metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": rank * scale})}
    save_file(tensors, path, metadata)
    return scale
