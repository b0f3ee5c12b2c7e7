"""Procedural scenes: determinism, true captions, disjoint splits."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data import DataConfig
from ldm.data.dataset import open_source
from ldm.data.sources import shapes
from ldm.data.transforms import View


def pixels(row_image: Image.Image) -> np.ndarray:
    return np.asarray(row_image.convert("RGB"), np.float64)


def center_of(image: np.ndarray, color: str) -> np.ndarray:
    """Mean (x, y) of the pixels that are nearer to `color` than 40."""
    near = np.abs(image - np.array(shapes.COLORS[color])).sum(-1) < 40
    assert near.sum() >= 4, f"no {color} object"
    ys, xs = np.nonzero(near)
    return np.array([xs.mean(), ys.mean()]) + 0.5


@pytest.fixture(scope="module")
def rows():
    return shapes.load("train", 32, count=200)


@pytest.fixture(scope="module")
def pairs():
    return shapes.load_pairs("train", 48, count=120)


def test_columns_and_images(rows):
    assert set(rows.column_names) == {"image", "caption", "shape", "color", "background", "position", "size"}
    assert rows[0]["image"].size == (32, 32) and rows[0]["image"].mode == "RGB"


def test_a_row_depends_on_seed_and_index_alone(rows):
    fewer, again = shapes.load("train", 32, count=5), shapes.load("train", 32, count=200)
    other = shapes.load("train", 32, count=200, seed=1)
    assert all(np.array_equal(pixels(fewer[i]["image"]), pixels(rows[i]["image"])) for i in range(5))
    assert rows["caption"][:] == again["caption"][:] != other["caption"][:]
    moved = [not np.array_equal(pixels(rows[i]["image"]), pixels(other[i]["image"])) for i in range(20)]
    assert all(moved)


@pytest.mark.parametrize("combos", [shapes.scenes, shapes.pair_scenes])
def test_the_splits_share_no_combination_and_leave_none_out(combos):
    train, test = combos("train"), combos("test")
    assert not set(train) & set(test)
    assert len(test) == round(shapes.TEST_FRACTION * (len(train) + len(test)))
    assert len(set(train + test)) == len(train) + len(test)


def test_test_rows_show_test_combinations():
    held_out = set(shapes.scenes("test"))
    for row in shapes.load("test", 16, count=30):
        assert shapes.Scene(*(row[name] for name in shapes.Scene._fields)) in held_out


def test_a_caption_names_its_own_attributes_and_no_others():
    words = {"shape": shapes.SHAPES, "color": shapes.COLORS, "size": shapes.SIZES, "position": shapes.POSITIONS}
    for scene in shapes.scenes("test"):
        for caption in shapes.captions(scene):
            for field, options in words.items():
                named = {option for option in options if option in caption}
                assert named == ({scene.color, scene.background} if field == "color" else {getattr(scene, field)})


def test_pair_captions_name_all_attributes():
    for scene in shapes.pair_scenes("test")[:300]:
        assert all(value in caption for caption in shapes.captions(scene) for value in scene)
        assert len(set(shapes.captions(scene))) == 2


def test_the_article_before_orange():
    scene = shapes.Scene("ring", "orange", "orange", "center", "small")
    assert not any("a orange" in caption for caption in shapes.captions(scene))


def test_object_and_background_differ():
    assert all(scene.color != scene.background for scene in shapes.scenes("train") + shapes.scenes("test"))
    for scene in shapes.pair_scenes("test"):
        assert len({scene.color, scene.other_color, scene.background}) == 3 and scene.shape != scene.other_shape


def test_the_image_shows_what_the_row_says(rows):
    for row in rows.select(range(80)):
        image = pixels(row["image"])
        assert np.abs(image[0, 0] - shapes.COLORS[row["background"]]).max() <= 1
        distance = center_of(image, row["color"]) / 32 - shapes.POSITIONS[row["position"]]
        assert np.abs(distance).max() < 0.08


def test_large_covers_more_than_small():
    for shape in shapes.SHAPES:
        area = {
            size: (pixels(shapes.render(shapes.Scene(shape, "black", "white", "center", size), 64, seed=0)) < 128).sum()
            for size in shapes.SIZES
        }
        assert 2 * area["small"] < area["large"]


def test_all_shapes_look_different():
    drawn = [shapes.render(shapes.Scene(s, "black", "white", "center", "large"), 32, seed=0) for s in shapes.SHAPES]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert np.abs(pixels(one) - pixels(other)).mean() > 4


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_outlines_are_antialiased(shape):
    grey = pixels(shapes.render(shapes.Scene(shape, "black", "white", "center", "large"), 32, seed=3))[..., 0]
    assert ((grey > 40) & (grey < 220)).sum() >= 8


@pytest.mark.parametrize("size", [8, 17, 100])
def test_any_size(size):
    for index in range(3):
        image = shapes.load("train", size, count=3)[index]["image"]
        assert image.size == (size, size) and pixels(image).std() > 1


def test_the_relation_of_a_pair_is_true(pairs):
    seen = set()
    for row in pairs:
        first, second = (center_of(pixels(row["image"]), row[name]) for name in ("color", "other_color"))
        apart = (first - second) / 48
        axis = 0 if row["relation"] in ("left of", "right of") else 1
        sign = 1 if row["relation"] in ("right of", "below") else -1
        assert sign * apart[axis] > 0.3 and abs(apart[1 - axis]) < 0.1, row["caption"]
        assert row["relation"] in row["caption"]
        seen.add(row["relation"])
    assert seen == set(shapes.RELATIONS)


def test_several_sets_are_one_after_the_other():
    both, *each = (
        open_source(DataConfig(source=name, resolution=16), "test") for name in ("shapes+pairs", "shapes", "pairs")
    )
    assert list(both.names) == [*each[0].names, *each[1].names]
    assert list(both.captions) == [*each[0].captions, *each[1].captions]
    last = len(both.names) - 1
    view, own = (View((16, 16)), len(each[1].names) - 1)
    pixels = [source.read(i, view, channels=3, side=16).pixels for source, i in ((both, last), (each[1], own))]
    assert torch.equal(*pixels)
    assert DataConfig(source="shapes+pairs").drawn and not DataConfig(source="shapes+photos").drawn


def test_images_are_stored_as_png_bytes(rows):
    cell = rows.data.column("image")[0].as_py()
    assert cell["path"] is None and Image.open(io.BytesIO(cell["bytes"])).format == "PNG"


def test_messages():
    with pytest.raises(ValueError, match="split 'val' .*train or test"):
        shapes.load("val", 32, count=1)  # type: ignore[arg-type]
