"""Changes to the training of a U-Net that `benchmarks/speedrun.py --candidate NAME` measures: rows of docs/records.md.

Each is a function that takes a stage that was built, and changes it before it trains. What pays moves into `ldm/`; what
does not stays in the table, whose row names the commit that had it.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.data import Batch
from ldm.data.latents import InMemoryLatents
from ldm.data.loader import sample_batches
from ldm.rng import StepRNG
from ldm.stages.diffusion import DiffusionStage, squared_error
from ldm.text.image_tower import ImageTower
from ldm.training.stage import Trainable
from ldm.unet import UNet
from ldm.unet.blocks import Attention

Candidate = Callable[[DiffusionStage], None]
GUIDE_STEP = 300  # of autoguidance


# The noise, t and the latents.


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


# Further terms of the loss.


def dispersive(stage: DiffusionStage) -> None:
    """Features of samples repel each other (Wang and He 2025, equation 6, with weight and temperature 0.5)."""
    features = middle_features(stage)

    def term() -> Tensor:
        h = features().flatten(1).float()
        distances = (h[:, None] - h).square().mean(2)
        return 0.5 * (-distances / 0.5).exp().mean().log()

    add_term(stage, term)


def contrastive_flow(stage: DiffusionStage) -> None:
    """The prediction is pushed away from the target of another sample (Stoica et al. 2025, equation 6, weight 0.05)."""
    prediction = catch_output(stage.unet)
    target = catch(stage.diffusion, "training_target")
    add_term(stage, lambda: -0.05 * squared_error(prediction(), target().roll(1, 0)).mean())


def align_vae(stage: DiffusionStage) -> None:
    """The middle's features follow those of the VAE's decoder, by their cosine (Yu et al. 2025, equation 8)."""
    vae, latents = stage.vae, catch(stage, "latents")
    assert vae is not None

    def target() -> Tensor:
        raw = vae.unstandardize(latents())
        return vae.decoder.middle(vae.decoder.conv_in(vae.post_quant_conv(raw)))

    factor = stage.config.unet.factor
    align(stage, lambda: F.pixel_unshuffle(target(), factor), factor**2 * vae.decoder.conv_in.out_channels)


def align_clip(stage: DiffusionStage) -> None:
    """The middle's features follow those that the image tower of the own OpenCLIP has of the image, computed once."""
    features, tower = cached_features(stage)
    align(stage, features, tower.visual.conv1.out_channels)


def align_relations(stage: DiffusionStage) -> None:
    """The cosines between the middle's features of an image are those between the image tower's; there is no head."""
    features, (wanted, _) = middle_features(stage), cached_features(stage)

    def term() -> Tensor:
        h = features()
        target = F.adaptive_avg_pool2d(wanted(), (h.shape[2], h.shape[3]))
        return (cosines(h.float()) - cosines(target)).square().mean()

    add_term(stage, term)


def cosines(h: Tensor) -> Tensor:
    """Between all places of each image: (b, c, h, w) -> (b, h w, h w)."""
    unit = F.normalize(h.flatten(2), dim=1)
    return unit.mT @ unit


def cached_features(stage: DiffusionStage) -> tuple[Callable[[], Tensor], ImageTower]:
    """What the image tower of the own OpenCLIP has of the images of a batch, (b, c, h, w), and the tower."""
    tower, open_data, loss, last = ImageTower.load(stage.config.text.model), stage.open_data, stage.loss, list[Tensor]()

    def opened(accelerator: Any) -> None:
        open_data(accelerator)
        cached = stage.data
        assert isinstance(cached, InMemoryLatents)
        with torch.no_grad():
            batches = sample_batches(cached.data, list(range(len(cached))))
            cached.columns[0]["features"] = torch.cat([tower(batch["image"])[-1] for batch in batches])

    def with_features(name: str, networks: Any, batch: Any, rng: StepRNG) -> dict[str, Tensor]:
        last[:] = [batch["features"]]
        return loss(name, networks, batch, rng)

    replace(stage, "open_data", opened)
    replace(stage, "loss", with_features)
    return (lambda: last[0]), tower


def align(stage: DiffusionStage, target: Callable[[], Tensor], width: int) -> None:
    """Half of the mean cosine distance of a projection of the middle's features and the target (b, width, h, w)."""
    features = middle_features(stage)
    project = nn.Conv2d(stage.config.unet.widths[-1], width, 1)
    stage.unet.align = project  # so it is trained, too

    def term() -> Tensor:
        h = features()
        with torch.no_grad():
            wanted = F.adaptive_avg_pool2d(target(), (h.shape[2], h.shape[3]))
        return -0.5 * F.cosine_similarity(project(h), wanted, dim=1).mean()

    add_term(stage, term)


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
    """Matrices and kernels take orthogonalized steps, of 20 times the learning rate; the rest AdamW (Jordan 2024)."""
    stage.trainables = [
        Trainable("unet", stage.unet, lambda parameters, config: Muon(parameters, config.learning_rate))
    ]


class Muon(torch.optim.Optimizer):
    """Momentum that Newton and Schulz's iteration orthogonalizes, for what has two dimensions or more."""

    def __init__(self, parameters: list[nn.Parameter], learning_rate: float) -> None:
        self.rest = torch.optim.AdamW([p for p in parameters if p.ndim < 2], lr=learning_rate, betas=(0.9, 0.99))
        super().__init__([p for p in parameters if p.ndim >= 2], {"lr": 20 * learning_rate})
        self.ratio = 20

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of both."""
        rate = self.param_groups[0]["lr"]
        self.rest.param_groups[0]["lr"] = rate / self.ratio
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


def power_ema(stage: DiffusionStage) -> None:
    """Averages of power profiles (Karras et al. 2024, section 3.1); the one of least validation loss generates."""
    exponents, step, best = (30.0, 16.97, 6.94, 3.56), 0, {0: 0.0}
    averages = {gamma: [p.detach().clone() for p in stage.unet.parameters()] for gamma in exponents}

    def after_step(mean: Any) -> None:
        nonlocal step
        step += 1
        weights = [p.detach() for p in stage.unet.parameters()]
        for gamma, average in averages.items():
            torch._foreach_lerp_(average, weights, 1 - (1 - 1 / step) ** (gamma + 1))

    def choose() -> None:
        if step not in best:
            losses = {}
            for gamma, average in averages.items():
                load(average, stage.unet)
                losses[gamma] = stage.validate()["validation_loss"]
            best[step] = min(losses, key=losses.__getitem__)
            print(f"\nvalidation losses {losses}")
        load(averages[best[step]], stage.unet)

    replace(stage, "after_step", after_step)
    before_sampling(stage, choose)


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


def catch_output(module: nn.Module) -> Callable[[], Tensor]:
    """What a module returned last."""
    last: list[Tensor] = []
    module.register_forward_hook(lambda module, inputs, output: last.__setitem__(slice(None), [output]))
    return lambda: last[0]


def middle_features(stage: DiffusionStage) -> Callable[[], Tensor]:
    """What the U-Net has after its middle, (b, c, h, w)."""
    return catch_output(stage.unet.middle[-1])


def add_term(stage: DiffusionStage, term: Callable[[], Tensor]) -> None:
    """Add to the loss."""
    loss = stage.loss

    def with_term(*args: Any) -> dict[str, Tensor]:
        losses = loss(*args)
        value = term()
        return {**losses, "loss": losses["loss"] + value, "term": value}

    replace(stage, "loss", with_term)


def load(weights: list[Tensor], module: nn.Module) -> None:
    """Copy weights into the parameters of a module, in their order."""
    with torch.no_grad():
        for p, value in zip(module.parameters(), weights, strict=True):
            p.copy_(value)


def before_sampling(stage: DiffusionStage, action: Callable[[], None]) -> None:
    """Call it before images are generated, where the averaged weights are in place."""
    open_data = stage.open_data

    def opened(accelerator: Any) -> None:
        open_data(accelerator)
        sample = stage.pipeline.sample

        def sampled(*args: Any, **settings: Any) -> Tensor:
            action()
            return sample(*args, **settings)

        replace(stage.pipeline, "sample", sampled)

    replace(stage, "open_data", opened)


CANDIDATES: dict[str, Candidate] = {
    candidate.__name__: candidate
    for candidate in (
        immiscible,
        posterior_mean,
        dispersive,
        contrastive_flow,
        align_vae,
        align_clip,
        align_relations,
        qk_norm,
        muon,
        power_ema,
        autoguidance,
    )
}
