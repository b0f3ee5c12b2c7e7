"""img2img, through the script: files, reproduction, messages."""

from pathlib import Path

import img2img
import numpy as np
import pytest
import txt2img
from PIL import Image

from ldm.data.sources import shapes


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
