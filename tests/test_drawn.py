"""What captions of drawn sets ask for, and whether images show it, vary, and have flat backgrounds."""

from collections.abc import Sequence
from math import comb

import pytest
import torch
from torch import Tensor, nn

from ldm.data import DataConfig
from ldm.data.sources import shapes
from ldm.data.sources.characters import Character
from ldm.evaluation.classifier import to_batch
from ldm.evaluation.drawn import DrawnSet, drawn_set
from ldm.evaluation.prompts import background_deviation, prompt_accuracy, variety

CAT = Character("cat", "astronaut", "blue", "left")


def opened(source: str) -> DrawnSet:
    """One of the sets."""
    found = drawn_set(DataConfig(source=source))
    assert found is not None
    return found


class Reader(nn.Module):
    """Reads the values of one attribute that are written in the first pixel of each image."""

    def __init__(self, name: str, values: Sequence[str]) -> None:
        super().__init__()
        self.attributes = {name: values}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        [(name, values)] = self.attributes.items()
        return {name: torch.eye(len(values))[images[:, 0, 0, 0].long()]}


def written(indices: Sequence[int]) -> Tensor:
    """Images for `Reader`."""
    return torch.tensor(indices).float()[:, None, None, None].expand(-1, 3, 2, 2)


@pytest.mark.parametrize("source", ["shapes", "pairs"])
def test_captions_of_shapes_leave_nothing_open(source: str) -> None:
    drawn = opened(source)
    for scene in drawn.scenes("test")[:50]:
        assert all(
            drawn.asked(scene, text) == drawn.labels(scene) == drawn.named(scene) for text in drawn.captions(scene)
        )
    assert not drawn.open_captions()
    assert all(text in drawn.captions(scene) for text, scene in list(drawn.by_caption("test").items())[:50])


def test_the_order_of_two_objects_is_not_asked_for() -> None:
    """ "A right of B" and "B left of A" are one image."""
    drawn = opened("pairs")
    one = shapes.PairScene("star", "red", "ring", "blue", "white", "right of")
    other = shapes.PairScene("ring", "blue", "star", "red", "white", "left of")
    assert drawn.labels(one) == drawn.labels(other) == other._asdict()
    assert drawn.asked(one, shapes.captions(one)[0]) == other._asdict()
    below, above = one._replace(relation="below"), other._replace(relation="above")
    assert drawn.labels(below) == drawn.labels(above) == above._asdict()


def test_captions_of_characters_leave_the_background_open() -> None:
    """And the side that they face, always."""
    drawn = opened("characters")
    said = {"creature": "cat", "role": "astronaut"}
    for text in ("a cat astronaut", "an astronaut cat", "a cat dressed as an astronaut"):
        assert drawn.asked(CAT, text) == said
        assert drawn.asked(CAT, f"{text} on a blue background") == drawn.named(CAT) == {**said, "background": "blue"}
    scenes = drawn.by_caption("test")
    assert set(drawn.open_captions()) == {text for text in scenes if "background" not in text}
    assert scenes["a cat astronaut"][:2] == CAT[:2] and all("none" not in scene for scene in scenes.values())


def test_other_sets_are_not_read() -> None:
    assert drawn_set(DataConfig(source="emoji")) is None
    assert drawn_set(DataConfig(source="shapes", channels=1)) is None


def test_what_is_not_asked_for_is_not_counted() -> None:
    reader = Reader("color", ("red", "blue"))
    asked = [{"color": "red"}, {"color": "red"}, {"color": "blue"}, {}]
    found = prompt_accuracy(reader, written([0, 1, 1, 0]), asked)  # type: ignore[arg-type]
    color, everything = found["prompt accuracy, color"], found["prompt accuracy, all"]
    assert (color.value, color.samples) == (pytest.approx(2 / 3), 3)
    assert (everything.value, everything.samples) == (0.75, 4)


def test_variety_of_known_counts() -> None:
    """Training has each of the 8 backgrounds equally often, so real draws have De Moivre's mean deviation."""
    drawn, n, p = opened("characters"), 80, 1 / 8
    reader = Reader("background", drawn.attributes["background"])
    k = int(n * p) + 1
    of_real = 8 / 2 * 2 * k * comb(n, k) * p**k * (1 - p) ** (n - k + 1) / n
    for indices, distance in (([3] * n, 7 / 8), ([*range(8)] * 10, 0.0), ([0, 1] * 40, 6 / 8)):
        [(name, found)] = variety(drawn, reader, written(indices), ["background"]).items()  # type: ignore[arg-type]
        assert name.startswith("background left open")
        assert found.value == pytest.approx(distance - of_real, abs=0.005) and found.samples == n
        assert found.low <= found.value <= found.high


@pytest.mark.parametrize(("source", "size"), [("shapes", 32), ("characters", 64)])
def test_flat_backgrounds_deviate_by_what_is_added(source: str, size: int) -> None:
    """Renders by nothing, noise of a standard deviation of 4 steps by 4, whatever the character is like."""
    drawn = opened(source)
    scenes = drawn.scenes("test")[:12]
    images = to_batch([drawn.render(scene, size, seed=100 + i) for i, scene in enumerate(scenes)])
    assert background_deviation(drawn, images, scenes).value < 0.05
    noise = 4 / 127.5 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert background_deviation(drawn, images + noise, scenes).value == pytest.approx(4, rel=0.05)
    gray = torch.zeros(len(scenes), 3, size, size)
    assert background_deviation(drawn, gray, scenes).value == 0


def test_renders_are_the_images_of_the_set() -> None:
    scene = shapes.scenes("test")[0]
    one, other = (to_batch([opened("shapes").render(scene, 16, seed=seed)]) for seed in (5, 6))
    assert torch.equal(one, to_batch([shapes.render(scene, 16, seed=5)]))
    assert not torch.equal(one, other), "the seed moves the objects a little"
