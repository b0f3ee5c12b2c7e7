"""The scripts, one after the other, as a person runs them."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cache_latents
import pytest
import torch
import train_ldm
import txt2img
from helpers import copy_stages_before, losses, train

from ldm.data.sources import shapes
from ldm.pipeline import Pipeline

ROOT = Path(__file__).parents[1]


def test_three_stages_make_a_model_that_generates(tiny_runs: Path, tiny_model: Path, tmp_path: Path) -> None:
    for stage in ("clip", "vae", "ldm"):
        run = tiny_runs / stage
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
        assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
        assert (run / "config.yaml").is_file()
        assert any((run / "tensorboard").rglob("events*"))
    assert (tiny_runs / "ldm/samples/step-000004.png").is_file()
    txt2img.main(
        ["a red circle", "--model", str(tiny_model), "--out", str(tmp_path), "--num-images", "2", "--steps", "2"]
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["00000.png", "00001.png", "grid-00000.png"]


def test_diffusion_in_pixels_without_text_and_in_grey(tmp_path: Path) -> None:
    """`autoencoder: none` and `text: none` are the DDPM of the lesson, here on one channel."""
    flags = "--vae none --text.model none --unet.in-channels 1 --unet.context-dim 0 --unet.pooled-dim 0"
    linear = "--diffusion.noise-schedule linear --diffusion.prediction epsilon --data.channels 1"
    model = train("ldm", tmp_path / "pixels", *flags.split(), *linear.split())
    pipeline = Pipeline.load(model)
    assert pipeline.vae is None and pipeline.text is None
    image = pipeline("", steps=3, sampler="ddpm")[0]
    assert image.mode == "L" and image.size == (16, 16)


def test_grey_latents(tiny_runs: Path, tmp_path: Path) -> None:
    """A one-channel VAE below a U-Net, as for medical images."""
    shutil.copytree(tiny_runs / "clip", tmp_path / "clip")
    train("vae", tmp_path / "vae", "--data.channels", "1", "--vae.image-channels", "1")
    model = train("ldm", tmp_path / "ldm", "--data.channels", "1")
    assert Pipeline.load(model)("a star", steps=2)[0].mode == "L"


def test_two_text_towers_and_sizes(tiny_runs: Path, tmp_path: Path) -> None:
    """What conditions Stable Diffusion XL in addition to its prompt, in a run that is resumed, saved and read back."""
    copy_stages_before("ldm", tiny_runs, tmp_path)
    second = train("clip", tmp_path / "other/clip", "--seed", "1")
    flags = (
        f"--second-text.model local-dir:{second} --second-text.use-pooled --text.no-use-pooled --unet.context-dim 64"
    )
    flags += " --unet.size-embed-dim 8 --text.pad-token-id 49407"
    flags += " --second-text.pad-token-id 0 --second-text.zero-empty-prompt"
    model = train("ldm", tmp_path / "ldm", *flags.split(), "--steps", "2")
    model = train("ldm", tmp_path / "ldm", *flags.split(), "--resume", "latest")
    pipeline = Pipeline.load(model)
    assert pipeline.text is not None and [e.config.pad_token_id for e in pipeline.text.encoders] == [49407, 0]
    assert sorted(path.name for path in model.glob("*text")) == ["second_text", "text"]
    with torch.no_grad():
        pipeline.unet.conv_out.weight.normal_()
        pipeline.unet.vector_embed[0].weight.normal_()
    square, wide = (pipeline("a star", steps=2, width=width, height=16)[0] for width in (16, 32))
    assert wide.crop((0, 0, 16, 16)).tobytes() != square.tobytes()
    with pytest.raises(SystemExit, match="has second_text_sha256 .*: they must match to resume"):
        flags = flags.replace(str(second), str(tmp_path / "clip/model"))
        train("ldm", tmp_path / "ldm", *flags.split(), "--resume", "latest")


def test_any_caption_can_stand_in_the_sample_grid(tiny_runs: Path, tmp_path: Path) -> None:
    """Longer than any prompt, with the signs of prompts and of the tower: captions are read as in training."""
    copy_stages_before("ldm", tiny_runs, tmp_path)
    captions = ["word " * 600, "a cat AND a dog (very red:", "<end_of_text> [a]", ""]
    (tmp_path / "photos").mkdir()
    for number in range(8):
        shapes.render(shapes.scenes("train")[number], 16, seed=number).save(tmp_path / f"photos/{number}.png")
        (tmp_path / f"photos/{number}.txt").write_text(captions[number % 4])
    model = train("ldm", tmp_path / "ldm", "--data.source", str(tmp_path / "photos"), "--seed", "3")
    assert (model / "model.json").is_file() and (tmp_path / "ldm/samples/step-000004.png").is_file()


def test_a_model_without_text_says_that_prompts_change_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--vae none --text.model none --unet.in-channels 3 --unet.context-dim 0 --unet.pooled-dim 0"
    model = train("ldm", tmp_path / "pixels", *flags.split())
    txt2img.main(["a cat", "--model", str(model), "--out", str(tmp_path), "--steps", "2"])
    assert "unconditional model: the prompt is ignored" in capsys.readouterr().err


def test_a_stage_that_is_missing_is_named_with_the_recipe_of_the_run(tmp_path: Path) -> None:
    clip = "accelerate launch scripts/train_clip.py --config configs/emoji-cpu/clip.yaml --run"
    with pytest.raises(SystemExit, match=f"run `{clip} {tmp_path}/clip` first"):
        train_ldm.main(["--config", "configs/emoji-cpu/ldm.yaml", "--run", str(tmp_path / "ldm"), "--vae", "none"])


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves(tmp_path: Path) -> None:
    """SIGTERM to `accelerate launch` alone, which dies of it: the run saves its step and ends."""
    flags = ["--steps", "100000", "--batch-size", "8", "--data.resolution", "16", "--checkpoint-every", "100000"]
    command = ["-m", "accelerate.commands.launch", "scripts/train_vae.py", "--run", str(tmp_path), *flags]
    launcher = subprocess.Popen([sys.executable, *command], cwd=ROOT)
    log, saved = tmp_path / "log.jsonl", tmp_path / "checkpoints"
    wait_for(lambda: log.is_file() and log.read_text().count("\n") > 2)
    launcher.terminate()
    launcher.wait()
    wait_for(lambda: any(saved.glob("step-*/progress.json")))
    size = log.stat().st_size
    time.sleep(2)
    assert log.stat().st_size == size


def wait_for(there: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.1)


def test_the_latent_cache_changes_nothing(tiny_runs: Path, tmp_path: Path) -> None:
    copy_stages_before("ldm", tiny_runs, tmp_path)
    train("ldm", tmp_path / "ldm", "--no-cache-latents")
    want, found = losses(tiny_runs / "ldm"), losses(tmp_path / "ldm")
    assert max(abs(found[step] / want[step] - 1) for step in want) < 1e-5


def test_widths_that_do_not_fit_name_the_flag(tiny_runs: Path, tmp_path: Path) -> None:
    copy_stages_before("ldm", tiny_runs, tmp_path)
    with pytest.raises(SystemExit, match=r"unet.in_channels is 5, .* need 4: --unet.in-channels 4"):
        train("ldm", tmp_path / "ldm", "--unet.in-channels", "5")
    with pytest.raises(SystemExit, match=r"unet.pooled_dim is 16, .* need 0: --unet.pooled-dim 0"):
        train("ldm", tmp_path / "ldm", "--text.no-use-pooled")
    with pytest.raises(SystemExit, match="image size 18 is not a multiple of 4, the VAE's factor"):
        train("vae", tmp_path / "other", "--data.resolution", "18")
    message = r"data.channels is 1, the VAE .* 3: .*--data.channels 3, or a VAE .* --vae.image-channels 1"
    for stage in ("vae", "ldm"):
        with pytest.raises(SystemExit, match=message):
            train(stage, tmp_path / "other", "--data.channels", "1")
    with pytest.raises(SystemExit, match=message):
        cache_latents.main(["--out", str(tmp_path / "latents"), "--data.resolution", "16", "--data.channels", "1"])


def test_missing_stages_name_the_script_that_makes_them(tmp_path: Path) -> None:
    """With the data of this run."""
    data = "--data.resolution 16"
    vae = rf"no finished vae below .*: run `accelerate launch scripts/train_vae.py {data} --run .*/vae` first"
    with pytest.raises(SystemExit, match=vae):
        train("ldm", tmp_path / "ldm")
    with pytest.raises(SystemExit, match=r"no finished text tower below .*train_clip.py .*--run .*/clip` first"):
        train("ldm", tmp_path / "ldm", "--vae", "none", "--unet.in-channels", "3")


def test_resuming_on_another_vae_or_text_is_refused(tiny_runs: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_runs, tmp_path / "runs")
    clip, vae = (train(stage, tmp_path / f"other/{stage}", "--seed", "1") for stage in ("clip", "vae"))
    for key, flags in {
        "vae_sha256": ["--vae", str(vae)],
        "text_sha256": ["--text.model", f"local-dir:{clip}"],
        "layer": ["--text.layer", "last"],
    }.items():
        with pytest.raises(SystemExit, match=f"has {key} .*: they must match to resume"):
            train("ldm", tmp_path / "runs/ldm", "--resume", "latest", *flags)


def test_cached_latents_cannot_be_mirrored(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="data.random_flip: cached latents cannot be mirrored; .*--no-cache-latents"):
        train("ldm", tmp_path / "ldm", "--data.random-flip", "--cache-latents")


@pytest.mark.parametrize("system", ["windows", "apple"])
def test_the_whole_chain_on_another_system(system: str, tmp_path: Path) -> None:
    """Without what the system lacks, on a console that can show no name of an image, and whose reader goes away."""
    photos, folder = tmp_path / "photos", tmp_path / "runs"
    photos.mkdir()
    for number in range(16):
        shapes.render(shapes.scenes("train")[number], 16, seed=number).save(photos / f"{number:02} 猫.png")
        (photos / f"{number:02} 猫.txt").write_text("猫", encoding="utf-8")
    for number in range(4):
        (photos / f"broken {number} 猫.jpg").write_bytes(b"no image")
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "tests", "scripts"))
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONIOENCODING": "cp1252:strict", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/other_systems.py"), system, str(photos), str(folder)]
    with (tmp_path / "errors").open("w") as errors:
        chain = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors)
    assert chain.stdout is not None
    lines = list(iter(chain.stdout.readline, b"")) if system == "windows" else [chain.stdout.readline()]
    chain.stdout.close()
    assert chain.wait() == 0, (tmp_path / "errors").read_text()[-3000:]
    assert lines and (system == "apple" or any(rb"\u732b.jpg: not a PNG" in line for line in lines))
    assert (folder / "out/00000.png").is_file() and (folder / "latents/index.json").is_file()
    assert all((folder / stage / "checkpoints/step-000002/sha256.json").is_file() for stage in ("clip", "vae", "ldm"))


@pytest.mark.slow
def test_the_commands_of_the_readme(tmp_path: Path) -> None:
    """Through `accelerate launch`, in processes of their own, with every stage shortened."""
    short = {"clip": 2, "vae": 2, "ldm": 2}
    for stage, steps in short.items():
        run = str(tmp_path / stage)
        command = ["-m", "accelerate.commands.launch", f"scripts/train_{stage}.py", "--run", run, "--steps", str(steps)]
        command += ["--no-cache-latents"] if stage == "ldm" else []  # which takes a minute
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    model = ["--model", str(tmp_path / "ldm/model"), "--steps", "2"]
    out = ["--out", str(tmp_path / "out")]
    subprocess.run([sys.executable, "scripts/txt2img.py", "a cat astronaut", *model, *out], cwd=ROOT, check=True)
    assert (tmp_path / "out/00000.png").is_file()
