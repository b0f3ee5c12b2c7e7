"""The painting script: files, metadata, reproduction, messages."""

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import txt2img
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from ldm.pipeline.record import PNG_CHUNK, GenerationRecord, a1111_parameters


def paint(model: Path, out: Path, *flags: str) -> None:
    txt2img.main([*flags, "--model", str(model), "--out", str(out), "--steps", "2", "--device", "cpu"])


def reproduce(picture: Path, *flags: str) -> None:
    txt2img.main(["--reproduce", str(picture), "--out", str(picture.parent / "again"), *flags])


def test_pictures_are_numbered_after_those_that_are_there(tiny_model: Path, tmp_path: Path) -> None:
    paint(tiny_model, tmp_path, "a red circle")
    paint(tiny_model, tmp_path, "a red circle", "a blue star", "--num-images", "2", "--seed", "5")
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["00000.png", "00001.png", "00002.png", "00003.png", "00004.png", "grid-00001.png"]
    assert "Seed: 6" in Image.open(tmp_path / "00004.png").text["parameters"]  # type: ignore[attr-defined]


def test_metadata_is_conventional_and_complete(tiny_model: Path, tmp_path: Path) -> None:
    paint(
        tiny_model,
        tmp_path,
        "ein Stern, größer",
        "--negative-prompt",
        "blurry",
        "--guidance-scale",
        "4",
        "--sampler",
        "ddim",
    )
    text = Image.open(tmp_path / "00000.png").text  # type: ignore[attr-defined]
    lines = text["parameters"].split("\n")
    assert lines[:2] == ["ein Stern, größer", "Negative prompt: blurry"]
    assert lines[2].startswith("Steps: 2, Sampler: DDIM, CFG scale: 4.0, Seed: 0, Size: 16x16, Model hash: ")
    record = json.loads(text["ldm"])
    assert record["version"] == 1 and record["prompt"] == "ein Stern, größer" and record["sampler"] == "ddim"
    assert len(record["model_hash"]) == 64


def test_values_with_commas_colons_or_lines_are_quoted() -> None:
    size = {"width": 8, "height": 8, "num_images": 1, "index": 0}
    call = {"prompt": "p", "negative_prompt": "", "steps": 1, "sampler": "ddim", "guidance_scale": 1, "seed": 0}
    text = a1111_parameters(GenerationRecord(**call, **size, eta=0, model_hash="ab", model='a, b: "c"\n'))
    assert text.endswith('Model: "a, b: \\"c\\"\\n"')


@pytest.mark.parametrize(
    "flags", [[], ["--sampler", "ddpm"], ["--timesteps", "1,0.4"], ["--num-images", "3", "--batch-size", "2"]]
)
def test_reproduce_makes_the_same_file(flags: list[str], tiny_model: Path, tmp_path: Path) -> None:
    paint(tiny_model, tmp_path / "a", "a red circle", "--seed", "3", *flags)
    for file in (tmp_path / "a").glob("0*.png"):
        out = tmp_path / file.stem
        txt2img.main(["--reproduce", str(file), "--out", str(out)])
        assert (out / "00000.png").read_bytes() == file.read_bytes()


def test_weaker_models_tiles_and_previews(tiny_model: Path, tmp_path: Path) -> None:
    """Each changes what is painted, or shows it, and is reproduced."""
    weaker = tmp_path / "weaker"
    shutil.copytree(tiny_model, weaker)
    weights = load_file(weaker / "unet.safetensors")
    save_file({name: tensor * 0.9 for name, tensor in weights.items()}, weaker / "unet.safetensors")
    large = ["a star", "--width", "64", "--height", "64", "--num-images", "2"]
    for name, flags in {
        "plain": [],
        "weaker": ["--guide-model", str(weaker), "--guidance-scale", "3"],
        "tile": ["--vae-tile", "8"],
    }.items():
        paint(tiny_model, tmp_path / name, *large, *flags, "--preview")
        reproduce(tmp_path / name / "00001.png")
        assert (tmp_path / name / "again/00000.png").read_bytes() == (tmp_path / name / "00001.png").read_bytes()
        assert Image.open(tmp_path / name / "preview.png").size == (2 * 16 + 2, 16)  # latents of 16 x 16, beside
    pictures = [Image.open(tmp_path / name / "00000.png").tobytes() for name in ("plain", "weaker", "tile")]
    assert len(set(pictures)) == 3
    save_file(weights, weaker / "unet.safetensors")
    with pytest.raises(SystemExit, match="weaker is not the weaker model that guided this picture: put that one back"):
        reproduce(tmp_path / "weaker/00000.png")


def test_reproduce_needs_the_model_and_the_metadata(tiny_model: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.png"
    Image.new("RGB", (8, 8)).save(plain)
    with pytest.raises(SystemExit, match="lost its metadata: it can not be reproduced"):
        reproduce(plain)
    with pytest.raises(SystemExit, match="no such picture"):
        reproduce(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(SystemExit, match="is no PNG file that can be read"):
        reproduce(tmp_path / "text.png")
    paint(tiny_model, tmp_path / "out", "a star")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="was painted by another model"):
        patch.setattr("txt2img.sha256", lambda path: "0" * 64)
        patch.setattr(
            "ldm.pipeline.Pipeline.load", lambda *a, **k: SimpleNamespace(weights=tiny_model, folder=1, kind="")
        )
        reproduce(tmp_path / "out/00000.png")


def test_reproduce_takes_no_other_settings(tiny_model: Path, tmp_path: Path) -> None:
    paint(tiny_model, tmp_path, "a star")
    with pytest.raises(SystemExit, match="--reproduce takes all settings from .*00000.png: leave out steps"):
        reproduce(tmp_path / "00000.png", "--steps", "3")
    with pytest.raises(SystemExit, match="leave out prompts"):
        reproduce(tmp_path / "00000.png", "a red circle")


def test_records_of_another_version_are_told(tmp_path: Path) -> None:
    for number, text in enumerate(["{", "[]", '{"version": 1, "prompt": "a star"}', '{"version": 2}']):
        info = PngInfo()
        info.add_itxt(PNG_CHUNK, text)
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png", pnginfo=info)
        with pytest.raises(SystemExit, match="was painted by another version of ldm"):
            reproduce(tmp_path / f"{number}.png")


def test_prompts_from_a_file_and_from_standard_input(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n\n  a star \n")
    paint(tiny_model, tmp_path / "a", "--prompt-file", str(tmp_path / "prompts.txt"))
    monkeypatch.setattr("sys.stdin", io.StringIO("a ring\n"))
    paint(tiny_model, tmp_path / "b", "a cross", "--prompt-file", "-")

    def prompts(folder: Path) -> list[str]:
        records = [Image.open(p).text["ldm"] for p in sorted(folder.glob("0*.png"))]  # type: ignore[attr-defined]
        return [json.loads(record)["prompt"] for record in records]

    assert prompts(tmp_path / "a") == ["a red circle", "a star"]
    assert prompts(tmp_path / "b") == ["a cross", "a ring"]


def test_missing_and_empty_prompts_are_told(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(SystemExit, match="prompt file .*empty.txt is empty: write a prompt on each line"):
        paint(tiny_model, tmp_path, "--prompt-file", str(tmp_path / "empty.txt"))
    with pytest.raises(SystemExit, match="prompt file .*none.txt does not exist"):
        paint(tiny_model, tmp_path, "--prompt-file", str(tmp_path / "none.txt"))
    with pytest.raises(SystemExit, match="no prompt: say what to paint"):
        paint(tiny_model, tmp_path)
    with pytest.raises(SystemExit, match="a prompt is empty: say what to paint"):
        paint(tiny_model, tmp_path, "a star", " ")
    with pytest.raises(SystemExit, match="sampler 'plms' is unknown: choose one of ddpm, ddim"):
        paint(tiny_model, tmp_path, "a star", "--sampler", "plms")
    (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))
    with pytest.raises(SystemExit, match="latin.txt is no UTF-8 text: save it as UTF-8"):
        paint(tiny_model, tmp_path, "--prompt-file", str(tmp_path / "latin.txt"))


def test_settings_that_can_not_be_are_told(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="--out .*file is a file: name a folder"):
        paint(tiny_model, tmp_path / "file", "a star")
    with pytest.raises(SystemExit, match="grid '1,x' is no list of times: write them as 1,0.7,0.3"):
        paint(tiny_model, tmp_path, "a star", "--timesteps", "1,x")
    with pytest.raises(SystemExit, match="nowhere does not exist: name a model folder, a diffusers folder or a single"):
        paint(tmp_path / "nowhere", tmp_path, "a star")
    with pytest.raises(SystemExit, match="device cuda:99 can not be used here .*: leave out --device"):
        txt2img.main(["a star", "--model", str(tiny_model), "--out", str(tmp_path), "--device", "cuda:99"])
    with pytest.raises(ValueError, match="interval 0.9 0.1 must rise, within 0 to 1"):
        txt2img.Txt2ImgConfig.from_dict({"guidance": {"interval": (0.9, 0.1)}}, source="x")
    with pytest.raises(ValueError, match="guidance_scale: Input should be a finite number"):
        txt2img.Txt2ImgConfig.from_dict({"guidance_scale": float("nan")}, source="x")
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "words.txt").unlink()
    with pytest.raises(SystemExit, match="words.txt is missing: copy the folder again"):
        paint(model, tmp_path, "a star")


def test_unknown_words_are_named(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paint(tiny_model, tmp_path, "a cat astronaut")
    assert "words that no caption of this model's training had: cat, astronaut" in capsys.readouterr().err


def test_without_a_model_the_demo_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="no finished pipeline below runs: run `make demo` first, or name one"):
        txt2img.main(["a star"])


def test_steps_zero_is_told(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        txt2img.main(["a star", "--steps", "0"])
    assert "greater than or equal to 1" in capsys.readouterr().err
