"""The paper's optimizer, without the first moment, which it does not need."""

import math

import torch
from torch import Tensor

from models.common import note
from models.parallel import local

# eps only prevents 0 / 0. A loss is a mean over the elements of a latent, so gradients shrink with
# its size: the usual 1e-8 exceeds those of adapters at full size, and updates are far below the
# rate. Not below 4e-18: where squares under 1e-38 become 0, updates would exceed the rate
BETA, EPS = 0.999, 1e-16


class AdamW:
    """AdamW with the paper's betas (0, 0.999) and without weight decay.

    With beta1 = 0 the first moment is the gradient itself, so only the second one is stored.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], lr: float):
        self.parameters = parameters
        self.lr = lr
        self.steps = 0
        self.second = {name: torch.zeros_like(p) for name, p in parameters.items()}

    @torch.no_grad()
    def step(self, factor: float, finite: Tensor) -> None:
        """Update every parameter that has a gradient, at the learning rate lr * factor.

        finite () bool: if False, all gradients count as 0; on the device, so nothing waits for it.
        Afterwards p.grad holds the update divided by the learning rate.
        """
        self.steps += 1
        correction = math.sqrt(1 - BETA**self.steps)  # second moments start at zero
        skip = ~finite
        for name, p in self.parameters.items():
            if p.grad is None:  # e.g. the last text branch of Qwen-Image, whose output is unused
                continue
            p, grad, v = local(p), local(p.grad), local(self.second[name])  # this rank's shard
            grad.masked_fill_(skip, 0.0)
            v.mul_(BETA).addcmul_(grad, grad, value=1 - BETA)
            grad.div_(v.sqrt().div_(correction).add_(EPS))  # 1 or -1 in the first update
            p.sub_(grad, alpha=self.lr * factor)


def note_if_slow(role: str, update_rms: float) -> None:
    """Say once if the first updates of a role are far smaller than its learning rate."""
    if update_rms < 0.1:
        note(f"the first updates of {role} are smaller than a tenth of its learning rate")
