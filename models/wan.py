"""Wan 2.1 and 2.2: the diffusion transformer for videos. Parameters have their published names.

A token is a patch of 1 x 2 x 2 latents; the order is frame, row, column. With dtype bf16 the
linear layers and attention are bf16; the residual stream, the modulation and the head are float32.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.layers import attend, call_block, gelu, modulate, rms, rope_table, rotate, sinusoid
from models.lora import Linear
from models.parallel import gather_tokens, shard_tokens

PATCH = (1, 2, 2)  # frames, rows, columns

# Published name, name in diffusers. norm3 is norm2 there: both number the norms, in other orders,
# and it is the only norm of a block, outside attention, that has parameters.
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


# settings in diffusers' config.json
OUR_NAMES = {"in_channels": "in_dim", "out_channels": "out_dim", "num_attention_heads": "num_heads"}


def diffusers_name(name: str) -> str:
    """The name in diffusers of a parameter or module with this published name."""
    return next((name.replace(a, b) for a, b in RENAMED if a in name), name)


def guide(v: Tensor, v_null: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (CFG): v_null + scale (v - v_null)."""
    return v_null + scale * (v - v_null)


class Attention(nn.Module):
    """Attention from z (B, L, D) to a context (B, M, D). q and k are normalized over D."""

    def __init__(self, dim: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)

    def forward(
        self,
        z: Tensor,  # (B, L, D)
        context: Tensor,  # (B, M, D)
        rope: Tensor | None,  # (L, d / 2, 2); None: cross-attention
        adapter: str | None,
        token_counts: tuple = (),
    ) -> Tensor:
        q = rms(self.q(z, adapter), self.norm_q)  # (B, L, D) float32
        k = rms(self.k(context, adapter), self.norm_k)  # (B, M, D) float32
        v = self.v(context, adapter)
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in (q, k, v))  # (B, L, H, d)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        return self.o(attend(q.to(z.dtype), k.to(z.dtype), v, None, token_counts), adapter)


class Block(nn.Module):
    """Self-attention, cross-attention to the text, MLP. Time modulates the first and the last."""

    def __init__(self, dim: int, ffn_dim: int, heads: int, eps: float):
        super().__init__()
        self.eps = eps
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))
        self.self_attn = Attention(dim, heads, eps)
        self.cross_attn = Attention(dim, heads, eps)
        self.norm3 = nn.LayerNorm(dim, eps)  # the published name; diffusers calls it norm2
        self.ffn = nn.ModuleList([Linear(dim, ffn_dim), nn.Identity(), Linear(ffn_dim, dim)])

    def forward(
        self,
        z: Tensor,  # (B, L, D) float32, the residual stream
        e: Tensor,  # (B, 1 or L, 6, D) float32, the projected time embedding
        text: Tensor,  # (B, text_len, D)
        rope: Tensor,  # (L, d / 2, 2)
        adapter: str | None,
        token_counts: tuple,
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float() + e).unbind(2)
        y = modulate(z, shift1, scale1, self.eps).to(text.dtype)
        z = torch.addcmul(z, self.self_attn(y, y, rope, adapter, token_counts), gate1)
        y = self.norm3(z).to(text.dtype)
        z = z + self.cross_attn(y, text, None, adapter)  # no gate, no rope
        y = modulate(z, shift2, scale2, self.eps).to(text.dtype)
        y = self.ffn[2](gelu(self.ffn[0](y, adapter)), adapter)
        return torch.addcmul(z, y, gate2)  # (B, L, D) float32


class Head(nn.Module):
    """From tokens to patches of v. Modulated by the time embedding itself, not its projection."""

    def __init__(self, dim: int, outputs: int, eps: float):
        super().__init__()
        self.eps = eps
        self.modulation = nn.Parameter(torch.zeros(1, 2, dim))
        self.head = Linear(dim, outputs)

    def forward(self, z: Tensor, e: Tensor) -> Tensor:  # z (B, L, D), e (B, 1 or L, D)
        shift, scale = (self.modulation.float() + e[:, :, None]).unbind(2)
        return self.head(modulate(z, shift, scale, self.eps))


class Wan(nn.Module):
    """v = net(x_t, t, c, adapter): x_t (B, C, F, H, W), t in [0, 1] -> v, float32, like x_t.

    t (B,), or (B, L) with a time per token, as image to video with the 5B model needs.
    c["text"] (B, M, text_dim), M <= text_len; c["image"] (B, 20, F, H, W) for image to video only:
    mask (4) and latents (16). H and W are even. dtype: of the blocks. checkpointing: less memory.
    """

    # parts of names of parameters that stay float32 if dtype is bf16
    float32 = ("time_embedding", "time_projection", "modulation", "head", "norm")
    makes_video = True  # x_t has frames; else (B, C, H, W)
    takes_mask = False  # as published, attention sees the zero rows of a text's padding
    diffusers_class = "WanTransformer3DModel"
    class_names = ("WanModel", diffusers_class)  # in the config.json of both layouts
    pipelines = ("WanPipeline", "WanImageToVideoPipeline")  # of diffusers; from text, from an image
    cfg_argument = "guidance_scale"  # of these pipelines
    vae_class = "AutoencoderKLWan"  # of diffusers
    official_sampler = "UniPC"
    comfyui_node = "ModelSamplingSD3"  # sets the shift
    diffusers_name = staticmethod(diffusers_name)
    guide = staticmethod(guide)

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
            raise ValueError(f"dim: expected a multiple of 2 x {num_heads} heads, got {dim}")
        self.head_dim, self.freq_dim = dim // num_heads, freq_dim
        self.text_len, self.text_dim = text_len, text_dim
        self.image_channels = in_dim - out_dim  # of c["image"]
        self.dtype, self.checkpointing = dtype, checkpointing
        self.patch_embedding = nn.Conv3d(in_dim, dim, PATCH, PATCH)
        self.text_embedding = nn.ModuleList(
            [Linear(text_dim, dim), nn.Identity(), Linear(dim, dim)]
        )
        self.time_embedding = nn.Sequential(Linear(freq_dim, dim), nn.SiLU(), Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(dim, ffn_dim, num_heads, eps) for _ in range(num_layers))
        self.head = Head(dim, out_dim * 4, eps)

    @staticmethod
    def read_config(config: dict, tensors: dict) -> dict:
        """Settings under our names, from a config.json of either layout and its tensors."""
        settings = {OUR_NAMES.get(key, key): value for key, value in config.items()}
        if "attention_head_dim" in settings:
            settings["dim"] = settings["num_heads"] * settings["attention_head_dim"]
        if "text_embedding.0.weight" in tensors:  # the original layout, whose configs lack it
            settings["text_dim"] = tensors["text_embedding.0.weight"].shape[-1]
        return settings

    @staticmethod
    def adapted(name: str) -> bool:
        """Return whether LoRAs adapt this layer: the ten of a block, as in published LoRAs."""
        return name.startswith("blocks.")

    def forward(self, x_t: Tensor, t: Tensor, c: dict, adapter: str | None = None) -> Tensor:
        x = torch.cat([x_t, c["image"].to(x_t.dtype)], 1) if "image" in c else x_t
        channels, length = self.patch_embedding.in_channels, c["text"].shape[1]
        if x.shape[1] != channels:
            raise ValueError(
                f"expected {channels} channels, got {x.shape[1]}; image to video needs c['image']"
            )
        if length > self.text_len:
            raise ValueError(f"expected a text of at most {self.text_len} tokens, got {length}")
        frames, rows, columns = (n // p for n, p in zip(x.shape[2:], PATCH))
        count = frames * rows * columns  # tokens of a sample; below, L of them are on this rank
        z = self.patches(x).float()  # (B, L, D)
        t = t[:, None] if t.ndim == 1 else shard_tokens(t)  # (B, 1 or L)
        e = self.time_embedding(sinusoid(t, self.freq_dim))  # (B, 1 or L, D)
        e6 = self.time_projection(e).unflatten(-1, (6, -1))  # (B, 1 or L, 6, D)
        # as published, attention sees the zero rows of the padding: there is no mask
        text = F.pad(c["text"], (0, 0, 0, self.text_len - length)).to(self.dtype)
        text = self.text_embedding[2](gelu(self.text_embedding[0](text)))  # (B, text_len, D)
        rope = shard_tokens(self.rope(frames, rows, columns, x.device), 0)  # (L, d / 2, 2)
        for block in self.blocks:
            z = call_block(block, self.checkpointing, z, e6, text, rope, adapter, (count,))
        p, q, r = PATCH
        return rearrange(  # channels last within a patch, unlike in `patches`
            gather_tokens(self.head(z, e), count),
            "b (f h w) (p q r c) -> b c (f p) (h q) (w r)",
            f=frames,
            h=rows,
            w=columns,
            p=p,
            q=q,
            r=r,
        )

    def patches(self, x: Tensor) -> Tensor:
        """Embed patches: (B, C, F, H, W) -> (B, L, D). A convolution with stride = kernel size."""
        p, q, r = PATCH
        x = rearrange(x, "b c (f p) (h q) (w r) -> b (f h w) (c p q r)", p=p, q=q, r=r)
        x = shard_tokens(x)  # (B, L, C p q r)
        weight, bias = self.patch_embedding.weight.flatten(1), self.patch_embedding.bias
        return F.linear(x.to(self.dtype), weight.to(self.dtype), bias.to(self.dtype))

    def rope(self, frames: int, rows: int, columns: int, device: torch.device) -> Tensor:
        """Rope of a grid, positions from 0. Of 128 channels, 44, 42, 42 are frame, row, column."""
        side = 2 * (self.head_dim // 6)
        positions = tuple(tuple(range(n)) for n in (frames, rows, columns))
        return rope_table(positions, (self.head_dim - 2 * side, side, side), device)
