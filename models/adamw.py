"""The paper's optimizer, without the first moment, which it does not need."""

import math

import torch

from models.parallel import local

# eps only prevents 0 / 0. The usual 1e-8 is larger than the gradients of an adapter at full size,
# since a loss is the mean over the elements of a latent: updates would be far below the rate
BETA, EPS = 0.999, 1e-20


class AdamW:
    """AdamW with the paper's betas (0, 0.999) and without weight decay.

    With beta1 = 0 the first moment is the gradient itself, so only the second one is stored.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], lr: float):
        self.parameters, self.lr, self.steps = parameters, lr, 0
        self.second = {name: torch.zeros_like(p) for name, p in parameters.items()}

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Update every parameter that has a gradient, at the learning rate lr * factor."""
        self.steps += 1
        correction = math.sqrt(1 - BETA**self.steps)  # the second moment starts at zero
        for name, p in self.parameters.items():
            if p.grad is None:  # e.g. the last text branch of Qwen-Image, whose output is unused
                continue
            p, grad, v = local(p), local(p.grad), local(self.second[name])  # this rank's shard
            v.mul_(BETA).addcmul_(grad, grad, value=1 - BETA)
            denominator = v.sqrt().add_(EPS * correction)
            p.addcdiv_(grad, denominator, value=-self.lr * factor * correction)
