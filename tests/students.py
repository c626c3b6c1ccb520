"""Finished students of tiny teachers, for tests of what is made of them."""

import contextlib
import io
import json

import torch
from safetensors.torch import save_file

import train
from models.draws import normal
from models.files import opened, write_tensors

QUICK = ["--iters", "1", "--batch", "1", "--micro-batch", "1", "--fake-updates", "1",
         "--sample-every", "0", "--save-every", "9", "--eval-samples", "2"]  # fmt: skip


def student(out, teacher, *flags):
    """The folder of a run of one iteration, whose adapters are then far from zero."""
    with contextlib.redirect_stdout(io.StringIO()):
        line = [*map(str, ["--teacher", teacher, "--out", out, *QUICK, *flags])]
        assert train.main(line) == 0
    file, about = opened(out / "student.safetensors", "student", "")
    tensors = {name: file.get_tensor(name) for name in file.keys()}
    for name, x in tensors.items():
        drawn = normal(x.shape, name)
        full = name.endswith((".up", ".down"))
        tensors[name] = drawn / 5 if full else x + 0.01 * drawn  # without an adapter: all move
    write_tensors(out / "student.safetensors", tensors, about)
    return out


def embeddings(path, teacher, prompts=("a", "b"), dim=64, length=9):
    """A file of embeddings of these prompts."""
    offsets = torch.arange(len(prompts) + 1) * length
    about = {"kind": "embeddings", "teacher": teacher, "prompts": list(prompts), "negative": ""}
    tensors = {
        "text": normal((length * len(prompts), dim), "texts").bfloat16(),
        "offsets": offsets,
        "negative": normal((3, dim), "negative").bfloat16(),
    }
    save_file(tensors, path, {"about": json.dumps(about)})
    return path
