"""What evaluate writes: the report on any data, comparisons, refusals, sweeps."""

import json
from pathlib import Path
from typing import Any

import evaluate
import pytest
from helpers import train, write_photos
from PIL import Image

from ldm.evaluation.estimates import Estimate
from ldm.evaluation.memorization import Memorization, Share
from ldm.evaluation.report import Report, compare
from ldm.evaluation.sweep import SweepPoint, write_sweep


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Forty images with captions to train on, and 24 that are held out."""
    for split, count in (("train", 40), ("test", 24)):
        (tmp_path / f"photos/{split}").mkdir(parents=True)
        write_photos(tmp_path / f"photos/{split}", count, caption=split + " photo {}")
    return tmp_path / "photos"


def measure(model: Path, out: Path, *flags: str) -> dict[str, Any]:
    """Evaluate on the CPU with few steps; returns the report."""
    few = ["--num-samples", "24", "--steps", "1", "--device", "cpu"]
    evaluate.main(["--model", str(model), "--out", str(out), *few, *flags])
    report: dict[str, Any] = json.loads((out / "evaluation.json").read_text())
    return report


def test_any_data_with_captions(
    tiny_model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The VAE's bound, generated and other real images, on the own tower; memorization in three spaces; figures."""
    out, source = tmp_path / "out", ["--data.source", str(photos)]
    report = measure(tiny_model, out, *source, "--features", str(tmp_path / "real.safetensors"))
    metrics = [f"{name}_self" for name in ("fd", "kid", "cmmd", "precision", "recall", "density", "coverage")]
    for name in [*metrics, "clip_score_self", *(f"r{name}" for name in metrics), "VAE SSIM", "fd_self, real images"]:
        found = report["measures"][name]
        assert found["low"] <= found["value"] <= found["high"] and found["samples"] == 24, name
    assert next(iter(report["measures"])) == "VAE PSNR, dB" and "prompt accuracy, all" not in report["measures"]
    assert report["memorization"].keys() == {"pixels", "latents", "features"}
    assert report["training"] == {"images": 40, "searched": 40, "look_like_another": 0, "examples": []}
    protocol, settings = report["protocol"], report["settings"]
    assert protocol["num_samples"] == 24 and protocol["extractor"] == "self" and len(protocol["sha256"]) == 16
    assert "bicubic" in protocol["resize"] and settings["sampler"] == "dpmpp_2m" and settings["steps"] == 1
    page = (out / "evaluation.md").read_text()
    for name in ("evaluation", "samples", "pairs"):
        assert Image.open(out / f"{name}.png").width > 250 and f"({name}.png)" in page
    assert "| rfd_self |" in page and "to training images, in features" in page

    again = measure(tiny_model, out, *source, "--features", str(tmp_path / "real.safetensors"))
    assert again["measures"] == report["measures"], "features from the file, and the same seeds"
    with pytest.raises(
        SystemExit, match=r"real.safetensors has features of .* reference test; here .* reference train"
    ):
        measure(tiny_model, out, *source, "--features", str(tmp_path / "real.safetensors"), "--reference", "train")
    few = measure(tiny_model, out, *source, "--reference", "train", "--num-samples", "12", "--max-train-images", "0")
    told = (
        "fd: at least 17 images of each set are needed, one more than the 16 dimensions of its features; there are 12"
    )
    assert told in capsys.readouterr().out and told in few["notes"]
    assert "fd_self" not in few["measures"] and "kid_self" in few["measures"] and not few["memorization"]


def test_images_without_captions_and_a_model_without_text(
    tiny_runs: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a tower of its own it asks for one; with one it is measured, but not under captions."""
    for file in photos.rglob("*.txt"):
        file.unlink()
    flags = "--text.model none --unet.context-dim 0 --unet.pooled-dim 0 --unet.transformer-depth 0 0"
    vae = ["--vae", str(tiny_runs / "vae/model"), "--data.source", str(photos)]
    model = train("ldm", tmp_path / "ldm", *flags.split(), *vae)
    report = measure(model, tmp_path / "out")
    assert set(report["measures"]) == {"VAE PSNR, dB", "VAE SSIM"} and set(report["memorization"]) == {
        "pixels",
        "latents",
    }
    assert "the model has no image tower; pass --extractor: `local-dir:FOLDER`" in capsys.readouterr().out
    report = measure(model, tmp_path / "out", "--extractor", f"local-dir:{tiny_runs}/clip/model")
    assert {"rfd_self", "fd_self", "coverage_self"} < set(report["measures"])
    assert "clip_score_self" not in report["measures"]
    with pytest.raises(SystemExit, match="--sweep needs --extractor, as the model has no image tower"):
        measure(model, tmp_path / "out", "--sweep")


def report(folder: Path, *, fd: tuple[float, float, float], protocol: dict[str, Any], steps: int = 30) -> Path:
    """A report with one measure that two have, and one of its own."""
    own = {f"only in {folder.name}": Estimate(1.0, 1.0, 1.0, 5)}
    memorization = {"pixels": Memorization({5: Share(Estimate(0.5, 0.4, 0.6, 240), 1e-9)}, 0.9, 1e-12)}
    measures = {"fd_self": Estimate(*fd, 240), **own}
    Report({"model": folder.name}, protocol, {"steps": steps}, measures, memorization).write(folder)
    return folder / "evaluation.json"


def test_reports_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    protocol = {"sha256": "ab", "num_samples": 240}
    one = report(tmp_path / "a", fd=(4.0, 3.5, 4.4), protocol=protocol)
    other = report(tmp_path / "b", fd=(3.0, 2.7, 3.3), protocol=protocol, steps=60)
    evaluate.main(["--compare", str(one), str(other.parent)])
    told = capsys.readouterr().out
    assert "| fd_self | 4 | 3 | -1 | -1.5 to -0.4169 | * |" in told  # 0.5 = |(0.3, 0.4)|, 0.5831 = |(0.3, 0.5)|
    assert "steps: 30 -> 60" in told and "in one report alone: only in a, only in b" in told
    assert "| * |" not in compare(one, one)


def test_reports_that_are_not_comparable(tmp_path: Path) -> None:
    one = report(tmp_path / "a", fd=(4.0, 3.5, 4.5), protocol={"sha256": "ab", "num_samples": 240, "resize": "x"})
    other = report(tmp_path / "b", fd=(4.0, 3.5, 4.5), protocol={"sha256": "cd", "num_samples": 240})
    with pytest.raises(SystemExit, match="not comparable: sha256 is ab and cd; resize is x and None: evaluate both"):
        evaluate.main(["--compare", str(one), str(other)])
    with pytest.raises(SystemExit, match="--compare .*c: no such report: pass two evaluation.json"):
        evaluate.main(["--compare", str(one), str(tmp_path / "c")])
    other.write_text('{"model": "m", "VAE SSIM": {"value": 1}}')
    with pytest.raises(SystemExit, match="does not say how it was measured: evaluate the model again"):
        evaluate.main(["--compare", str(one), str(other)])


def test_what_is_repeated_is_told(tmp_path: Path) -> None:
    report(tmp_path / "a", fd=(4.0, 3.5, 4.5), protocol={})
    page = (tmp_path / "a/evaluation.md").read_text()
    assert "in pixels: 50.0% [40.0%, 60.0%] of samples are nearer than the nearest 5 % of held-out images" in page
    assert "with probability 0.90 (p = 1e-12): training images are repeated" in page


def test_a_sweep(tiny_model: Path, photos: Path, tmp_path: Path) -> None:
    """Of the CLIP score, over every combination; a wrong sampler is told before anything is done."""
    out, source = tmp_path / "out", ["--data.source", str(photos), "--num-samples", "4", "--device", "cpu"]
    flags = ["--sweep", "--sweep-scales", "1", "3", "--sweep-steps", "1", "2", "--sweep-samplers", "euler", "ddim"]
    evaluate.main(["--model", str(tiny_model), "--out", str(out), *source, *flags])
    values = json.loads((out / "sweep.json").read_text())
    points = {(p["sampler"], p["steps"], p["guidance_scale"]): p["estimate"]["value"] for p in values["points"]}
    assert values["measure"] == "clip_score_self" and len(points) == 8
    assert values["model"] == str(tiny_model) and values["num_samples"] == 4 and values["seed"] == 0
    assert values.keys() >= {"data_sha256", "guidance_interval"} and "steps" not in values
    assert points["euler", 2, 1.0] != points["euler", 2, 3.0]
    assert Image.open(out / "sweep.png").width > 400
    assert not (out / "evaluation.json").exists()
    with pytest.raises(SystemExit, match="sampler .*nothing"):
        evaluate.main(["--model", str(tiny_model), *source, "--sweep", "--sweep-samplers", "nothing"])


def test_heat_map_of_one_sampler(tmp_path: Path) -> None:
    points = [SweepPoint("ddim", 5, scale, Estimate(scale, scale, scale, 9)) for scale in (1.0, 2.0)]
    write_sweep("fd_self", points, tmp_path, {})
    assert json.loads((tmp_path / "sweep.json").read_text())["points"][1]["guidance_scale"] == 2.0
    assert Image.open(tmp_path / "sweep.png").height > 100
