"""What both transformers are made of: sinusoid, rope, norms, attention, checkpointed blocks."""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from models import parallel


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """cos(1000 t w_i), then sin(1000 t w_i), w_i = 10000^(-2i/dim); (...,) -> (..., dim).

    In float64: at angles near 1000 the float32 product alone is wrong by 4e-5.
    """
    wide = t.cpu().double() if t.device.type == "mps" else t.double()  # MPS has no float64
    w = 10000 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = 1000 * wide[..., None] * w.to(wide.device)  # (..., dim / 2)
    return torch.cat([angle.cos(), angle.sin()], -1).float().to(t.device)


@lru_cache(maxsize=16)  # a table a bucket; 39 MB at 75,600 tokens
@torch.inference_mode(False)  # a table first made while sampling must serve training too
def rope_table(positions: tuple, dims: tuple, device: torch.device) -> Tensor:
    """e^(i p w_k) of the rows of a grid, complex64 (L, d / 2); w_k = 10000^(-2k/dim) on each axis.

    positions: a tuple of numbers an axis; tokens run over their product, the last axis fastest.
    """
    mesh = torch.meshgrid(*[torch.tensor(p, dtype=torch.float64) for p in positions], indexing="ij")
    angles = [
        p.reshape(-1, 1) * 10000 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        for p, dim in zip(mesh, dims)
    ]
    angle = torch.cat(angles, 1)  # (L, d / 2) float64, on the CPU
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64).to(device)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn the pairs (2i, 2i + 1) of each head by the table's angles; x (B, L, H, d) float32."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))  # (B, L, H, d / 2)
    return torch.view_as_real(pairs * rope[:, None]).flatten(-2)


def rms(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """x / sqrt(mean x^2 + eps) w over the last dimension, in float32."""
    x, w = x.float(), norm.weight.float()
    if x.device.type == "cpu":
        return Rms.apply(x, w, norm.eps)
    return F.rms_norm(x, norm.normalized_shape, w, norm.eps)


def gelu(x: Tensor) -> Tensor:
    """x Phi(x) by its tanh approximation."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return Gelu.apply(x)
    return F.gelu(x, approximate="tanh")


def modulate(z: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LN(z) (1 + scale) + shift; z (B, L, D), shift and scale (B, 1, D), or (B, L, D) by token."""
    dim = z.shape[-1:]
    if scale.numel() == dim.numel():  # one sample: the kernel's own weight and bias, one pass
        return F.layer_norm(z, dim, 1 + scale.flatten(), shift.flatten(), eps)
    return torch.addcmul(shift, F.layer_norm(z, dim, eps=eps), 1 + scale)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, streams: tuple = ()
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v; q (B, L, H, d), k and v (B, M, H, d), mask (B, M): True is seen.

    The one place where tokens meet. Where processes share the tokens of q, k and v, `streams` says
    how many there are of each kind: all tokens of some heads come here, and go back.
    """
    q, k, v = (parallel.to_heads(x, streams).transpose(1, 2) for x in (q, k, v))  # (B, H, L, d)
    mask = None if mask is None else mask[:, None, None]  # (B, 1, 1, M)
    if q.is_meta:  # models/plan.py counts bytes: as a GPU's kernel, with no scores in memory
        out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return parallel.to_tokens(out.transpose(1, 2), streams).flatten(2)  # (B, L, H d)


def run(block: nn.Module, checkpointing: bool, *inputs):
    """Call a block; with checkpointing its inside is computed again in backward, not kept.

    All that a recomputation depends on must be among the inputs, the adapter's name above all.
    """
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return block(*inputs)


# -- the same in fewer passes over memory, for CPUs; GPUs have kernels for both --------------------


class Rms(torch.autograd.Function):
    """x r w, r = 1 / sqrt(mean x^2 + eps): less than half the time of torch's on a CPU."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        r = (norm.square() / x.shape[-1] + eps).rsqrt()  # (..., 1)
        ctx.save_for_backward(x, w, r)
        return (x * r).mul_(w)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, w, r = ctx.saved_tensors
        product = grad * x
        along = (product @ w)[..., None] * r**3 / x.shape[-1]  # (..., 1): the part that r removes
        grad_w = r.flatten() @ product.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return (grad * w).mul_(r).addcmul_(x, along, value=-1), grad_w, None


class Gelu(torch.autograd.Function):
    """x s, s = sigmoid(x (a + b x^2)): gelu's tanh approximation at half the time of torch's.

    It keeps the slope in place of x, and works on a few rows at a time, which stay in the cache.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        root = 2 * math.sqrt(2 / math.pi)
        a, b = x.new_tensor(root), 0.044715 * root
        needed = ctx.needs_input_grad[0]
        out, slopes = torch.empty_like(x), torch.empty_like(x) if needed else x
        ctx.save_for_backward(slopes)
        rows = [y.view(-1, y.shape[-1]).split(32) for y in (x, out, slopes)]
        for x, s, slope in zip(*rows):
            torch.addcmul(a, x, x, value=b, out=s).mul_(x).sigmoid_()
            if needed:  # slope = s + s (1 - s) x (a + 3 b x^2)
                torch.addcmul(a, x, x, value=3 * b, out=slope).mul_(x)
                slope.addcmul_(slope, s, value=-1)
                torch.addcmul(s, slope, s, out=slope)
            s.mul_(x)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]
