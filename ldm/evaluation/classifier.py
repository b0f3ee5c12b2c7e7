"""A small network that reads the five attributes of an image of shapes, to score whether a prompt was followed."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import rng
from ldm.data.sources import shapes
from ldm.imaging import pil_to_tensor
from ldm.io.tensors import load_weights, save_weights

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": shapes.SHAPES,
    "color": tuple(shapes.COLORS),
    "background": tuple(shapes.COLORS),
    "position": tuple(shapes.POSITIONS),
    "size": tuple(shapes.SIZES),
}
CLASSIFIER_VERSION = 2  # raise it when the network or its training change: weights of other versions are not read
MIN_ACCURACY = 0.995  # on real held-out renders


class AttributeClassifier(nn.Module):
    """(b, 3, size, size) in [-1, 1] -> logits of each attribute, (b, values)."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.ops import Conv2dNormActivation  # slow to import

        self.features = nn.Sequential(
            *Conv2dNormActivation(3, 32, stride=2), *Conv2dNormActivation(32, 64), *Conv2dNormActivation(64, 64),
            *Conv2dNormActivation(64, 128, stride=2), *Conv2dNormActivation(128, 128),
            nn.AdaptiveAvgPool2d(8), nn.Conv2d(128, 32, 1), nn.Flatten(), nn.Linear(32 * 64, 256), nn.ReLU(),
        )  # fmt: skip
        self.heads = nn.ModuleDict({name: nn.Linear(256, len(values)) for name, values in ATTRIBUTES.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}


def train_classifier(size: int, *, steps: int = 400, batch_size: int = 96, seed: int = 0) -> AttributeClassifier:
    """Train on renders of the training split's scenes."""
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
        labels = scene_labels(batch)
        loss = sum(F.cross_entropy(logits, labels[name]) for name, logits in model(images).items())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
        schedule.step()
    return model.eval()


def degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur and noise each image (b, c, h, w) at random: generated images have softer outlines than renders."""
    blur, noise = torch.rand(2, len(images), 1, 1, 1, generator=generator)
    soft = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    return torch.lerp(images, soft, blur) + 0.1 * noise * torch.randn(images.shape, generator=generator)


def check_classifier(model: AttributeClassifier, size: int) -> float:
    """Accuracy on held-out renders, all five attributes; ValueError when it is under 99.5 %."""
    scenes = shapes.scenes("test") * 3
    correct = count_correct(model, render_batch(scenes, size, seed=rng.fold_seed("held-out renders")), scenes)["all"]
    if correct < MIN_ACCURACY * len(scenes):
        found = f"{correct} of {len(scenes)} real renders at {size} pixels, {MIN_ACCURACY:.1%} are needed"
        raise ValueError(f"the classifier reads only {found}: delete its file to train it again")
    return correct / len(scenes)


def load_classifier(folder: Path, size: int) -> AttributeClassifier:
    """The classifier of this image size, trained at the first call; it is checked at every call."""
    path = folder / f"classifier-{CLASSIFIER_VERSION}-{size}.safetensors"
    if not path.is_file():
        print(f"training the classifier for shapes at {size} pixels, once, into {path}")
        save_weights(train_classifier(size), path)
    classifier = AttributeClassifier().eval()
    load_weights(classifier, path)
    accuracy = check_classifier(classifier, size)
    print(f"classifier accuracy on held-out renders: {accuracy:.1%}")
    return classifier


@torch.no_grad()
def count_correct(model: AttributeClassifier, images: Tensor, scenes: Sequence[shapes.Scene]) -> dict[str, int]:
    """How many images (b, 3, h, w) show the wanted value of each attribute, and of "all" five."""
    labels = scene_labels(scenes)
    correct = {name: logits.argmax(1) == labels[name] for name, logits in model(images).items()}
    correct["all"] = torch.stack(list(correct.values())).all(0)
    return {name: int(values.sum()) for name, values in correct.items()}


def scene_labels(scenes: Sequence[shapes.Scene]) -> dict[str, Tensor]:
    """The index of each scene's value of each attribute, (b,)."""
    return {
        name: torch.tensor([values.index(getattr(scene, name)) for scene in scenes])
        for name, values in ATTRIBUTES.items()
    }


def render_batch(scenes: Sequence[shapes.Scene], size: int, *, seed: int) -> Tensor:
    """Images of scenes, (b, 3, size, size) in [-1, 1]."""
    images = [pil_to_tensor(shapes.render(scene, size, seed=seed + i), 3) for i, scene in enumerate(scenes)]
    return torch.stack(images).to(memory_format=torch.channels_last)  # faster in convolutions
