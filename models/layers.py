"""Layers of both transformers: time embedding, rope, norms, attention, activation checkpointing."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from models import parallel

BACKENDS = [  # of attention, in this order; the first takes no mask
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """cos(1000 t w_i), then sin(1000 t w_i), with w_i = 10000^(-2i/dim): (...,) -> (..., dim).

    In float64: at angles near 1000 the product alone, in float32, has an error of 4e-5.
    """
    wide = t.cpu().double() if t.device.type == "mps" else t.double()  # MPS has no float64
    w = 10000 ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=wide.device) / dim)
    angle = 1000 * wide[..., None] * w  # (..., dim / 2)
    return torch.cat([angle.cos(), angle.sin()], -1).float().to(t.device)


@lru_cache(maxsize=16)  # one table per bucket; 39 MB at 75,600 tokens
@torch.inference_mode(False)  # a table that is first made while sampling is used in training, too
def rope_table(positions: tuple, dims: tuple, device: torch.device) -> Tensor:
    """cos and sin of p w_k of the tokens of a grid, with w_k = 10000^(-2k/dim): (L, d / 2, 2).

    positions: the positions p on each axis. Tokens are ordered with the last axis fastest.
    dims: how many of the d channels of a head each axis rotates. float32, computed in float64.
    """
    grid = torch.meshgrid(*[torch.tensor(p, dtype=torch.float64) for p in positions], indexing="ij")
    angles = [
        p.reshape(-1, 1) * 10000 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        for p, dim in zip(grid, dims)
    ]
    angle = torch.cat(angles, 1)  # (L, d / 2) float64, on the CPU
    return torch.stack([angle.cos(), angle.sin()], -1).float().to(device)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i + 1) of each head; x (B, L, H, d) float32, rope (L, d / 2, 2).

    Real numbers, since torch.compile leaves complex ones alone.
    """
    (a, b), (cos, sin) = x.unflatten(-1, (-1, 2)).unbind(-1), rope[:, None].unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)  # (B, L, H, d)


def rms(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """x / sqrt(mean x^2 + eps) w over the last dimension, in float32."""
    return F.rms_norm(x.float(), norm.normalized_shape, norm.weight.float(), norm.eps)


def gelu(x: Tensor) -> Tensor:
    """x Phi(x), in its tanh approximation: the teachers were trained with it."""
    return F.gelu(x, approximate="tanh")


def modulate(z: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LN(z) (1 + scale) + shift; z (B, L, D), shift and scale (B, 1 or L, D)."""
    dim = z.shape[-1:]
    if scale.numel() == dim.numel():  # one sample: the kernel's own weight and bias, one pass
        return F.layer_norm(z, dim, 1 + scale.flatten(), shift.flatten(), eps)
    return torch.addcmul(shift, F.layer_norm(z, dim, eps=eps), 1 + scale)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, token_counts: tuple[int, ...] = ()
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: q (B, L, H, d), k and v (B, M, H, d) -> (B, L, H d).

    mask (B, M): True where a key is visible. token_counts: with context parallelism q, k and v have
    this rank's tokens of these kinds; all tokens of some heads come here, and go back after it.
    The one place where tokens meet.
    """
    by_heads = lambda x: parallel.tokens_to_heads(x, token_counts).transpose(1, 2)
    q, k, v = (by_heads(x) for x in (q, k, v))  # (B, H, L, d)
    mask = None if mask is None else mask[:, None, None]  # (B, 1, 1, M)
    if q.is_meta:  # models/plan.py counts bytes: as a GPU's kernel, which keeps no scores
        out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    else:
        with sdpa_kernel(BACKENDS, set_priority=True):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return parallel.heads_to_tokens(out.transpose(1, 2), token_counts).flatten(2)


def attention_backend(q: Tensor, mask: Tensor | None = None) -> str:
    """The back-end that `attend` gets for such q (B, L, H, d) and mask (B, L)."""
    x = q.transpose(1, 2)
    mask = None if mask is None else mask[:, None, None]
    with sdpa_kernel(BACKENDS, set_priority=True):
        return SDPBackend(torch._fused_sdp_choice(x, x, x, mask)).name


def call_block(block: nn.Module, checkpointing: bool, *inputs):
    """Call a block. With checkpointing, backward computes its inside again instead of storing it.

    All that the second computation depends on must be among the inputs, above all the adapter's
    name: an attribute of the network would have the value of the last call by then.
    """
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return block(*inputs)
