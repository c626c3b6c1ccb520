"""The paper's optimizer, without the memory that it does not use."""

import math

import torch

from models.parallel import part


class AdamW:
    """AdamW with betas (0, 0.999), no decay, eps 1e-8: what the paper trains with.

    Without momentum the first moment is the gradient itself, so only the second is kept.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], lr: float):
        self.parameters, self.lr, self.steps = parameters, lr, 0
        self.second = {name: torch.zeros_like(p) for name, p in parameters.items()}

    @torch.no_grad()
    def step(self, factor: float, beta: float = 0.999, eps: float = 1e-8) -> None:
        """Move every parameter that has a gradient by about lr * factor, against it."""
        self.steps += 1
        unbias = math.sqrt(1 - beta**self.steps)
        for name, p in self.parameters.items():
            if p.grad is None:  # nobody reads the output of Qwen-Image's last text branch
                continue
            p, grad, v = part(p), part(p.grad), part(self.second[name])
            v.mul_(beta).addcmul_(grad, grad, value=1 - beta)
            p.addcdiv_(grad, v.sqrt().add_(eps * unbias), value=-self.lr * factor * unbias)
