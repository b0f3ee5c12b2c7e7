"""The sets whose images are drawn here, so that what a prompt asks for can be checked: shapes, characters, phantom."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from PIL import Image

from ldm.data import DataConfig
from ldm.data.sources import characters, phantom, shapes
from ldm.data.sources.base import Split
from ldm.data.sources.phantom_art import LESION_SIGNALS, LEVELS, LOBES, RADII, SIGNALS


class DrawnSet(NamedTuple):
    """Scenes, which have an attribute each by its name, their captions, and how they are drawn."""

    name: str
    attributes: Mapping[str, tuple[str, ...]]  # the values of each
    scenes: Callable[[Split], Sequence[Any]]
    captions: Callable[[Any], tuple[str, ...]]  # the last names all that any names
    render: Callable[..., Image.Image]  # (scene, size, seed=)
    classifier_steps: int  # after which its classifier reads held-out renders
    seen: Callable[[Any], Any] = lambda scene: scene  # as its image shows it
    flat_background: bool = True

    def labels(self, scene: Any) -> dict[str, str]:
        """The value of each attribute that the image of a scene shows."""
        seen = self.seen(scene)
        return {name: getattr(seen, name) for name in self.attributes}

    def asked(self, scene: Any, caption: str) -> dict[str, str]:
        """Those that a caption of the scene names; the others it leaves open."""
        labels = self.labels(scene)
        return {name: labels[name] for name in labels if re.search(rf"\b{getattr(scene, name)}\b", caption)}

    def named(self, scene: Any) -> dict[str, str]:
        """Those that captions can name; the others are always open."""
        return self.asked(scene, self.captions(scene)[-1])

    def by_caption(self, split: Split) -> dict[str, Any]:
        """A scene that each caption of a split describes; others differ from it in what the caption leaves open."""
        return {text: scene for scene in self.scenes(split) for text in self.captions(scene)}

    def open_captions(self) -> list[str]:
        """The captions of the test split that leave open what others name."""
        scenes = self.by_caption("test")
        return [text for text, scene in scenes.items() if self.asked(scene, text) != self.named(scene)]


OPPOSITES = {"right of": "left of", "below": "above"}


def from_first(scene: shapes.PairScene) -> shapes.PairScene:
    """The same pair, described from its left or upper object: which one a caption begins with cannot be seen."""
    if scene.relation not in OPPOSITES:
        return scene
    objects = (scene.other_shape, scene.other_color, scene.shape, scene.color)
    return shapes.PairScene(*objects, scene.background, OPPOSITES[scene.relation])


def drawn_set(data: DataConfig) -> DrawnSet | None:
    """The set that a model was trained on, if it is one of these, with the channels that it is drawn for."""
    if (data.channels, data.source) == (1, "phantom"):
        values = {"contrast": tuple(SIGNALS), "level": tuple(LEVELS), "ventricles": phantom.VENTRICLES}
        values |= {"side": ("no", *phantom.SIDES), "lobe": ("no", *LOBES), "size": ("no", *RADII)}
        values |= {"brightness": ("no", *LESION_SIGNALS)}
        drawn = DrawnSet("phantom", values, phantom.scenes, phantom.captions, phantom.render, 900)
        return drawn._replace(flat_background=False)
    if data.channels != 3:
        return None
    if data.source == "shapes":
        colors = tuple(shapes.COLORS)
        values = {"shape": shapes.SHAPES, "color": colors, "background": colors}
        values |= {"position": tuple(shapes.POSITIONS), "size": tuple(shapes.SIZES)}
        return DrawnSet("shapes", values, shapes.scenes, shapes.captions, shapes.render, 400)
    if data.source == "pairs":
        colors = tuple(shapes.COLORS)
        values = {"shape": shapes.SHAPES, "color": colors, "other_shape": shapes.SHAPES, "other_color": colors}
        values |= {"background": colors, "relation": tuple(dict.fromkeys(OPPOSITES.values()))}
        return DrawnSet("pairs", values, shapes.pair_scenes, shapes.captions, shapes.render, 250, from_first)
    if data.source == "characters":
        values = {"creature": tuple(characters.CREATURES), "role": tuple(characters.ROLES)}
        values |= {"background": tuple(characters.BACKGROUNDS), "facing": characters.FACINGS}
        render = partial(characters.render, font=data.emoji_font)
        steps = 200 if data.emoji_font is None else 600  # Noto's roles are less easy to tell from each other
        name = "characters" if data.emoji_font is None else f"characters-{data.emoji_font.stem}"
        return DrawnSet(name, values, characters.pairs, characters.captions, render, steps)
    return None
