"""Claims about loading: published weights arrive whole, in little memory, or not at all."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from students import FORMS, write_lora

from models import lora, weights
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


# -- what is published ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_full_size_networks_have_the_published_parameters(name):
    """Their number; with the published lists beside the repository, both layouts' keys and shapes.

    A renaming that forgets a layer, or one of another layer, has other keys.
    """
    net = empty_network(name)
    ours = {key: tuple(p.shape) for key, p in net.named_parameters()}
    assert (sum(p.numel() for p in net.parameters()), len(ours)) == SIZES[name]
    if not KEYS.is_dir():
        pytest.skip("no lists of published keys beside the repo")
    repository = weights.TEACHERS[name].repository.split("/")[1].removesuffix("-Diffusers").lower()
    listed = json.loads((KEYS / f"{repository}.json").read_text())
    theirs = {key: tuple(shape) for key, (_, shape) in listed["keys"].items()}
    assert {net.diffusers_name(key): shape for key, shape in ours.items()} == theirs
    assert ours == {name or key: theirs[key] for key, (name, _) in listed["keys"].items()}


# -- loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout,files", [("original", 1), ("diffusers", 3)])
def test_both_layouts_give_the_same_network_whole_or_in_shards(tmp_path, layout, files):
    net = weights.load(save(tmp_path, tiny(), layout, files), torch.float32)
    assert is_same(net, tiny()) and not net.training
    assert not any(p.requires_grad for p in net.parameters())


def test_a_single_file_of_comfyui_needs_no_config(tmp_path):
    """In float16, which is converted."""
    net = weights.random_network("wan22-tiny", torch.float32)
    tensors = {key: p.half() for key, p in net.named_parameters()}
    prefixed = {f"model.diffusion_model.{key}": x for key, x in tensors.items()}
    save_file(prefixed, tmp_path / "a.safetensors")
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
        branches, boundary_t = weights.branch_paths("wan22-tiny", *paths)
        nets = [weights.load(path, torch.float32, teacher="wan22-tiny") for path in branches]
        assert boundary_t == 0.875
        assert [is_same(net, tiny(seed)) for seed, net in enumerate(nets)] == [True, True]
    (tmp_path / "model_index.json").write_text('{"boundary_ratio": 0.8}')
    assert weights.branch_paths("wan22-tiny", tmp_path)[1] == 0.8


def test_a_class_that_lacks_a_part_of_the_port_is_named(monkeypatch):
    part = type("Part", (), dict.fromkeys(set(weights.PORT) - {"guide"}))
    spec = weights.TEACHERS["wan21-tiny"]._replace(network=part)
    monkeypatch.setitem(weights.TEACHERS, "wan21-tiny", spec)
    with pytest.raises(TypeError, match="Part: expected guide, as"):
        weights.teacher_spec("wan21-tiny")


# -- LoRA ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "teacher,form", [("qwen-image-tiny", "kohya"), *[("wan22-tiny", form) for form in FORMS]]
)
def test_every_form_of_lora_is_read_with_its_alpha(tmp_path, teacher, form):
    """The factors of each layer, to the bit."""
    net = empty_network(teacher)
    scale = write_lora(tmp_path / "x.safetensors", form, net)
    factors, rest = read_lora(net, tmp_path / "x.safetensors")
    assert not rest and factors.keys() == lora.adapted_layers(net).keys()
    for name, (up, down, found) in factors.items():
        assert found == scale
        assert torch.equal(down, normal(down.shape, 0, name, "down") / 3)
        assert torch.equal(up, normal(up.shape, 0, name, "up") / 3)


def empty_network(teacher="wan22-tiny"):
    """A network on the meta device."""
    return weights.build(*weights.TEACHERS[teacher][:2], torch.float32)


def read_lora(net, path):
    """Factors by layer, and the rest, of a LoRA file."""
    return lora.split_changes(weights.read_loras(net, [(path, 1.0)]), net)


PEFT = {"peft_type": "LORA", "r": 2, "lora_alpha": 16}
BY_TENSOR = {"blocks.0.self_attn.q.alpha": torch.tensor(16.0)}


@pytest.mark.parametrize(
    "tensors,metadata,config,expected",
    [
        ({}, {}, {}, 1),
        (BY_TENSOR, {}, {}, 8),
        ({}, {"lora_alpha": "16", "rank": "2"}, {}, 8),
        ({}, {"networkAlpha": "16.0"}, {}, 8),
        ({}, {}, PEFT | {"r": 4, "rank_pattern": {"q": 2}, "init_lora_weights": True}, 8),
        (BY_TENSOR, {"ss_network_alpha": "Dynamic", "ss_network_dim": "Dynamic"}, PEFT, 8),
        (BY_TENSOR, {"lora_alpha": "2"}, {}, "16 in its tensor, 2 in metadata"),
        (BY_TENSOR, {"lora_alpha": "8"}, PEFT, "the alphas 8.0 and 16.0"),
        ({}, {}, PEFT | {"r": 4}, "rank 4 named beside factors of rank 2"),
        ({}, {"ss_network_alpha": "16"}, {}, "may be in the factors already"),
        ({}, {}, PEFT | {"use_rslora": True}, "userslora True, which is not supported"),
        ({}, {"ss_network_args": json.dumps({"rs_lora": "True"})}, {}, "rslora True"),
        ({}, {}, PEFT | {"init_lora_weights": "pissa_niter_4"}, "initloraweights pissa"),
    ],
)
def test_the_alpha_is_found_wherever_it_stands(
    tmp_path, capsys, tensors, metadata, config, expected
):
    """The scale is printed. Two that differ are refused, as are other rules than alpha / rank."""
    net = empty_network()
    file = tmp_path / "adapter_model.safetensors"
    save_file(some_factors(net, "blocks.0.self_attn.q".__eq__, **tensors), file, metadata)
    if config:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            read_lora(net, file)
        return
    [(_, _, scale)] = read_lora(net, file)[0].values()
    assert scale == expected and f"alpha / rank = {expected}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "names,high,low",
    [
        (("low_noise_model", "high_noise_model"), [1], [0]),
        (("a", "b"), [0], [1]),
        (("WanT2VLow", "myHighLora"), [1], [0]),
        (("wan_LN", "wan_hn_v2"), [1], [0]),
        (("low_rank_high_noise", "b"), [0], [1]),
        (("FLOW", "slow_motion"), [0], [1]),
        (("my_low", "my_low"), [0], [1]),  # one file for both
        (("a_high", "a_low", "b_low", "style"), [0, 3], [1, 2, 3]),
        (("low/model", "high_noise_model/model"), [1], [0]),  # by folder
    ],
)
def test_loras_are_told_apart_by_whole_words_only(names, high, low):
    """Two files are a pair; one that says nothing is for both."""
    files = [lora.LoraFile(Path(name + ".safetensors"), i) for i, name in enumerate(names)]
    found = lora.files_of_branches(files, 2)
    assert [[file.strength for file in part] for part in found] == [high, low]


@pytest.mark.parametrize(
    "names,branches,expected",
    [
        ("a_high a_low", 1, "one transformer, got a_high, a_low"),
        ("a_high a_low a_low", 2, "expected different LoRA files"),
        ("a b c", 2, "may be for high or low noise; say it in their names"),
    ],
)
def test_lora_files_that_could_go_elsewhere_are_refused(names, branches, expected):
    with pytest.raises(UserError, match=expected):
        lora.files_of_branches([lora.LoraFile(Path(name)) for name in names.split()], branches)


def test_links_of_a_cache_have_the_names_of_the_links(tmp_path, capsys):
    """High and low noise go by the link's name, not by the blob's."""
    for noise, blob in (("low", "aaa"), ("high", "bbb")):
        (tmp_path / blob).write_bytes(b"")
        (tmp_path / f"{noise}_noise.safetensors").symlink_to(tmp_path / blob)
    low, high = (tmp_path / f"{noise}_noise.safetensors" for noise in ("low", "high"))
    assert weights.branch_paths("wan22-tiny", low, high)[0] == [high, low]
    assert "swapped" in capsys.readouterr().out
    with pytest.raises(UserError, match="both for low noise"):
        weights.branch_paths("wan22-tiny", low, low)


def some_factors(net, keep=lambda name: True, prefix="", infix="", **others):
    """Tensors of a LoRA of the layers to keep."""
    tensors = {}
    for name, layer in lora.adapted_layers(net).items():
        if keep(name):
            for word, shape in (("A", (2, layer.in_features)), ("B", (layer.out_features, 2))):
                tensors[f"{prefix}{name}.lora_{word}{infix}.weight"] = normal(shape, name, word)
    return tensors | others


@pytest.mark.parametrize(
    "prefix,infix",
    [
        ("model.diffusion_model.", ""),
        ("transformer_2.", ".my_name"),
        ("module._fsdp_wrapped_module.", ""),
        ("generator.model._orig_mod.", ".default"),
    ],
)
def test_what_trainers_put_around_names_is_removed(tmp_path, prefix, infix):
    """From LoRA files and from weights."""
    net = weights.random_network("wan22-tiny")
    save_file(some_factors(net, prefix=prefix, infix=infix), tmp_path / "x.safetensors")
    assert len(weights.read_loras(net, [(tmp_path / "x.safetensors", 1.0)])) == 20
    tensors = {prefix + name: p for name, p in net.named_parameters()}
    save_file(tensors, tmp_path / "w.safetensors")
    infos = weights.index_tensors([tmp_path / "w.safetensors"])
    assert set(infos) == {name for name, _ in net.named_parameters()}


def test_strengths_and_several_files_add_up(tmp_path):
    """0.5 a + 2 b, as factors of rank 4 and as merged weights, of a whole diff, too."""
    net, files = empty_network(), []
    key = "blocks.0.self_attn.q"
    for i, strength in enumerate((0.5, 2.0)):
        tensors = some_factors(net, **{f"{key}.diff_b": torch.ones(128)})
        save_file({name: (i + 1) * x for name, x in tensors.items()}, tmp_path / f"{i}.safetensors")
        files.append(lora.parse_file(f"{tmp_path}/{i}.safetensors:{strength}"))
    a, b = weights.read_loras(net, files[:1]), weights.read_loras(net, files[1:])
    both = weights.read_loras(net, files)
    weight, bias, rows = torch.zeros(128, 128), torch.zeros(128), slice(None)
    change = [lora.merge(weight, x[f"{key}.weight"], rows) for x in (a, b, both)]
    assert torch.allclose(change[0] + change[1], change[2], atol=1e-4)
    assert torch.allclose(16 * change[0], change[1], atol=1e-3)  # 2 / 0.5, and twice both factors
    merged = lora.merge(bias, both[f"{key}.bias"], rows)
    assert torch.equal(merged, torch.full((128,), 0.5 + 2 * 2.0))
    assert len(lora.split_changes(both, net)[0][key].down) == 4


KEY = "blocks.0.self_attn.q"
NOT_LORA = {  # tensors: part of the error
    f"{KEY}.lokr_w1": "a LoKr",
    f"{KEY}.hada_w1_a": "a LoHa",
    f"{KEY}.lora_magnitude_vector.default.weight": "a DoRA",
    f"{KEY}.lora_B.bias": "a LoRA with a bias",
    "vace_blocks.0.self_attn.q.lora_A.weight": r"vace_blocks.* is not known",
    f"{KEY}.lora_mid.weight": "lora_mid.weight is not known",
    f"transformer_2.{KEY}.lora_A.weight": "one LoRA per file",
    f"{KEY}.diff_b": "NaN or infinity",
}


@pytest.mark.parametrize("name", NOT_LORA)
def test_other_kinds_of_adapters_are_named(tmp_path, name):
    net, file = empty_network(), tmp_path / "x.safetensors"
    save_file(some_factors(net, **{name: torch.full((128,), torch.nan)}), file)
    with pytest.raises(UserError, match=NOT_LORA[name]):
        weights.read_loras(net, [(file, 1.0)])


def test_a_lora_without_a_float_for_this_network_is_refused(tmp_path):
    quantised = {f"{KEY}.lora_A.weight": torch.ones(2, 128).char()}
    for tensors, expected in ((quantised, "quantised"), ({}, "contains no LoRA")):
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(UserError, match=expected):
            weights.read_loras(empty_network(), [(tmp_path / "x.safetensors", 1.0)])


def test_the_image_branch_of_wan21_is_left_out(tmp_path, capsys):
    """With one line that says so; the other layers change."""
    net = empty_network("wan22-i2v-tiny")
    image = {
        "blocks.0.cross_attn.k_img.lora_A.weight": torch.ones(2, 128),
        "blocks.1.cross_attn.norm_k_img.diff": torch.ones(128),
        "img_emb.proj.1.diff_b": torch.ones(4),
    }
    save_file(some_factors(net, **image), tmp_path / "x.safetensors")
    for _ in range(2):
        assert len(weights.read_loras(net, [(tmp_path / "x.safetensors", 1.0)])) == 20
    assert capsys.readouterr().out.count("3 tensors of Wan2.1's image branch") == 1


# -- what can be wrong ---------------------------------------------------------------------------

SHARD = "diffusion_pytorch_model-00002-of-00003.safetensors"


def truncate(folder):
    """Cut the end off a shard."""
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-1000])


def remove_tensor(folder):
    """Remove the first tensor from the first shard."""
    file = folder / SHARD.replace("00002", "00001")
    save_file({k: x for k, x in load_file(file).items() if "patch_embedding.w" not in k}, file)


def add_variant(folder):
    """Add a network of another dtype, which has an index of its own."""
    name = "diffusion_pytorch_model{}.safetensors.index.json"
    shutil.copy(folder / name.format(""), folder / name.format(".fp16"))


@pytest.mark.parametrize(
    "damage,expected",
    [
        (truncate, "cannot read"),
        (add_variant, "are two networks; keep one"),
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


@pytest.mark.parametrize(
    "name,content,expected",
    [
        ("a-Q4_K_M.gguf", b"GGUF\3", "quantised .GGUF."),
        ("pytorch_model.bin", b"PK\3\4", "a pickle, which is never opened"),
    ],
)
def test_other_formats_are_named_and_hidden_files_skipped(tmp_path, name, content, expected):
    """As a file, as a LoRA, and alone in a folder."""
    (tmp_path / name).write_bytes(content)
    (tmp_path / "._hidden.safetensors").write_bytes(b"macOS")
    net = empty_network("wan21-tiny")
    for read in (weights.load, lambda file: weights.read_loras(net, [(file, 1.0)])):
        with pytest.raises(UserError, match=expected) as error:
            read(tmp_path / name)
        assert "download it again" not in str(error.value)
    with pytest.raises(UserError, match=expected):
        weights.load(tmp_path)


def test_folders_beside_a_single_file_are_found(tmp_path, monkeypatch):
    """Or those of the default folder; what is missing is named, with a small download."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine" / "wan.safetensors"
    (file.parent / "transformer").mkdir(parents=True)
    file.write_bytes(b"")
    expected = 'mine has no folder vae .* hf download Wan-AI/.* --include "vae/." --local-dir'
    with pytest.raises(UserError, match=expected):
        weights.subfolder("wan22", file, "vae")
    for folder in (weights.default_folder("wan22"), file.parent):
        (folder / "vae").mkdir(parents=True)
        for path in (file, file.parent / "transformer"):  # or the folder of a branch
            assert weights.subfolder("wan22", path, "vae").samefile(folder / "vae")


@pytest.mark.parametrize(
    "teacher,kind,other",
    [
        ("qwen-image-tiny", "QwenImagePipeline", "QwenImageEditPlusPipeline"),
        ("wan21-tiny", "WanPipeline", "WanImageToVideoPipeline"),
        ("wan22-i2v-tiny", "WanImageToVideoPipeline", "WanPipeline"),
    ],
)
def test_another_model_of_the_same_classes_is_refused(tmp_path, teacher, kind, other):
    """By model_index.json. Transformers may be named alone, if it is a fine-tune after all."""
    boundary = weights.TEACHERS[teacher].boundary
    parts = [tmp_path / name for name in weights.PAIRS[1][: 2 if boundary else 1]]
    for part in parts:
        part.mkdir()
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"_class_name": kind}))
    assert weights.branch_paths(teacher, tmp_path)[0] == parts
    index.write_text(json.dumps({"_class_name": other}))
    with pytest.raises(UserError, match=f"{index}: expected {kind}, found {other}; of a fine-tune"):
        weights.branch_paths(teacher, tmp_path)
    assert weights.branch_paths(teacher, *parts)[0] == parts


def test_the_command_counts_a_whole_download_and_refuses_another(tmp_path, capsys):
    folder = save(tmp_path / "w", tiny(), files=3)
    number = sum(x.numel() for x in tiny().values())
    assert weights.main(["--teacher", "wan21-tiny", "--weights", str(folder)]) == 0
    assert f"{number:,} parameters, {len(tiny())} tensors, 3 files, F32" in capsys.readouterr().out
    assert weights.main(["--teacher", "wan21", "--weights", str(folder)]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and not printed.out


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
def test_loading_2_gb_takes_the_bf16_network_and_little_more(tmp_path, dtype, fits):
    """At most 300 MB, tensors of 55 MB. Negative control: kept in float32 it does not fit."""
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
    assert sum(files) > 2e9 and (growth < bf16 + 300e6) == fits
