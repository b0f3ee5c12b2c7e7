"""Estimates, the classifier and its refusal, and the evaluation script."""

import json
from pathlib import Path
from typing import Any

import evaluate
import pytest
import torch

from ldm.cli import parse_cli
from ldm.data import DataConfig, open_dataset
from ldm.data.sources import shapes
from ldm.evaluation import classifier as module
from ldm.evaluation.classifier import (
    CLASSIFIER_VERSION,
    AttributeClassifier,
    attributes_shown,
    check_classifier,
    to_batch,
    train_classifier,
)
from ldm.evaluation.drawn import drawn_set
from ldm.evaluation.estimates import mean_ci, proportion_ci
from ldm.evaluation.subject import EvaluateConfig, data_sha256
from ldm.pipeline import Pipeline
from ldm.pipeline.generate import SHIPPED_MODEL

SHAPES = drawn_set(DataConfig(source="shapes"))
assert SHAPES is not None


def test_wilsons_interval() -> None:
    found = proportion_ci(81, 263)  # Newcombe 1998, table I: 0.2553 to 0.3662
    assert found.value == pytest.approx(81 / 263)
    assert (found.low, found.high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))
    assert proportion_ci(10, 10).high == 1.0 and proportion_ci(10, 10).low < 1.0


def test_interval_of_a_mean() -> None:
    found = mean_ci([1.0, 2.0, 3.0, 4.0])
    half = 1.959964 * (5 / 3) ** 0.5 / 2
    assert found == (2.5, pytest.approx(2.5 - half), pytest.approx(2.5 + half), 4)
    with pytest.raises(ValueError, match="at least two samples"):
        mean_ci([1.0])


def test_an_untrained_classifier_refuses_to_judge() -> None:
    torch.manual_seed(0)
    model = AttributeClassifier(SHAPES.attributes).eval()
    with pytest.raises(ValueError, match=r"reads only \S+% of 1000 real renders at 16 pixels, 99.5% are needed"):
        check_classifier(model, SHAPES, 16)


def test_what_captions_never_name_is_checked_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    characters = drawn_set(DataConfig(source="characters"))
    assert characters is not None

    def shown(model: Any, images: Any, asked: list[dict[str, str]]) -> dict[str, list[bool]]:
        facing = [scene["facing"] == "left" for scene in asked if "facing" in scene]
        return {"creature": [True] * len(asked), "facing": facing, "all": [True] * len(asked)}

    monkeypatch.setattr(module, "attributes_shown", shown)
    monkeypatch.setattr(module, "NUM_CHECKED", 8)
    assert check_classifier(AttributeClassifier(characters.attributes), characters, 16) == {"facing": 0.5, "all": 1.0}


def test_right_answers_are_told_by_attribute() -> None:
    scene = shapes.scenes("test")[0]
    classifier = AttributeClassifier(SHAPES.attributes).eval()
    with torch.no_grad():
        for name, head in classifier.heads.items():
            values = SHAPES.attributes[name]
            head.weight.zero_()  # type: ignore[operator]
            head.bias.copy_(torch.eye(len(values))[values.index(getattr(scene, name))])  # type: ignore[operator]
    wrong = SHAPES.labels(scene) | {"size": "small" if scene.size == "large" else "large"}
    asked = [SHAPES.labels(scene), wrong, {"color": scene.color}]
    shown = attributes_shown(classifier, torch.zeros(3, 3, 16, 16), asked)
    assert shown["size"] == [True, False] and shown["shape"] == [True, True] and shown["color"] == [True] * 3
    assert shown["all"] == [True, False, True], "what is not asked for is not counted"


def test_evaluate_reports_fidelity_and_prompt_accuracy(
    tiny_runs: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the tiny model, with a classifier that need not prove itself: every figure with its count and interval."""
    monkeypatch.setattr(module, "train_classifier", lambda drawn, size: AttributeClassifier(drawn.attributes).eval())
    monkeypatch.setattr(module, "check_classifier", lambda model, drawn, size: {"all": 1.0})
    evaluate.main(
        ["--model", str(tiny_model), "--num-samples", "6", "--steps", "2", "--batch-size", "4", "--device", "cpu"]
    )
    report = json.loads((tiny_runs / "ldm/evaluation.json").read_text())["measures"]
    names = ["VAE PSNR, dB", "VAE SSIM", *(f"prompt accuracy, {name}" for name in [*SHAPES.attributes, "all"])]
    names.append("background deviation, 8-bit steps")
    for name in names:
        assert report[name]["samples"] == 6 and report[name]["low"] <= report[name]["value"] <= report[name]["high"]
    assert (tiny_runs / f"classifier-shapes-{CLASSIFIER_VERSION}-16.safetensors").is_file()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 60 images, some of which are held out."""
    for i, scene in enumerate(shapes.scenes("train")[:60]):
        (tmp_path / "photos").mkdir(exist_ok=True)
        shapes.render(scene, 24, seed=i).save(tmp_path / f"photos/{i:02}.png")
    return tmp_path / "photos"


def measure(model: Path, *flags: str) -> None:
    evaluate.main(["--model", str(model), "--num-samples", "4", "--steps", "1", "--device", "cpu", *flags])


def test_other_data_is_measured_at_the_size_of_the_model(
    tiny_runs: Path, tiny_model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the size of the model, which is told; what was measured on the model's own data stays."""
    file = tiny_runs / "ldm/evaluation.json"
    own = file.read_bytes() if file.exists() else None
    measure(tiny_model, "--data.source", str(photos), "--out", str(tmp_path / "out"))
    told = capsys.readouterr().out
    for part in (f"in {photos}/", "at 16 pixels", "fd: at least 17 images of each set are needed"):
        assert part in told
    report = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert report["settings"]["data"] == str(photos) and report["measures"]["VAE SSIM"]["samples"] >= 2
    assert "prompt accuracy, all" not in report["measures"] and "clip_score_self" not in report["measures"]
    assert own == (file.read_bytes() if file.exists() else None)
    config = parse_cli(EvaluateConfig, ["--model", str(tiny_model), "--data.source", "x"], default=None, description="")
    assert config.data == DataConfig(source="x", resolution=16)
    with pytest.raises(SystemExit, match="data.channels is 1, the VAE expects 3"):
        measure(tiny_model, "--data.source", str(photos), "--data.channels", "1", "--out", str(tmp_path / "out"))


def test_what_is_too_little_to_measure(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "few"
    for split, count in (("train", 3), ("test", 1)):
        (folder / split).mkdir(parents=True)
        for i in range(count):
            shapes.render(shapes.scenes("train")[i], 24, seed=i).save(folder / split / f"{i}.png")
    flags = ["--data.source", str(folder), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="needs at least 2 held-out images, for its intervals; there is 1: add images"):
        measure(tiny_model, *flags)
    shapes.render(shapes.scenes("test")[0], 24, seed=9).save(folder / "test/1.png")
    measure(tiny_model, *flags)
    assert "the nearest 5 % need at least 20 held-out images; there are 2" in capsys.readouterr().out
    nearest = json.loads((tmp_path / "out/nearest.json").read_text())
    assert len(nearest) == 2 and nearest[0].keys() == {"caption", "pixels", "latents", "features"}
    assert (
        nearest[0]["pixels"]["image"] in {f"train/{i}.png" for i in range(3)} and nearest[0]["pixels"]["distance"] > 0
    )


def test_what_images_are_compared_by(photos: Path) -> None:
    """Another size, font or number of channels makes other images of the same source."""

    def of(**changes: Any) -> str:
        config = DataConfig(**{"source": "characters", "resolution": 16, **changes})
        return data_sha256(open_dataset(config, "test", seed=0))

    hashes = [of(), of(resolution=32), of(channels=1), of(source="shapes"), of(source=str(photos))]
    assert len(set(hashes)) == 5 and of() == hashes[0]
    fonts = [drawn_set(DataConfig(source="characters", emoji_font=font)) for font in (None, Path("Noto.ttf"))]
    assert [each and each.name for each in fonts] == ["characters", "characters-Noto"], "each has its own classifier"


def test_the_model_that_comes_along_is_not_written_to(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"models/characters comes with ldm and stays as it is: pass --out"):
        measure(SHIPPED_MODEL)


def test_a_model_whose_data_is_gone_or_unknown(
    tiny_model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The flag that points to other data is named; the folder of the training is found from where the training ran."""
    pipeline = Pipeline.load(tiny_model)
    pipeline.metadata = {**pipeline.metadata, "data": {**pipeline.metadata["data"], "source": "photos"}}
    pipeline.components = pipeline.components._replace(metadata=pipeline.metadata)
    pipeline.save(tmp_path / "run/model")
    monkeypatch.chdir(tmp_path / "run")
    with pytest.raises(SystemExit, match="data.source photos: no such folder.*--data.source"):
        measure(Path("model"))
    monkeypatch.chdir(tmp_path)
    measure(Path("run/model"))
    assert "VAE PSNR" in capsys.readouterr().out and Path("run/evaluation.json").is_file()
    pipeline.components = pipeline.components._replace(metadata={})
    pipeline.save(tmp_path / "converted/model")
    with pytest.raises(SystemExit, match="does not name its data.*pass --data.source"):
        measure(tmp_path / "converted/model")
    measure(tmp_path / "converted/model", "--data.source", "photos")


def test_the_classifier_learns_to_read_renders() -> None:
    """A tenth of its training at half the resolution; the demo trains it to 99.5 % and checks that at every use."""
    scenes = shapes.scenes("test")[:200]
    images = to_batch([shapes.render(scene, 16, seed=1) for scene in scenes])
    model = train_classifier(SHAPES, 16, steps=40, batch_size=48)
    shown = attributes_shown(model, images, [*map(SHAPES.labels, scenes)])
    assert sum(shown["background"]) > 160 and sum(shown["position"]) > 120
