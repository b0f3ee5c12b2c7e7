"""A small network that reads the five attributes of a shapes picture, to score whether a prompt was obeyed."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ldm import rng
from ldm.data.sources import shapes

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": shapes.SHAPES,
    "color": tuple(shapes.COLORS),
    "background": tuple(shapes.COLORS),
    "position": tuple(shapes.POSITIONS),
    "size": tuple(shapes.SIZES),
}
CLASSIFIER_VERSION = 2  # raise it when the network or its training change: weights of other recipes are not read
MIN_ACCURACY = 0.995  # share of real held-out renders that it must read without a mistake


class AttributeClassifier(nn.Module):
    """(b, 3, size, size) in [-1, 1] -> logits of each attribute, (b, values)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_convolution(3, 32, stride=2), *_convolution(32, 64), *_convolution(64, 64),
            *_convolution(64, 128, stride=2), *_convolution(128, 128),
            nn.AdaptiveAvgPool2d(8), nn.Conv2d(128, 32, 1), nn.Flatten(), nn.Linear(32 * 64, 256), nn.ReLU(),
        )  # fmt: skip
        self.heads = nn.ModuleDict({name: nn.Linear(256, len(values)) for name, values in ATTRIBUTES.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def predict_scenes(self, images: Tensor) -> list[shapes.Scene]:
        """The scene that each picture seems to show."""
        best = {name: logits.argmax(1).tolist() for name, logits in self(images).items()}
        return [
            shapes.Scene(**{name: ATTRIBUTES[name][best[name][i]] for name in ATTRIBUTES}) for i in range(len(images))
        ]


def _convolution(channels_in: int, channels_out: int, *, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]


def train_classifier(size: int, *, steps: int = 400, batch_size: int = 96, seed: int = 0) -> AttributeClassifier:
    """Train on renders of the training split's scenes and check on those of the test split.

    ValueError when it misreads more than 0.5 % of the held-out renders: then its word is worth nothing.
    """
    torch.manual_seed(rng.fold_seed(seed, "classifier"))
    model = AttributeClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    scenes = shapes.scenes("train")
    for step in range(steps):
        chosen = torch.randint(len(scenes), (batch_size,), generator=rng.generator(seed, "classifier", step)).tolist()
        batch = [scenes[i] for i in chosen]
        images = render_batch(batch, size, seed=rng.fold_seed(seed, "renders", step))
        images = degrade(images, rng.generator(seed, "worsened", step))
        loss = sum(
            F.cross_entropy(logits, torch.tensor([ATTRIBUTES[name].index(getattr(s, name)) for s in batch]))
            for name, logits in model(images).items()
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
        schedule.step()
    check_classifier(model.eval(), size)
    return model


def degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur and noise each image, more or less: a reader of generated pictures must not stumble over soft outlines."""
    blur, noise = torch.rand(2, len(images), 1, 1, 1, generator=generator)
    soft = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    return torch.lerp(images, soft, blur) + 0.1 * noise * torch.randn(images.shape, generator=generator)


def check_classifier(model: AttributeClassifier, size: int) -> float:
    """Share of held-out renders that are read without a mistake; ValueError when it is under 99.5 %."""
    scenes = shapes.scenes("test") * 3
    right = count_correct(model, render_batch(scenes, size, seed=rng.fold_seed("held-out renders")), scenes)["all"]
    if right < MIN_ACCURACY * len(scenes):
        raise ValueError(
            f"the classifier reads only {right} of {len(scenes)} real renders at {size} pixels, "
            f"{MIN_ACCURACY:.1%} are needed to score generated ones: delete its file to train it again"
        )
    return right / len(scenes)


def count_correct(model: AttributeClassifier, images: Tensor, scenes: Sequence[shapes.Scene]) -> dict[str, int]:
    """How many pictures show the wanted value of each attribute, and of "all" five."""
    pairs = list(zip(model.predict_scenes(images), scenes, strict=True))
    right = {name: sum(getattr(a, name) == getattr(b, name) for a, b in pairs) for name in ATTRIBUTES}
    return right | {"all": sum(a == b for a, b in pairs)}


def render_batch(scenes: Sequence[shapes.Scene], size: int, *, seed: int) -> Tensor:
    """Pictures of scenes, (b, 3, size, size) in [-1, 1]."""
    return to_tensor([shapes.render(scene, size, seed=seed + i) for i, scene in enumerate(scenes)])


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """8-bit RGB pictures of one size -> (b, 3, h, w) in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
