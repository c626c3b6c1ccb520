"""Qwen-Image: the two-stream diffusion transformer for images. Parameters have published names.

Text and image tokens have separate weights and meet in attention. An image token is a patch of
2 x 2 latents. With dtype bf16 all is bf16, as published, but for norms and rope, in float32.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.layers import attend, call_block, gelu, modulate, rms, rope_table, rotate, sinusoid
from models.lora import Linear
from models.parallel import gather_tokens, shard_tokens

ROPE_LEN = 1024  # tokens of a text that have a position


def pack(x: Tensor) -> Tensor:
    """Make patches of 2 x 2 latents, channels first: (B, 16, H, W) -> (B, L, 64)."""
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def unpack(z: Tensor, rows: int) -> Tensor:
    """The inverse: (B, L, 64) -> (B, 16, H, W), rows = H / 2."""
    return rearrange(z, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=2, q=2)


def guide(v: Tensor, v_null: Tensor, scale: float) -> Tensor:
    """CFG as published: v_null + scale (v - v_null), each token rescaled to its norm in v.

    All are (B, 16, H, W).
    """
    rows = v.shape[2] // 2
    v, v_null = pack(v), pack(v_null)
    guided = v_null + scale * (v - v_null)  # (B, L, 64)
    norms = v.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
    return unpack(guided * norms, rows)


def round_time(t: Tensor) -> Tensor:
    """Round t as the published bf16 pipeline does: 0.9 becomes 0.8984, 0.75 becomes 0.7539.

    It rounds 1000 t to bf16, divides by 1000, and rounds again. This changes the output of a tiny
    model by 13 %, so teacher, fake and student must all use the same times.
    """
    return (1000 * t).bfloat16().div(1000).float()


class Attention(nn.Module):
    """Joint attention over [text, image]. Each stream has its own projections and norms."""

    def __init__(self, dim: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (Linear(dim, dim) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (Linear(dim, dim) for _ in range(3))
        self.to_out, self.to_add_out = nn.ModuleList([Linear(dim, dim)]), Linear(dim, dim)
        self.norm_q, self.norm_k = (nn.RMSNorm(dim // heads, eps) for _ in range(2))
        self.norm_added_q, self.norm_added_k = (nn.RMSNorm(dim // heads, eps) for _ in range(2))

    def forward(
        self,
        image: Tensor,  # (B, L, D)
        text: Tensor,  # (B, T, D)
        rope: Tensor,  # (T + L, d / 2, 2)
        mask: Tensor | None,  # (B, T + L) of all ranks
        adapter: str | None,
        token_counts: tuple,
    ) -> tuple[Tensor, Tensor]:
        """Return image and text before their output projections."""
        heads = lambda x: x.unflatten(-1, (self.heads, -1))  # (B, L, H, d)
        q = [rms(heads(self.add_q_proj(text, adapter)), self.norm_added_q)]
        q += [rms(heads(self.to_q(image, adapter)), self.norm_q)]
        k = [rms(heads(self.add_k_proj(text, adapter)), self.norm_added_k)]
        k += [rms(heads(self.to_k(image, adapter)), self.norm_k)]
        v = [heads(self.add_v_proj(text, adapter)), heads(self.to_v(image, adapter))]
        q, k = (rotate(torch.cat(x, 1), rope).to(image.dtype) for x in (q, k))
        out = attend(q, k, torch.cat(v, 1), mask, token_counts)  # (B, T + L, D)
        text, image = out.split([text.shape[1], image.shape[1]], 1)
        return image, text


class FeedForward(nn.Module):
    """D -> 4 D -> D."""

    def __init__(self, dim: int):
        super().__init__()
        first = nn.ModuleDict({"proj": Linear(dim, 4 * dim)})
        self.net = nn.ModuleList([first, nn.Identity(), Linear(4 * dim, dim)])

    def forward(self, y: Tensor, adapter: str | None) -> Tensor:
        return self.net[2](gelu(self.net[0]["proj"](y, adapter)), adapter)


class Block(nn.Module):
    """Joint attention, then one feed-forward network per stream. Time modulates all of them."""

    def __init__(self, dim: int, heads: int, eps: float, last: bool):
        super().__init__()
        self.eps, self.last = eps, last
        self.img_mod = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.txt_mod = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.attn = Attention(dim, heads, eps)
        self.img_mlp, self.txt_mlp = FeedForward(dim), FeedForward(dim)

    def forward(
        self,
        image: Tensor,  # (B, L, D)
        text: Tensor,  # (B, T, D)
        e: Tensor,  # (B, D), the time embedding
        rope: Tensor,
        mask: Tensor | None,
        adapter: str | None,
        token_counts: tuple,
    ) -> tuple[Tensor, Tensor | None]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.img_mod(e)[:, None].chunk(6, -1)
        shift3, scale3, gate3, shift4, scale4, gate4 = self.txt_mod(e)[:, None].chunk(6, -1)
        y_image = modulate(image, shift1, scale1, self.eps)
        y_text = modulate(text, shift3, scale3, self.eps)
        y_image, y_text = self.attn(y_image, y_text, rope, mask, adapter, token_counts)
        image = torch.addcmul(image, self.attn.to_out[0](y_image, adapter), gate1)
        y_image = self.img_mlp(modulate(image, shift2, scale2, self.eps), adapter)
        image = torch.addcmul(image, y_image, gate2)
        if self.last:  # its text output is not used
            return image, None
        text = torch.addcmul(text, self.attn.to_add_out(y_text, adapter), gate3)
        y_text = self.txt_mlp(modulate(text, shift4, scale4, self.eps), adapter)
        return image, torch.addcmul(text, y_text, gate4)


class QwenImage(nn.Module):
    """v = net(x_t, t, c, adapter): x_t (B, 16, H, W), t (B,) in [0, 1] -> v, float32, like x_t.

    c["text"] (B, T, text_dim); c["mask"] (B, T) bool, True where a token is visible, or None.
    H and W are even. dtype: of the network. checkpointing: less memory.
    round_t: round times as the published bf16 pipeline does. None: if dtype is bf16, because a
    bf16 student will run in that pipeline.
    """

    # models/wan.py says what these are
    float32 = ()  # no parameter stays float32 if dtype is bf16
    makes_video = False
    takes_mask = True
    diffusers_class = "QwenImageTransformer2DModel"
    class_names = (diffusers_class,)
    pipelines = ("QwenImagePipeline",)
    cfg_argument = "true_cfg_scale"
    vae_class = "AutoencoderKLQwenImage"
    official_sampler = "Euler"
    comfyui_node = "ModelSamplingAuraFlow"
    text_len = 512  # tokens of a prompt at most, as in the published pipeline (encoders.MAX_TOKENS)
    image_channels = 0
    diffusers_name = staticmethod(lambda name: name)  # the published one
    read_config = staticmethod(lambda config, tensors: config)  # it has our names
    guide = staticmethod(guide)

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
        self.text_dim = joint_attention_dim
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
    def adapted(name: str) -> bool:
        """Return whether LoRAs adapt this layer: twelve of a block, not the modulation."""
        return name.startswith("transformer_blocks.") and "_mod." not in name

    def forward(self, x_t: Tensor, t: Tensor, c: dict, adapter: str | None = None) -> Tensor:
        rows, columns = x_t.shape[2] // 2, x_t.shape[3] // 2
        token_counts = c["text"].shape[1], rows * columns  # tokens; T and L are this rank's part
        image = self.img_in(shard_tokens(pack(x_t)).to(self.dtype))  # (B, L, D)
        text = shard_tokens(c["text"]).to(self.dtype)
        text = self.txt_in(rms(text, self.txt_norm).to(self.dtype))  # (B, T, D)
        e = self.embed_time(t)  # (B, D)
        mask = c.get("mask")
        if mask is not None:
            mask = F.pad(mask, (0, token_counts[1]), value=True)  # (B, T + L), of all ranks
        rope = self.rope(token_counts[0], rows, columns, x_t.device)  # (T + L, d / 2, 2)
        for block in self.transformer_blocks:
            inputs = image, text, e, rope, mask, adapter, token_counts
            image, text = call_block(block, self.checkpointing, *inputs)
        scale, shift = self.norm_out["linear"](F.silu(e))[:, None].chunk(2, -1)  # scale first
        v = self.proj_out(modulate(image, shift, scale, self.eps))  # (B, L, 64)
        return unpack(gather_tokens(v, token_counts[1]), rows).float()

    def embed_time(self, t: Tensor) -> Tensor:
        """Time embedding (B, D), before SiLU."""
        layers = self.time_text_embed["timestep_embedder"]
        waves = sinusoid(round_time(t) if self.round_t else t, 256).to(self.dtype)
        return layers["linear_2"](F.silu(layers["linear_1"](waves)))

    def rope(self, length: int, rows: int, columns: int, device: torch.device) -> Tensor:
        """Rope of [text, image], (T + L, d / 2, 2).

        Image positions are centred: n rows are at -(n - n // 2) ... n // 2 - 1, columns likewise.
        Text token j is at max(rows // 2, columns // 2) + j on all three axes.
        """
        if length > ROPE_LEN:
            raise ValueError(f"expected a text of at most {ROPE_LEN} tokens, got {length}")
        centred = [tuple(range(n // 2 - n, n // 2)) for n in (rows, columns)]
        image = rope_table(((0,), *centred), self.axes, device)  # (L, d / 2, 2)
        first = max(rows // 2, columns // 2)
        positions = (tuple(range(first, first + ROPE_LEN)),)  # one table for texts of all lengths
        text = [rope_table(positions, (dim,), device)[:length] for dim in self.axes]
        return torch.cat([shard_tokens(torch.cat(text, 1), 0), shard_tokens(image, 0)])
