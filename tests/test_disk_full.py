"""A full disk: one line names the file and the remedy, what was there is whole, and it goes on with more room."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import cache_latents
import check_data
import convert
import datasets
import evaluate
import img2img
import make_figures
import pytest
import torch
import txt2img
from helpers import assert_same, contents, full_disk, latent_flags, tensors_of, train, write_set
from PIL import Image
from safetensors.torch import load_file

from ldm import imaging
from ldm.config import write_yaml
from ldm.data import DataConfig, open_dataset
from ldm.data.batch_sampler import SampleKey
from ldm.data.sources.sharded import count_rows, list_shards
from ldm.io.atomic import write_tensors, write_text
from ldm.training import checkpoint
from ldm.training.config import TrainingConfig
from ldm.training.logger import RunLogger


class Disk:
    """A disk of a few kilobytes."""

    def __init__(self, folder: Path, kilobytes: int) -> None:
        self.folder = folder
        folder.mkdir()
        self._mount(f"size={kilobytes}k")

    def grow(self) -> None:
        self._mount("remount,size=64m")

    def _mount(self, options: str) -> None:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)], capture_output=True)
        if done.returncode:
            pytest.skip("mounting is not allowed here")


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (txt2img, ["a star", "--model", "{model}", "--out"]),
        (img2img, ["a star", "--image", "none.png", "--model", "{model}", "--out"]),
        (evaluate, ["--model", "{model}", "--out"]),
        (make_figures, ["--model", "{model}", "--out"]),
        (cache_latents, ["--vae", "{model}", "--out"]),
        (convert, ["{model}"]),
        (check_data, ["{folder}", "--contact-sheet"]),
        (check_data, ["{folder}", "--quarantine"]),
    ],
)
def test_an_output_that_cannot_be_written_is_found_first(
    script: ModuleType, flags: list[str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded: a file in the place of a folder, and a folder that nobody can make."""

    def load(*_: object) -> None:
        raise AssertionError("nothing may be loaded")

    monkeypatch.setattr(torch.nn.Module, "load_state_dict", load)
    (tmp_path / "images").mkdir()
    (tmp_path / "file").write_text("")
    argv = [flag.format(model=tiny_model, folder=tmp_path / "images") for flag in flags]
    name = flags[-1] if flags[-1].startswith("--") else "OUT"
    for out, reason in {
        tmp_path / "file/sub/a.png": ".*file is a file",
        Path("/proc/nowhere/a.png"): r"/proc/nowhere.* cannot be written \(",
    }.items():
        with pytest.raises(SystemExit, match=f"^error: {name} {reason}.*: pass a folder that can be written"):
            script.main([*argv, str(out)])
    assert (tmp_path / "file").read_text() == ""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Disk]]:
    """Makes a disk of some kilobytes."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("mounting is not allowed here")
    yield lambda kilobytes: Disk(tmp_path / "disk", kilobytes)
    subprocess.run(["umount", "-l", str(tmp_path / "disk")], capture_output=True)


def refused(action: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that ends a script."""
    with pytest.raises(SystemExit) as caught:
        action()
    message = str(caught.value.code)
    assert message.startswith("error: ") and "No space left on device" in message and "free some space and " in message
    shown = capsys.readouterr()
    assert len(message.splitlines()) == 1 and "Traceback" not in shown.out + shown.err
    return message


def check_whole(folder: Path) -> None:
    """Every file can be read, and no temporary one is left; the log may end in a line that was cut."""
    for file in filter(Path.is_file, folder.rglob("*")):
        assert not file.name.startswith("."), file
        if file.suffix == ".png":
            Image.open(file).load()
        elif file.suffix == ".safetensors":
            load_file(file)
        elif file.suffix == ".json":
            json.loads(file.read_text())
    assert all(checkpoint.find_corruption(path) is None for path in folder.glob("*/checkpoints/*"))


@pytest.mark.parametrize(
    ("kilobytes", "file", "checkpoint_every"),
    [
        (8, "tensorboard", 2),
        (16, "samples/step-000002.png", 4),
        (2000, "checkpoints", 2),
        (3000, "checkpoints", 2),
        (5600, "model/vae.safetensors", 2),
    ],
)
def test_training(
    kilobytes: int,
    file: str,
    checkpoint_every: int,
    tiny_runs: Path,
    disk: Callable[[int], Disk],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It goes on from the last checkpoint, or starts again, and ends as a run that never met a full disk."""
    small = disk(kilobytes)
    run, flags = small.folder / "vae", ["--sample-every", "2", "--checkpoint-every", str(checkpoint_every)]
    message = refused(lambda: train("vae", run, *flags), capsys)
    assert f"{run}/{file}" in message
    check_whole(small.folder)
    small.grow()
    saved = checkpoint.latest(run / "checkpoints")
    assert (saved is not None) == ("--resume latest" in message or file.startswith("model"))
    train("vae", run, *flags, *(["--resume", "latest"] if saved else []))
    check_whole(small.folder)
    assert_same(tensors_of(run, 4), tensors_of(tiny_runs / "vae", 4))


def test_encoding(
    tiny_runs: Path, disk: Callable[[int], Disk], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was written stays, and a second call makes the files of one that never met a full disk."""
    small, flags = disk(200), latent_flags(tiny_runs)
    out = small.folder / "latents"
    assert "safetensors could not be written" in refused(
        lambda: cache_latents.main(["--out", str(out), *flags]), capsys
    )
    check_whole(out)
    before = contents(out)
    small.grow()
    cache_latents.main(["--out", str(out), *flags])
    cache_latents.main(["--out", str(tmp_path / "whole"), *flags])
    assert before and before.items() < contents(out).items() and contents(out) == contents(tmp_path / "whole")


def test_painting(tiny_model: Path, disk: Callable[[int], Disk], capsys: pytest.CaptureFixture[str]) -> None:
    """The pictures that found room are whole, and the grid that did not is the old one, or is not there."""
    small = disk(8)
    command = ["a star", "--num-images", "2", "--steps", "2", "--model", str(tiny_model), "--out", str(small.folder)]
    message = refused(lambda: txt2img.main(command), capsys)
    assert f"{small.folder}/grid-00000.png could not be written" in message
    assert sorted(contents(small.folder)) == ["00000.png", "00001.png"]
    check_whole(small.folder)
    small.grow()
    txt2img.main(command)
    assert sorted(contents(small.folder)) == [*(f"0000{i}.png" for i in range(4)), "grid-00002.png"]


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.json", lambda path: write_text(path, "x" * 100)),
        ("a.yaml", lambda path: write_yaml(path, TrainingConfig())),
        ("a.safetensors", lambda path: write_tensors(path, {"x": torch.zeros(100)})),
        ("a.png", lambda path: imaging.save_image(Image.effect_noise((32, 32), 50), path)),
    ],
)
def test_what_was_there_is_whole(name: str, write: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / name).write_text("before")
    with full_disk(), pytest.raises(ValueError, match=f"{name} could not be written .*: free some space and try again"):
        write(tmp_path / name)
    assert contents(tmp_path) == {name: b"before"}
    with pytest.raises(ValueError, match=r"could not be written \(.*\): pass a writable folder and try"):
        write(tmp_path / name / "file")


def test_the_log_names_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def limited(logs: RunLogger, step: int, values: dict[str, float]) -> None:
        with full_disk():
            note(logs, step, values)

    note = RunLogger.write_json
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLogger, "write_json", limited)
        with pytest.raises(
            SystemExit, match=r"log.jsonl could not be written .* restart with --run .*/vae --resume latest"
        ):
            train("vae", tmp_path / "vae")
    assert "Traceback" not in capsys.readouterr().err


def test_a_shard_that_finds_no_room(
    disk: Callable[[int], Disk], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is to blame, and no image."""
    photos = write_set(tmp_path / "photos")
    small = disk(32)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", small.folder)
    shards = list_shards(str(photos))
    with full_disk(), pytest.raises(ValueError, match=r"rows.jsonl could not be written .*: free some space"):
        count_rows(shards, tmp_path / "counts")
    assert count_rows(shards, tmp_path / "counts") == [20] * 6
    data = open_dataset(DataConfig(source=str(photos), resolution=16), "train", seed=0)
    (small.folder / "more").write_bytes(bytes(16384))
    with pytest.raises(ValueError, match=r"arrow could not be written \(.*No space left.*free some space"):
        [data[SampleKey(index, 0, 0)] for index in range(len(data))]
    assert data.reader.unreadable() == []
    small.grow()
    assert len([data[SampleKey(index, 0, 0)] for index in range(len(data))]) == len(data)
