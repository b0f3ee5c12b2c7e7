"""Latents computed once: the same training, what is whole is kept, and what is damaged is never read."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import encode
import pytest
import torch
from helpers import train
from PIL import Image
from safetensors.torch import load_file, save_file
from test_training import losses

from ldm.data import DataConfig, latents, open_dataset
from ldm.data.batch_sampler import SampleKey
from ldm.pipeline.pipeline import load_vae
from ldm.text.tower import TextTower

SIZE = ["--data.resolution", "16"]
TEXT = ["--text.layer", "penultimate", "--text.use-pooled"]  # as configs/shapes/ldm.yaml has it


def make(runs: Path, *flags: str) -> Path:
    encode.main(["--out", str(runs / "latents"), *SIZE, "--images-per-file", "100", *flags])
    return runs / "latents"


@pytest.fixture(scope="module")
def runs(tiny_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny clip and vae stages, and latents of them."""
    folder = tmp_path_factory.mktemp("runs")
    for stage in ("clip", "vae"):
        shutil.copytree(tiny_runs / stage, folder / stage)
    make(folder)
    return folder


def test_training_from_latents_equals_training_from_images(runs: Path, tiny_runs: Path) -> None:
    """Up to the float16 of the latents, in the losses of training and validation; it opens no image."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train_ldm.open_dataset", None)
        train("ldm", runs / "ldm", "--cached-latents", str(runs / "latents"))
    want, found = losses(tiny_runs / "ldm"), losses(runs / "ldm")
    assert want.keys() == found.keys() and max(abs(found[step] / want[step] - 1) for step in want) < 2e-3
    words = [(run / "ldm/model/words.txt").read_text() for run in (runs, tiny_runs)]
    assert words[0] == words[1]
    last = [json.loads((run / "ldm/log.jsonl").read_text().splitlines()[-1]) for run in (runs, tiny_runs)]
    assert last[0]["validation_loss"] == pytest.approx(last[1]["validation_loss"], rel=2e-3)


def test_training_from_text_states_runs_no_tower(runs: Path, tiny_runs: Path, tmp_path: Path) -> None:
    """But for that of "", and of the sample grid. A tower that says something else is refused."""
    for name in ("clip", "vae"):
        shutil.copytree(runs / name, tmp_path / name)
    flags = ["--cached-latents", str(make(tmp_path, "--text-embeddings", *TEXT))]
    asked: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextTower, "forward", counted(asked, TextTower.forward))
        train("ldm", tmp_path / "ldm", *flags, "--sample-every", "99", "--caption-dropout", "0.5")
    assert asked == [1, 2 * 16]  # ""; the sample grid at the end, and "" for each of its prompts
    with pytest.raises(SystemExit, match="something else: layer is last, there penultimate; run scripts/encode"):
        train("ldm", tmp_path / "other", *flags, "--text.layer", "last")
    train("ldm", runs / "dropped", "--cached-latents", str(runs / "latents"), "--caption-dropout", "0.5")
    want, found = losses(runs / "dropped"), losses(tmp_path / "ldm")
    assert want.keys() == found.keys() and max(abs(found[step] / want[step] - 1) for step in want) < 2e-3


def counted(sizes: list[int], forward: Callable[..., Any]) -> Callable[..., Any]:
    """A function that notes the size of each batch."""
    return lambda self, ids, **rest: sizes.append(len(ids)) or forward(self, ids, **rest)


def test_what_is_whole_is_kept(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("clip", "vae", "latents"):
        shutil.copytree(runs / name, tmp_path / name)
    files = sorted((tmp_path / "latents").glob("*.safetensors"))
    index = latents.read_index(tmp_path / "latents")
    assert len(files) == sum(-(-rows // 100) for rows in index.rows.values()) > 5
    before = {file: file.stat().st_mtime_ns for file in files}
    told = (tmp_path / "latents/index.json").read_text()
    files[1].unlink()
    files[2].write_bytes(files[2].read_bytes()[:100])
    make(tmp_path)
    assert f"{len(files) - 2} of {len(files)} files are there" in capsys.readouterr().out
    changed = [file for file in files if file.stat().st_mtime_ns != before[file]]
    assert changed == files[1:3] and (tmp_path / "latents/index.json").read_text() == told
    make(tmp_path, "--seed", "1")
    assert f"0 of {len(files)} files are there" in capsys.readouterr().out
    make(tmp_path, "--seed", "1", "--images-per-file", "50")  # files of the same names hold other rows
    assert "\n0 of " in capsys.readouterr().out


def test_numbers_beyond_float16_are_refused(runs: Path, tmp_path: Path) -> None:
    large, none = torch.full((1, 1, 1, 1), 7e4), torch.zeros(1, 1, 1, 1)
    for mean, states, told in ((large, none, "latents reach 70000"), (none, large, "text tower reach 70000")):
        with pytest.raises(ValueError, match=f"the .*{told}, beyond the 65,504 of float16: train without"):
            latents.write_latent_file(
                tmp_path / "train-000-000000.safetensors",
                open_dataset(DataConfig(resolution=16), "train", seed=0),
                0,
                range(1),
                encode=lambda images, mean=mean: (mean, none),
                tokenize=lambda texts: torch.zeros(len(texts), 4),
                keep=lambda ids, states=states: (states, states),
                made="made",
            )
    assert not list(tmp_path.iterdir())


def test_variants_are_what_the_epochs_would_have_cut(runs: Path, tmp_path: Path) -> None:
    for name in ("clip", "vae"):
        shutil.copytree(runs / name, tmp_path / name)
    photos, draw = tmp_path / "photos", random.Random(0)
    photos.mkdir()
    for number in range(12):
        Image.frombytes("RGB", (24, 16), draw.randbytes(24 * 16 * 3)).save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text(f"picture {number}")
    flags = ["--data.source", str(photos), "--data.random-flip", "--augmentations-per-image", "2"]
    folder = make(tmp_path, *flags)
    config = DataConfig(source=str(photos), resolution=16, random_flip=True)
    data, vae = open_dataset(config, "train", seed=0), load_vae(tmp_path / "vae/model")
    cached = latents.LatentDataset(folder, "train", seed=0)
    assert len(cached) == len(data)
    means = []
    for epoch in (0, 1, 2):
        for index in range(len(data)):
            key = SampleKey(index, epoch, 0)
            same = data[SampleKey(index, epoch % 2, 0)]
            with torch.no_grad():
                want = vae.encode(same["image"][None])
            torch.testing.assert_close(cached[key]["mean"], want.mean[0], rtol=1e-2, atol=1e-2)
            assert torch.equal(cached[key]["sizes"], same["sizes"])
            means.append(cached[key]["mean"])
    assert not torch.equal(torch.stack(means[: len(data)]), torch.stack(means[len(data) : 2 * len(data)]))


def test_latents_of_something_else_are_refused(runs: Path, tmp_path: Path) -> None:
    flags = ["--cached-latents", str(runs / "latents")]
    with pytest.raises(SystemExit, match="was made with something else: seed is 1, there 0; run scripts/encode.py"):
        train("ldm", runs / "other", *flags, "--seed", "1")
    vae = train("vae", tmp_path / "vae", "--seed", "1")
    with pytest.raises(SystemExit, match="made with something else: vae_sha256 is .*, there .*; run scripts/encode.py"):
        train("ldm", runs / "other", *flags, "--vae", str(vae))
    with pytest.raises(SystemExit, match=r"holds no finished latents \(no index.json\): make them with scripts/encode"):
        train("ldm", runs / "other", "--cached-latents", str(tmp_path))
    with pytest.raises(SystemExit, match="encode.py made them with a VAE and a text tower"):
        none = ["--vae", "none", "--unet.in-channels", "3"]
        train("ldm", runs / "other", *flags, *none)


def test_a_changed_file_is_never_read(runs: Path, tmp_path: Path) -> None:
    """2,000 files with bits turned, bytes cut off or changed: each row is the one that was written, or an error."""
    folder, draw = tmp_path / "latents", random.Random(0)
    shutil.copytree(runs / "latents", folder)
    index = latents.read_index(folder)
    small = {name: tensor.clone() for name, tensor in load_file(folder / "test-000-000000.safetensors").items()}
    rows = {name: tensor[:8] for name, tensor in small.items() if name != "ids"}
    file = folder / "test-000-000000.safetensors"
    save_file(
        {**rows, "ids": small["ids"][: small["last"][7]]},
        file,
        latents.file_tag(file.name, latents.content_key(index.fingerprint, index.images_per_file)),
    )
    whole = file.read_bytes()
    held_out = latents.LatentDataset(folder, "test", seed=0)
    latents._opened.cache_clear()
    want = [held_out[SampleKey(i, 0, 0)] for i in range(8)]
    seen = 0
    for number in range(2_000):
        place = draw.choice((draw.randrange(len(whole)), draw.randrange(900)))
        changed = {
            0: whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :],
            1: whole[:place],
            2: whole[:place] + draw.randbytes(8) + whole[place + 8 :],
        }[number % 3]
        other = folder / f".changed-{number}"  # a new file each time: the old one is mapped into memory
        other.write_bytes(changed)
        other.replace(file)
        latents._opened.cache_clear()
        for i in range(8):
            try:
                found = held_out[SampleKey(i, 0, 0)]
            except ValueError as error:
                assert "test-000-000000.safetensors is missing or damaged: remove it and run" in str(error)
                seen += 1
                break
            assert all(torch.equal(found[name], want[i][name]) for name in found)
    assert seen > 1_900  # the others had a change in what no row of the split is read from
    (folder / "index.json").write_text("{")
    with pytest.raises(ValueError, match="index.json is damaged: run scripts/encode.py again"):
        latents.LatentDataset(folder, "test", seed=0)
