"""Claims about the transformers: they compute what the published implementations compute.

Held to stored reference outputs, where the folder beside the repository has them, and to diffusers
with tiny networks of our own, where the extras are installed. Each mistake that a port usually
makes is made on purpose, and seen to be caught.
"""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file

import moe
from models import layers, lora, qwen_image, wan, weights
from models.qwen_image import QwenImage, pack
from models.wan import Wan
from phases import step_times
from sample import trajectory

PARITY = Path(__file__).parents[2] / "shared" / "parity"
references = pytest.mark.skipif(not PARITY.is_dir(), reason="no stored references beside the repo")
ROUND_32, ROUND_16 = 2e-5, 2e-2  # relative L2 that rounding may cost


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# -- stored references ---------------------------------------------------------------------------


def wan_reference(layout="original", dtype=torch.float32):
    """Network, inputs by name, and what the official code computes in float32."""
    net = weights.load(PARITY / "wan_t2v" / layout, dtype)
    net.text_len = 16  # the config of diffusers does not say: 512 for all that is published
    io = load_file(PARITY / "wan_t2v" / "io.safetensors")
    c = {"text": io["in.encoder_hidden_states_padded"]}
    inputs = io["in.latents"], io["in.timestep"].double() / 1000, c
    return net, inputs, io


def qwen_reference(dtype=torch.float32, round_t=None):
    net = weights.load(PARITY / "qwen_image" / "diffusers", dtype)
    net.round_t = net.round_t if round_t is None else round_t
    io = load_file(PARITY / "qwen_image" / "io.safetensors")
    inputs = io["in.latents"], io["in.timestep"].double(), {"text": io["in.encoder_hidden_states"]}
    return net, inputs, io


@references
@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wan_computes_what_the_official_code_computes(layout, dtype):
    net, inputs, io = wan_reference(layout, dtype)
    v = net(*inputs)
    bound = ROUND_32 if dtype == torch.float32 else ROUND_16 / 4  # residual in float32: 3.5e-3
    assert v.dtype == torch.float32 and v.shape == inputs[0].shape
    assert error(v, io["out.fp32.official"]) < bound


@references
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_wan_has_the_gradients_of_the_official_code(layout):
    net, (x, t, c), io = wan_reference(layout)
    net.requires_grad_(True)
    x.requires_grad_(True)
    (net(x, t, c) * io["in.probe"]).sum().backward()
    ours = {wan.diffusers_name(name): p.grad for name, p in net.named_parameters()}
    ours["hidden_states"] = x.grad
    wanted = {k.removeprefix("grad."): v for k, v in io.items() if k.startswith("grad.")}
    assert len(wanted) == 9
    assert {name: error(ours[name], g) for name, g in wanted.items()} == {
        name: pytest.approx(0, abs=1e-4) for name in wanted
    }


@references
def test_the_short_texts_of_a_batch_are_padded_to_the_full_length():
    """Given without padding, they give the same; a batch of one too."""
    net, (x, t, _), io = wan_reference()
    v = net(x[:1], t[:1], {"text": io["in.context.0"][None]})
    assert io["in.context.0"].shape[0] < net.text_len
    assert error(v, io["out.fp32.official"][:1]) < ROUND_32


@references
def test_qwen_image_computes_what_diffusers_computed():
    net, inputs, io = qwen_reference()
    assert not net.round_t and error(pack(net(*inputs)), io["out.fp32"]) < ROUND_32


@references
@pytest.mark.parametrize("round_t,key", [(True, "out.bf16"), (False, "out.bf16_sigma_fp32")])
def test_qwen_image_in_bf16_rounds_times_as_published_and_only_if_asked(round_t, key):
    net, inputs, io = qwen_reference(torch.bfloat16, round_t)
    other = {"out.bf16": "out.bf16_sigma_fp32"}.get(key, "out.bf16")
    assert error(pack(net(*inputs)), io[key]) < ROUND_16
    assert error(pack(net(*inputs)), io[other]) > 0.1


@references
def test_qwen_image_rounds_times_in_bf16_by_default():
    assert qwen_reference(torch.bfloat16)[0].round_t


@references
def test_qwen_image_has_the_gradients_of_diffusers():
    net, (x, t, c), io = qwen_reference()
    net.requires_grad_(True)
    x.requires_grad_(True)
    c["text"].requires_grad_(True)
    (pack(net(x, t, c)) * io["in.probe"]).sum().backward()
    ours = {name: p.grad for name, p in net.named_parameters()}
    ours |= {"hidden_states": pack(x.grad), "encoder_hidden_states": c["text"].grad}
    wanted = {k.removeprefix("grad."): v for k, v in io.items() if k.startswith("grad.")}
    assert len(wanted) == 9
    assert max(error(ours[name], g) for name, g in wanted.items()) < 1e-4


@references
def test_tables_and_norms_are_those_of_the_references():
    """Rope at head dimension 128, the sinusoid, the norms on inputs so small that eps shows."""
    io = load_file(PARITY / "unit_wan_rope.safetensors")
    net = Wan(256, 8, 2, 0)
    table = net.rope(*io["grid"].tolist(), torch.device("cpu"))
    assert error(layers.rotate(io["in.q"], table), io["out.q_rot"]) < 1e-6
    io = load_file(PARITY / "unit_qwen_rope.safetensors")
    table = QwenImage(2, 128, 0).rope(9, 5, 7, torch.device("cpu"))
    assert error(layers.rotate(io["in.q_img"], table[9:]), io["out.q_img_rot"]) < 1e-6
    assert error(table[:9].angle().cos(), io["angle.txt"].cos()) < 1e-5
    io = load_file(PARITY / "unit_time_embed.safetensors")
    assert (
        layers.sinusoid(io["t"].double() / 1000, 256) - io["wan.official_f64"]
    ).abs().max() < 1e-6
    waves = layers.sinusoid(qwen_image.rounded(io["qwen.sigma"]), 256)
    assert (waves - io["qwen.from_bf16_sigma"]).abs().max() < 1e-4
    io = load_file(PARITY / "unit_norms.safetensors")
    norm = torch.nn.RMSNorm(64, eps=1e-6)
    norm.weight.data = io["w"]
    assert error(layers.rms(io["in.x_small"], norm), io["rms.fp32_small"]) < 1e-6
    norm.eps = 1e-5  # negative control
    assert error(layers.rms(io["in.x_small"], norm), io["rms.fp32_small"]) > 1e-3


# -- mistakes, made on purpose -------------------------------------------------------------------


def per_head(x, norm):
    """Wan's norms by head."""
    heads = x.unflatten(-1, (-1, 32))
    return (heads * (heads.square().mean(-1, keepdim=True) + norm.eps).rsqrt()).flatten(
        -2
    ) * norm.weight


def half_split(x, rope):
    """Pairs (i, i + d / 2) in place of (2i, 2i + 1)."""
    y = torch.view_as_complex(torch.stack(x.chunk(2, -1), -1)) * rope[:, None]
    return torch.cat([y.real, y.imag], -1)


def other_axes(self, frames, rows, columns, device):
    """Every axis as long as the others."""
    positions = tuple(tuple(range(n)) for n in (frames, rows, columns))
    return layers.rope_table(positions, (8, 12, 12), device)


def from_one(self, frames, rows, columns, device):
    """Positions from 1 on the second axis, doubled."""
    positions = tuple(range(frames)), tuple(range(0, 2 * rows, 2)), tuple(range(columns))
    return layers.rope_table(positions, (12, 10, 10), device)


def sine_first(t, dim):
    return torch.roll(layers.sinusoid(t, dim), dim // 2, -1)


def times_in_bf16(t, dim):
    return layers.sinusoid((1000 * t).bfloat16().double() / 1000, dim)


def channel_first(x, pattern, **sizes):
    return rearrange(x, pattern.replace("(p q r c)", "(c p q r)"), **sizes)


def swapped_modulate(z, shift, scale, eps):
    return layers.modulate(z, scale, shift, eps)


def corner(self, length, rows, columns, device):
    """Qwen's image positions from 0."""
    grid = layers.rope_table(((0,), tuple(range(rows)), tuple(range(columns))), self.axes, device)
    places = (tuple(range(max(rows // 2, columns // 2), max(rows // 2, columns // 2) + length)),)
    text = torch.cat([layers.rope_table(places, (d,), device) for d in self.axes], 1)
    return torch.cat([text, grid])


WAN_MISTAKES = {
    "q and k normed by head": (wan, "rms", per_head),
    "no norm of q and k": (wan, "rms", lambda x, norm: x),
    "rope of half-split pairs": (wan, "rotate", half_split),
    "no rope": (wan, "rotate", lambda x, rope: x),
    "rope axes of other lengths": (Wan, "rope", other_axes),
    "rope positions doubled": (Wan, "rope", from_one),
    "sine before cosine": (wan, "sinusoid", sine_first),
    "times rounded to bf16": (wan, "sinusoid", times_in_bf16),
    "times not scaled by 1000": (wan, "sinusoid", lambda t, d: layers.sinusoid(t / 1000, d)),
    "channels first on the way out": (wan, "rearrange", channel_first),
    "gelu by erf": (wan, "gelu", F.gelu),
    "scale and shift swapped": (wan, "modulate", swapped_modulate),
    "text not padded": (wan.F, "pad", lambda x, sides: x),
}
QWEN_MISTAKES = {
    "norms over all channels": (qwen_image, "rms", lambda x, n: F.rms_norm(x.flatten(2), (x.flatten(2).shape[-1],)).view(x.shape) * n.weight),
    "rope of half-split pairs": (qwen_image, "rotate", half_split),
    "rope from the corner": (QwenImage, "rope", corner),
    "times rounded": (qwen_image, "sinusoid", lambda t, d: layers.sinusoid(qwen_image.rounded(t), d)),
    "sine before cosine": (qwen_image, "sinusoid", sine_first),
    "shift before scale at the end": (qwen_image, "modulate", swapped_modulate),
    "gelu by erf": (qwen_image, "gelu", F.gelu),
}  # fmt: skip


@references
@pytest.mark.parametrize("mistake", WAN_MISTAKES)
def test_a_usual_mistake_in_wan_is_caught(mistake, monkeypatch):
    net, (x, t, _), io = wan_reference()
    where, name, wrong = WAN_MISTAKES[mistake]
    monkeypatch.setattr(where, name, wrong)
    wrong = [
        error(net(x[i : i + 1], t[i : i + 1], {"text": io[f"in.context.{i}"][None]}), truth[None])
        for i, truth in enumerate(io["out.fp32.official"])
    ]  # a short text and t = 1, a full one and t = 0.625
    assert max(wrong) > 2 * ROUND_32


@references
@pytest.mark.parametrize("mistake", QWEN_MISTAKES)
def test_a_usual_mistake_in_qwen_image_is_caught(mistake, monkeypatch):
    net, inputs, io = qwen_reference()
    where, name, wrong = QWEN_MISTAKES[mistake]
    monkeypatch.setattr(where, name, wrong)
    assert error(pack(net(*inputs)), io["out.fp32"]) > 2 * ROUND_32


@references
def test_the_head_must_have_the_embedding_and_not_its_silu():
    net, inputs, io = wan_reference()
    forward = net.head.forward
    net.head.forward = lambda z, e: forward(z, F.silu(e))
    assert error(net(*inputs), io["out.fp32.official"]) > 2 * ROUND_32


@references
def test_a_bf16_residual_stream_in_wan_would_be_seen():
    """The bound on bf16 tells diffusers' recipe, 6e-3, from ours, 3.5e-3."""
    net, inputs, io = wan_reference("original", torch.bfloat16)
    for block in net.blocks:
        block.register_forward_hook(lambda module, args, z: z.bfloat16().float())
    assert error(net(*inputs), io["out.fp32.official"]) > 4e-3


# -- what needs no reference ---------------------------------------------------------------------


def inputs_for(net, size=(2, 4, 6), texts=5):
    """x_t, t and c for a tiny network, batch 2."""
    g = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, generator=g)
    t = torch.tensor([0.3, 0.9])
    if isinstance(net, QwenImage):
        text = normal(2, texts, net.txt_in.in_features)
        return normal(2, 16, *size[1:]), t, {"text": text}
    c = {"text": normal(2, texts, net.text_embedding[0].in_features)}
    if net.patch_embedding.in_channels == 36:
        c["image"] = normal(2, 20, *size)
    return normal(2, net.head.head.out_features // 4, *size), t, c


TINY = ["wan21-tiny", "wan22-tiny", "wan22-i2v-tiny", "qwen-image-tiny"]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_network_takes_and_gives_float32_of_one_shape(name, dtype):
    net = weights.random(name, dtype)
    x, t, c = inputs_for(net)
    v = net(x, t, c)
    assert v.shape == x.shape and v.dtype == torch.float32 and v.isfinite().all()
    wide = weights.random(name, torch.float32)
    wide.load_state_dict(net.state_dict())
    wide.round_t = getattr(net, "round_t", False)
    assert error(v, wide(x, t, c)) < ROUND_16


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("adapter", [None, "student"])
def test_checkpointing_changes_no_gradient(name, adapter):
    """Also with other roles called between forward and backward: a role is an argument."""
    grads = []
    for checkpointing in (False, True):
        net = weights.random(name, torch.float32)
        for role in ("student", "fake"):
            lora.start_adapter(net, role, (1,), rank=4)
        g = torch.Generator().manual_seed(2)
        for p in net.parameters():
            p.requires_grad_(True)
            if not p.any():
                p.data.normal_(std=0.1, generator=g)  # adapters' zeros
        for key, p in net.named_parameters():
            if key.endswith((".down", ".up")):
                p.data = torch.randn(p.shape, generator=g) / 10
        net.checkpointing = checkpointing
        x, t, c = inputs_for(net)
        v = net(x, t, c, adapter)
        net(x, t, c, "fake")
        net(x, t, c)
        v.square().mean().backward()
        grads.append({key: p.grad for key, p in net.named_parameters()})
    plain, again = grads
    assert all((p is None) == (again[key] is None) for key, p in plain.items())
    assert all(torch.equal(p, again[key]) for key, p in plain.items() if p is not None)
    adapted = [key for key, p in plain.items() if ".adapters." in key and p is not None and p.any()]
    assert all(".adapters.student." in key for key in adapted) and bool(adapted) == bool(adapter)


def test_a_role_kept_as_an_attribute_would_give_wrong_gradients(monkeypatch):
    """Negative control of the test above: checkpointing recomputes with the role called last."""
    now = []
    forward = lora.Linear.forward

    def from_attribute(self, x, adapter=None):
        return forward(self, x, now[-1] if len(self.adapters) else None)

    monkeypatch.setattr(lora.Linear, "forward", from_attribute)
    norms = []
    for checkpointing in (False, True):
        net = weights.random("wan21-tiny", torch.float32)
        for role in ("student", "fake"):
            lora.start_adapter(net, role, (1,), rank=4)
        g = torch.Generator().manual_seed(2)
        for key, p in net.named_parameters():
            if key.endswith((".down", ".up")):
                p.data = torch.randn(p.shape, generator=g)
        net.checkpointing = checkpointing
        x, t, c = inputs_for(net)
        x.requires_grad_(True)
        now.append("student")
        v = net(x, t, c)
        now.append("fake")
        net(x, t, c)
        v.square().mean().backward()
        norms.append(x.grad.norm().item())
    assert abs(norms[0] / norms[1] - 1) > 1e-2


@pytest.mark.parametrize("name,number", [("wan21-tiny", 10), ("qwen-image-tiny", 12)])
def test_an_adapter_sits_on_the_published_layers_and_starts_as_nothing(name, number):
    net = weights.random(name, torch.float32)
    x, t, c = inputs_for(net)
    before = net(x, t, c)
    lora.start_adapter(net, "student", (1,), rank=4)
    held = [key for key, module in net.named_modules() if isinstance(module, lora.Adapter)]
    assert len(held) == 2 * number  # of two blocks
    assert torch.equal(net(x, t, c, "student"), before)
    next(iter(m for m in net.modules() if isinstance(m, lora.Adapter))).up.data += 1
    assert not torch.equal(net(x, t, c, "student"), before)
    assert torch.equal(net(x, t, c), before)


def test_padding_that_the_mask_hides_changes_nothing_in_qwen_image():
    net = weights.random("qwen-image-tiny", torch.float32)
    x, t, c = inputs_for(net)
    padded = F.pad(c["text"], (0, 0, 0, 3), value=7.0)
    mask = torch.arange(8)[None] < torch.tensor([[5], [5]])
    v = net(x, t, {"text": padded, "mask": mask})
    assert error(v, net(x, t, c)) < ROUND_32
    assert error(v, net(x, t, {"text": padded})) > 1e-3
    assert torch.equal(net(x, t, c | {"mask": None}), net(x, t, c))


def test_modulation_by_token_equals_modulation_by_sample_where_times_agree():
    net = weights.random("wan21-tiny", torch.float32)
    x, t, c = inputs_for(net)
    assert error(net(x, t[:, None].expand(2, 12), c), net(x, t, c)) < 1e-6


def test_fast_rms_and_gelu_are_the_slow_ones():
    """Values and gradients, against float64."""
    x = torch.randn(3, 70, 2, 32, requires_grad=True)
    norm = torch.nn.RMSNorm(32, eps=1e-6)
    norm.weight.data = torch.rand(32) + 0.5
    grad = torch.randn_like(x)
    for ours, slow in [
        (layers.gelu(x), F.gelu(x.double(), approximate="tanh")),
        (layers.rms(x, norm), F.rms_norm(x.double(), (32,), norm.weight.double(), 1e-6)),
    ]:
        assert error(ours, slow) < 1e-6
        parameters = [x] if ours.grad_fn.name().startswith("Gelu") else [x, norm.weight]
        a = torch.autograd.grad(ours, parameters, grad)
        b = torch.autograd.grad(slow, parameters, grad.double())
        assert max(error(p, q) for p, q in zip(a, b)) < 1e-6


@pytest.mark.parametrize("name,length", [("wan21-tiny", 17), ("qwen-image-tiny", 1025)])
def test_a_text_that_is_too_long_is_refused_and_not_cut(name, length):
    net = weights.random(name, torch.float32)
    x, t, c = inputs_for(net, texts=length)
    with pytest.raises(ValueError, match=f"a text of {length} tokens"):
        net(x, t, c)


def test_a_mistyped_role_is_an_error_and_not_the_teacher():
    net = weights.random("wan21-tiny", torch.float32)
    lora.start_adapter(net, "student", (1,), rank=4)
    with pytest.raises(KeyError):
        net(*inputs_for(net), "studnet")


def test_the_expert_at_the_boundary_itself_is_the_high_one():
    high, low = (lambda x, t, c, value=value: torch.full_like(x, value) for value in (1.0, 2.0))
    t = torch.tensor([0.9, 0.875, 0.874])
    v = moe.by_time(high, low, 0.875)(torch.zeros(3, 1), t)
    assert v[:, 0].tolist() == [1, 1, 2]


def test_guidance_rescales_each_token_of_qwen_image_and_nothing_of_wan():
    v, null = torch.randn(2, 16, 4, 6), torch.randn(2, 16, 4, 6)
    guided = qwen_image.guide(v, null, 4.0)
    assert torch.allclose(pack(guided).norm(dim=-1), pack(v).norm(dim=-1), rtol=1e-5)
    straight = pack(null + 4 * (v - null))
    assert torch.allclose(
        F.normalize(pack(guided), dim=-1), F.normalize(straight, dim=-1), atol=1e-6
    )
    assert torch.allclose(wan.guide(v, null, 4.0), null + 4 * (v - null))


# -- diffusers, with tiny networks of our own ----------------------------------------------------


def stir(model):
    """Random parameters, larger than any initialisation: no zero hides a mistake."""
    g = torch.Generator().manual_seed(3)
    for p in model.parameters():
        spread = 0.3 if p.ndim == 1 else 1.5 / math.sqrt(p[0].numel())
        p.data = torch.randn(p.shape, generator=g) * spread + (p.ndim == 1)
    return model.eval()


def diffusers_wan(tmp_path, text_dim=48, shard="200KB", **sizes):
    """A tiny WanTransformer3DModel and ours, loaded from its sharded folder."""
    diffusers = pytest.importorskip("diffusers", reason="needs requirements-full.txt")
    sizes = dict(in_channels=16, out_channels=16) | sizes
    theirs = stir(
        diffusers.WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=32, text_dim=text_dim, ffn_dim=160,
            num_layers=2, **sizes,
        )
    )  # fmt: skip
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    return theirs, weights.load(tmp_path, torch.float32)


@pytest.mark.parametrize("size", [(1, 2, 2), (3, 6, 10), (2, 14, 4)])
def test_wan_t2v_agrees_with_diffusers(tmp_path, size):
    """Batch 3, odd numbers of tokens."""
    theirs, ours = diffusers_wan(tmp_path)
    g = torch.Generator().manual_seed(4)
    x, text = torch.randn(3, 16, *size, generator=g), torch.randn(3, 512, 48, generator=g)
    t = torch.tensor([1.0, 0.83333, 0.0123])
    v = theirs(x, 1000 * t, text, return_dict=False)[0]
    assert error(ours(x, t, {"text": text}), v) < ROUND_32
    assert error(ours(x, t.flip(0), {"text": text}), v) > 1e-2


def test_wan_i2v_with_its_36_channels_agrees_with_diffusers(tmp_path):
    theirs, ours = diffusers_wan(tmp_path, in_channels=36)
    g = torch.Generator().manual_seed(4)
    x, image = (torch.randn(2, n, 3, 4, 6, generator=g) for n in (16, 20))
    text, t = torch.randn(2, 512, 48, generator=g), torch.tensor([0.9, 0.4])
    v = theirs(torch.cat([x, image], 1), 1000 * t, text, return_dict=False)[0]
    assert error(ours(x, t, {"text": text, "image": image}), v) < ROUND_32


def test_wan_ti2v_with_a_time_for_every_token_agrees_with_diffusers(tmp_path):
    """The first latent frame is clean: t = 0 for its tokens."""
    theirs, ours = diffusers_wan(tmp_path, in_channels=48, out_channels=48)
    g = torch.Generator().manual_seed(4)
    x, text = torch.randn(2, 48, 3, 4, 6, generator=g), torch.randn(2, 512, 48, generator=g)
    t = torch.tensor([[0.9], [0.4]]).expand(2, 18).clone()
    t[:, :6] = 0
    v = theirs(x, 1000 * t, text, return_dict=False)[0]
    assert error(ours(x, t, {"text": text}), v) < ROUND_32


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rows,columns", [(5, 7), (4, 6), (1, 1)])
def test_qwen_image_agrees_with_diffusers(tmp_path, masked, rows, columns):
    diffusers = pytest.importorskip("diffusers", reason="needs requirements-full.txt")
    theirs = stir(
        diffusers.QwenImageTransformer2DModel(
            num_layers=2, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=48,
            axes_dims_rope=(8, 12, 12),
        )
    )  # fmt: skip
    theirs.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = weights.load(tmp_path, torch.float32)
    g = torch.Generator().manual_seed(4)
    x = torch.randn(2, 16, 2 * rows, 2 * columns, generator=g)
    text, t = torch.randn(2, 9, 48, generator=g), torch.tensor([0.9, 0.5])
    mask = torch.arange(9)[None] < torch.tensor([[9], [4]]) if masked else None
    grid = [[(1, rows, columns)]] * 2
    v = theirs(pack(x), text, mask, t, grid, return_dict=False)[0]
    assert error(pack(ours(x, t, {"text": text, "mask": mask})), v) < ROUND_32
    if masked:  # negative control
        assert error(pack(ours(x, t, {"text": text})), v) > 1e-3


@pytest.mark.parametrize("boundary", [0.875, 0.9, 0.95])  # the last splits 1 + 3
def test_two_experts_make_the_steps_of_diffusers_pipeline(tmp_path, boundary):
    """Four Euler steps at shift 5 with the exact scheduler; every x, to rounding."""
    diffusers = pytest.importorskip("diffusers", reason="needs requirements-full.txt")
    experts = [diffusers_wan(tmp_path / name) for name in ("transformer", "transformer_2")]
    for p in experts[1][0].parameters():
        p.data *= 0.9
    experts[1][0].save_pretrained(tmp_path / "transformer_2", max_shard_size="200KB")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.sigma_min = 1 / 4
    scheduler.set_shift(5.0)
    vae = diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    pipeline = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler,
        transformer=experts[0][0], transformer_2=experts[1][0], boundary_ratio=boundary,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(5)
    z, text = torch.randn(1, 16, 2, 4, 6, generator=g), torch.randn(1, 512, 48, generator=g)
    seen = []
    pipeline(
        prompt_embeds=text, latents=z, height=32, width=48, num_frames=5, num_inference_steps=4,
        guidance_scale=1.0, output_type="latent",
        callback_on_step_end=lambda p, i, t, kw: seen.append(kw["latents"]) or {},
    )  # fmt: skip
    (tmp_path / "model_index.json").write_text(json.dumps({"boundary_ratio": boundary}))
    (high, low), found = weights.load_teacher("wan22-tiny", tmp_path, dtype=torch.float32)
    net = moe.by_time(high, low, found)
    with torch.no_grad():
        ours = list(trajectory([net] * 4, step_times(4, 5.0), z, {"text": text}))[1:]
        swapped = list(trajectory([high] * 4, step_times(4, 5.0), z, {"text": text}))[1:]
    assert [error(a, b) < ROUND_32 for a, b in zip(ours, seen, strict=True)] == [True] * 4
    assert error(swapped[-1], seen[-1]) > 1e-2
