"""Drawn heads: what captions say is in the values and the masks, and splits share no patient and no scene."""

from pathlib import Path
from typing import Any

import export_phantom
import numpy as np
import pytest
from helpers import train

from ldm.data import DataConfig, open_splits
from ldm.data.batch_sampler import SampleKey
from ldm.data.sources import phantom
from ldm.data.sources.phantom_art import FIELD, LESION_SIGNALS, LOBES, MAX_VALUE, RADII, SIGNALS
from ldm.evaluation.classifier import AttributeClassifier, attributes_shown, to_batch
from ldm.evaluation.drawn import drawn_set

CONFIG = DataConfig(source="phantom", resolution=64, channels=1)
ILL = [scene for scene in phantom.scenes("train") if scene.lesion][::9]


def test_splits_share_no_patient_and_no_scene_with_a_lesion() -> None:
    train_set, held_out = open_splits(CONFIG, seed=0)
    assert not set(train_set.source.patients) & set(held_out.source.patients)
    seen = [{scene for _, scene in phantom.slices(split) if scene.lesion} for split in ("train", "test")]
    assert not seen[0] & seen[1] and len(seen[1]) == phantom.HELD_OUT_SCENES and len(seen[0]) > 300
    assert {len({level for p, (_, level, *_) in phantom.slices("train") if p == patient}) for patient in range(9)} == {
        3
    }


def test_values_are_floats_of_more_than_256_levels() -> None:
    train_set, _ = open_splits(CONFIG, seed=0)
    image = train_set[SampleKey(4, 0, 0)]["image"]
    assert image.shape == (1, 64, 64) and image.unique().numel() > 1000
    again = train_set[SampleKey(4, 1, 0)]["image"]
    assert (image == again).all()


@pytest.mark.parametrize("scene", ILL, ids=lambda scene: " ".join(scene))
def test_the_lesion_is_where_the_caption_says(scene: phantom.Scene) -> None:
    """By its mask: side, direction from the centre, size and brightness; elsewhere the slice is as without it."""
    for patient in (3, 70_000):
        values, mask = phantom.draw(scene, patient, 64)
        without, nothing = phantom.draw(scene._replace(side="no"), patient, 64)
        assert not nothing.any() and mask.any()
        rows, columns = mask.nonzero()
        x, y = ((center.mean() - 31.5) * FIELD / 64 for center in (columns, rows))
        assert (x > 4) == (scene.side == "left") and (x < -4) == (scene.side == "right")
        low, high = LOBES[scene.lobe]
        assert low - 14 < np.degrees(np.arctan2(abs(x), -y)) < high + 14
        radius = np.sqrt(mask.sum() / np.pi) * FIELD / 64
        assert RADII[scene.size][0] - 1.5 < radius < RADII[scene.size][1] + 1.5
        inside, before = (one[mask].mean() / MAX_VALUE for one in (values, without))
        assert (inside > before) == (scene.brightness == "bright")
        near = np.pad(mask, 2)
        around = np.any([np.roll(near, (i, j), (0, 1)) for i in (-2, -1, 0, 1, 2) for j in (-2, -1, 0, 1, 2)], 0)
        assert (values == without)[~around[2:-2, 2:-2]].all()


def test_both_contrasts_show_one_head_and_one_lesion() -> None:
    masks = [phantom.draw(ILL[0]._replace(contrast=contrast), 5, 64)[1] for contrast in SIGNALS]
    assert (masks[0] == masks[1]).all()
    heads = [phantom.draw(phantom.Scene(contrast, "low", "normal"), 5, 64)[0] for contrast in SIGNALS]
    outside = [head > 0.2 * head.max() for head in heads]
    assert (outside[0] == outside[1]).mean() > 0.95 and not np.array_equal(*heads)


def test_anatomy_varies_by_patient_and_ventricles_by_the_caption() -> None:
    scenes = [phantom.Scene("T1", "middle", kind) for kind in phantom.VENTRICLES]
    heads = np.stack([[phantom.draw(scene, patient, 64)[0] for scene in scenes] for patient in range(8)]).astype(float)
    dark = (heads[:, :, 20:44, 20:44] < 0.3 * MAX_VALUE).mean((2, 3))
    assert (dark[:, 1] > 1.4 * dark[:, 0]).all()
    assert min(np.abs(a - b).mean() for i, a in enumerate(heads[:, 0]) for b in heads[:i, 0]) > 0.01 * MAX_VALUE


def test_captions_name_every_attribute() -> None:
    drawn = drawn_set(CONFIG)
    assert drawn is not None
    for scene in (*ILL, phantom.Scene("T1", "low", "normal")):
        for caption in phantom.captions(scene):
            assert drawn.asked(scene, caption) == scene._asdict(), caption
    assert not drawn.open_captions() and set(LESION_SIGNALS) | {"no"} == set(drawn.attributes["brightness"])


def test_the_classifier_reads_grey_renders() -> None:
    drawn = drawn_set(CONFIG)
    assert drawn is not None
    model = AttributeClassifier(drawn.attributes).eval()
    images = to_batch([drawn.render(ILL[0], 64, seed=1)])
    shown = attributes_shown(model, images[:, :1], [drawn.labels(ILL[0])])
    assert shown == attributes_shown(model, images, [drawn.labels(ILL[0])])


def test_a_vae_trains_on_it(tmp_path: Path) -> None:
    model = train(
        "vae", tmp_path / "vae", "--data.source", "phantom", "--data.channels", "1", "--vae.image-channels", "1"
    )
    assert (model / "model.json").exists()


@pytest.mark.parametrize("kind", ["dicom", "nifti"])
def test_written_as_files_it_is_read_back_equal(tmp_path: Path, kind: str) -> None:
    """Values to the last bit, captions, spacing and patients, through the readers of medical files."""
    export_phantom.main([str(tmp_path / "out"), "--format", kind, "--patients", "4", "--size", "32"])
    drawn = {(patient, phantom.captions(scene)[0]): (patient, scene) for patient, scene in phantom.slices("train")}
    config = DataConfig(source=str(tmp_path / "out"), resolution=32, channels=1, window="2048,4096")
    found = 0
    for split in open_splits(config, seed=0):
        source: Any = split.source
        assert {item.spacing for item in source.slices} == {(FIELD / 32, FIELD / 32)}
        for index, item in enumerate(source.slices):
            patient, scene = drawn[int(item.patient.removeprefix("sub-")), source.captions[index][0]]
            values = (split[SampleKey(index, 0, 0)]["image"][0].numpy() + 1) / 2 * 4096
            np.testing.assert_allclose(values, phantom.draw(scene, patient, 32)[0], atol=1e-3)
            found += 1
    assert found >= 4 * 2 * 3 - 4
    with pytest.raises(SystemExit, match="exists already: name another folder"):
        export_phantom.main([str(tmp_path / "out")])


def test_it_is_joined_to_no_other_set() -> None:
    with pytest.raises(ValueError, match="phantom is of 12 bits and is joined to no other set"):
        open_splits(DataConfig(source="phantom+characters"), seed=0)
