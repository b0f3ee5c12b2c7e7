"""Changes to the training of a U-Net that `benchmarks/speedrun.py --candidate NAME` measures: rows of docs/records.md.

Each is a function that takes a stage that was built, and changes it before it trains. What pays moves into `ldm/`; what
does not stays in the table, whose row names the commit that had it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ldm.data import Batch
from ldm.evaluation.drawn import drawn_set
from ldm.rng import StepRNG
from ldm.stages.diffusion import DiffusionStage
from ldm.training.stage import Networks, Trainable
from ldm.unet import UNet
from ldm.unet.blocks import Attention

Candidate = Callable[[DiffusionStage], None]
GUIDE_STEP = 200  # of autoguidance
MUON_RATIO = 20  # of Muon's learning rate to AdamW's


# The captions, the noise and the latents.


def one_wording(stage: DiffusionStage) -> None:
    """Training has one caption where several ask for the same: the first of them."""
    drawn = drawn_set(stage.config.data)
    assert drawn is not None
    first: dict[str, str] = {}
    wording: dict[str, str] = {}
    for caption, scene in drawn.by_caption("train").items():
        wording[caption] = first.setdefault(str(drawn.asked(scene, caption)), caption)
    loss = stage.loss

    def reworded(name: str, networks: Networks, batch: Batch, rng: StepRNG) -> dict[str, Tensor]:
        captions = [wording.get(caption, caption) for caption in batch["caption"]]
        return loss(name, networks, {**batch, "caption": captions}, rng)

    replace(stage, "loss", reworded)


class MatchedNoise(StepRNG):
    """Noise that is dealt out to the samples of a batch so that each gets one near its latent."""

    def __init__(self, rng: StepRNG, latents: Callable[[], Tensor]) -> None:
        super().__init__(rng.seed, rng.step, rng.positions, rng.batch_size, rng.device)
        self.latents = latents

    def randn(self, stream: str, shape: Any) -> Tensor:
        noise = super().randn(stream, shape)
        if stream != "noise":
            return noise
        distances = torch.cdist(self.latents().flatten(1), noise.flatten(1))
        order = torch.empty(len(noise), dtype=torch.long)
        for _ in noise:  # greedy: the nearest pair that is left
            sample, nearest = divmod(int(distances.argmin()), len(noise))
            order[sample] = nearest
            distances[sample], distances[:, nearest] = torch.inf, torch.inf
        return noise[order]


def immiscible(stage: DiffusionStage) -> None:
    """Immiscible diffusion (Li et al. 2024, section 3.2), with a greedy assignment within the batch."""
    loss, latents = stage.loss, catch(stage, "latents")
    replace(stage, "loss", lambda name, networks, batch, rng: loss(name, networks, batch, MatchedNoise(rng, latents)))


def posterior_mean(stage: DiffusionStage) -> None:
    """The mean of the VAE's posterior is noised, not a sample of it."""
    latents = stage.latents

    def mean(batch: Batch, randn: Any) -> Tensor:
        return latents(batch, lambda shape: torch.zeros(len(batch["sizes"]), *shape))

    replace(stage, "latents", mean)


# The network, the optimizer and the averages.


def qk_norm(stage: DiffusionStage) -> None:
    """Queries and keys are normed by their root mean square (Henry et al. 2020; Esser et al. 2024)."""
    for module in stage.unet.modules():
        if isinstance(module, Attention):
            for name in ("to_q", "to_k"):
                linear = getattr(module, name)
                norm = nn.RMSNorm(linear.out_features // module.num_heads)
                setattr(module, name, nn.Sequential(linear, ByHead(norm, module.num_heads)))


class ByHead(nn.Module):
    """A norm of each head: (b, n, heads d) -> (b, n, heads d)."""

    def __init__(self, norm: nn.Module, num_heads: int) -> None:
        super().__init__()
        self.norm, self.num_heads = norm, num_heads

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.unflatten(-1, (self.num_heads, -1))).flatten(-2)


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


def autoguidance(stage: DiffusionStage) -> None:
    """Guided by the weights of an early step (Karras et al. 2024), when the network has had twice as many."""
    guide, step = UNet(stage.config.unet).eval(), 0

    def after_step(mean: Any) -> None:
        nonlocal step
        step += 1
        if step == GUIDE_STEP:
            guide.load_state_dict(stage.unet.state_dict())
        if step == 2 * GUIDE_STEP:
            stage.pipeline.guide_unet = guide

    replace(stage, "after_step", after_step)


# What the candidates are made of.


def replace(owner: Any, name: str, method: Callable[..., Any]) -> None:
    """Put another method into an object."""
    setattr(owner, name, method)


def catch(owner: Any, name: str) -> Callable[[], Tensor]:
    """What a method returned last."""
    method, last = getattr(owner, name), list[Tensor]()

    def caught(*args: Any) -> Tensor:
        last[:] = [method(*args)]
        return last[0]

    replace(owner, name, caught)
    return lambda: last[0]


CANDIDATES: dict[str, Candidate] = {
    candidate.__name__: candidate
    for candidate in (
        one_wording,
        immiscible,
        posterior_mean,
        qk_norm,
        muon,
        autoguidance,
    )
}
