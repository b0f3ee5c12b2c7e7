"""img2img, through the script: files, reproduction, messages."""

from pathlib import Path

import img2img
import numpy as np
import pytest
import txt2img
from PIL import ExifTags, Image, ImageOps

from ldm.data.sources import shapes
from ldm.pipeline import Pipeline


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    shapes.render(shapes.scenes("train")[0], 16, seed=1).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def generate(model: Path, out: Path, *flags: str) -> np.ndarray:
    img2img.main([*flags, "--model", str(model), "--out", str(out), "--steps", "3", "--device", "cpu"])
    return np.asarray(Image.open(out / "00000.png"), dtype=int)


def test_strength_mask_and_edges(tiny_model: Path, image_file: Path, tmp_path: Path) -> None:
    original = np.asarray(Image.open(image_file), dtype=int)
    flags = ["a star", "--image", str(image_file)]
    changed = generate(tiny_model, tmp_path / "a", *flags)
    assert changed.shape == original.shape and (changed != original).any()
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 16, 4))
    mask.save(tmp_path / "mask.png")
    filled = generate(tiny_model, tmp_path / "b", *flags, "--mask", str(tmp_path / "mask.png"), "--strength", "1")
    assert (filled[4:] == original[4:]).all() and (filled[:4] != original[:4]).any()
    wider = generate(tiny_model, tmp_path / "c", *flags, "--outpaint", "8", "0", "0", "16")
    assert wider.shape == (32, 24, 3) and (wider[:16, 8:] == original).all()
    assert len(np.unique(wider[16:].reshape(-1, 3), axis=0)) > 10


def test_an_inverted_image_is_generated_again_and_changed(tiny_model: Path, image_file: Path, tmp_path: Path) -> None:
    flags = ["--image", str(image_file), "--inversion-prompt", "a ring", "--sampler", "ddim", "--eta", "0"]
    same = generate(tiny_model, tmp_path / "a", "a ring", *flags, "--guidance-scale", "1")
    other = generate(tiny_model, tmp_path / "b", "a ring", *flags, "--guidance-scale", "9")
    seeds = generate(tiny_model, tmp_path / "c", "a ring", *flags, "--guidance-scale", "1", "--seed", "7")
    assert (same == seeds).all() and (same != other).any()
    txt2img.main(["--reproduce", str(tmp_path / "a/00000.png"), "--out", str(tmp_path / "a")])
    assert (tmp_path / "a/00000.png").read_bytes() == (tmp_path / "a/00001.png").read_bytes()
    with pytest.raises(SystemExit, match="inversion_prompt .*num_images 1 .*variation_seed"):
        generate(tiny_model, tmp_path / "d", "a ring", *flags, "--num-images", "2")


def test_reproduce_needs_the_same_image(tiny_model: Path, image_file: Path, tmp_path: Path) -> None:
    generate(tiny_model, tmp_path / "a", "a star", "--image", str(image_file), "--outpaint", "8", "0", "0", "0")
    again = ["--reproduce", str(tmp_path / "a/00000.png"), "--out", str(tmp_path / "b")]
    txt2img.main(again)
    assert (tmp_path / "a/00000.png").read_bytes() == (tmp_path / "b/00000.png").read_bytes()
    Image.new("RGB", (16, 16)).save(image_file)
    with pytest.raises(SystemExit, match="image.png is not the image .*put that one back"):
        txt2img.main(again)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A JPEG of 57 x 83 pixels, stored turned."""
    grey = np.add.outer(3 * np.arange(83), np.arange(57)).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(np.stack([grey, grey[::-1], grey[:, ::-1]], axis=-1))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.jpg", exif=exif)
    return tmp_path / "photo.jpg"


def test_a_photo_is_turned_resized_and_cropped(
    tiny_model: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the size of the training; its mask follows, and the file is reproduced."""
    upright = ImageOps.exif_transpose(Image.open(photo))
    mask = Image.new("L", upright.size, 255)
    mask.paste(0, (0, 0, 57, 42))  # the upper half stays
    mask.save(tmp_path / "mask.png")
    flags = ["a star", "--image", str(photo), "--mask", str(tmp_path / "mask.png"), "--strength", "1"]
    found = generate(tiny_model, tmp_path / "a", *flags)
    want = np.asarray(ImageOps.fit(upright, (16, 16), Image.Resampling.LANCZOS), dtype=int)
    assert found.shape == (16, 16, 3) and (found[:7] == want[:7]).all() and (found[9:] != want[9:]).any()
    assert "photo.jpg: 57x83 resized and cropped to 16x16" in capsys.readouterr().err
    call = {"image": Image.open(photo), "mask": mask, "strength": 1.0, "steps": 3}
    assert (found == np.asarray(Pipeline.load(tiny_model, device="cpu")("a star", **call)[0])).all()  # type: ignore[arg-type]
    for name, more in {"b": ["--width", "24"], "c": ["--outpaint", "8", "0", "0", "8", "--width", "24"]}.items():
        assert generate(tiny_model, tmp_path / name, *flags, *more).shape[1] == (24 if name == "b" else 32)
        txt2img.main(["--reproduce", str(tmp_path / name / "00000.png"), "--out", str(tmp_path / name)])
        assert (tmp_path / name / "00000.png").read_bytes() == (tmp_path / name / "00001.png").read_bytes()


def test_a_size_far_from_the_training_is_told(
    tiny_model: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for size, far in {"8": True, "16": False, "24": False, "32": True}.items():
        sides = ["--width", size, "--height", size, "--steps", "1", "--device", "cpu"]
        for script, image in ((img2img, ["--image", str(photo)]), (txt2img, [])):
            script.main(["a star", *image, "--model", str(tiny_model), "--out", str(tmp_path), *sides])
            told = f"warning: {size}x{size} is far from" in capsys.readouterr().err
            assert told == far, (script, size)


def transparent_mask(mode: str) -> tuple[Image.Image, dict[str, object]]:
    """White, but clear in its left half, with the options to save it."""
    mask, options = Image.new("LA", (16, 16), (255, 0)), {}
    mask.paste((255, 255), (8, 0, 16, 16))
    if mode in ("P", "I;16"):
        mask, options = Image.new(mode, (16, 16), 0), {"transparency": 0}
        mask.paste(1 if mode == "P" else 65535, (8, 0, 16, 16))
        if mode == "P":
            mask.putpalette([255] * 6)
    return mask if mask.mode == mode else mask.convert(mode), options


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "I;16"])
def test_what_is_clear_in_a_mask_stays(
    mode: str, tiny_model: Path, image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = np.asarray(Image.open(image_file), dtype=int)
    mask, options = transparent_mask(mode)
    mask.save(tmp_path / "mask.png", **options)
    flags = ["a star", "--image", str(image_file), "--strength", "1"]
    found = generate(tiny_model, tmp_path / "a", *flags, "--mask", str(tmp_path / "mask.png"))
    assert (found[:, :8] == original[:, :8]).all() and (found[:, 8:] != original[:, 8:]).any()
    told = capsys.readouterr().err
    assert "mask.png is transparent in part: clear counts as black" in told and "image.png is" not in told


def test_what_is_clear_in_an_image_is_white_and_told(
    tiny_model: Path, image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(image_file)
    generate(tiny_model, tmp_path / "a", "a star", "--image", str(image_file))
    assert "image.png is transparent in part: clear counts as white" in capsys.readouterr().err


def test_bad_input_is_an_error(tiny_model: Path, image_file: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--image is required"):
        generate(tiny_model, tmp_path, "a star")
    with pytest.raises(SystemExit, match="image .*none.png does not exist"):
        generate(tiny_model, tmp_path, "a star", "--image", str(tmp_path / "none.png"))
    Image.new("L", (8, 8)).save(tmp_path / "mask.png")
    with pytest.raises(SystemExit, match="mask is 8x8.* same size"):
        generate(tiny_model, tmp_path, "a star", "--image", str(image_file), "--mask", str(tmp_path / "mask.png"))
    with pytest.raises(SystemExit, match="width 17 .*multiples of"):
        generate(tiny_model, tmp_path, "a star", "--image", str(image_file), "--outpaint", "1", "0", "0", "0")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(SystemExit, match="text.png: "):
        generate(tiny_model, tmp_path, "a star", "--image", str(tmp_path / "text.png"))
