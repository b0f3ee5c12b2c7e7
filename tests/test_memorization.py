"""Whether training images are repeated: copies are caught, and new images come out as new."""

import json
from pathlib import Path

import evaluate
import pytest
import torch
from helpers import train
from PIL import Image
from torch import Tensor

from ldm.data.sources import characters, shapes
from ldm.data.sources.base import Split
from ldm.evaluation.memorization import (
    Memorization,
    closest_pairs,
    compare_distances,
    find_nearest,
    rank_test,
    share_nearer,
)
from ldm.imaging import pil_to_tensor


def renders(scenes: list[shapes.Scene], seed: int) -> Tensor:
    """Images (n, 3, 16, 16) of scenes, each moved a little by a seed of its own."""
    images = [shapes.render(scene, 16, seed=seed + i) for i, scene in enumerate(scenes)]
    return torch.stack([pil_to_tensor(image, 3) for image in images])


TRAINING = renders(list(shapes.scenes("train")[:400]), 0)
HELD_OUT = renders(list(shapes.scenes("test")[:160]), 10_000)
PIXELS = {"pixels": lambda images: images.flatten(1)}


def memorization(samples: Tensor, held_out: Tensor = HELD_OUT) -> Memorization:
    sets = {"samples": samples, "held-out images": held_out}
    found = find_nearest(sets, TRAINING.split(64), PIXELS)["pixels"]
    return compare_distances(found["samples"].distances, found["held-out images"].distances)


def test_the_nearest_training_image_is_found_in_every_space() -> None:
    order = torch.randperm(len(TRAINING), generator=torch.Generator().manual_seed(0))[:20]
    samples = TRAINING[order] + 0.02 * torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    spaces = {**PIXELS, "mean colour": lambda images: images.mean((2, 3))}
    found = find_nearest({"samples": samples, "itself": TRAINING}, TRAINING.split(64), spaces)
    assert found["pixels"]["samples"].indices.tolist() == order.tolist()
    assert found["pixels"]["samples"].distances.mean() == pytest.approx(0.02, rel=0.1)
    assert (found["pixels"]["itself"].distances == 0).all() and (found["mean colour"]["itself"].distances == 0).all()
    direct = torch.cdist(samples.mean((2, 3)), TRAINING.mean((2, 3))).min(1).values / 3**0.5
    torch.testing.assert_close(found["mean colour"]["samples"].distances, direct, atol=1e-4, rtol=1e-3)


def test_noised_training_images_are_caught() -> None:
    noise = torch.randn(100, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    found = memorization(TRAINING[100:200] + 0.02 * noise)
    assert found.is_evident and found.p_value < 1e-20 and found.auc > 0.95
    assert found.nearer[1].share.value > 0.9 and found.nearer[5].p_value < 1e-20


def test_a_few_copies_among_new_images_are_seen() -> None:
    """The test of all samples hardly sees them; the share of the nearest does."""
    new = renders(list(shapes.scenes("test")[160:260]), 50_000)
    found = memorization(torch.cat([TRAINING[:15], new[:85]]))
    assert found.is_evident and found.nearer[1].share.value >= 0.15 and found.p_value > 1e-3


def test_new_images_of_held_out_combinations_come_out_as_new() -> None:
    found = memorization(renders(list(shapes.scenes("test")[160:320]), 50_000))
    assert not found.is_evident and found.p_value > 0.05
    assert found.nearer[5].share.value < 0.1


def test_characters_of_held_out_pairs_come_out_as_new() -> None:
    """Samples of the captions of the held-out images, as evaluate generates them; copies of training images do not."""

    def draw(split: Split, count: int, seed: int) -> Tensor:
        scenes = enumerate(characters.pairs(split)[:count])
        return torch.stack([pil_to_tensor(characters.render(scene, 32, seed=seed + i), 3) for i, scene in scenes])

    training, held_out, new = draw("train", 400, 0), draw("test", 120, 10_000), draw("test", 120, 20_000)
    copies = training[:120] + 0.02 * torch.randn(120, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    sets = {"new": new, "copies": copies, "held-out images": held_out}
    nearest = find_nearest(sets, training.split(100), PIXELS)["pixels"]
    found = {name: compare_distances(nearest[name].distances, nearest["held-out images"].distances) for name in sets}
    assert not found["new"].is_evident and found["new"].p_value > 0.01 and found["new"].nearer[5].share.value < 0.12
    assert found["copies"].is_evident and found["copies"].nearer[1].share.value > 0.9


def test_the_p_value_of_the_nearest_is_exact() -> None:
    """One order of two samples and two held-out images in six has both samples first, and three have one or more."""
    held_out = torch.tensor([2.0, 3.0])
    for samples, p_value in (([0.0, 1.0], 1 / 6), ([1.0, 4.0], 1 / 2), ([4.0, 5.0], 1)):
        assert share_nearer(torch.tensor(samples), held_out, 50).p_value == pytest.approx(p_value)


def test_percentiles_need_held_out_images() -> None:
    """A hundred for the first, twenty for the fifth."""
    assert memorization(TRAINING[:30]).nearer.keys() == {1, 5}
    assert memorization(TRAINING[:30], HELD_OUT[:99]).nearer.keys() == {5}
    found = memorization(TRAINING[:30], HELD_OUT[:19])
    assert not found.nearer and found.is_evident and found.p_value < 1e-6


def test_rank_test() -> None:
    """The worked example of Siegel 1956 in Mann and Whitney's form: U = 4 of 4 x 5 pairs; and equal numbers."""
    small, large = torch.tensor([51.0, 64, 70, 78]), torch.tensor([45.0, 75, 82, 110, 53])
    below = sum(float(a < b) for a in small for b in large) / 20
    assert rank_test(small, large)[0] == pytest.approx(below)
    assert rank_test(torch.ones(5), torch.ones(6)) == (0.5, pytest.approx(0.5))
    generator = torch.Generator().manual_seed(3)
    draws = [rank_test(*torch.rand(2, 40, generator=generator).round(decimals=1)) for _ in range(400)]
    rejected = sum(p < 0.05 for _, p in draws) / 400
    assert 0.02 < rejected < 0.09, "one in twenty where nothing differs, also with ties"


def test_closest_pairs_show_each_training_image_once() -> None:
    samples = TRAINING[[5, 5, 9]] + 0.01 * torch.arange(3)[:, None, None, None]
    nearest = find_nearest({"samples": samples}, [TRAINING], PIXELS)["pixels"]["samples"]
    asked: list[list[int]] = []
    sheet = closest_pairs(samples, nearest, torch.ones(4), lambda i: asked.append(list(i)) or TRAINING[list(i)])
    assert asked == [[5, 9]] and isinstance(sheet, Image.Image)
    assert sheet.width == 2 * 128 + 8


def write_folder(folder: Path) -> Path:
    """Fifty training images and sixty that are held out, of other combinations, all of large shapes."""
    for split, count in (("train", 50), ("test", 60)):
        (folder / split).mkdir(parents=True)
        scenes = [scene for scene in shapes.scenes(split) if scene.size == "large"]  # type: ignore[arg-type]
        for i, scene in enumerate(scenes[:count]):
            shapes.render(scene, 16, seed=i).save(folder / split / f"{i:03}.png")
    return folder


@pytest.mark.slow
def test_an_overfitted_model_is_caught(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An unconditional model in pixels, that saw each of fifty images about 300 times."""
    small = "--unet.in-channels 3 --unet.context-dim 0 --unet.pooled-dim 0 --unet.patch-size 4 --unet.model-channels 64"
    small += " --unet.channel-mult 1 1 --unet.transformer-depth 0 0 --vae none --text.model none --no-cache-latents"
    often = "--steps 1000 --batch-size 16 --learning-rate 2e-3 --lr-schedule cosine --log-every 100"
    source = ["--data.source", str(write_folder(tmp_path / "photos"))]
    model = train("ldm", tmp_path / "ldm", *small.split(), *often.split(), *source)
    evaluate.main(["--model", str(model), "--num-samples", "60", "--steps", "20", "--device", "cpu"])
    report = json.loads((tmp_path / "ldm/evaluation.json").read_text())
    found = report["memorization"]["pixels"]
    assert found["nearer_than_5_percent"]["value"] > 0.2 and found["p_value"] < 1e-3
    assert "training images are repeated" in capsys.readouterr().out
