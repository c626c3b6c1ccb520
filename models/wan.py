"""Wan 2.1 and 2.2: the diffusion transformer for videos, under the names of its published weights.

Tokens are patches of 1 x 2 x 2 latents, in the order frame, row, column. With bf16 inside, the
linear layers and attention are bf16; the residual stream, the modulation and the head are float32.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.layers import attend, gelu, modulate, rms, rope_table, rotate, run, sinusoid
from models.lora import Linear
from models.parallel import all_tokens, cut_tokens

PATCH = (1, 2, 2)  # frames, rows, columns


# (published, as diffusers renames it); norm3 really becomes norm2: it is the only norm of a block
# that has parameters outside attention
RENAMED = (
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("self_attn.norm_", "attn1.norm_"),
    ("self_attn.o", "attn1.to_out.0"),
    ("self_attn.", "attn1.to_"),
    ("cross_attn.norm_", "attn2.norm_"),
    ("cross_attn.o", "attn2.to_out.0"),
    ("cross_attn.", "attn2.to_"),
    ("norm3", "norm2"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
    (".modulation", ".scale_shift_table"),
)


def diffusers_name(name: str) -> str:
    """What diffusers calls the parameter, or the module, that is published under this name."""
    return next((name.replace(a, b) for a, b in RENAMED if a in name), name)


def guide(v: Tensor, v_null: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, v_null + scale (v - v_null)."""
    return v_null + scale * (v - v_null)


class Attention(nn.Module):
    """Queries of z (B, L, D), keys and values of a context (B, M, D); q, k normed over all of D."""

    def __init__(self, dim: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)

    def forward(
        self, z: Tensor, context: Tensor, rope: Tensor | None, adapter, streams: tuple = ()
    ) -> Tensor:
        q = rms(self.q(z, adapter), self.norm_q)
        k = rms(self.k(context, adapter), self.norm_k)
        v = self.v(context, adapter)
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in (q, k, v))  # (B, L, H, d)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        return self.o(attend(q.to(z.dtype), k.to(z.dtype), v, None, streams), adapter)


class Block(nn.Module):
    """Self-attention, attention to the text, MLP; e (B, 1 or L, 6, D) float32 modulates two."""

    def __init__(self, dim: int, ffn_dim: int, heads: int, eps: float):
        super().__init__()
        self.eps = eps
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))
        self.self_attn = Attention(dim, heads, eps)
        self.cross_attn = Attention(dim, heads, eps)
        self.norm3 = nn.LayerNorm(dim, eps)  # the published name; diffusers calls it norm2
        self.ffn = nn.ModuleList([Linear(dim, ffn_dim), nn.Identity(), Linear(ffn_dim, dim)])

    def forward(
        self, z: Tensor, e: Tensor, text: Tensor, rope: Tensor, adapter, streams: tuple
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float() + e).unbind(2)
        y = modulate(z, shift1, scale1, self.eps).to(text.dtype)
        z = torch.addcmul(z, self.self_attn(y, y, rope, adapter, streams), gate1)
        y = self.norm3(z).to(text.dtype)
        z = z + self.cross_attn(y, text, None, adapter)  # no gate, no rope
        y = modulate(z, shift2, scale2, self.eps).to(text.dtype)
        y = self.ffn[2](gelu(self.ffn[0](y, adapter)), adapter)
        return torch.addcmul(z, y, gate2)  # (B, L, D) float32


class Head(nn.Module):
    """Tokens -> patches of velocity. Modulated by the time embedding itself, not its projection."""

    def __init__(self, dim: int, outputs: int, eps: float):
        super().__init__()
        self.eps = eps
        self.modulation = nn.Parameter(torch.zeros(1, 2, dim))
        self.head = Linear(dim, outputs)

    def forward(self, z: Tensor, e: Tensor) -> Tensor:  # e (B, 1 or L, D)
        shift, scale = (self.modulation.float() + e[:, :, None]).unbind(2)
        return self.head(modulate(z, shift, scale, self.eps))


class Wan(nn.Module):
    """v = net(x_t, t, c, adapter): x_t (B, C, F, H, W), t (B,) or (B, L) in [0, 1] -> v float32.

    c["text"] (B, L, text_dim), L <= text_len; c["image"] (B, 20, F, H, W) for image to video only.
    H and W are even. `dtype` is that of the inside; `checkpointing` trades time for memory.
    """

    float32 = ("time_embedding", "time_projection", "modulation", "head", "norm")  # kept so in bf16

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_heads: int,
        num_layers: int,
        in_dim: int = 16,
        out_dim: int = 16,
        text_dim: int = 4096,
        text_len: int = 512,
        freq_dim: int = 256,
        eps: float = 1e-6,
        dtype: torch.dtype = torch.float32,
        checkpointing: bool = False,
    ):
        super().__init__()
        if dim % (2 * num_heads):
            raise ValueError(f"{dim} channels do not make {num_heads} heads of an even size")
        self.head_dim, self.text_len, self.freq_dim = dim // num_heads, text_len, freq_dim
        self.dtype, self.checkpointing = dtype, checkpointing
        self.patch_embedding = nn.Conv3d(in_dim, dim, PATCH, PATCH)
        self.text_embedding = nn.ModuleList(
            [Linear(text_dim, dim), nn.Identity(), Linear(dim, dim)]
        )
        self.time_embedding = nn.Sequential(Linear(freq_dim, dim), nn.SiLU(), Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(dim, ffn_dim, num_heads, eps) for _ in range(num_layers))
        self.head = Head(dim, out_dim * 4, eps)

    diffusers_name = staticmethod(diffusers_name)

    @staticmethod
    def adapted(name: str) -> bool:
        """The ten linear layers of a block that the published LoRAs adapt."""
        return name.startswith("blocks.")

    def forward(self, x_t: Tensor, t: Tensor, c: dict, adapter: str | None = None) -> Tensor:
        x = (
            torch.cat([x_t, c["image"].to(x_t.dtype)], 1) if "image" in c else x_t
        )  # noise, mask, image
        takes = self.patch_embedding.in_channels
        if x.shape[1] != takes:
            raise ValueError(f"{x.shape[1]} channels, not {takes}; image to video needs c['image']")
        frames, rows, columns = (n // p for n, p in zip(x.shape[2:], PATCH))
        count = frames * rows * columns  # tokens; from here on this process's part of them
        z = self.patches(x).float()  # (B, L, D)
        t = t[:, None] if t.ndim == 1 else cut_tokens(t)
        e = self.time_embedding(sinusoid(t, self.freq_dim))  # (B, 1 or L, D)
        e6 = self.time_projection(e).unflatten(-1, (6, -1))  # (B, 1 or L, 6, D)
        missing = self.text_len - c["text"].shape[1]
        if missing < 0:
            raise ValueError(f"a text of {c['text'].shape[1]} tokens; {self.text_len} at most")
        # zero rows are attended to, all text_len of them
        text = F.pad(c["text"], (0, 0, 0, missing)).to(self.dtype)
        text = self.text_embedding[2](gelu(self.text_embedding[0](text)))  # (B, text_len, D)
        rope = cut_tokens(self.rope(frames, rows, columns, x.device), 0)
        for block in self.blocks:
            z = run(block, self.checkpointing, z, e6, text, rope, adapter, (count,))
        p, q, r = PATCH  # out: channels last within a patch; in: channels first
        return rearrange(
            all_tokens(self.head(z, e), count), "b (f h w) (p q r c) -> b c (f p) (h q) (w r)",
            f=frames, h=rows, w=columns, p=p, q=q, r=r,
        )  # fmt: skip

    def patches(self, x: Tensor) -> Tensor:
        """The convolution, stride = kernel, as a product: (B, C, F, H, W) -> (B, L, D)."""
        p, q, r = PATCH
        x = rearrange(x, "b c (f p) (h q) (w r) -> b (f h w) (c p q r)", p=p, q=q, r=r)
        x = cut_tokens(x)
        weight, bias = self.patch_embedding.weight.flatten(1), self.patch_embedding.bias
        return F.linear(x.to(self.dtype), weight.to(self.dtype), bias.to(self.dtype))

    def rope(self, frames: int, rows: int, columns: int, device: torch.device) -> Tensor:
        """Positions from 0 on each axis; 44, 42, 42 of 128 channels for frame, row, column."""
        side = 2 * (self.head_dim // 6)
        positions = tuple(tuple(range(n)) for n in (frames, rows, columns))
        return rope_table(positions, (self.head_dim - 2 * side, side, side), device)
