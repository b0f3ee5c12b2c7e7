"""Whether images of a drawn set show what their prompts ask for, and vary in what these leave open."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm import rng
from ldm.evaluation.classifier import AttributeClassifier, attributes_shown, to_batch
from ldm.evaluation.drawn import DrawnSet
from ldm.evaluation.estimates import RESAMPLES, Estimate, bootstrap_ci, mean_ci, proportion_ci
from ldm.evaluation.subject import EvaluateConfig, Subject, generate

REAL_DRAWS = 1000  # repeated draws of as many real images as there are generated ones
SEEDS_OF_A_CAPTION = 8  # where it is measured what a caption leaves open
MARGIN = 1 / 64  # of the side, one pixel at least, between a figure and what counts as background
FLAT = 2 / 255  # in [-1, 1]: below it a difference is none of a drawn background


def prompt_accuracy(
    classifier: AttributeClassifier, images: Tensor, asked: Sequence[Mapping[str, str]]
) -> dict[str, Estimate]:
    """The share of images (b, 3, h, w) that show each attribute that their prompts ask for, and all of these."""
    shown = attributes_shown(classifier, images, asked)
    return {f"prompt accuracy, {name}": proportion_ci(sum(v), len(v)) for name, v in shown.items() if v}


@torch.no_grad()
def variety(
    drawn: DrawnSet, classifier: AttributeClassifier, images: Tensor, open_names: Sequence[str]
) -> dict[str, Estimate]:
    """How far attributes that prompts leave open are distributed from how they are in training.

    The total variation distance, half the sum of absolute differences, of images (b, 3, h, w), less the mean of that of
    as many real draws, which is not 0 either.
    """
    found, estimates = classifier(images), {}
    for name in open_names:
        values = drawn.attributes[name]
        training = _shares([values.index(getattr(scene, name)) for scene in drawn.scenes("train")], len(values))
        chosen = found[name].argmax(1).numpy()
        generator = np.random.Generator(np.random.PCG64(rng.fold_seed("variety", name)))
        again = generator.choice(chosen, (RESAMPLES, len(chosen)))
        real = generator.choice(len(values), (REAL_DRAWS, len(chosen)), p=training)
        of_real = np.array([_distance(row, training) for row in real])
        beyond = [_distance(row, training) - of_real.mean() for row in (chosen, *again)]
        measure = f"{name} left open: distance beyond that of real draws"
        estimates[measure] = bootstrap_ci(torch.tensor(beyond, dtype=torch.float64), len(chosen))
    return estimates


def _shares(indices: Any, count: int) -> np.ndarray:
    return np.bincount(indices, minlength=count) / len(indices)


def _distance(indices: np.ndarray, training: np.ndarray) -> float:
    """Total variation distance of the shares of indices to those of training."""
    return float(np.abs(_shares(indices, len(training)) - training).sum() / 2)


def background_deviation(drawn: DrawnSet, images: Tensor, scenes: Sequence[Any]) -> Estimate:
    """The standard deviation of generated images (b, 3, h, w) where renders of their scenes have a flat background.

    In steps of 8 bits, a mean over the channels and images.
    """
    masks = (background_mask(drawn, scene, images.shape[-1]) for scene in scenes)
    return mean_ci([_deviation(image, mask) for image, mask in zip(images, masks, strict=True)])


def _deviation(image: Tensor, mask: Tensor) -> float:
    return 127.5 * image[:, mask].std(1).mean().item()


def background_mask(drawn: DrawnSet, scene: Any, size: int) -> Tensor:
    """Where all renders of a scene, whatever its captions never name, are as their upper left corner: (h, w).

    It ends a margin before the figure of the few renders that are drawn, as what varies moves that of others further.
    """
    unnamed = {name: values for name, values in drawn.attributes.items() if name not in drawn.named(scene)}
    variants = [scene._replace(**{name: value}) for name, values in unnamed.items() for value in values] or [scene]
    renders = to_batch([drawn.render(variant, size, seed=seed) for variant in variants for seed in range(4)])
    figure = ((renders - renders[..., :1, :1]).abs() > FLAT).any(1).any(0)
    margin = max(round(MARGIN * size), 1)
    return F.max_pool2d(figure[None].float(), 2 * margin + 1, stride=1, padding=margin)[0] == 0


def what_is_shown(subject: Subject, generated: Tensor, config: EvaluateConfig) -> dict[str, Estimate]:
    """Whether images of the held-out captions show what these ask for, vary as in training, on flat backgrounds."""
    drawn = subject.drawn
    assert drawn is not None
    classifier, scenes = subject.classifier, drawn.by_caption("test")
    chosen = [scenes[caption] for caption in subject.captions]
    found = asked_for(subject, generated)
    if drawn.flat_background:
        found |= {"background deviation, 8-bit steps": background_deviation(drawn, generated, chosen)}
    if captions := drawn.open_captions():
        count = max(config.num_samples // SEEDS_OF_A_CAPTION, 1)
        spread = [captions[i * len(captions) // count] for i in range(count) for _ in range(SEEDS_OF_A_CAPTION)]
        named = drawn.asked(scenes[captions[0]], captions[0])
        left_open = [name for name in drawn.attributes if name not in named]
        found |= variety(drawn, classifier, generate(subject, spread, config), left_open)
    return found


def asked_for(subject: Subject, generated: Tensor) -> dict[str, Estimate]:
    """The prompt accuracy of images of the held-out captions."""
    drawn = subject.drawn
    assert drawn is not None
    scenes = drawn.by_caption("test")
    asked = [drawn.asked(scenes[caption], caption) for caption in subject.captions]
    return prompt_accuracy(subject.classifier, generated, asked)
