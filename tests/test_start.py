"""What a training says before its first step: its recipe and sizes, and what it could not learn from its data."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import copy_stages_before, encoded, plain, tiny_flags, write_photos
from PIL import Image

from ldm.cli import exit_on_user_error, parse_cli
from ldm.config import CONFIGS, read_yaml, relative
from ldm.data import DataConfig, open_dataset
from ldm.stages import STAGES
from ldm.stages.start import equal_captions
from ldm.text.tokenizer import Tokenizer
from ldm.training.distributed import make_accelerator


def start(stage: str, run: Path, *flags: str) -> None:
    """Build the tiny recipe of a stage with its data, as a training does before its first step."""
    args = tiny_flags(stage, run, *flags)
    config = parse_cli(STAGES[stage].Config, args, default=STAGES[stage].default, description="")
    accelerator = make_accelerator(config)
    with exit_on_user_error():
        STAGES[stage].build(config, accelerator).open_data(accelerator)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), 20)


@pytest.mark.parametrize("stage", ["clip", "vae", "ldm"])
def test_the_recipe_and_its_sizes_are_said(
    stage: str, photos: Path, tiny_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_stages_before(stage, tiny_runs, tmp_path)
    start(stage, tmp_path / stage)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("recipe: ")]
    network = "unet" if stage == "ldm" else stage
    assert re.search(rf"shapes, the default recipe; parameters: {network} [\d,]+", line)
    assert "4 steps of 8 images of 16 pixels; cpu, float32" in line and ("vae 162,248 (frozen), text " in line) == (
        stage == "ldm"
    )
    start(stage, tmp_path / stage, "--data.source", str(photos))
    warning = f"for {photos} pass --config configs/images-64/{stage}.yaml, or .*plan.py --source {photos}"
    assert re.search(f"warning: the default recipe is made for shapes; .*{warning}", capsys.readouterr().out)


def test_the_scripts_start_from_the_recipes_of_characters() -> None:
    """In a process of its own: tests start from those of shapes."""
    code = "from ldm.stages import STAGES; print(*(stage.default for stage in STAGES.values()), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CONFIGS.parent)
    files = [Path(line) for line in done.stdout.splitlines()]
    assert files == [CONFIGS / f"characters/{stage}.yaml" for stage in STAGES]
    assert all(STAGES[file.stem].Config().run == Path(read_yaml(file)["run"]) for file in files)


def test_a_recipe_for_own_images_is_named_without_a_warning(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = CONFIGS / "images-64/vae.yaml"
    start("vae", tmp_path / "vae", "--config", str(file), "--data.source", str(photos))
    output = capsys.readouterr().out
    assert f"recipe: {relative(file)}; parameters: vae " in output and "warning" not in output


def test_a_batch_larger_than_the_set_is_said(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start("vae", tmp_path / "vae", "--data.source", str(photos), "--batch-size", "64")
    assert re.search(r"--batch-size 64 is more than the 1\d training images.*--batch-size 16", capsys.readouterr().out)
    start("vae", tmp_path / "vae", "--data.source", str(photos), "--batch-size", "16")
    assert "more than the" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("caption", "length", "expected"),
    [
        (
            "a long caption about photo {}",
            6,
            r"1 different texts in 1\d captions.* about 15 equal.*--clip.context-length",
        ),
        ("a photo", 77, r"1 different texts in 1\d captions.* about 15 equal ones in a batch of 16.*write captions"),
        ("a long caption about photo {}", 77, None),
    ],
)
def test_captions_that_the_tower_reads_as_equal_are_said(
    caption: str, length: int, expected: str | None, tmp_path: Path
) -> None:
    data = open_dataset(DataConfig(source=str(write_photos(tmp_path, 20, caption=caption))), "train", seed=0)
    lines = equal_captions(data, Tokenizer(length), 16)
    assert re.search(expected, *lines) if expected else lines == []


def write_images(folder: Path, *images: bytes) -> list[str]:
    """A folder of JPEGs in turn, as flags."""
    for number in range(12):
        (folder / f"{number}.jpg").write_bytes(images[number % len(images)])
    return ["--data.source", str(folder)]


@pytest.mark.parametrize("stage", ["clip", "vae"])
def test_images_of_one_colour_are_refused_before_the_first_step(stage: str, tmp_path: Path) -> None:
    """Black exports, also where JPEG moved a pixel by one level: their principal components were NaN."""
    speck = plain((0, 0, 0))
    speck.putpixel((5, 5), (1, 1, 1))
    flags = write_images(tmp_path, encoded(plain((0, 0, 0))), encoded(speck))
    with pytest.raises(SystemExit, match=r"1\d of 1\d .*looked at, and all are of one colour \(0, 0, 0\).*check_data"):
        start(stage, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_images_without_variance_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, warning, images in (
        ("equal", "all are equal", [encoded(halves((9, 9, 200)))]),
        (
            "channel",
            r"channel 1 \(of 0 to 2\) is constant",
            [encoded(halves((9, 0, 200))), encoded(halves((70, 0, 1)))],
        ),
        ("sound", "", [encoded(halves((9, 9, 200))), encoded(halves((70, 80, 1)))]),
    ):
        (tmp_path / name).mkdir()
        start("vae", tmp_path / f"run-{name}", "--vae.latent-channels", "16", *write_images(tmp_path / name, *images))
        output = capsys.readouterr().out
        assert (
            re.search(f"training images were looked at, and {warning}", output) if warning else "looked" not in output
        )


def halves(color: tuple[int, int, int]) -> Image.Image:
    """An image, black on one half."""
    image = plain(color)
    image.paste((0, 0, 0), (0, 0, 6, 12))
    return image
