"""Claim: a file damaged at random ends in status 0 or 2 and one line, never in a traceback."""

import contextlib
import io
import json
import os
import random
import shutil
import traceback
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load, save
from students import QUICK, write_base, write_embeddings, write_lora

import sample
import train
from models import teachers, weights

BASE = "diffusion_pytorch_model.safetensors"
TOY = "--iters 1 --warmup 0 --batch 8 --fake-updates 1 --eval-samples 20 --sample-every 1"
TINY = f"--teacher wan21-tiny {QUICK} --size 1x16x16"
DRAW = "--teacher wan21-tiny --n 1 --steps 1 --size 1x16x16 --out new --prompts e.safetensors"
VALUES = [None, -1, 0, 2, 1e400, 10**40, "x", "\0", "../..", "a" * 5000, [], {}, True, [[1]]]
READERS = {  # program and arguments -> the files that it reads
    (train, "--resume --out run"): "run/config.json run/state/state.json run/state "
    "run/start.safetensors run/log.jsonl run/metrics.json",
    (train, f"{TOY} --points p.csv --out new"): "p.csv",
    (train, f"{TOY} --points p.npy --out new"): "p.npy",
    (sample, "--student run --n 2 --out new"): "run/student.safetensors",
    (sample, "--student big --n 1 --out new"): "big/student.safetensors big/config.json",
    (sample, f"{DRAW} --weights w --lora l.safetensors"): "e.safetensors l.safetensors "
    f"w/config.json w/{BASE} w/{BASE}.index.json",
}
KINDS = {file: reader for reader, files in READERS.items() for file in files.split()}


def make_files() -> None:
    """Make a file of each kind in the working directory."""
    points = numpy.random.default_rng(0).normal(size=(9, 2))
    numpy.savetxt("p.csv", points, delimiter=",", header="x,y", comments="")
    numpy.save("p.npy", points)
    net = weights.random_network("wan21-tiny", torch.float32)
    file = write_base(Path("w"), "wan21-tiny") / BASE
    index = {"weight_map": dict.fromkeys(dict(net.named_parameters()), BASE)}
    file.with_name(f"{BASE}.index.json").write_text(json.dumps(index))
    write_embeddings(Path("e.safetensors"), "wan21-tiny")
    write_lora(Path("l.safetensors"), "diffusers", net)
    assert 0 == train.main(f"{TOY} --out run".split()) == train.main(f"{TINY} --out big".split())


def damage(content: bytes, suffix: str, rng: random.Random) -> bytes:
    """Flip or cut bytes, replace a value of JSON, reshape or retype a tensor."""
    way, data = rng.choice(["flip", "cut", "value", "value"]), bytearray(content)
    if way == "value" and suffix == ".safetensors":
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata, tensors = header.get("__metadata__", {}), load(content)
        if metadata and rng.random() < 0.5:
            name = rng.choice(sorted(metadata))
            metadata[name] = damage(metadata[name].encode(), ".json", rng).decode(errors="replace")
            return save(tensors, metadata)
        x = tensors.pop(name := rng.choice(sorted(tensors)))
        forms = [x.flatten(), x[None], x[:0], x * torch.nan, x.bool(), x.double(), x.long()]
        tensors |= {name: rng.choice(forms).contiguous()} if rng.random() < 0.8 else {}
        return save(tensors, metadata)
    if way == "value" and suffix == ".json":
        place, key = (root := [json.loads(content)]), 0
        while rng.random() < 0.8 and isinstance(place[key], (dict, list)) and place[key]:
            place = place[key]
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        place[key] = rng.choice(VALUES)
        return json.dumps(root[0]).encode()
    if way == "cut":
        return content[: rng.randrange(len(content))]
    for i in rng.choices(range(len(data)), k=rng.randint(1, 8)):
        data[i] = rng.randrange(256)
    return bytes(data)


def fuzz(folder: Path, count: int) -> list[str]:
    """Damage each kind of file in a new folder, `count` times. Returns what went wrong."""
    faults, rng, good, bad = [], random.Random(0), folder / "good", folder / "bad"
    good.mkdir()
    os.chdir(good)
    make_files()
    for kind in [kind for kind in KINDS for _ in range(count)]:
        os.chdir(folder)
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        os.chdir(bad)
        if kind.startswith("run/") and kind not in ("run/metrics.json", "run/student.safetensors"):
            Path("run/metrics.json").unlink()  # the run is not finished
        file = next(Path("run/state").glob("*.safetensors")) if kind == "run/state" else Path(kind)
        file.write_bytes(content := damage(file.read_bytes(), file.suffix, rng))
        (program, line), error, names = KINDS[kind], io.StringIO(), set(os.listdir())
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            try:
                teachers.text_shape.cache_clear()  # as in a process of its own
                status = program.main(line.split())
            except BaseException:
                status = traceback.format_exc()[-700:]
        text, others = error.getvalue(), set(os.listdir()) - names - {"new"}
        if status not in (0, 2) or text.count("\n") != (status == 2) or others:
            faults.append(f"{kind}: {status} {text[-300:]} {others} {content[:60]}")
    return faults


@pytest.mark.parametrize("count", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_damaged_files_of_each_kind(tmp_path, monkeypatch, quick_toys, count):
    monkeypatch.chdir(tmp_path)  # is restored afterwards
    assert fuzz(tmp_path, count) == []
