"""Changes to the training of a U-Net that `benchmarks/speedrun.py --candidate NAME` measures: rows of docs/records.md.

Each is a function that takes a stage that was built, and changes it before it trains. What pays moves into `ldm/`; what
does not stays in the table, whose row names the commit that had it. Muon is here still: it takes less than half of the
steps, each of which takes 2.4 times as long on a CPU, and has not been timed on a GPU.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ldm.stages.diffusion import DiffusionStage
from ldm.training.stage import Trainable

Candidate = Callable[[DiffusionStage], None]
MUON_RATIO = 20  # of Muon's learning rate to AdamW's


def muon(stage: DiffusionStage) -> None:
    """Matrices and kernels take orthogonalized steps, of MUON_RATIO times the rate; the rest AdamW (Jordan 2024)."""
    trained = stage.trainables[0].module
    stage.trainables = [Trainable("unet", trained, lambda weights, config: Muon(weights, config.learning_rate))]


class Muon(torch.optim.Optimizer):
    """Momentum that Newton and Schulz's iteration orthogonalizes, for what has two dimensions or more."""

    def __init__(self, parameters: list[nn.Parameter], learning_rate: float) -> None:
        self.rest = torch.optim.AdamW([p for p in parameters if p.ndim < 2], lr=learning_rate, betas=(0.9, 0.99))
        super().__init__([p for p in parameters if p.ndim >= 2], {"lr": MUON_RATIO * learning_rate})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of both."""
        super().zero_grad(set_to_none)
        self.rest.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of both."""
        rate = self.param_groups[0]["lr"]
        self.rest.param_groups[0]["lr"] = rate / MUON_RATIO
        self.rest.step()
        for p in self.param_groups[0]["params"]:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 0.05)
            update = newton_schulz(p.grad.lerp(momentum, 0.95).flatten(1)).view_as(p)
            p.sub_(update, alpha=rate * max(1, len(p) / p[0].numel()) ** 0.5)


def newton_schulz(matrix: Tensor) -> Tensor:
    """The nearest orthogonal matrix, about: five iterations of degree five, in bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16() / (matrix.norm() + 1e-7)
    tall = len(x) > x.shape[1]
    x = x.mT if tall else x
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix)


CANDIDATES: dict[str, Candidate] = {candidate.__name__: candidate for candidate in (muon,)}
