"""A small network that reads the attributes of an image of a drawn set, to score whether a prompt was followed."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ldm import rng
from ldm.evaluation.drawn import DrawnSet
from ldm.imaging import pil_to_tensor
from ldm.io.tensors import load_weights, save_weights

CLASSIFIER_VERSION = 4  # raise it when the network or its training change: weights of other versions are not read
CLASSIFIER_SIDE = 32  # pixels: larger images are reduced
VIEWS = 4  # of each render in training, degraded anew in each
NUM_CHECKED = 1000  # held-out renders
MIN_ACCURACY = 0.995  # on real held-out renders


class AttributeClassifier(nn.Module):
    """(b, 1 or 3, size, size) in [-1, 1] -> logits of each attribute, (b, values)."""

    def __init__(self, attributes: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.attributes = attributes
        from torchvision.ops import Conv2dNormActivation  # slow to import

        self.features = nn.Sequential(
            *Conv2dNormActivation(3, 32, stride=2), *Conv2dNormActivation(32, 64), *Conv2dNormActivation(64, 64),
            *Conv2dNormActivation(64, 128, stride=2), *Conv2dNormActivation(128, 128),
            nn.AdaptiveAvgPool2d(8), nn.Conv2d(128, 32, 1), nn.Flatten(), nn.Linear(32 * 64, 256), nn.ReLU(),
        )  # fmt: skip
        self.heads = nn.ModuleDict({name: nn.Linear(256, len(values)) for name, values in attributes.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if images.shape[-1] > CLASSIFIER_SIDE:
            images = F.adaptive_avg_pool2d(images, CLASSIFIER_SIDE)
        features = self.features(images.expand(-1, 3, -1, -1))
        return {name: head(features) for name, head in self.heads.items()}


def train_classifier(
    drawn: DrawnSet, size: int, *, steps: int | None = None, batch_size: int = 96, seed: int = 0
) -> AttributeClassifier:
    """Train on renders of the training split's scenes; the number of steps is that of the set when left out."""
    steps = steps or drawn.classifier_steps
    torch.manual_seed(rng.fold_seed(seed, "classifier"))
    model = AttributeClassifier(drawn.attributes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    scenes = repeated(drawn.scenes("train"), steps * batch_size // VIEWS)
    renders = [drawn.render(scene, size, seed=rng.fold_seed(seed, "renders", i)) for i, scene in enumerate(scenes)]
    for step in tqdm(range(steps), "training the classifier", unit="step"):
        chosen = torch.randint(len(scenes), (batch_size,), generator=rng.generator(seed, "classifier", step)).tolist()
        images = degrade(to_batch([renders[i] for i in chosen]), rng.generator(seed, "worsened", step))
        labels = label_indices(model, [drawn.labels(scenes[i]) for i in chosen])
        loss = sum(F.cross_entropy(logits, labels[name]) for name, logits in model(images).items())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
        schedule.step()
    return model.eval()


def repeated(scenes: Sequence[Any], count: int) -> list[Any]:
    """So many scenes: the first ones, and all of them again where there are fewer."""
    return list(itertools.islice(itertools.cycle(scenes), count))


def degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur and noise each image (b, c, h, w) at random: generated images have softer outlines than renders."""
    blur, noise = torch.rand(2, len(images), 1, 1, 1, generator=generator)
    soft = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    return torch.lerp(images, soft, blur) + 0.1 * noise * torch.randn(images.shape, generator=generator)


def check_classifier(model: AttributeClassifier, drawn: DrawnSet, size: int) -> dict[str, float]:
    """Accuracy on held-out renders, of all attributes that captions name, and of each other one.

    ValueError where the former is under 99.5 %; of the latter, such as a facing, some renders show nothing.
    """
    scenes, seed = repeated(drawn.scenes("test"), NUM_CHECKED), rng.fold_seed("held-out renders")
    images = to_batch([drawn.render(scene, size, seed=seed + i) for i, scene in enumerate(scenes)])
    named = [*map(drawn.named, scenes)]
    correct = attributes_shown(model, images, [*map(drawn.labels, scenes)])
    accuracy = {name: sum(right) / len(right) for name, right in correct.items() if right and name not in named[0]}
    all_named = attributes_shown(model, images, named)["all"]
    accuracy["all"] = sum(all_named) / len(all_named)
    if accuracy["all"] < MIN_ACCURACY:
        found = f"{accuracy['all']:.1%} of {len(scenes)} real renders at {size} pixels, {MIN_ACCURACY:.1%} are needed"
        raise ValueError(f"the classifier reads only {found}: delete its file to train it again")
    return accuracy


def load_classifier(folder: Path, drawn: DrawnSet, size: int) -> AttributeClassifier:
    """The classifier of this set and image size, trained at the first call; it is checked at every call."""
    path = folder / f"classifier-{drawn.name}-{CLASSIFIER_VERSION}-{size}.safetensors"
    if not path.is_file():
        print(f"training the classifier for {drawn.name} at {size} pixels, once, into {path}")
        save_weights(train_classifier(drawn, size), path)
    classifier = AttributeClassifier(drawn.attributes).eval()
    load_weights(classifier, path)
    accuracy = ", ".join(f"{name} {share:.1%}" for name, share in check_classifier(classifier, drawn, size).items())
    print(f"classifier accuracy on held-out renders: {accuracy}")
    return classifier


@torch.no_grad()
def attributes_shown(
    model: AttributeClassifier, images: Tensor, asked: Sequence[Mapping[str, str]]
) -> dict[str, list[bool]]:
    """Whether images (b, 3, h, w) show what each is asked for: by attribute, where it is asked for, and "all"."""
    shown: dict[str, list[bool]] = {name: [] for name in (*model.attributes, "all")}
    found = {name: logits.argmax(1).tolist() for name, logits in model(images).items()}
    for i, wanted in enumerate(asked):
        right = {name: model.attributes[name][found[name][i]] == value for name, value in wanted.items()}
        for name, value in (*right.items(), ("all", all(right.values()))):
            shown[name].append(value)
    return shown


def label_indices(model: AttributeClassifier, labels: Sequence[Mapping[str, str]]) -> dict[str, Tensor]:
    """The index of the value of each attribute, (b,)."""
    return {
        name: torch.tensor([list(values).index(label[name]) for label in labels])
        for name, values in model.attributes.items()
    }


def to_batch(images: Sequence[Image.Image]) -> Tensor:
    """Images as (b, 3, h, w) in [-1, 1]."""
    batch = torch.stack([pil_to_tensor(image, 3) for image in images])
    return batch.to(memory_format=torch.channels_last)  # faster in convolutions
