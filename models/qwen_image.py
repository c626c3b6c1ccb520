"""Qwen-Image: the two-stream diffusion transformer for pictures, under its published names.

Text and image tokens have weights of their own and meet in attention. Tokens are 2 x 2 latents.
With bf16 inside everything is bf16, as published; statistics and rope are float32.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.layers import attend, gelu, modulate, rms, rope_table, rotate, run, sinusoid
from models.lora import Linear
from models.parallel import all_tokens, cut_tokens

TEXT_LEN = 1024  # tokens of the longest prompt


def pack(x: Tensor) -> Tensor:
    """Patches of 2 x 2 latents, channel first: (B, 16, H, W) -> (B, L, 64)."""
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def unpack(z: Tensor, rows: int) -> Tensor:
    """(B, L, 64) -> (B, 16, H, W), rows = H / 2."""
    return rearrange(z, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=2, q=2)


def guide(v: Tensor, v_null: Tensor, scale: float) -> Tensor:
    """v_null + scale (v - v_null), rescaled to the norm of v in every token; (B, 16, H, W)."""
    rows = v.shape[2] // 2
    v, v_null = pack(v), pack(v_null)
    guided = v_null + scale * (v - v_null)  # (B, L, 64)
    norms = v.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
    return unpack(guided * norms, rows)


def rounded(t: Tensor) -> Tensor:
    """t as the published bf16 pipeline feeds it: 0.9 becomes 0.8984, 0.75 becomes 0.7539.

    It rounds 1000 t to bf16, divides by 1000, and rounds again. On a tiny model this moves the
    output by 13 %, so teacher, fake and student must all see the same times.
    """
    return (1000 * t).bfloat16().div(1000).float()


class Attention(nn.Module):
    """Joint attention over [text, image]: each stream has its own projections and its own norms."""

    def __init__(self, dim: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (Linear(dim, dim) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (Linear(dim, dim) for _ in range(3))
        self.to_out, self.to_add_out = nn.ModuleList([Linear(dim, dim)]), Linear(dim, dim)
        self.norm_q, self.norm_k = (nn.RMSNorm(dim // heads, eps) for _ in range(2))
        self.norm_added_q, self.norm_added_k = (nn.RMSNorm(dim // heads, eps) for _ in range(2))

    def forward(self, image: Tensor, text: Tensor, rope: Tensor, mask, adapter, streams):
        heads = lambda x: x.unflatten(-1, (self.heads, -1))  # (B, L, H, d)
        q = [rms(heads(self.add_q_proj(text, adapter)), self.norm_added_q)]
        q += [rms(heads(self.to_q(image, adapter)), self.norm_q)]
        k = [rms(heads(self.add_k_proj(text, adapter)), self.norm_added_k)]
        k += [rms(heads(self.to_k(image, adapter)), self.norm_k)]
        v = [heads(self.add_v_proj(text, adapter)), heads(self.to_v(image, adapter))]
        q, k = (rotate(torch.cat(x, 1), rope).to(image.dtype) for x in (q, k))
        out = attend(q, k, torch.cat(v, 1), mask, streams)  # (B, T + L, D)
        text, image = out.split([text.shape[1], image.shape[1]], 1)
        return image, text  # before their output projections


class MLP(nn.Module):
    """Four times as wide inside, gelu by its tanh approximation."""

    def __init__(self, dim: int):
        super().__init__()
        first = nn.ModuleDict({"proj": Linear(dim, 4 * dim)})
        self.net = nn.ModuleList([first, nn.Identity(), Linear(4 * dim, dim)])

    def forward(self, y: Tensor, adapter) -> Tensor:
        return self.net[2](gelu(self.net[0]["proj"](y, adapter)), adapter)


class Block(nn.Module):
    """Both streams: joint attention, then an MLP each; modulated by SiLU(e), e (B, D)."""

    def __init__(self, dim: int, heads: int, eps: float, last: bool):
        super().__init__()
        self.eps, self.last = eps, last
        self.img_mod = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.txt_mod = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.attn = Attention(dim, heads, eps)
        self.img_mlp, self.txt_mlp = MLP(dim), MLP(dim)

    def forward(self, image: Tensor, text: Tensor, e: Tensor, rope, mask, adapter, streams):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.img_mod(e)[:, None].chunk(6, -1)
        shift3, scale3, gate3, shift4, scale4, gate4 = self.txt_mod(e)[:, None].chunk(6, -1)
        y_image = modulate(image, shift1, scale1, self.eps)
        y_text = modulate(text, shift3, scale3, self.eps)
        y_image, y_text = self.attn(y_image, y_text, rope, mask, adapter, streams)
        image = torch.addcmul(image, self.attn.to_out[0](y_image, adapter), gate1)
        y_image = self.img_mlp(modulate(image, shift2, scale2, self.eps), adapter)
        image = torch.addcmul(image, y_image, gate2)
        if self.last:  # nobody reads the text after it
            return image, None
        text = torch.addcmul(text, self.attn.to_add_out(y_text, adapter), gate3)
        y_text = self.txt_mlp(modulate(text, shift4, scale4, self.eps), adapter)
        return image, torch.addcmul(text, y_text, gate4)


class QwenImage(nn.Module):
    """v = net(x_t, t, c, adapter): x_t (B, 16, H, W), t (B,) in [0, 1] -> v (B, 16, H, W) float32.

    c["text"] (B, T, text_dim), c["mask"] (B, T) bool: True is seen; absent or None: all are. H and
    W are even. `dtype` is that of the inside; `round_t` whether times are rounded as the published
    bf16 pipeline does, by default where dtype is bf16: what a student's users will feed it.
    """

    float32 = ()  # no parameter is kept in float32

    def __init__(
        self,
        num_attention_heads: int,
        attention_head_dim: int,
        num_layers: int,
        joint_attention_dim: int = 3584,
        in_channels: int = 64,
        axes_dims_rope: tuple = (16, 56, 56),
        eps: float = 1e-6,
        dtype: torch.dtype = torch.float32,
        checkpointing: bool = False,
        round_t: bool | None = None,
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.axes, self.eps = tuple(axes_dims_rope), eps
        self.dtype, self.checkpointing = dtype, checkpointing
        self.round_t = dtype == torch.bfloat16 if round_t is None else round_t
        self.img_in, self.txt_in = Linear(in_channels, dim), Linear(joint_attention_dim, dim)
        self.txt_norm = nn.RMSNorm(joint_attention_dim, eps)
        embedder = {"linear_1": Linear(256, dim), "linear_2": Linear(dim, dim)}
        self.time_text_embed = nn.ModuleDict({"timestep_embedder": nn.ModuleDict(embedder)})
        last = num_layers - 1
        blocks = [Block(dim, num_attention_heads, eps, i == last) for i in range(num_layers)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.norm_out = nn.ModuleDict({"linear": Linear(dim, 2 * dim)})
        self.proj_out = Linear(dim, in_channels)

    @staticmethod
    def diffusers_name(name: str) -> str:
        """Published under the names of diffusers."""
        return name

    @staticmethod
    def adapted(name: str) -> bool:
        """The twelve linear layers of a block that published LoRAs adapt: not the modulation."""
        return name.startswith("transformer_blocks.") and "_mod." not in name

    def forward(self, x_t: Tensor, t: Tensor, c: dict, adapter: str | None = None) -> Tensor:
        rows, columns = x_t.shape[2] // 2, x_t.shape[3] // 2
        streams = c["text"].shape[1], rows * columns  # T, L; from here on this process's part
        image = self.img_in(cut_tokens(pack(x_t)).to(self.dtype))  # (B, L, D)
        text = cut_tokens(c["text"]).to(self.dtype)
        text = self.txt_in(rms(text, self.txt_norm).to(self.dtype))  # (B, T, D)
        e = self.time(t)  # (B, D)
        mask = c.get("mask")
        if mask is not None:
            mask = F.pad(mask, (0, streams[1]), value=True)  # (B, T + L), keys only
        rope = self.rope(streams[0], rows, columns, x_t.device)  # (T + L, d / 2)
        for block in self.transformer_blocks:
            inputs = image, text, e, rope, mask, adapter, streams
            image, text = run(block, self.checkpointing, *inputs)
        scale, shift = self.norm_out["linear"](F.silu(e))[:, None].chunk(2, -1)  # scale first
        v = self.proj_out(modulate(image, shift, scale, self.eps))  # (B, L, 64)
        return unpack(all_tokens(v, streams[1]), rows).float()

    def time(self, t: Tensor) -> Tensor:
        """Time embedding (B, D), before SiLU."""
        layers = self.time_text_embed["timestep_embedder"]
        waves = sinusoid(rounded(t) if self.round_t else t, 256).to(self.dtype)
        return layers["linear_2"](F.silu(layers["linear_1"](waves)))

    def rope(self, length: int, rows: int, columns: int, device: torch.device) -> Tensor:
        """Image rows and columns are centred: n of them stand at -(n - n // 2) .. n // 2 - 1.

        Text token j stands at max(rows // 2, columns // 2) + j on all three axes.
        """
        if length > TEXT_LEN:
            raise ValueError(f"a text of {length} tokens; {TEXT_LEN} at most")
        centred = [tuple(range(n // 2 - n, n // 2)) for n in (rows, columns)]
        image = rope_table(((0,), *centred), self.axes, device)  # (L, d / 2)
        first = max(rows // 2, columns // 2)
        places = (tuple(range(first, first + TEXT_LEN)),)  # of the longest text: one table for all
        text = [rope_table(places, (dim,), device)[:length] for dim in self.axes]
        return torch.cat([cut_tokens(torch.cat(text, 1), 0), cut_tokens(image, 0)])
