"""Characters: what is drawn is what is said, held-out pairs are never shown, any font will do."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from fontTools.ttLib import TTFont

from ldm.data import DataConfig, open_dataset
from ldm.data.batch_sampler import SampleKey
from ldm.data.sources import characters
from ldm.data.sources.characters import ALONE, BACKGROUNDS, CREATURES, FACINGS, ROLES, Character
from ldm.data.sources.emoji_font import find_font, openmoji

FONTS = sorted({openmoji(), find_font()})


def pixels(image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), np.float64)


def difference(first, second) -> float:
    return np.abs(pixels(first) - pixels(second)).mean()


@pytest.fixture(scope="module")
def rows():
    return characters.load("train", 32, count=120)


def test_columns_and_images(rows):
    assert rows.column_names == ["image", "caption", "creature", "role", "background", "facing"]
    assert rows[0]["image"].size == (32, 32) and rows[0]["image"].mode == "RGB"
    assert characters.load("test", count=1)[0]["image"].size == (64, 64)


def test_a_row_depends_on_seed_and_index_alone(rows):
    fewer, other = characters.load("train", 32, count=5), characters.load("train", 32, count=20, seed=1)
    assert all(difference(fewer[i]["image"], rows[i]["image"]) == 0 for i in range(5))
    assert fewer["caption"][:] == rows["caption"][:5]
    assert all(other[i]["role"] == rows[i]["role"] for i in range(20))
    assert all(difference(other[i]["image"], rows[i]["image"]) > 0 for i in range(20))


def test_a_tenth_of_the_pairs_is_held_out_on_every_background():
    held_out = set(characters.held_out_pairs())
    assert ("cat", "astronaut") in held_out and len(held_out) == round(0.1 * len(CREATURES) * len(ROLES))
    train, test = characters.scenes("train"), characters.scenes("test")
    assert not {scene[:2] for scene in train} & held_out and {scene[:2] for scene in test} == held_out
    assert len(set(train + test)) == len(train) + len(test)
    names = len(CREATURES) * len(ROLES) + len(CREATURES) + len(ROLES)
    assert len(train) + len(test) == names * len(BACKGROUNDS) * len(FACINGS)


def test_training_shows_each_word_with_and_without_another():
    train = characters.scenes("train")
    assert {scene.creature for scene in train if scene.role == ALONE} == set(CREATURES)
    assert {scene.role for scene in train if scene.creature == ALONE} == set(ROLES)
    together = [scene for scene in train if ALONE not in scene]
    for name, values in (("creature", CREATURES), ("role", ROLES)):
        shown = {value: sum(getattr(scene, name) == value for scene in together) for value in values}
        assert min(shown.values()) > 0.7 * 24 * len(BACKGROUNDS) * len(FACINGS), shown
    assert set(characters.pairs("train")) == set(together)


def test_captions_name_creature_and_role_and_half_of_them_the_background():
    scene = Character("cat", "astronaut", "blue", "left")
    texts = characters.captions(scene)
    assert texts[0] == "a cat astronaut" and "an astronaut cat on a blue background" in texts
    assert all("cat" in text and "astronaut" in text for text in texts) and len(set(texts)) == len(texts)
    assert sum("blue" in text for text in texts) == len(texts) / 2
    assert not any("left" in text for text in texts)
    assert characters.captions(scene._replace(role=ALONE))[0] == "a cat"
    assert characters.captions(scene._replace(creature=ALONE))[0] == "an astronaut"


def test_rows_show_their_background_and_captions_are_true(rows):
    for row in rows:
        scene = Character(*(row[name] for name in Character._fields))
        assert row["caption"] in characters.captions(scene)
        corner = pixels(row["image"])[0, 0]
        distances = {name: np.abs(corner - np.array(color)).sum() for name, color in BACKGROUNDS.items()}
        assert min(distances, key=distances.get) == scene.background, row["caption"]  # type: ignore[arg-type]


def test_backgrounds_are_flat_and_told_apart_whatever_their_hue():
    corners: dict[str, list[np.ndarray]] = {name: [] for name in BACKGROUNDS}
    for name, seed in itertools.product(BACKGROUNDS, range(12)):
        image = pixels(characters.render(Character("cat", "king", name, "right"), 32, seed=seed))
        assert np.ptp(image[:3, :6].reshape(-1, 3), axis=0).max() == 0
        corners[name].append(image[0, 0])
    assert all(np.ptp(values, axis=0).max() > 2 for values in corners.values())
    for first, second in itertools.combinations(corners.values(), 2):
        assert min(np.abs(a - b).sum() for a in first for b in second) > 25


def test_what_captions_leave_open_varies():
    scene = Character("fox", "farmer", "green", "right")
    images = [characters.render(scene, 64, seed=seed) for seed in range(4)]
    assert all(difference(a, b) > 1 for a, b in itertools.combinations(images, 2))
    mirrored = characters.render(scene._replace(facing="left"), 64, seed=0)
    assert np.array_equal(pixels(mirrored)[:, ::-1], pixels(images[0])) and difference(mirrored, images[0]) > 5


@pytest.mark.parametrize("font", FONTS, ids=lambda path: path.name)
def test_every_role_is_seen_on_every_creature(font):
    """Images of two roles with one creature, and of two creatures in one role, differ in more than a few pixels."""

    def draw(creature: str, role: str) -> np.ndarray:
        return pixels(characters.render(Character(creature, role, "white", "right"), 48, seed=0, font=font))

    for creature in CREATURES:
        images = {role: draw(creature, role) for role in ROLES}
        for first, second in itertools.combinations(ROLES, 2):
            assert (np.abs(images[first] - images[second]).sum(-1) > 60).mean() > 0.02, (creature, first, second)
    for role in ROLES:
        images = {creature: draw(creature, role) for creature in CREATURES}
        for first, second in itertools.combinations(CREATURES, 2):
            assert (np.abs(images[first] - images[second]).sum(-1) > 60).mean() > 0.02, (role, first, second)


@pytest.mark.parametrize("font", FONTS, ids=lambda path: path.name)
def test_headgear_is_seen_above_every_face(font):
    """The upper part of a body in a hat is not hidden by the face: above it, most of what was drawn is still seen."""
    hats = ("astronaut", "firefighter", "cook", "police officer", "detective", "guard", "builder", "king", "mage")
    hats += ("farmer", "student", "pilot", "santa", "bride", "ninja")
    for role, creature in itertools.product(hats, CREATURES):
        role_alone, together = (
            pixels(characters.render(Character(name, role, "blue", "right"), 64, seed=0, font=font))
            for name in (ALONE, creature)
        )
        drawn = np.abs(role_alone - role_alone[0, 0]).sum(-1) > 30
        first = int(np.flatnonzero(drawn.any(1))[0])
        hat = drawn[first : first + 12]
        seen = np.abs(role_alone - together).sum(-1)[first : first + 12] < 30
        assert seen[hat].mean() > 0.3, (creature, role, seen[hat].mean())


def test_as_a_source_with_all_captions():
    train = open_dataset(DataConfig(source="characters", resolution=16), "train", seed=0)
    assert len(train) == len(characters.scenes("train"))
    texts = {train[SampleKey(0, epoch, 0)]["caption"] for epoch in range(40)}
    assert texts == set(characters.captions(characters.scenes("train")[0]))
    assert "OpenMoji" in train.describe() or openmoji().name in train.describe()
    grey = open_dataset(DataConfig(source="characters", resolution=16, channels=1), "test", seed=0)
    assert grey[SampleKey(0, 0, 0)]["image"].shape == (1, 16, 16)


def test_a_font_that_lacks_emoji_is_refused_with_the_first_five(tmp_path):
    font = TTFont(openmoji())
    lost = {ord(text) for text in (*list(CREATURES.values())[:7], ROLES["ninja"])}
    for table in font["cmap"].tables:
        table.cmap = {code: name for code, name in table.cmap.items() if code not in lost}
    path = tmp_path / "few.ttf"
    font.save(path)
    with pytest.raises(
        ValueError, match=r"few\.ttf: lacks 8 of .*cat 🐱, dog 🐶.*, rabbit 🐰, \.\.\.; .*--data.emoji-font"
    ) as error:
        characters.load("test", 16, count=1, font=path)
    assert "fox" not in str(error.value) and "\n" not in str(error.value)


def test_a_held_out_pair_asked_for_in_training():
    asked = [("cat", "cook"), ("cat", "astronaut")]
    with pytest.raises(ValueError, match="only: cat astronaut is held out: it is in split 'test' alone"):
        characters.load("train", 16, only=asked)
    with pytest.raises(ValueError, match="only: cat wizard is no pair of CREATURES and ROLES"):
        characters.load("test", 16, only=[("cat", "wizard")])
    shown = characters.pairs("train")[0][:2]
    with pytest.raises(ValueError, match="only: .* is in split 'train' alone"):
        characters.load("test", 16, only=[shown])
    rows = characters.load("test", 16, only=[("cat", "astronaut")])
    assert set(zip(rows["creature"], rows["role"], strict=True)) == {("cat", "astronaut")} and len(rows) == 16


def test_a_file_that_is_no_font_and_an_unknown_split(tmp_path):
    (tmp_path / "a.ttf").write_text("no font")
    with pytest.raises(ValueError, match=r"a\.ttf: not a font with colour emoji; .*--data.emoji-font"):
        characters.load("train", 16, count=1, font=Path(tmp_path / "a.ttf"))
    with pytest.raises(ValueError, match="split 'val' .*train or test"):
        characters.load("val", 16)  # type: ignore[arg-type]
