"""Starting and going on: which settings count, what is checked before data, which images are the same, what is said."""

import json
import os
import shutil
import sys
from pathlib import Path

import cache_latents
import psutil
import pytest
from helpers import (
    STAGE_NAMES,
    Toy,
    copy_stages_before,
    encoded,
    losses,
    numbered_png,
    plain,
    toy,
    toy_config,
    train,
    write_set,
    write_tar,
)

from ldm import commands
from ldm.cli import parse_cli
from ldm.config import check_equal
from ldm.data import DataConfig, open_dataset
from ldm.ranks import Ranks
from ldm.stages import STAGES
from ldm.stages.vae import TrainVAEConfig, VAEStage


def parse(*argv: str) -> TrainVAEConfig:
    return parse_cli(TrainVAEConfig, argv, default=VAEStage.default, description="")


def write_photos(folder: Path, *, count: int = 24, shade: int = 0) -> Path:
    """Images with captions, each of one colour."""
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:02}.png").write_bytes(encoded(plain((number * 9, shade, 90), (20, 16))))
        (folder / f"{number:02}.txt").write_text(f"shade {number}")
    return folder


@pytest.fixture(scope="module")
def own_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos, and a VAE that was trained on them."""
    folder = tmp_path_factory.mktemp("own")
    train("vae", folder / "runs/vae", "--data.source", str(write_photos(folder / "photos")))
    return folder


@pytest.fixture
def own(own_run: Path, tmp_path: Path) -> Path:
    """A copy of it, elsewhere: as on another machine."""
    return Path(shutil.copytree(own_run, tmp_path / "own"))


# Settings.


def test_a_resumed_run_keeps_its_settings(own: Path) -> None:
    """Flags count most, then a file that is named, then those of the run."""
    run, source = own / "runs/vae", f"{own.parent}/own/photos"
    config = parse("--run", str(run), "--resume", "latest", "--steps", "9")
    assert config.data.resolution == 16 and config.vae.base_channels == 32 and config.steps == 9
    assert config.config == VAEStage.default and config.run == run
    file = own / "more.yaml"
    file.write_text("data: {channels: 1}\nbatch_size: 5\nsteps: 7\n")
    config = parse(
        "--run", str(run), "--resume", "latest", "--config", str(file), "--data.source", source, "--steps", "9"
    )
    assert (config.data.channels, config.data.resolution, config.batch_size, config.steps) == (1, 16, 5, 9)
    assert config.config == file and config.data.source == source


def test_a_checkpoint_names_its_run(own: Path) -> None:
    saved = own / "runs/vae/checkpoints/step-000004"
    assert parse("--resume", str(saved)).run == own / "runs/vae"
    other = parse(f"--resume={saved}", "--run", "elsewhere")
    assert other.run == Path("elsewhere") and other.data.resolution == 16


def test_a_run_without_settings_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match=r"--resume latest: .*missing/config.yaml.*--run, .*--config, or start without --resume"
    ):
        parse("--run", str(tmp_path / "missing"), "--resume", "latest")
    assert parse("--run", str(tmp_path / "missing"), "--resume", "latest", "--config", str(VAEStage.default))


def test_a_checkpoint_that_is_not_in_a_run_goes_on_with_a_recipe_or_a_run(own: Path) -> None:
    saved = shutil.copytree(own / "runs/vae/checkpoints/step-000004", own / "backup/step-000004")
    with pytest.raises(SystemExit, match="--resume .*step-000004: there is no .*config.yaml; name the run"):
        parse("--resume", str(saved))
    assert parse("--resume", str(saved), "--config", str(VAEStage.default)).run == Path("runs/shapes/vae")
    config = parse("--resume", str(saved), "--run", str(own / "runs/vae"))
    assert config.run == own / "runs/vae" and config.vae.base_channels == 32


def test_a_finished_run_is_no_recipe_to_resume(own: Path) -> None:
    """Its file of settings starts another run, also where it was resumed itself."""
    train("vae", own / "runs/vae", "--data.source", str(own / "photos"), "--resume", "latest", "--steps", "5")
    assert parse("--config", str(own / "runs/vae/config.yaml")).resume is None


def test_settings_that_are_not_those_of_the_recipe_are_told(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train("vae", own / "runs/vae", "--data.source", str(own / "photos"), "--resume", "latest", "--steps", "5")
    printed = capsys.readouterr().out
    assert "resumed with" in printed and "shapes/vae.yaml, but" in printed and "data.resolution: 32 -> 16" in printed
    assert "config changed since the checkpoint: " in printed and "; steps: 4 -> 5" in printed


# Checks before any data are opened.


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_what_needs_no_data_is_checked_first(stage: str, tiny_runs: Path, tmp_path: Path) -> None:
    copy_stages_before(stage, tiny_runs, tmp_path)
    run = Path(shutil.copytree(tiny_runs / stage, tmp_path / stage))
    network = {"clip": "--clip.width 64", "vae": "--vae.base-channels 64", "ldm": "--unet.model-channels 64"}[stage]
    field = network.split()[0].removeprefix("--").replace("-", "_")
    file = tmp_path / "file"
    file.touch()

    def refused(message: str, run: Path, *flags: str) -> None:
        with pytest.raises(SystemExit, match=message):
            train(stage, run, "--data.source", str(tmp_path / "no_photos"), *flags)

    refused("already has step-000004: pass --resume latest, or choose another --run", run)
    refused("file/run.* could not be written .*pass a writable folder", file / "run")
    resume = ("--resume", "latest")
    refused(rf"step-000004 has .*{field} \S+, here 64: they must match to resume", run, *resume, *network.split())
    refused("step-000004 has data.drawn_source shapes, here None", run, *resume)
    source = ("--data.source", "shapes")
    refused("step-000004 has seed 0, here 3", run, *resume, *source, "--seed", "3")
    refused("is at step 4, past --steps 3", run, *resume, *source, "--steps", "3")
    refused("has no checkpoint to resume from", tmp_path / "new", *resume, "--config", str(STAGES[stage].default))
    refused("no manifest.json: pass a folder", tmp_path / "new", "--resume", str(run / "checkpoints/none"))


def test_a_checkpoint_or_latents_without_what_decides_them_are_refused(tiny_runs: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_runs / "clip", tmp_path / "vae"))  # of another kind
    flags = ["--resume", "latest", "--config", str(VAEStage.default), "--data.source", str(tmp_path / "no_photos")]
    with pytest.raises(SystemExit, match="config.yaml: clip: unknown key"):
        train("vae", run, *flags)
    (run / "config.yaml").unlink()
    with pytest.raises(SystemExit, match="step-000004 has no vae.*: they must match to resume"):
        train("vae", run, *flags)
    with pytest.raises(ValueError, match="latents has no vae_sha256; seed 1, here 0: remedy"):
        check_equal({"seed": 0, "vae_sha256": "ab"}, {"seed": 1}, "latents", "remedy")


# The same images.


def test_images_that_moved_are_the_same(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a slash, absolute or relative, in a folder of another name, through a link."""
    run = own / "runs/vae"
    shutil.move(own / "photos", own / "pictures")
    (own / "link").symlink_to(own / "pictures", target_is_directory=True)
    monkeypatch.chdir(own)
    for steps, source in enumerate(["pictures/", str(own / "pictures"), "link"], 5):
        train("vae", run, "--resume", "latest", "--data.source", source, "--steps", str(steps))
    assert max(losses(run)) == 7


def test_images_that_were_added_are_counted(own: Path) -> None:
    flags = ["--resume", "latest", "--data.source", str(own / "photos")]
    for name in ("new", "newer", "newest"):
        (own / f"photos/{name}.png").write_bytes(encoded(plain()))
    added = r"step-000004 was trained on other images: 3 added \(new.*\), none removed; move them away to resume"
    with pytest.raises(SystemExit, match=added):
        train("vae", own / "runs/vae", *flags)
    held = json.loads((own / "runs/vae/items.json").read_text())
    (own / "photos" / held[0]).unlink()
    with pytest.raises(
        SystemExit, match=rf"other images: 3 added \(.*\), 1 removed \({held[0]}\); resume with the same"
    ):
        train("vae", own / "runs/vae", *flags)


def test_other_images_of_the_same_names_are_refused(own: Path) -> None:
    write_photos(own / "others", shade=200)
    with pytest.raises(SystemExit, match="step-000004 was trained on other images of the same names"):
        train("vae", own / "runs/vae", "--resume", "latest", "--data.source", str(own / "others"))


def test_latents_are_those_of_the_images_wherever_they_are(own: Path, tiny_runs: Path) -> None:
    runs = own / "runs"
    shutil.copytree(tiny_runs / "clip", runs / "clip")
    latents = ["--out", str(runs / "latents"), "--data.resolution", "16"]
    cache_latents.main([*latents, "--data.source", str(own / "photos")])
    write_photos(own / "others", shade=200)
    shutil.move(own / "photos", own / "pictures")
    cached = ["--cached-latents", str(runs / "latents"), "--steps", "1", "--sample-prompts", "a"]
    train("ldm", runs / "moved", *cached, "--data.source", f"{own}/pictures/")
    train("ldm", runs / "gone", *cached, "--data.source", str(own / "photos"))  # as they were spelled: none is opened
    for flags, message in (
        (
            ["--data.source", str(own / "others")],
            "was made from other images than those of .*others: run scripts/cache",
        ),
        ([], "has data.source .*photos, here shapes: pass --data.source .*photos"),
        (
            ["--data.source", f"{own}/photos", "--data.channels", "3", "--data.random-flip"],
            "has data.random_flip False, here True",
        ),
    ):
        with pytest.raises(SystemExit, match=message):
            train("ldm", runs / "other", *cached, *flags)


def test_latents_of_other_captions_are_written_again(
    own: Path, tiny_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_runs / "clip", own / "runs/clip")
    flags = ["--out", str(own / "runs/latents"), "--data.resolution", "16", "--data.source", str(own / "photos")]
    cache_latents.main(flags)
    cache_latents.main(flags)
    assert "2 of 2 files are there" in capsys.readouterr().out
    (own / "photos/03.txt").write_text("another caption")
    cache_latents.main(flags)
    assert "0 of 2 files are there" in capsys.readouterr().out


def test_a_fingerprint_knows_a_drawn_set_by_its_name() -> None:
    one, other = DataConfig(source="photos"), DataConfig(source="/elsewhere/photos/", emoji_font=None)
    assert one.fingerprint() == other.fingerprint() != DataConfig(source="pairs").fingerprint()
    assert DataConfig(source="pairs").fingerprint() != DataConfig(source="shapes").fingerprint()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes")
def test_what_is_no_file_has_no_content(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", count=3)
    os.mkfifo(photos / "pipe.png")
    (photos / "folder.png").mkdir()
    assert open_dataset(DataConfig(source=str(photos)), "train", seed=0).fingerprint()["content"]


def test_shards_are_the_same_wherever_they_are(tmp_path: Path) -> None:
    """Those of another set are not, though they have the same names and as many rows."""
    for name in ("one", "moved", "other"):
        write_set(tmp_path / name, tars=2, rows=4)
    write_tar(tmp_path / "other/000.tar", [(f"{i}.png", numbered_png(i + 90)) for i in range(4)])
    one, moved, other = (
        open_dataset(DataConfig(source=str(tmp_path / name)), "train", seed=0).fingerprint()
        for name in ("one", "moved", "other")
    )
    assert one == moved != other and one["items"] == other["items"]


# A checkpoint before what may fail.


class Failing(Toy):
    """Its validation fails."""

    def validate(self, ranks: Ranks) -> dict[str, float]:
        raise RuntimeError("out of memory")


def test_a_step_is_saved_before_it_is_validated(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        toy(toy_config(tmp_path, validate_every=3), stage=Failing)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]
    toy(toy_config(tmp_path, validate_every=3, resume="latest"))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation_w" in line] == [3, 6, 8]  # step 3 is made up for
    toy(toy_config(tmp_path, validate_every=3, resume="latest"))
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == len(lines)  # nothing is done twice


# Commands.

PYTHON, TRAIN = "/venv/bin/python", "scripts/train_vae.py"
FLAGS = ["--run", "runs/mine/vae", "--steps", "9"]


@pytest.mark.parametrize(
    ("parent", "own_words", "resumed", "evaluated"),
    [
        (["bash"], ["python", TRAIN], f"python {TRAIN}", "python scripts/txt2img.py"),
        ([PYTHON, "BIN/accelerate", "launch", "--multi_gpu", TRAIN], [PYTHON, "-u", TRAIN],
         f"BIN/accelerate launch --multi_gpu {TRAIN}", "python scripts/txt2img.py"),
        ([PYTHON, "BIN/torchrun", "--nproc_per_node", "2", "--", TRAIN], [PYTHON, "-u", TRAIN],
         f"BIN/torchrun --nproc_per_node 2 -- {TRAIN}", "python scripts/txt2img.py"),
        ([PYTHON, "BIN/accelerate", "launch", "-m", "ldm.scripts.train_vae"], [PYTHON, "-m", "ldm.scripts.train_vae"],
         "BIN/accelerate launch -m ldm.scripts.train_vae", "python -m ldm.scripts.txt2img"),
        (["bash"], [PYTHON, "BIN/ldm-train-vae"], "BIN/ldm-train-vae", "BIN/ldm-txt2img"),
        (["bash"], [PYTHON, "-m", "pytest"], "", "python scripts/txt2img.py"),
    ],
)  # fmt: skip
def test_commands_are_those_of_this_program(
    parent: list[str],
    own_words: list[str],
    resumed: str,
    evaluated: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("accelerate", "torchrun", "ldm-train-vae"):
        (tmp_path / name).touch()
    parent, own_words = ([word.replace("BIN", str(tmp_path)) for word in words] for words in (parent, own_words))
    resumed, evaluated = (text.replace("BIN", str(tmp_path)) for text in (resumed, evaluated))
    monkeypatch.setattr(sys, "argv", [own_words[-1], *FLAGS])
    monkeypatch.setattr(sys, "orig_argv", [*own_words, *FLAGS])
    monkeypatch.setattr(psutil.Process, "cmdline", lambda process: [*parent, *FLAGS])
    commands.started_with.cache_clear()
    try:
        assert (
            commands.resume_command(Path("runs/mine/vae")) == f"{resumed} --run runs/mine/vae --resume latest".strip()
        )
        assert commands.script_command("txt2img", launched=False) == evaluated
        trained = commands.script_command("train_ldm")
        assert trained == (resumed or f"accelerate launch {TRAIN}").replace("vae", "ldm")
    finally:
        commands.started_with.cache_clear()


def test_the_next_stage_gets_the_recipe_and_the_data(tmp_path: Path) -> None:
    data = ["--data.source", "my photos", "--data.channels", "1", "--data.random-flip", "--data.bucket-step", "16"]
    config = parse("--config", "configs/emoji-cpu/vae.yaml", "--run", f"{tmp_path}/my runs/vae", *data)
    command = commands.command_to_train(config, "ldm", VAEStage.default)
    flags = "--data.source 'my photos' --data.bucket-step 16 --data.channels 1"
    start = "accelerate launch scripts/train_ldm.py --config configs/emoji-cpu/ldm.yaml"
    assert command == f"{start} {flags} --run '{tmp_path}/my runs/ldm'"
    assert "bucket" not in commands.command_to_train(config, "clip", VAEStage.default)
    assert "--vae.image-channels 1" in commands.command_to_train(config, "vae", VAEStage.default)


def test_a_finished_run_says_what_it_made(tiny_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its model, its last validation, and the next command; and the bar what it does at 100 %."""
    ends = {
        "clip": ("validation_retrieval", rf"train_vae.py --data.resolution 16 --run {tmp_path}/vae"),
        "vae": ("validation_psnr", f"train_ldm.py --data.resolution 16 --run {tmp_path}/ldm"),
        "ldm": ("validation_loss", f"txt2img.py 'a prompt' --model {tmp_path}/ldm/model"),
    }
    copy_stages_before("ldm", tiny_runs, tmp_path)
    shutil.copytree(tiny_runs / "ldm", tmp_path / "ldm")
    for stage, (measure, command) in ends.items():
        train(stage, tmp_path / stage, "--resume", "latest", *(["--no-cache-latents"] if stage == "ldm" else []))
        shown = capsys.readouterr()
        made, following = shown.out.strip().splitlines()[-2:]
        assert made.startswith(f"finished after 4 steps: {tmp_path}/{stage}/model; at step 4: {measure} ")
        assert following.startswith("next: ") and following.endswith(command)
        assert "100%" in shown.err and f"{stage}, saving the model: 100%" in shown.err


def test_the_bar_names_what_a_run_does_beside_its_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy(toy_config(tmp_path / "toy"))
    shown = capsys.readouterr().err
    for what in ("saving a checkpoint", "validating", "sampling", "saving the model"):
        assert f"toy, {what}: 100%" in shown
