"""Claims about the transformers: they compute what the published implementations compute.

Compared with stored outputs of the official code, where the folder beside the repository has
them, and with diffusers, where it is installed. Negative controls: each mistake that a port
usually makes is made on purpose, and is caught.
"""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from students import error_of
from torch import Tensor, nn

from models import layers, lora, qwen_image, wan, weights
from models.common import normal
from models.qwen_image import QwenImage, pack
from models.wan import Wan

PARITY = Path(__file__).parents[2] / "shared" / "parity"
references = pytest.mark.skipif(not PARITY.is_dir(), reason=f"no stored outputs in {PARITY}")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # relative L2 that rounding may cost
CPU = torch.device("cpu")


def assert_close(a: Tensor, b: Tensor, tolerance: float = TOLERANCE[torch.float32]) -> None:
    assert error_of(a, b) < tolerance


def assert_far(a: Tensor, b: Tensor, distance: float = 2 * TOLERANCE[torch.float32]) -> None:
    assert error_of(a, b) > distance


# -- stored outputs of the official code ---------------------------------------------------------


def wan_reference(layout: str = "original", dtype: torch.dtype = torch.float32):
    """The network, its inputs, and the stored tensors by name."""
    net = weights.load(PARITY / "wan_t2v" / layout, dtype)
    net.text_len = 16  # diffusers' config does not say it; it is 512 in all published networks
    io = load_file(PARITY / "wan_t2v" / "io.safetensors")
    c = {"text": io["in.encoder_hidden_states_padded"]}
    return net, (io["in.latents"], io["in.timestep"].double() / 1000, c), io


def qwen_reference(dtype: torch.dtype = torch.float32, round_t: bool = False):
    net = weights.load(PARITY / "qwen_image" / "diffusers", dtype)
    assert net.round_t == (dtype == torch.bfloat16)  # the default
    net.round_t = round_t
    io = load_file(PARITY / "qwen_image" / "io.safetensors")
    inputs = io["in.latents"], io["in.timestep"].double(), {"text": io["in.encoder_hidden_states"]}
    return net, inputs, io


@references
@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 5e-3)])
def test_wan_computes_what_the_official_code_computes(layout, dtype, tolerance):
    """In bf16 with a float32 residual stream. Control: with a bf16 stream the error is larger."""
    net, inputs, io = wan_reference(layout, dtype)
    v, truth = net(*inputs), io["out.fp32.official"]
    assert v.dtype == torch.float32
    assert_close(v, truth, tolerance)
    if dtype == torch.bfloat16:
        for block in net.blocks:
            block.register_forward_hook(lambda module, args, z: z.bfloat16().float())
        assert error_of(net(*inputs), truth) > 1.1 * error_of(v, truth)  # 4.1e-3 and 3.5e-3


@references
def test_qwen_image_computes_what_diffusers_computes():
    """In bf16 with times rounded as in the published pipeline. Control: the other times."""
    net, inputs, io = qwen_reference()
    assert_close(pack(net(*inputs)), io["out.fp32"])
    for round_t, key in enumerate(("out.bf16_sigma_fp32", "out.bf16")):
        net, inputs, _ = qwen_reference(torch.bfloat16, bool(round_t))
        assert_close(pack(net(*inputs)), io[key], TOLERANCE[torch.bfloat16])
        net.round_t = not round_t
        assert_far(pack(net(*inputs)), io[key], 0.1)


@references
@pytest.mark.parametrize("reference", [wan_reference, qwen_reference])
def test_gradients_are_those_of_the_official_code(reference):
    """Of some parameters and of the inputs."""
    net, (x, t, c), io = reference()
    for tensor in (*net.parameters(), x, c["text"]):
        tensor.requires_grad_(True)
    as_stored = pack if reference is qwen_reference else lambda v: v
    (as_stored(net(x, t, c)) * io["in.probe"]).sum().backward()
    grads = {net.diffusers_name(name): p.grad for name, p in net.named_parameters()}
    grads |= {"hidden_states": as_stored(x.grad), "encoder_hidden_states": c["text"].grad}
    expected = {k.removeprefix("grad."): v for k, v in io.items() if k.startswith("grad.")}
    assert len(expected) == 9
    for name, grad in expected.items():
        assert_close(grads[name], grad, 1e-4)


@references
def test_rope_sinusoid_and_norms_are_those_of_the_official_code():
    """Head dimension 128; norms of inputs so small that eps matters (control: another eps)."""
    io = load_file(PARITY / "unit_wan_rope.safetensors")
    table = Wan(256, 8, 2, 0).rope(*io["grid"].tolist(), CPU)
    assert_close(layers.rotate(io["in.q"], table), io["out.q_rot"], 1e-6)
    io = load_file(PARITY / "unit_qwen_rope.safetensors")
    table = QwenImage(2, 128, 0).rope(9, 5, 7, CPU)
    assert_close(layers.rotate(io["in.q_img"], table[9:]), io["out.q_img_rot"], 1e-6)
    assert_close(table[:9, :, 0], io["angle.txt"].cos(), 1e-5)
    io = load_file(PARITY / "unit_time_embed.safetensors")
    waves = layers.sinusoid(io["t"].double() / 1000, 256)
    assert (waves - io["wan.official_f64"]).abs().max() < 1e-6
    waves = layers.sinusoid(qwen_image.round_time(io["qwen.sigma"]), 256)
    assert (waves - io["qwen.from_bf16_sigma"]).abs().max() < 1e-4
    io = load_file(PARITY / "unit_norms.safetensors")
    norm = nn.RMSNorm(64, eps=1e-6)
    norm.weight.data = io["w"]
    assert_close(layers.rms(io["in.x_small"], norm), io["rms.fp32_small"], 1e-6)
    norm.eps = 1e-5
    assert_far(layers.rms(io["in.x_small"], norm), io["rms.fp32_small"], 1e-3)


# -- negative controls: mistakes made on purpose -------------------------------------------------


def rotate_halves(x, rope):
    """Pairs (i, i + d / 2) instead of (2i, 2i + 1)."""
    y = torch.view_as_complex(torch.stack(x.chunk(2, -1), -1))
    y = y * torch.view_as_complex(rope)[:, None]
    return torch.cat([y.real, y.imag], -1)


sinusoid_of = lambda change_time: lambda t, dim: layers.sinusoid(change_time(t), dim)
round_to_bf16 = lambda t: (1000 * t).bfloat16().double() / 1000
sine_first = lambda t, dim: layers.sinusoid(t, dim).roll(dim // 2, -1)
swapped_modulate = lambda z, shift, scale, eps: layers.modulate(z, scale, shift, eps)
MISTAKES = {
    "wan: q and k not normalized": (wan, "rms", lambda x, norm: x),
    "wan: no rope": (wan, "rotate", lambda x, rope: x),
    "wan: time rounded to bf16": (wan, "sinusoid", sinusoid_of(round_to_bf16)),
    "wan: time not scaled by 1000": (wan, "sinusoid", sinusoid_of(lambda t: t / 1000)),
    "wan: text not padded": (wan.F, "pad", lambda x, sides: x),
    "qwen: time rounded": (qwen_image, "sinusoid", sinusoid_of(qwen_image.round_time)),
}
for name, module in (("wan", wan), ("qwen", qwen_image)):
    MISTAKES |= {
        f"{name}: rope of half-split pairs": (module, "rotate", rotate_halves),
        f"{name}: sine before cosine": (module, "sinusoid", sine_first),
        f"{name}: scale and shift swapped": (module, "modulate", swapped_modulate),
        f"{name}: gelu without its approximation": (module, "gelu", F.gelu),
    }


def largest_error(net: nn.Module, x: Tensor, t: Tensor, c: dict, io: dict) -> float:
    """Largest error of a sample. For Wan: a short text at t = 1, a full one at t = 0.625."""
    if isinstance(net, QwenImage):
        return error_of(pack(net(x, t, c)), io["out.fp32"])
    return max(
        error_of(net(x[i : i + 1], t[i : i + 1], {"text": io[f"in.context.{i}"][None]}), v[None])
        for i, v in enumerate(io["out.fp32.official"])
    )


@references
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_usual_mistake_is_caught(mistake, monkeypatch):
    net, inputs, io = wan_reference() if mistake.startswith("wan") else qwen_reference()
    assert largest_error(net, *inputs, io) < TOLERANCE[torch.float32]
    monkeypatch.setattr(*MISTAKES[mistake])
    assert largest_error(net, *inputs, io) > 2 * TOLERANCE[torch.float32]


# -- without references --------------------------------------------------------------------------


def random_inputs(net: nn.Module) -> tuple[Tensor, Tensor, dict]:
    """x_t, t and c of a tiny network, batch 2."""
    t = torch.tensor([0.3, 0.9])
    if isinstance(net, QwenImage):
        return normal((2, 16, 4, 6), "x"), t, {"text": normal((2, 5, net.txt_in.in_features), "c")}
    c = {"text": normal((2, 5, net.text_embedding[0].in_features), "c")}
    if net.patch_embedding.in_channels == 36:
        c["image"] = normal((2, 20, 2, 4, 6), "image")
    return normal((2, net.head.head.out_features // 4, 2, 4, 6), "x"), t, c


def with_adapters(name: str, checkpointing: bool) -> nn.Module:
    """A tiny network with adapters student and fake that are far from zero."""
    net = weights.random_network(name, torch.float32).requires_grad_(True)
    for adapter in ("student", "fake"):
        for key, p in lora.start_adapter(net, adapter, (1,), rank=4).items():
            p.data = normal(p.shape, adapter, key) / 5
    net.checkpointing = checkpointing
    return net


@pytest.mark.parametrize(
    "name,adapter",
    [("wan21-tiny", None), ("wan22-i2v-tiny", "student"), ("qwen-image-tiny", "student")],
)
def test_checkpointing_recomputes_the_role_that_was_passed(name, adapter):
    """The gradients are the same bits, although other roles are called before backward."""
    stored, recomputed = {}, {}
    for grads, checkpointing in ((stored, False), (recomputed, True)):
        net = with_adapters(name, checkpointing)
        x, t, c = random_inputs(net)
        v = net(x, t, c, adapter)
        net(x, t, c, "fake"), net(x, t, c)
        v.square().mean().backward()
        grads |= {key: p.grad for key, p in net.named_parameters() if p.grad is not None}
    assert set(stored) == set(recomputed)
    assert all(torch.equal(grad, recomputed[key]) for key, grad in stored.items())
    adapted = {key.split(".adapters.")[1].split(".")[0] for key in stored if ".adapters." in key}
    assert adapted == ({adapter} if adapter else set())


def test_an_adapter_kept_as_an_attribute_would_give_wrong_gradients(monkeypatch):
    """Negative control: checkpointing recomputes with the role that was called last."""
    role, forward = None, lora.Linear.forward
    from_attribute = lambda self, x, adapter=None: forward(self, x, role if self.adapters else None)
    monkeypatch.setattr(lora.Linear, "forward", from_attribute)
    grads = []
    for checkpointing in (False, True):
        net = with_adapters("wan21-tiny", checkpointing)
        x, t, c = random_inputs(net)
        role = "student"
        v = net(x.requires_grad_(True), t, c)
        role = "fake"
        v.square().mean().backward()
        grads.append(x.grad)
    assert_far(*grads, 1e-2)


@pytest.mark.parametrize("name,layers_per_block", [("wan21-tiny", 10), ("qwen-image-tiny", 12)])
def test_an_adapter_is_on_the_published_layers_and_starts_as_zero(name, layers_per_block):
    net = weights.random_network(name, torch.float32)
    inputs = random_inputs(net)
    before = net(*inputs)
    parameters = lora.start_adapter(net, "student", (1,), rank=4)
    assert len(lora.adapted_layers(net)) == 2 * layers_per_block  # two blocks
    assert torch.equal(net(*inputs, "student"), before)
    next(p for key, p in parameters.items() if key.endswith(".up")).data += 1
    assert torch.equal(net(*inputs), before) and not torch.equal(net(*inputs, "student"), before)
    with pytest.raises(KeyError):  # a misspelled role is not the teacher
        net(*inputs, "studnet")


# -- diffusers, with tiny random networks --------------------------------------------------------


def make_pair(folder: Path, name: str, **settings) -> tuple:
    """A tiny network of diffusers, and ours, loaded from the shards that it saves.

    Its random parameters are large, so that no zero hides a mistake.
    """
    diffusers = pytest.importorskip("diffusers", reason="needs models/requirements.txt")
    theirs = getattr(diffusers, name)(
        num_attention_heads=2, attention_head_dim=32, num_layers=2, **settings
    ).eval()
    for key, p in theirs.named_parameters():
        std = 0.3 if p.ndim == 1 else 1.5 / math.sqrt(p[0].numel())
        p.data = normal(p.shape, folder.name, key) * std + (p.ndim == 1)
    theirs.save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return theirs, weights.load(folder, torch.float32)


@pytest.mark.parametrize(
    "channels,size,per_token",
    [
        ((16, 16), (3, 6, 10), False),
        ((36, 16), (3, 4, 6), False),  # with a first frame
        ((48, 48), (3, 4, 6), True),  # the first latent frame is clean: t = 0 for its tokens
    ],
)
def test_wan_agrees_with_diffusers(tmp_path, channels, size, per_token):
    """Batch 3. Control: the times in another order."""
    settings = dict(zip(("in_channels", "out_channels"), channels), text_dim=48, ffn_dim=160)
    theirs, ours = make_pair(tmp_path, "WanTransformer3DModel", **settings)
    x, image = normal((3, channels[0], *size), "x").tensor_split(channels[1:], 1)
    c = {"text": normal((3, 512, 48), "text")} | ({"image": image} if image.numel() else {})
    t = torch.tensor([1.0, 0.83333, 0.0123])
    if per_token:
        t = t[:, None].repeat(1, 18)
        t[:, :6] = 0
    v = theirs(torch.cat([x, image], 1), 1000 * t, c["text"], return_dict=False)[0]
    assert_close(ours(x, t, c), v)
    assert_far(ours(x, t.flip(0), c), v, 1e-2)


@pytest.mark.parametrize("rows,columns,masked", [(5, 7, False), (4, 6, True)])
def test_qwen_image_agrees_with_diffusers(tmp_path, rows, columns, masked):
    """Control: without the mask."""
    settings = dict(joint_attention_dim=48, axes_dims_rope=(8, 12, 12))
    theirs, ours = make_pair(tmp_path, "QwenImageTransformer2DModel", **settings)
    x, text = normal((2, 16, 2 * rows, 2 * columns), "x"), normal((2, 9, 48), "text")
    t, grid = torch.tensor([0.9, 0.5]), [[(1, rows, columns)]] * 2
    mask = torch.arange(9)[None] < torch.tensor([[9], [4]]) if masked else None
    v = theirs(pack(x), text, mask, t, grid, return_dict=False)[0]
    assert_close(pack(ours(x, t, {"text": text, "mask": mask})), v)
    if masked:
        assert_far(pack(ours(x, t, {"text": text})), v, 1e-3)
