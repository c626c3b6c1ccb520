"""Claims about loading: published weights arrive whole, in little memory, or not at all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from students import FORMS, write_lora

from models import lora, wan, weights
from models.common import UserError, normal
from models.wan import Wan, diffusers_name

ROOT = Path(__file__).parent.parent
KEYS = ROOT.parent / "shared" / "keys"
SIZES = {  # parameters and tensors of what is published
    "wan21-1.3b": (1_418_996_800, 825),
    "wan21": (14_288_491_584, 1095),
    "wan22": (14_288_491_584, 1095),
    "wan22-i2v": (14_288_901_184, 1095),
    "wan22-5b": (4_999_787_712, 825),
    "qwen-image": (20_430_401_088, 1933),
}
SHARED = {"ffn_dim": 96, "num_layers": 2, "freq_dim": 256, "eps": 1e-6}
ORIGINAL = SHARED | {  # as published: without text_dim
    "_class_name": "WanModel",
    "dim": 64,
    "num_heads": 2,
    "in_dim": 16,
    "out_dim": 16,
    "text_len": 16,
    "model_type": "t2v",
}
DIFFUSERS = SHARED | {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 48,
    "patch_size": [1, 2, 2],
    "image_dim": None,
}
LAYOUTS = {"original": ORIGINAL, "diffusers": DIFFUSERS}


def tiny(seed=0) -> dict[str, torch.Tensor]:
    """Tensors of a tiny Wan under the original names."""
    torch.manual_seed(seed)
    net = Wan(64, 96, 2, 2, text_dim=48, text_len=16)
    return {key: torch.randn_like(p) for key, p in net.named_parameters()}


def save(folder: Path, tensors, layout="original", files=1) -> Path:
    """Write a folder of published weights in this number of shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LAYOUTS[layout]))
    if layout == "diffusers":
        tensors = {diffusers_name(key): value for key, value in tensors.items()}
    keys = list(tensors)
    names = [f"diffusion_pytorch_model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    for i, name in enumerate(names):
        save_file({key: tensors[key] for key in keys[i::files]}, folder / name)
    if files > 1:
        weight_map = {key: names[i % files] for i, key in enumerate(keys)}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def is_same(net, tensors) -> bool:
    return all(torch.equal(p, tensors[key].to(p.dtype)) for key, p in net.named_parameters())


def meta_network(name):
    spec = weights.TEACHERS[name]
    return weights.build(spec.network, spec.settings, torch.bfloat16)


# -- what is published ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_full_size_networks_have_the_published_numbers_of_parameters_and_tensors(name):
    shapes = [p.shape for p in meta_network(name).parameters()]
    assert (sum(shape.numel() for shape in shapes), len(shapes)) == SIZES[name]


@pytest.mark.skipif(not KEYS.is_dir(), reason="no lists of published keys beside the repo")
@pytest.mark.parametrize("name", SIZES)
def test_full_size_networks_have_the_published_keys_and_shapes_in_both_layouts(name):
    repository = weights.TEACHERS[name].repository.split("/")[1].removesuffix("-Diffusers").lower()
    listed = json.loads((KEYS / f"{repository}.json").read_text())
    net = meta_network(name)
    ours = {key: tuple(p.shape) for key, p in net.named_parameters()}
    theirs = {key: tuple(shape) for key, (_, shape) in listed["keys"].items()}
    assert {net.diffusers_name(key): shape for key, shape in ours.items()} == theirs
    assert ours == {name or key: theirs[key] for key, (name, _) in listed["keys"].items()}


def test_a_renaming_that_forgets_norm3_is_refused(tmp_path, monkeypatch):
    """Negative control: diffusers calls it norm2."""
    save(tmp_path, tiny(), "diffusers")
    weights.load(tmp_path)
    kept = tuple(pair for pair in wan.RENAMED if pair[0] != "norm3")
    monkeypatch.setattr(wan, "RENAMED", kept)
    with pytest.raises(UserError, match="norm2"):
        weights.load(tmp_path)


# -- loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_layouts_give_the_same_network_whole_or_in_shards(tmp_path, layout, files):
    net = weights.load(save(tmp_path, tiny(), layout, files), torch.float32)
    assert is_same(net, tiny()) and not net.training
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file_of_comfyui_needs_no_config(tmp_path, prefix):
    """In float16, which is converted."""
    net = weights.random_network("wan22-tiny", torch.float32)
    tensors = {key: p.half() for key, p in net.named_parameters()}
    save_file({prefix + key: value for key, value in tensors.items()}, tmp_path / "a.safetensors")
    net = weights.load(tmp_path / "a.safetensors", torch.float32, teacher="wan22-tiny")
    assert is_same(net, tensors)


def test_a_bf16_wan_keeps_its_modulation_norms_times_and_head_in_float32(tmp_path):
    net = weights.load(save(tmp_path, tiny()))
    block = net.blocks[0]
    for p in (block.norm3.weight, block.modulation, net.time_projection[1].weight):
        assert p.dtype == net.head.head.weight.dtype == torch.float32
    assert block.self_attn.q.weight.dtype == torch.bfloat16 and is_same(net, tiny())


@pytest.mark.parametrize("names", weights.PAIRS)
def test_two_branches_come_high_noise_first_with_their_boundary(tmp_path, names):
    """From the published folder, or from a path for each; a fine-tune may have another boundary."""
    for seed, name in enumerate(names):
        layout = "diffusers" if "transformer" in name else "original"
        save(tmp_path / name, tiny(seed), layout)
    for paths in ([tmp_path], [tmp_path / name for name in names]):
        nets, boundary_t = weights.load_teacher("wan22-tiny", *paths, dtype=torch.float32)
        assert boundary_t == 0.875
        assert [is_same(net, tiny(seed)) for seed, net in enumerate(nets)] == [True, True]
    (tmp_path / "model_index.json").write_text('{"boundary_ratio": 0.8}')
    assert weights.branch_paths("wan22-tiny", tmp_path)[1] == 0.8


# -- LoRA ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("teacher", ["wan22-tiny", "qwen-image-tiny"])
def test_every_form_of_lora_is_read_with_its_alpha(tmp_path, teacher, form):
    """As an adapter it computes what it computes when merged at load; the base alone does not."""
    net = weights.random_network(teacher, torch.float32)
    save_file(dict(net.named_parameters()), tmp_path / "base.safetensors")
    scale = write_lora(tmp_path / "x.safetensors", form, net)
    factors, rest = lora.split_deltas(weights.read_lora(net, tmp_path / "x.safetensors"), net)
    assert not rest and {f.scale for f in factors.values()} == {scale}
    lora.attach(net, "a", factors)
    merged = weights.load(
        tmp_path / "base.safetensors",
        torch.float32,
        teacher=teacher,
        teacher_lora=tmp_path / "x.safetensors",
    )
    shape = (2, 16, 1, 6, 8) if "wan" in teacher else (2, 16, 6, 8)
    x, c, t = normal(shape, "x"), {"text": normal((2, 9, 64), "c")}, torch.tensor([0.9, 0.3])
    with torch.no_grad():
        plain, adapted, merged = net(x, t, c), net(x, t, c, adapter="a"), merged(x, t, c)
    assert torch.allclose(adapted, merged, atol=1e-4)
    assert not torch.allclose(adapted, plain, atol=1e-2)


@pytest.mark.parametrize(
    "names,order",
    [
        (("low_noise_model", "high_noise_model"), [1, 0]),
        (("a", "b"), [0, 1]),
        (("model", "HIGH"), [1, 0]),
        (("mineLowNoise", "HighNoise"), [1, 0]),
        (("low_rank_high_noise", "b"), [0, 1]),
        (("FLOW", "slow_motion"), [0, 1]),
    ],
)
def test_loras_are_told_apart_by_whole_words_only(names, order):
    files = [Path(name + ".safetensors") for name in names]
    assert lora.sort_high_low(files) == [files[i] for i in order]


def test_a_lora_may_change_whole_weights_and_biases(tmp_path):
    base, key = save(tmp_path / "base", tiny()), "blocks.0.ffn.0"
    tensors = {f"{key}.diff_b": torch.ones(96), f"{key}.diff": torch.ones(96, 64)}
    save_file(tensors, tmp_path / "lora.safetensors")
    net = weights.load(base, torch.float32, teacher_lora=tmp_path / "lora.safetensors")
    assert torch.equal(net.blocks[0].ffn[0].weight, tiny()[f"{key}.weight"] + 1)
    assert torch.equal(net.blocks[0].ffn[0].bias, tiny()[f"{key}.bias"] + 1)


# -- what can be wrong ---------------------------------------------------------------------------

SHARD = "diffusion_pytorch_model-00002-of-00003.safetensors"


def truncate(folder):
    """Cut the end off a shard."""
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-1000])


def remove_tensor(folder):
    """Remove the first tensor from the first shard."""
    file = folder / SHARD.replace("00002", "00001")
    save_file({k: x for k, x in load_file(file).items() if "patch_embedding.w" not in k}, file)


@pytest.mark.parametrize(
    "damage,expected",
    [
        (truncate, "cannot read"),
        (remove_tensor, "lacks patch_embedding.weight (64, 16, 1, 2, 2)"),
        (lambda folder: (folder / "config.json").write_text("{}"), "expected one of"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line_that_names_it(tmp_path, damage, expected):
    folder = save(tmp_path / "weights", tiny(), files=3)
    weights.load(folder)
    damage(folder)
    with pytest.raises(UserError) as error:
        weights.load(folder)
    line = str(error.value)
    assert expected in line and str(folder) in line and "\n" not in line


def test_a_lora_of_another_network_is_refused(tmp_path):
    """A tensor that fits no layer is not silently skipped."""
    save_file({"blocks.9.ffn.0.diff": torch.ones(96, 64)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="not a LoRA of a layer"):
        weights.load(save(tmp_path / "w", tiny()), teacher_lora=tmp_path / "lora.safetensors")


def test_a_folder_that_is_not_there_says_how_to_get_it(tmp_path):
    hint = "get it: hf download Wan-AI/Wan2.2-T2V-A14B-Diffusers --local-dir"
    with pytest.raises(UserError, match=hint):
        weights.load_teacher("wan22", tmp_path / "nowhere")


def test_the_command_counts_a_whole_download_and_refuses_another(tmp_path, capsys):
    folder = save(tmp_path / "w", tiny(), files=3)
    number = sum(x.numel() for x in tiny().values())
    assert weights.main(["--teacher", "wan21-tiny", "--weights", str(folder)]) == 0
    assert f"{number:,} parameters, {len(tiny())} tensors, 3 files, F32" in capsys.readouterr().out
    line = [sys.executable, "-m", "models.weights", "--teacher", "wan21", "--weights", folder]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout


# -- memory --------------------------------------------------------------------------------------

# VmHWM and not ru_maxrss, which starts from the peak of the parent process
MEASURE = """
import re, sys, torch
from models import weights
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
net = weights.load(sys.argv[1], getattr(torch, sys.argv[2]))
print(peak() - before, sum(p.nbytes for p in net.parameters()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype,fits", [("bfloat16", True), ("float32", False)])
def test_loading_2_gb_takes_the_bf16_network_one_shard_and_little_more(tmp_path, dtype, fits):
    """At most 200 MB more than that. Negative control: kept in float32 it does not fit."""
    sizes = dict(dim=1536, ffn_dim=8960, num_heads=12, num_layers=11)
    net = weights.build(Wan, sizes, torch.float32)
    tensors = {key: torch.ones(p.shape) for key, p in net.named_parameters()}
    folder = save(tmp_path / "w", tensors, files=6)
    (folder / "config.json").write_text(json.dumps(ORIGINAL | sizes | {"text_len": 512}))
    files = [file.stat().st_size for file in folder.glob("*.safetensors")]
    del tensors
    line = [sys.executable, "-c", MEASURE, folder, dtype]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    growth, network = map(int, done.stdout.split())
    bf16 = network if fits else network // 2
    assert sum(files) > 2e9 and (growth < bf16 + max(files) + 200e6) == fits
