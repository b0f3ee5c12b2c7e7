"""Images that keep their shape: buckets of sides, steps of one bucket, and the same numbers from the latents."""

import itertools
import math
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import cache_latents
import pytest
import torch
from helpers import assert_same, losses, on_ranks, tensors_of, train
from PIL import Image
from torch import Tensor

from ldm.data import DataConfig, ImageTextDataset, open_dataset
from ldm.data.batch_sampler import BucketBatchSampler, EpochBatchSampler, SampleKey
from ldm.data.buckets import MIN_BUCKET_IMAGES, assign_buckets, bucket_resolutions
from ldm.data.latents import InMemoryLatents, LatentDataset, LatentFileLayout
from ldm.data.sources.base import hash_split
from ldm.imaging import image_size
from ldm.pipeline.load import load_vae
from ldm.ranks import Ranks

SHAPES = [(24, 24), (20, 30), (30, 20), (24, 25)]  # width and height of the photos, in turn
NAMES = [f"{number:03}.png" for number in range(160)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, draw = tmp_path_factory.mktemp("photos"), random.Random(0)
    for number, name in enumerate(NAMES):
        width, height = SHAPES[number % 4]
        Image.frombytes("RGB", (width, height), draw.randbytes(width * height * 3)).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"picture {number}")
    return folder


def opened(photos: Path, **more: object) -> ImageTextDataset:
    config = DataConfig(source=str(photos), resolution=16, bucket_step=4, **more)  # type: ignore[arg-type]
    return open_dataset(config, "train", seed=0)


def test_buckets_have_the_area_of_the_square_and_not_more() -> None:
    for size, step in ((512, 64), (1024, 64), (256, 32), (64, 8)):
        sides = bucket_resolutions(size, step)
        assert (size, size) in sides and len(set(sides)) == len(sides)
        assert all(height % step == width % step == 0 for height, width in sides)
        assert all((w, h) in sides and max(w, h) <= 4 * min(w, h) for h, w in sides)
        assert all(size**2 - step * max(h, w) < h * w <= size**2 for h, w in sides)
    assert (384, 640) in bucket_resolutions(512, 64)
    with pytest.raises(ValueError, match="data.resolution 100 .*multiple of data.bucket_step 64"):
        bucket_resolutions(100, 64)


def test_an_image_goes_to_the_nearest_bucket_that_has_enough() -> None:
    sides = bucket_resolutions(512, 64)
    shapes = (
        [(1000, 1000)] * MIN_BUCKET_IMAGES
        + [(1000, 1500)] * MIN_BUCKET_IMAGES
        + [(1000, 2500)] * (MIN_BUCKET_IMAGES - 1)
    )
    used, groups = assign_buckets(shapes, sides)
    assert [used[g] for g in (groups[0], groups[MIN_BUCKET_IMAGES])] == [(512, 512), (384, 640)]
    assert len(used) == 2 and set(groups[2 * MIN_BUCKET_IMAGES :].tolist()) == {groups[MIN_BUCKET_IMAGES].item()}
    for (height, width), group in zip(shapes, groups.tolist(), strict=True):
        distances = [abs(math.log(w / h) - math.log(width / height)) for h, w in used]
        assert distances[group] == pytest.approx(min(distances))
    assert assign_buckets([(3, 4)], sides)[1].tolist() == [0]
    few = assign_buckets([(1, 1)] * 20 + [(2, 3)] * 10 + [(1, 3)] * 9, sides)
    assert few[0] == [(384, 640), (512, 512)] and few[1].tolist() == [1] * 20 + [0] * 19


@pytest.mark.parametrize(("squares", "others"), [(1, 60), (5, 40), (300, 3)])
def test_an_image_is_never_cut_more_than_a_square_would(squares: int, others: int) -> None:
    """Few squares among many photos stayed in no bucket of their own, and were cut to 80 x 48."""
    shapes = [(96, 96)] * squares + [(80, 120)] * others + [(120, 80)] * 2 + [(50, 300)]
    used, groups = assign_buckets(shapes, bucket_resolutions(64, 16))
    assert used[groups[0]] == (64, 64) and set(groups.tolist()) == set(range(len(used)))
    for (height, width), group in zip(shapes, groups.tolist(), strict=True):
        bucket_height, bucket_width = used[group]
        cut = abs(math.log(width / height) - math.log(bucket_width / bucket_height))
        assert cut <= abs(math.log(width / height)) + 1e-6


def test_each_step_takes_one_group_and_each_epoch_all_samples() -> None:
    groups = torch.tensor([0] * 13 + [1] * 5 + [2] * 2)
    sampler = BucketBatchSampler(groups, seed=3, batch_size=4)
    assert sampler.steps == 4 + 2 + 1
    epochs = []
    for epoch in range(2):
        steps = [sampler.indices(epoch * 7 + i) for i in range(7)]
        assert all(len({groups[i].item() for i in step}) == 1 for step in steps)
        counts = Counter(i for step in steps for i in step)
        assert set(counts) == set(range(20)) and max(counts.values()) <= 2
        epochs.append(steps)
    assert epochs[0] != epochs[1]
    parts = [
        iter(BucketBatchSampler(groups, seed=3, batch_size=4, start=5, grad_accum_steps=2, rank=r, world=2))
        for r in (0, 1)
    ]
    micro_batches = [next(part) for _ in range(2) for part in parts]
    assert [key.index for keys in micro_batches for key in keys] == epochs[0][5]
    assert [key.position for keys in micro_batches for key in keys] == [0, 1, 2, 3]
    one = EpochBatchSampler(20, seed=3, batch_size=4)
    assert sorted(i for step in range(5) for i in one.indices(step)) == list(range(20))


def test_images_keep_their_shape(photos: Path) -> None:
    data = opened(photos)
    names = [NAMES[i] for i in hash_split(NAMES, "train")]
    assert data.groups is not None and "width x height: images, " in data.describe()
    for index, name in enumerate(names[:12]):
        width, height = SHAPES[int(name[:3]) % 4]
        item = data[SampleKey(index, 0, 0)]
        new_height, new_width = item["image"].shape[1:]
        assert (new_height < new_width) == (height < width - 1)
        sizes = item["sizes"].tolist()
        assert sizes[:2] + sizes[4:] == [height, width, new_height, new_width]
    assert next(data.spread_images(5)).shape == (5, 3, 16, 16)
    held_out = open_dataset(data.config, "test", seed=0)
    assert held_out.groups is None and held_out[SampleKey(0, 0, 0)]["image"].shape == (3, 16, 16)


def test_a_fallback_takes_the_shape_of_what_it_replaces(photos: Path, tmp_path: Path) -> None:
    broken = tmp_path / "photos"
    shutil.copytree(photos, broken)
    whole = opened(photos)
    index = next(i for i in range(20) if whole[SampleKey(i, 0, 0)]["image"].shape != (3, 16, 16))
    file = broken / whole.source.names[index]
    file.write_bytes(file.read_bytes()[:200])  # its header is complete
    data = opened(broken, max_unreadable=0.5)
    assert data[SampleKey(index, 0, 0)]["image"].shape == whole[SampleKey(index, 0, 0)]["image"].shape
    assert len(data.reader.unreadable()) == 1


def test_a_turned_photo_is_as_high_as_it_is_shown(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert image_size(tmp_path / "a.jpg") == (30, 20)
    assert image_size(b"no image") == (1, 1)


@pytest.fixture(scope="module")
def runs(photos: Path, tiny_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vae and an ldm run on photos with buckets, on the tiny text tower."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(tiny_runs / "clip", folder / "clip")
    train("vae", folder / "vae", *flags(photos))
    train("ldm", folder / "ldm", *flags(photos), "--no-cache-latents")
    return folder


def flags(photos: Path) -> list[str]:
    return ["--data.source", str(photos), "--data.bucket-step", "8", "--data.resolution", "32"]


def test_a_run_with_buckets_resumes_without_a_change(runs: Path, photos: Path, tmp_path: Path) -> None:
    for name in ("clip", "vae"):
        shutil.copytree(runs / name, tmp_path / name)
    more = [*flags(photos), "--no-cache-latents"]
    train("ldm", tmp_path / "ldm", *more, "--steps", "2")
    train("ldm", tmp_path / "ldm", *more, "--resume", "latest")
    assert_same(tensors_of(runs / "ldm", 4), tensors_of(tmp_path / "ldm", 4))


def test_latents_in_memory_have_the_shape_of_their_bucket(
    runs: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("clip", "vae"):
        shutil.copytree(runs / name, tmp_path / name)
    train("ldm", tmp_path / "ldm", *flags(photos), "--cache-latents", "--batch-size", "64", "--steps", "2")
    assert re.search(r"2 of 3 buckets have fewer images than a step of 64 \(\d+, \d+\)", capsys.readouterr().out)
    data = open_dataset(DataConfig(source=str(photos), resolution=32, bucket_step=8), "train", seed=0)
    vae = load_vae(runs / "vae/model")
    device = torch.device("cpu")
    cached = InMemoryLatents(data, lambda images: vae.encode(images)._asdict(), device=device)
    for index in range(0, len(data), 7):
        key = SampleKey(index, 0, 0)
        item, row = data[key], cached[key]
        with torch.no_grad():
            torch.testing.assert_close(row["mean"], vae.encode(item["image"][None]).mean[0], rtol=1e-2, atol=1e-2)
        assert torch.equal(row["sizes"], item["sizes"]) and row["caption"] == item["caption"]


def test_ranks_share_the_encoding_of_latents_in_memory(photos: Path, tmp_path: Path) -> None:
    """And know of each other's images that cannot be read, whose replacements have captions of their own."""
    shutil.copytree(photos, folder := tmp_path / "photos")
    broken = folder / NAMES[hash_split(NAMES, "train")[3]]
    broken.write_bytes(broken.read_bytes()[:200])
    config = DataConfig(source=str(folder), resolution=32, bucket_step=8)
    sets = [open_dataset(config, "train", seed=0) for _ in range(3)]
    encoded = [0, 0, 0]

    def run(ranks: Ranks) -> InMemoryLatents:
        def encode(images: Tensor) -> dict[str, Tensor]:
            encoded[ranks.rank] += len(images)
            return {"mean": images.mean((2, 3), keepdim=True)}

        return InMemoryLatents(sets[ranks.rank], encode, device=torch.device("cpu"), ranks=ranks)

    found = on_ranks(3, run)
    assert sum(encoded) == len(sets[0]) and max(encoded) < len(sets[0])
    assert all(data.reader.unreadable()[0].startswith(broken.name) for data in sets)
    for index in range(0, len(sets[0]), 7):
        key = SampleKey(index, 0, 0)
        expected = sets[0][key]
        for latents in found:
            torch.testing.assert_close(latents[key]["mean"], expected["image"].mean((1, 2), keepdim=True))
            assert latents[key]["caption"] == expected["caption"]


def test_latents_with_buckets_train_as_images_do(runs: Path, photos: Path, tmp_path: Path) -> None:
    for name in ("clip", "vae"):
        shutil.copytree(runs / name, tmp_path / name)
    folder = tmp_path / "latents"
    cache_latents.main(["--out", str(folder), *flags(photos), "--images-per-file", "30"])
    train("ldm", tmp_path / "ldm", *flags(photos), "--cached-latents", str(folder))
    assert losses(tmp_path / "ldm") == pytest.approx(losses(runs / "ldm"), rel=2e-3)
    config = DataConfig(source=str(photos), resolution=32, bucket_step=8)
    data, cached = open_dataset(config, "train", seed=0), LatentDataset(folder, "train", seed=0)
    assert len(data.sides) == 3 and len(list(folder.glob("train-*.safetensors"))) > 4
    options = {"seed": 1, "batch_size": 8}
    assert next(iter(data.make_batch_sampler(**options))) == next(iter(cached.make_batch_sampler(**options)))
    vae = load_vae(runs / "vae/model")
    for index in range(0, len(data), 7):
        item, row = data[SampleKey(index, 0, 0)], cached[SampleKey(index, 0, 0)]
        with torch.no_grad():
            torch.testing.assert_close(row["mean"], vae.encode(item["image"][None]).mean[0], rtol=1e-2, atol=1e-2)
        assert torch.equal(row["sizes"], item["sizes"])
    buckets = folder / "buckets.safetensors"
    buckets.write_bytes(buckets.read_bytes()[:-1] + b"\1")
    with pytest.raises(ValueError, match="buckets.safetensors is missing or damaged: .*scripts/cache_latents.py"):
        LatentDataset(folder, "train", seed=0)


@pytest.mark.parametrize("groups", [None, torch.tensor([2, 0, 1, 2, 2, 0, 2, 2])])
def test_each_row_is_where_the_layout_says(groups: torch.Tensor | None) -> None:
    for split, augmentations in (("train", 2), ("test", 1)):
        layout = LatentFileLayout(split, 8, 3, augmentations=2, groups=groups)  # type: ignore[arg-type]
        files = {name: list(rows) for name, _, rows in layout.files()}
        rows_in_files = [row for rows in files.values() for row in rows]
        assert sorted(rows_in_files) == sorted([*range(8)] * augmentations) and max(map(len, files.values())) <= 3
        for row, epoch in itertools.product(range(8), range(3)):
            name, row_in_file = layout.locate(row, epoch)
            assert files[name][row_in_file] == row and name.startswith(f"{split}-{epoch % augmentations:03}-")
        if groups is not None:
            assert all(len({int(groups[row]) for row in rows}) == 1 for rows in files.values())


def test_steps_that_no_network_divides_by_are_refused(runs: Path, photos: Path, tmp_path: Path) -> None:
    for stage, step, message in (
        ("vae", "2", "data.bucket_step 2: .*multiple of the networks' factor 4"),
        ("clip", "8", "data.bucket_step: .*squares; leave it at 0"),
        ("vae", "12", "data.resolution 16 .*multiple of data.bucket_step 12"),
    ):
        with pytest.raises(SystemExit, match=message):
            train(stage, tmp_path / stage, "--data.source", str(photos), "--data.bucket-step", step)
