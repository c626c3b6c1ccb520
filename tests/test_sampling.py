"""Claims about sampling large teachers and about LoRA files, of others and ours, without extras."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moe
import sample
import train
from models import export, lora, sampling, weights
from models.draws import normal
from models.files import UserError, header
from models.qwen_image import QwenImage
from phases import step_times
from students import embeddings, student

LIGHTNING = ("diffusers", "ComfyUI", "LightX2V", "Wan2.2-Lightning")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs(teacher, *flags): a finished student, made once."""
    held = {}

    def of(teacher, *flags):
        if (teacher, flags) not in held:
            out = tmp_path_factory.mktemp("run") / teacher
            held[teacher, flags] = student(out, teacher, "--dtype", "float32", *flags)
        return held[teacher, flags]

    return of


def said(capsys, *line):
    """What the command prints; it must go well."""
    capsys.readouterr()
    assert sample.main([*map(str, line)]) == 0
    return capsys.readouterr().out


def refused(capsys, *line):
    """The one line of the error."""
    capsys.readouterr()
    assert sample.main([*map(str, line)]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1, shown
    return shown


# -- sampling ------------------------------------------------------------------------------------


def latents(folder):
    return load_file(folder / "latents.safetensors")


@pytest.mark.parametrize("teacher", ["wan22-tiny", "wan22-i2v-tiny", "qwen-image-tiny"])
@pytest.mark.parametrize("generator", ["lora", "full"])
def test_what_is_sampled_is_what_the_run_had_in_memory(runs, tmp_path, teacher, generator):
    """One network at a time computes what all roles beside each other do; other experts do not."""
    folder = runs(teacher, "--generator", generator)
    line = ["--student", folder, "--n", "2", "--trajectory", "--out", tmp_path]
    assert sample.main([*map(str, line)]) == 0
    xs, run = latents(tmp_path), loaded(folder)
    c, shape = run.batch(2, 0, "sample", 0)
    z = torch.stack([normal(xs["x0"].shape[1:], 0, "sample", j, "z") for j in range(2)])
    assert torch.equal(z, xs["x0"])
    with torch.no_grad():
        wanted = list(sample.trajectory(run.student, run.times, z, c))
        swapped = list(sample.trajectory(run.student[::-1], run.times, z, c))
    for i, x in enumerate(wanted):
        assert torch.allclose(xs[f"x{i}"], x, atol=1e-5)
    assert not torch.allclose(swapped[-1], wanted[-1], atol=1e-2)


def loaded(folder):
    """The run with all of its roles, as training has them."""
    cfg = json.loads((folder / "config.json").read_text())
    cfg = train.Config(**{k: tuple(v) if isinstance(v, list) else v
                          for k, v in cfg["settings"].items()})  # fmt: skip
    cfg = train.replace(cfg, size=cfg.size[:1])
    run = train.new_run(cfg, {}, torch.device("cpu"), folder)
    run.k = len(run.phases)
    tensors = load_file(folder / "student.safetensors")
    for role in moe.owners(run.phases):
        for name, p in run.roles.parameters_of(role).items():
            p.data.copy_(tensors[f"{role}/{name}"])
    return run


def test_blocks_that_come_one_by_one_compute_the_same(runs, tmp_path):
    """--offload blocks, adapters and all."""
    for way in ("none", "blocks"):
        line = ["--student", runs("wan22-tiny"), "--n", "1", "--offload", way]
        assert sample.main([*map(str, line), "--out", str(tmp_path / way)]) == 0
    assert torch.equal(*(latents(tmp_path / way)["x"] for way in ("none", "blocks")))


def test_seeds_and_prompts_share_their_noises(runs, tmp_path):
    """Sample j of every prompt begins at the same noise; fewer samples are the first of more."""
    folder = runs("wan22-tiny")
    prompt = embeddings(tmp_path / "p.safetensors", "wan22-tiny", ["a", "b"])
    line = ["--student", folder, "--prompts", prompt, "--trajectory"]
    for n, seed in ((2, 0), (1, 0), (1, 1)):
        out = tmp_path / f"{n}{seed}"
        assert sample.main([*map(str, [*line, "--n", n, "--seed", seed, "--out", out])]) == 0
    two, one, other = (latents(tmp_path / name) for name in ("20", "10", "11"))
    assert torch.equal(two["x0"][:2], two["x0"][2:])
    assert not torch.allclose(two["x4"][:2], two["x4"][2:], atol=1e-3)
    assert torch.allclose(one["x4"], two["x4"][[0, 2]], atol=1e-5)
    assert not torch.allclose(one["x0"], other["x0"], atol=1e-3)
    about = json.loads(lora.metadata(tmp_path / "20" / "latents.safetensors")["about"])
    assert about["names"] == ["000-00", "000-01", "001-00", "001-01"]
    assert about["times"] == list(step_times(4, 5.0)) and about["student"] == str(folder)


def test_the_teacher_is_sampled_with_its_own_steps_and_guidance(tmp_path, capsys):
    """Two evaluations for a guided step; it says that it is not the official solver."""
    out = said(capsys, "--teacher", "wan22-tiny", "--n", 2, "--out", tmp_path / "a")
    assert "80 network evaluations" in out and "UniPC" in out
    line = ["--teacher", "wan22-tiny", "--n", 2, "--steps", 8, "--guidance", 1, 3]
    out = said(capsys, *line, "--out", tmp_path / "b")
    high = sum(t >= 0.875 for t in step_times(8, 12.0)[:-1])
    assert f"{high + 2 * (8 - high)} network evaluations" in out and 0 < high < 8
    out = said(capsys, "--teacher", "qwen-image-tiny", "--n", 1, "--out", tmp_path / "c")
    assert "100 network evaluations" in out and "UniPC" not in out


def test_the_times_of_qwen_image_are_those_of_its_published_scheduler():
    """s = e^mu by size, stretched to end at 0.02; at 1328 x 1328 mu is 0.8343, s 2.303."""
    cfg = train.replace(train.config("qwen-image"), steps=50, size=("1328x1328",))
    times = sampling.teacher_times(cfg, None)
    u, s = 0.5, 2.718281828**0.834296875
    plain = lambda u: s * u / (1 + (s - 1) * u)
    wanted = 1 - (1 - plain(u)) * 0.98 / (1 - plain(1 / 50))
    assert times[0] == 1 and times[-2:] == (pytest.approx(0.02), 0.0)
    assert times[25] == pytest.approx(wanted, abs=1e-4)
    assert sampling.teacher_times(train.replace(cfg, steps=4), 3.0) == pytest.approx(
        step_times(4, 3.0)
    )


@pytest.mark.parametrize("flags,says", [
    ("--size 50x64", "nearest that fits is 48x64"), ("--size 48", "HEIGHTxWIDTH"),
    ("--size 48x64:0.5", "HEIGHTxWIDTH"), ("--teacher wan22-tiny", "not both"),
    ("--frames 8", "nearest: 9"), ("--size 1x48x64 --frames 9", "do not agree"),
    ("--steps 4", "--steps is for --teacher"), ("--shift 0", "--shift must"),
    ("--guidance 4", "--guidance is for --teacher"),
    ("--lora a.safetensors", "--lora is for --teacher"), ("--merge", "--export"),
    ("--bf16", "--export"), ("--image a.png", "takes none"), ("--n 0", "--n must"),
    ("--prompt fox", "no text encoder"), ("--prompts none.safetensors", "holds no embeddings"),
    ("--frames -3", "nearest: 1"), ("--frames 0", "nearest: 1"), ("--prompt=", "is empty"),
    ("--export x --n 3", "--n is for samples"), ("--decode none", "holds no latents"),
])  # fmt: skip
def test_flags_that_do_not_fit_are_one_line_and_write_nothing(runs, tmp_path, capsys, flags, says):
    out = tmp_path / "out"
    line = ["--student", runs("wan22-tiny"), "--out", out, *flags.split()]
    assert says in refused(capsys, *line) and not out.exists()


def test_large_flags_are_refused_for_toys_and_toys_for_export(tmp_path, capsys):
    line = ["--teacher", "toy2d", "--out", tmp_path / "out"]
    assert "--prompt is for large" in refused(capsys, *line, "--prompt", "fox")
    assert "--lora is for large" in refused(capsys, *line, "--lora", "a.safetensors")
    assert "--export is for a student" in refused(capsys, *line[:2], "--export", tmp_path / "e")
    assert "nearest" in refused(capsys, "--teacher", "wan23", "--out", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    out = said(capsys, *line, "--n", 500)  # the exact teacher, by the same command
    assert "40 network evaluations" in out and "precision" in out


def test_5b_sizes_are_divisible_by_32(capsys):
    line = ["--teacher", "wan22-5b", "--weights", "random", "--size", "720x1280"]
    assert "nearest that fits is 704x1280" in refused(capsys, *line)


@pytest.mark.slow
def test_toy_tiny_and_full_size_go_through_the_same_lines(runs, tmp_path, monkeypatch):
    """1.4 billion random weights in bf16 with an adapter of rank 64; drawn() is everyone's."""
    seen, plain = [], sample.drawn
    monkeypatch.setattr(
        sample, "drawn", lambda source, *a: seen.append(source.cfg.teacher) or plain(source, *a)
    )
    assert train.main(["--out", str(tmp_path / "toy"), "--iters", "1", "--warmup", "1"]) == 0
    full_size(tmp_path / "lora", "wan21-1.3b")
    full = "--teacher wan21-1.3b --weights random --size 1x32x32 --steps 1 --lora".split()
    for line in (["--student", tmp_path / "toy"], ["--student", runs("wan22-tiny")],
                 [*full, tmp_path / "lora"]):  # fmt: skip
        out = tmp_path / f"out{len(seen)}"
        assert sample.main([*map(str, line), "--n", "2", "--out", str(out)]) == 0
    assert seen == ["toy2d", "wan22-tiny", "wan21-1.3b"]
    assert latents(out)["x"].shape == (2, 16, 1, 4, 4)


# -- LoRA files of others ------------------------------------------------------------------------


def full_size(path, teacher, kind=torch.float32):
    """A file with the keys, ranks, alphas, sizes of the published one; its zeros take no disk."""
    row = weights.row_of(teacher)
    net = weights.build(row.network, row.settings, torch.bfloat16)
    prefix, shapes = "" if row.network is QwenImage else "diffusion_model.", {}
    for name, layer in lora.adapted(net).items():
        shapes[f"{prefix}{name}.lora_down.weight"] = kind, (64, layer.in_features)
        shapes[f"{prefix}{name}.lora_up.weight"] = kind, (layer.out_features, 64)
        shapes[f"{prefix}{name}.alpha"] = torch.int64, ()
    head, size = header(shapes, {})
    with open(path, "wb") as file:
        file.write(head)
        for dtype, shape in shapes.values():
            count = torch.Size(shape).numel() * dtype.itemsize
            if shape:
                file.seek(count, 1)
            else:
                file.write((8).to_bytes(count, "little"))
    return net, shapes, size


@pytest.mark.parametrize("teacher,tensors,bytes_there", [
    ("wan22", 1200, 1_226_000_000), ("wan22-i2v", 1200, 1_226_000_000),
    ("qwen-image", 2160, 1_698_951_104),
])  # fmt: skip
def test_files_of_the_published_size_load_on_the_meta_device(
    tmp_path, teacher, tensors, bytes_there
):
    """Keys, rank 64, shapes of the Lightning files; every layer gets its adapter."""
    path = tmp_path / "lightning.safetensors"
    net, shapes, size = full_size(path, teacher)
    assert len(shapes) == tensors and abs(size - bytes_there) < 3e6
    cfg = train.config(teacher, weights=("random",))
    sampling.check_lora(cfg, path, {})  # no consumer minds
    factors, rest = lora.split(weights.read_lora(net, path), net)
    assert not rest and len(factors) == tensors // 3
    assert {one.scale for one in factors.values()} == {1 / 8}
    lora.attach(net.to("meta"), "student1", factors)
    held = lora.parameters(net, "student1")
    assert len(held) == 2 * tensors // 3 and all(p.is_meta for p in held.values())
    assert sum(p.numel() for p in held.values()) * 4 == size - 8 * tensors // 3 - head_of(path)


def head_of(path):
    """Bytes before the tensors."""
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def tiny_file(path, form, teacher="wan22-tiny", seed=0, rank=2):
    """A LoRA of all adapted layers in one of the published forms. Returns alpha / rank as meant."""
    row = weights.row_of(teacher)
    net = weights.build(row.network, row.settings, torch.float32)
    tensors, about, scale = {}, {}, 0.5
    for name, layer in lora.adapted(net).items():
        down = normal((rank, layer.in_features), form, seed, name, "down")
        up = normal((layer.out_features, rank), form, seed, name, "up") / 10
        prefix, words, key = "diffusion_model.", ("lora_down", "lora_up"), name
        if form == "native":
            prefix, words, key = "transformer.", ("lora_A", "lora_B"), net.diffusers_name(name)
        if form in ("AB", "AB alpha"):
            words = "lora_A", "lora_B"
        if form == "bare":
            prefix = ""
        if form == "musubi":
            prefix, key = "lora_unet_", name.replace(".", "_")
        if form == "doubled":
            prefix, key = "transformer.", net.diffusers_name(name)
        tensors[f"{prefix}{key}.{words[0]}.weight"] = down
        tensors[f"{prefix}{key}.{words[1]}.weight"] = up
        if form not in ("AB", "native", "no alpha"):
            tensors[f"{prefix}{key}.alpha"] = torch.tensor(float(rank * scale))
    if form == "native":
        about = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": rank * scale})}
    save_file(tensors, path, about)
    return 1.0 if form in ("AB", "no alpha") else scale


FORMS = ["lightning", "AB", "AB alpha", "native", "bare", "musubi", "no alpha"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("teacher", ["wan22-tiny", "qwen-image-tiny"])
def test_every_form_of_file_is_read_with_its_alpha(tmp_path, capsys, teacher, form):
    """The adapter of each layer is the file's, at its scale; a base merged by hand agrees."""
    path = tmp_path / "x.safetensors"
    scale = tiny_file(path, form, teacher)
    net = weights.random(teacher, torch.float32, seed=1)
    factors, rest = lora.split(weights.read_lora(net, path), net)
    assert not rest and {one.scale for one in factors.values()} == {scale}
    lora.attach(net, "student1", factors)
    cfg = train.config(teacher)
    c, shape = train.large.data(cfg, tmp_path)(2, 0, 0)
    x, t = normal((2, *shape), "x"), torch.tensor([0.9, 0.3])
    with torch.no_grad():
        found = net(x, t, c, adapter="student1")
        plain = net(x, t, c)
        for key, one in factors.items():
            net.get_submodule(key).weight.addmm_(one.up, one.down, alpha=scale)
        merged = net(x, t, c)
    assert torch.allclose(found, merged, atol=1e-4) and not torch.allclose(found, plain, atol=1e-2)


REFUSED = [  # form, teacher, consumer, why
    ("no alpha", "wan22-tiny", "Wan2.2-Lightning", "needs an alpha"),
    ("AB", "wan22-tiny", "Wan2.2-Lightning", "ignores lora_A"),
    ("bare", "wan22-tiny", "diffusers", "load nothing"),
    ("bare", "wan22-tiny", "ComfyUI", "need the prefix"),
    ("native", "wan22-tiny", "ComfyUI", "no map"),
    ("native", "wan22-tiny", "LightX2V", "original names"),
    ("native", "wan22-tiny", "Wan2.2-Lightning", "original names"),
    ("no alpha", "qwen-image-tiny", "diffusers", "need an alpha"),
    ("AB alpha", "qwen-image-tiny", "diffusers", "drops the alpha"),
    ("doubled", "qwen-image-tiny", "diffusers", "doubles the prefix"),
    ("doubled", "qwen-image-tiny", "ComfyUI", "no map"),
    ("doubled", "qwen-image-tiny", "LightX2V", "does not strip"),
    ("native", "qwen-image-tiny", "LightX2V", "does not strip"),
]


@pytest.mark.parametrize("form,teacher,who,why", REFUSED)
def test_what_a_consumer_refuses_is_said_with_the_reason(tmp_path, capsys, form, teacher, who, why):
    """And refused where nobody takes it."""
    path = tmp_path / "high.safetensors"
    tiny_file(path, form, teacher)
    cfg = train.config(teacher)
    if form == "doubled":
        with pytest.raises(UserError, match=f"fits nobody.*{who}: .*{why}"):
            sampling.check_lora(cfg, path, {})
    else:
        sampling.check_lora(cfg, path, {})
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if f"not for {who}" in line and why in line]


@pytest.mark.parametrize("key,who,why", [
    ("diffusion_model.head.head.alpha", "diffusers", "raises on alpha of head.head"),
    ("diffusion_model.patch_embedding.lora_up.weight", "diffusers", "patch_embedding"),
    ("diffusion_model.blocks.0.ffn.0.diff", "diffusers", "differences"),
    ("diffusion_model.blocks.0.ffn.0.diff_b", "Wan2.2-Lightning", "differences"),
])  # fmt: skip
def test_keys_that_break_consumers_are_never_written(tmp_path, key, who, why):
    """Of the four, all take what we write; with one such key more, one of them does not."""
    tiny_file(tmp_path / "x.safetensors", "lightning")
    kinds = dict.fromkeys(load_file(tmp_path / "x.safetensors"), "F32")
    assert lora.refusals(kinds, True) == dict.fromkeys(LIGHTNING, "")
    assert why in lora.refusals(kinds | {key: "F32"}, True)[who]
    name = next(key for key in kinds if "lora_up" in key)
    assert "float32" in lora.refusals(kinds | {name: "BF16"}, True)["Wan2.2-Lightning"]


def test_high_and_low_are_told_apart_and_it_says_how(tmp_path, capsys):
    """By name, or in the order given; swapped on purpose, the latents are others."""
    names = {"named": ("my_high.safetensors", "my_low.safetensors"), "plain": ("a", "b")}
    found = {}
    for kind, (high, low) in names.items():
        for seed, name in enumerate((high, low)):
            tiny_file(tmp_path / name, "lightning", seed=seed)
        for order in ((high, low), (low, high)):
            line = ["--teacher", "wan22-tiny", "--n", 1, "--dtype", "float32", "--lora"]
            out = tmp_path / f"{kind}-{order[0]}-out"
            told = said(capsys, *line, *(tmp_path / name for name in order), "--out", out)
            assert ("by metadata or name" if kind == "named" else "order given") in told
            assert "4 network evaluations" in told
            found[kind, order[0] == high] = latents(out)["x"]
    assert torch.equal(found["named", True], found["named", False])
    assert torch.equal(found["named", True], found["plain", True])
    assert not torch.allclose(found["plain", True], found["plain", False], atol=1e-3)


def test_what_is_not_of_adapted_layers_is_merged(tmp_path, capsys):
    """.diff and .diff_b, as some published files have them; a random base takes none."""
    net = weights.random("wan21-tiny", torch.float32, seed=1)
    save_file(dict(net.named_parameters()), tmp_path / "base.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(
        {"_class_name": "WanModel"} | weights.row_of("wan21-tiny").settings))  # fmt: skip
    tiny_file(tmp_path / "x.safetensors", "lightning", "wan21-tiny")
    tensors = load_file(tmp_path / "x.safetensors")
    tensors["diffusion_model.head.head.diff_b"] = torch.ones(64)
    save_file(tensors, tmp_path / "y.safetensors")
    prompt = embeddings(tmp_path / "p.safetensors", "wan21-tiny", ["a"])
    base = ["--weights", tmp_path / "base.safetensors", "--prompts", prompt, "--n", 1, "--steps", 1,
            "--dtype", "float32", "--teacher", "wan21-tiny", "--latents"]  # fmt: skip
    for name in "xy":
        said(capsys, *base, "--lora", tmp_path / f"{name}.safetensors", "--out", tmp_path / name)
    x, y = (latents(tmp_path / name)["x"] for name in "xy")
    assert torch.allclose(y, x - 1, atol=1e-4)  # one Euler step of a velocity that is 1 more
    line = ["--teacher", "wan21-tiny", "--lora", tmp_path / "y.safetensors"]
    assert "published base" in refused(capsys, *line)


def rewritten(path, source, **about):
    """A copy of an exported file, whose metadata says something else."""
    save_file(load_file(source), path, lora.metadata(source) | about)
    return path


@pytest.mark.parametrize("about,says", [
    ({"times": "[1.0, 0.9, 0.75, 0.5, 0.0]"}, "unlike students"),
    ({"base": "x"}, "unlike students"),
    ({"times": "[1.0, NaN, 0.75, 0.5, 0.0]"}, "damaged"), ({"expert": "7"}, "damaged"),
    ({"times": "[1.0, 0.75, 0.9, 0.5, 0.0]"}, "damaged"), ({"steps": "nothing"}, "damaged"),
    ({"steps": "[0, 1]"}, "name each once"), ({"steps": "[1, 2, 3]"}, "name each once"),
    ({"times": "[]"}, "damaged"), ({"noise": "high", "times": ""}, "damaged"),
])  # fmt: skip
def test_metadata_that_does_not_hold_together_is_refused(runs, tmp_path, capsys, about, says):
    said(capsys, "--student", runs("wan22-tiny"), "--export", tmp_path / "out")
    high, low = (tmp_path / "out" / f"{noise}_noise_model.safetensors" for noise in ("high", "low"))
    low = rewritten(tmp_path / "low.safetensors", low, **about)
    line = ["--teacher", "wan22-tiny", "--out", tmp_path / "samples", "--lora", high, low]
    assert says in refused(capsys, *line) and not (tmp_path / "samples").exists()


def test_another_base_than_a_student_was_trained_on_is_said(runs, tmp_path, capsys):
    """By --weights, and by the fingerprint in a file's metadata; its own is passed in silence."""
    folder, base = runs("wan21-tiny"), tmp_path / "base"
    sharded(base, weights.random("wan21-tiny", torch.float32, seed=1), 10**9)
    prompt = embeddings(tmp_path / "p.safetensors", "wan21-tiny", ["a"])
    line = ["--n", 1, "--weights", base, "--prompts", prompt, "--latents", "--size", "1x48x64"]
    told = said(capsys, "--student", folder, *line, "--out", tmp_path / "a")
    assert "not the files that the student was trained on" in told
    own = student(tmp_path / "own", "wan21-tiny", "--weights", base, "--prompts", prompt)
    told = said(capsys, "--student", own, *line, "--out", tmp_path / "b")
    assert "note" not in told
    for run, alike in ((own, True), (folder, False)):
        out = tmp_path / f"export-{alike}"
        said(capsys, "--student", run, "--export", out)
        files = sorted(out.glob("*.safetensors"))
        told = said(capsys, "--teacher", "wan21-tiny", *line, "--lora", *files, "--out", out / "s")
        assert ("other files of the base" in told) != alike


def test_loras_that_do_not_fit_are_one_line(runs, tmp_path, capsys):
    high, low, qwen, odd = (tmp_path / f"{n}.safetensors" for n in ("high", "low", "qwen", "odd"))
    tiny_file(high, "lightning"), tiny_file(low, "lightning", seed=1)
    tiny_file(qwen, "lightning", "qwen-image-tiny")
    tensors = load_file(high)
    save_file(tensors | {"diffusion_model.blocks.0.ffn.0.lokr_w1": torch.ones(2)}, odd)
    line = ["--teacher", "wan22-tiny", "--out", tmp_path / "out", "--lora"]
    assert "--lora takes 2, one for each transformer, got 1" in refused(capsys, *line, high)
    assert "no layer of this network" in refused(capsys, *line, qwen, qwen)
    assert "ends in nothing that a LoRA has" in refused(capsys, *line, odd, low)
    assert "is no file" in refused(capsys, *line, tmp_path / "absent", low)
    key = "diffusion_model.blocks.0.ffn.0.lora_up.weight"
    save_file(tensors | {key: torch.ones(7, 2)}, odd)
    assert "has not the shape" in refused(capsys, *line, odd, low)
    out = tmp_path / "ours"
    said(capsys, "--student", runs("wan22-tiny"), "--export", out)
    files = out / "high_noise_model.safetensors", out / "low_noise_model.safetensors"
    assert "name each once" in refused(capsys, *line, files[0], files[0])
    assert "of 2 phases" in refused(capsys, *line, files[0])
    assert f"--lora {out}" in refused(capsys, "--student", out)
    told = said(capsys, *line, out, "--n", 1)  # a folder of them
    assert "student1, by its metadata" in told and "student2, by its metadata" in told
    told = said(capsys, *line, out, "--n", 1, "--steps", 8)
    assert "other steps were asked for" in told and "8 network evaluations" in told
    (tmp_path / "out" / "latents.safetensors").unlink()
    (tmp_path / "out" / "samples.png").unlink()
    (tmp_path / "out").rmdir()
    other = ["--teacher", "wan22-i2v-tiny", "--lora", *files]
    assert "is for wan22-tiny" in refused(capsys, *other)
    assert not (tmp_path / "out").exists()


# -- export --------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags,says", [
    (["--shift", "7"], "takes the step at t x 1000 = 875 with the low-noise transformer"),
    (["--phases", "4"], "phases 1 and 2 are both on the high-noise transformer"),
    (["--phases", "1"], "phase 1 takes the step at t x 1000 = 1000 with the low-noise"),
])  # fmt: skip
def test_students_that_routing_by_t_would_break_are_not_exported(
    runs, tmp_path, capsys, flags, says
):
    """Shift 7 is 3 + 1 by t and 2 + 2 by step; the default goes out."""
    folder, out = runs("wan22-tiny", *flags), tmp_path / "out"
    assert says in refused(capsys, "--student", folder, "--export", out) and not out.exists()
    train.main(["--teacher", "wan22-tiny", "--dry-run", *flags])  # as it says before training
    assert says in capsys.readouterr().out
    assert sample.main(["--student", str(folder), "--n", "1", "--out", str(tmp_path / "s")]) == 0


def test_exported_files_are_what_all_four_take(runs, tmp_path, capsys):
    """Keys, float32, alpha of no dimensions; a bf16 twin on request; names that Lightning wants."""
    out = tmp_path / "out"
    said(capsys, "--student", runs("wan22-tiny"), "--export", out, "--bf16")
    for name in ("high_noise_model", "low_noise_model"):
        tensors, twin = (load_file(x / f"{name}.safetensors") for x in (out, out / "bf16"))
        assert len(tensors) == 3 * 10 * 2
        dtypes = {key: x.dtype for key, x in tensors.items()}
        assert set(dtypes.values()) == {torch.float32}
        alphas = [x for key, x in tensors.items() if key.endswith(".alpha")]
        assert {(x.shape, x.item()) for x in alphas} == {(torch.Size([]), 8.0)}
        assert lora.refusals(dict.fromkeys(tensors, "F32"), True) == dict.fromkeys(LIGHTNING, "")
        for key, x in tensors.items():
            bf16 = x if key.endswith("alpha") else x.bfloat16()
            assert torch.equal(twin[key], bf16) and twin[key].dtype == bf16.dtype
    assert "holds other things" in refused(capsys, "--student", runs("wan22-tiny"), "--export", out)


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_an_export_that_fails_leaves_nothing(runs, tmp_path, capsys, monkeypatch, error):
    """In the second expert's file; the same command then goes through."""
    plain, calls = export.write_entries, []

    def failing(path, *given):
        calls.append(path)
        if len(calls) == 2:
            raise error
        return plain(path, *given)

    line = ["--student", runs("wan22-tiny"), "--export", tmp_path / "out"]
    monkeypatch.setattr(export, "write_entries", failing)
    assert sample.main([*map(str, line)]) == (2 if isinstance(error, OSError) else 130)
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert "README.md" in said(capsys, *line)


def test_a_student_of_a_base_with_a_lora_leaves_merged_only(tmp_path, capsys):
    """As a LoRA, other tools would load it without; merged it computes what the student does."""
    base, files = tmp_path / "base", [tmp_path / "teacher.safetensors"]
    sharded(base, weights.random("wan21-tiny", torch.float32, seed=1), 10**9)
    tiny_file(files[0], "lightning", "wan21-tiny")
    prompt = embeddings(tmp_path / "p.safetensors", "wan21-tiny", ["a"])
    run = student(tmp_path / "run", "wan21-tiny", "--weights", base, "--prompts", prompt,
                  "--teacher-lora", *files, "--dtype", "float32", "--phases", "1", "--steps", "1",
                  "--size", "1x32x32")  # fmt: skip
    assert "--teacher-lora" in refused(capsys, "--student", run, "--export", tmp_path / "out")
    said(capsys, "--student", run, "--export", tmp_path / "out", "--merge")
    said(
        capsys,
        "--student",
        run,
        "--n",
        1,
        "--out",
        tmp_path / "a",
        "--prompts",
        prompt,
        "--latents",
    )
    merged = tmp_path / "out" / "phase1"
    line = ["--teacher", "wan21-tiny", "--weights", merged, "--prompts", prompt,
            *"--steps 1 --n 1 --guidance 1 --size 1x32x32 --dtype float32".split()]  # fmt: skip
    said(capsys, *line, "--latents", "--out", tmp_path / "b")
    a, b = (latents(tmp_path / name)["x"] for name in "ab")
    assert torch.allclose(a, b, atol=1e-4)


def test_experts_of_one_name_do_not_meet(runs, tmp_path, capsys):
    """Bases named alike, as files and as folders, come out beside each other."""
    nets = [weights.random("wan22-tiny", torch.float32, seed=e) for e in (1, 2)]
    for e, net in enumerate(nets):
        sharded(tmp_path / "ab"[e] / "transformer", net, 10**9)
    paths = [tmp_path / name / "transformer" for name in "ab"]
    line = ["--student", runs("wan22-tiny"), "--merge", "--weights", *paths, "--export"]
    said(capsys, *line, tmp_path / "out")
    found = {
        p.relative_to(tmp_path / "out").parts[0] for p in (tmp_path / "out").rglob("*.safetensors")
    }
    assert found == {"high_noise_model", "low_noise_model"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Layout" in card and "from_pretrained" not in card  # original names


def test_samples_go_to_a_folder_of_samples_only(runs, tmp_path, capsys):
    """Other things are never overwritten; earlier samples are, and none of them stays behind."""
    folder = runs("wan22-tiny")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "prompts.safetensors").write_bytes(b"mine")
    line = ["--student", folder, "--n", 1, "--out"]
    assert "holds other things" in refused(capsys, *line, tmp_path / "mine")
    assert "holds a run" in refused(capsys, *line, folder)
    assert "cannot write" in refused(capsys, *line, "/proc/nowhere")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "001-03.mp4").write_bytes(b"old")
    said(capsys, *line, tmp_path / "old")
    held = sorted(path.name for path in (tmp_path / "old").iterdir())
    assert held == ["latents.safetensors", "samples.png"]
    assert list(latents(tmp_path / "old")) == ["x"]


def test_a_students_own_file_may_be_named(runs, tmp_path, capsys):
    """And a file that is of no run is no reason to advise --overwrite."""
    file = runs("wan22-tiny") / "student.safetensors"
    said(capsys, "--student", file, "--n", 1, "--out", tmp_path / "out")
    (tmp_path / "student.safetensors").write_bytes(file.read_bytes())
    told = refused(capsys, "--student", tmp_path / "student.safetensors")
    assert "holds no run" in told and "overwrite" not in told


def test_full_weights_need_a_base_and_room(runs, tmp_path, capsys, monkeypatch):
    line = ["--student", runs("wan22-tiny"), "--export", tmp_path / "out"]
    assert "random ones have none" in refused(capsys, *line, "--merge")
    full = ["--student", runs("wan22-tiny", "--generator", "full"), "--export", tmp_path / "out"]
    assert "random ones have none" in refused(capsys, *full)
    assert "--merge is for adapters" in refused(capsys, *full, "--merge")
    monkeypatch.setattr(export.shutil, "disk_usage", lambda _: type("D", (), {"free": 10}))
    assert "needs" in refused(capsys, *line) and not (tmp_path / "out").exists()


# -- merging -------------------------------------------------------------------------------------


def sharded(folder, net, size):
    """The weights of a network in original names, in shards of at most `size` bytes."""
    folder.mkdir(parents=True)
    shards, room = [{}], size
    for name, p in net.named_parameters():
        if p.nbytes > room:
            shards.append({})
            room = size
        shards[-1][name] = p.data
        room -= p.nbytes
    names = [f"diffusion_pytorch_model-{i + 1:05}-of-{len(shards):05}.safetensors"
             for i in range(len(shards))]  # fmt: skip
    for name, tensors in zip(names, shards):
        save_file(tensors, folder / name)
    where = {key: name for name, tensors in zip(names, shards) for key in tensors}
    index = {
        "metadata": {"total_size": sum(p.nbytes for p in net.parameters())},
        "weight_map": where,
    }
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel"} | net.settings))


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_merged_weights_compute_what_base_and_adapter_compute(runs, tmp_path, capsys, dtype, bound):
    """In the base's shards, names and dtypes; base alone is far from it. --bf16 halves float32."""
    for e, name in enumerate(("high_noise_model", "low_noise_model"), 1):
        sharded(tmp_path / "base" / name, weights.random("wan22-tiny", dtype, seed=e), 400_000)
    out, folder = tmp_path / "out", runs("wan22-tiny")
    line = ["--student", folder, "--weights", tmp_path / "base", "--merge", "--export"]
    said(capsys, *line, out)
    base, new = (sorted(p.relative_to(root) for p in root.rglob("*.*"))
                 for root in (tmp_path / "base", out))  # fmt: skip
    assert base == [p for p in new if p.name != "README.md"] and len(base) > 8
    tensors = load_file(folder / "student.safetensors")
    c, x, t = (
        {"text": normal((2, 9, 64), "c")},
        normal((2, 16, 1, 6, 8), "x"),
        torch.tensor([0.9, 0.3]),
    )
    for e, name in enumerate(("high_noise_model", "low_noise_model"), 1):
        net = weights.load(tmp_path / "base" / name, dtype)
        given = {
            n.removeprefix(f"student{e}/"): y for n, y in tensors.items() if f"student{e}/" in n
        }
        layers = {n[:-3] for n in given if n.endswith(".up")}
        lora.attach(net, "a", {n: lora.Factors(given[f"{n}.up"], given[f"{n}.down"], 8 / 4)
                               for n in layers})  # fmt: skip
        with torch.no_grad():
            wanted, plain = net(x, t, c, adapter="a"), net(x, t, c)
            found = weights.load(out / name, dtype)(x, t, c)
        distance = lambda a: ((a - wanted).norm() / wanted.norm()).item()
        print(
            f"{dtype}, expert {e}: merged {distance(found):.1e}, base alone {distance(plain):.1e}"
        )
        assert distance(found) < bound < 0.1 < distance(plain)
    kinds = {there.dtype for there in weights.plan(out / name, dtype)[1].values()}
    assert kinds == ({"F32"} if dtype == torch.float32 else {"F32", "BF16"})


MERGE = """
import sys
from pathlib import Path
import sample
from models import export, files

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

def all_at_once(path, entries, metadata):  # the control
    held = {key: entry._replace(read=entry.read().__class__.clone.__get__(entry.read()))
            for key, entry in entries.items()}
    return files.write_entries(path, held, metadata)

if sys.argv[1] == "at once":
    export.write_entries = all_at_once
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak, from here on
assert sample.main(sys.argv[2:]) == 0
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux says what is used")
def test_merging_into_2_gb_takes_the_memory_of_two_shards(tmp_path):
    """And little more, in a process of its own; one shard with all, read at once, takes 2 GB."""
    settings = dict(dim=1024, ffn_dim=4096, num_heads=8, num_layers=29, text_dim=64, text_len=16)
    net, grown = weights.random_network(weights.Wan, settings, torch.float32), {}
    size = sum(p.nbytes for p in net.parameters())
    prompt = embeddings(tmp_path / "p.safetensors", "wan21-tiny", ["a"])
    for way, shard in (("streamed", 250_000_000), ("at once", 3_000_000_000)):
        folder, run = tmp_path / way / "base", tmp_path / way / "run"
        sharded(folder, net, shard)
        student(run, "wan21-tiny", "--weights", folder, "--prompts", prompt, "--size", "1x32x32",
                "--phases", "1", "--steps", "1")  # fmt: skip
        line = ["--student", run, "--merge", "--export", tmp_path / way / "out"]
        found = subprocess.run(
            [sys.executable, "-c", MERGE, way, *map(str, line)],
            capture_output=True, text=True, cwd=Path(__file__).parents[1],
        )  # fmt: skip
        assert found.returncode == 0, found.stderr
        grown[way] = int(found.stdout.splitlines()[-1])
    print(f"base {size / 1e6:.0f} MB in shards of 250 MB: growth {grown['streamed'] / 1e6:.0f} MB; "
          f"all at once {grown['at once'] / 1e6:.0f} MB")  # fmt: skip
    assert 1.9e9 < size and grown["streamed"] < 2 * 250e6 + 200e6 < 1.5e9 < grown["at once"]
