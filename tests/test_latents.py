"""Latents computed once: the same training, valid files are reused, and what is damaged is never read."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cache_latents
import pytest
import torch
from helpers import losses, plain, train
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm import rng
from ldm.data import DataConfig, latents, open_dataset
from ldm.data.batch_sampler import SampleKey
from ldm.interop import compvis, diffusers
from ldm.pipeline.load import load_vae
from ldm.text.tower import TextTower
from ldm.vae import VAE, VAEConfig

SIZE = ["--data.resolution", "16"]
TEXT = ["--text.layer", "penultimate", "--text.use-pooled"]  # as configs/shapes/ldm.yaml has it


def make(runs: Path, *flags: str) -> Path:
    cache_latents.main(["--out", str(runs / "latents"), *SIZE, "--images-per-file", "100", *flags])
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
        patch.setattr("ldm.stages.diffusion.open_splits", None)
        train("ldm", runs / "ldm", "--cached-latents", str(runs / "latents"))
    assert losses(runs / "ldm") == pytest.approx(losses(tiny_runs / "ldm"), rel=2e-3)
    words = [(run / "ldm/model/vocab.txt").read_text() for run in (runs, tiny_runs)]
    assert words[0] == words[1]
    last = [json.loads((run / "ldm/log.jsonl").read_text().splitlines()[-1]) for run in (runs, tiny_runs)]
    assert last[0]["validation_loss"] == pytest.approx(last[1]["validation_loss"], rel=2e-3)


def test_training_from_text_embeddings_runs_no_tower(runs: Path, tiny_runs: Path, tmp_path: Path) -> None:
    """But for those of "", and of the sample grid. A tower with other settings is refused."""
    for name in ("clip", "vae"):
        shutil.copytree(runs / name, tmp_path / name)
    flags = ["--cached-latents", str(make(tmp_path, "--text-embeddings", *TEXT))]
    sizes: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextTower, "forward", counted(sizes, TextTower.forward))
        train("ldm", tmp_path / "ldm", *flags, "--sample-every", "99", "--caption-dropout", "0.5")
    assert sizes == [1, 2 * 16]  # ""; the sample grid at the end, and "" for each of its prompts
    with pytest.raises(SystemExit, match="has layer penultimate, here last: run scripts/cache_latents.py"):
        train("ldm", tmp_path / "other", *flags, "--text.layer", "last")
    train("ldm", runs / "dropped", "--cached-latents", str(runs / "latents"), "--caption-dropout", "0.5")
    assert losses(tmp_path / "ldm") == pytest.approx(losses(runs / "dropped"), rel=2e-3)


def counted(sizes: list[int], forward: Callable[..., Any]) -> Callable[..., Any]:
    """A function that notes the size of each batch."""
    return lambda self, ids, **rest: sizes.append(len(ids)) or forward(self, ids, **rest)


def test_valid_files_are_reused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("clip", "vae", "latents"):
        shutil.copytree(runs / name, tmp_path / name)
    files = sorted((tmp_path / "latents").glob("*.safetensors"))
    index = latents.read_index(tmp_path / "latents")
    assert len(files) == sum(-(-rows // 100) for rows in index.rows.values()) > 5
    before = {file: file.stat().st_mtime_ns for file in files}
    index_text = (tmp_path / "latents/index.json").read_text()
    files[1].unlink()
    files[2].write_bytes(files[2].read_bytes()[:100])
    make(tmp_path)
    assert f"{len(files) - 2} of {len(files)} files are there" in capsys.readouterr().out
    changed = [file for file in files if file.stat().st_mtime_ns != before[file]]
    assert changed == files[1:3] and (tmp_path / "latents/index.json").read_text() == index_text
    make(tmp_path, "--seed", "1")
    assert f"0 of {len(files)} files are there" in capsys.readouterr().out
    make(tmp_path, "--seed", "1", "--images-per-file", "50")  # files of the same names hold other rows
    assert "\n0 of " in capsys.readouterr().out


def test_numbers_beyond_float16_are_refused(runs: Path, tmp_path: Path) -> None:
    large, none = torch.full((1, 1, 1, 1), 7e4), torch.zeros(1, 1, 1, 1)
    for mean, states, name in ((large, none, "latents"), (none, large, "text embeddings")):
        with pytest.raises(ValueError, match=f"{name} overflow float16 .*70000.*: do not cache them"):
            latents.write_latent_file(
                tmp_path / "train-000-000000.safetensors",
                open_dataset(DataConfig(resolution=16), "train", seed=0),
                0,
                torch.arange(1),
                encode=lambda images, mean=mean: (mean, none),
                tokenize=lambda texts: torch.zeros(len(texts), 4),
                encode_text=lambda ids, states=states: (states, states),
                key="key",
            )
    assert not list(tmp_path.iterdir())


def test_augmentations_are_what_the_epochs_would_have_cropped(runs: Path, tmp_path: Path) -> None:
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


def test_a_published_vae_serves_in_any_form(runs: Path, tmp_path: Path) -> None:
    """Latents that were cached with the vae/ of diffusers are those of the file, and the model keeps their scale."""
    torch.manual_seed(0)
    vae = VAE(VAEConfig(base_channels=32, channel_mult=(1, 1), num_res_blocks=1)).requires_grad_(False)
    vae.latent_std.fill_(1 / 0.18215)
    diffusers.write_vae(vae, tmp_path / "published/vae")
    compvis.write_vae(vae, tmp_path / "vae.safetensors")
    torch.save({"state_dict": load_file(tmp_path / "vae.safetensors")}, tmp_path / "vae.pt")
    shutil.copytree(runs / "clip", tmp_path / "clip")
    folder = make(tmp_path, "--vae", str(tmp_path / "published"))
    model = train(
        "ldm",
        tmp_path / "ldm",
        "--vae",
        str(tmp_path / "published/vae"),
        "--cached-latents",
        str(folder),
        "--steps",
        "1",
    )
    want, found = vae.state_dict(), load_file(model / "vae.safetensors")
    assert all(torch.allclose(want[name], found[name], rtol=1e-4, atol=1e-5) for name in want)
    text = ["--text.model", f"local-dir:{tmp_path}/clip/model"]
    for form in (tmp_path / "vae.pt", model):
        train("ldm", tmp_path / "other" / form.name, "--vae", str(form), "--steps", "1", *text)
    with pytest.raises(SystemExit, match="missing does not exist: pass a model folder, a diffusers folder or a single"):
        train("ldm", tmp_path / "other", "--vae", str(tmp_path / "missing"), *text)


def test_latents_of_something_else_are_refused(runs: Path, tmp_path: Path) -> None:
    flags = ["--cached-latents", str(runs / "latents")]
    with pytest.raises(SystemExit, match="has seed 0, here 1: run scripts/cache_latents.py"):
        train("ldm", runs / "other", *flags, "--seed", "1")
    vae = train("vae", tmp_path / "vae", "--seed", "1")
    with pytest.raises(SystemExit, match="has vae_sha256 .*, here .*: run scripts/cache_latents.py"):
        train("ldm", runs / "other", *flags, "--vae", str(vae))
    with pytest.raises(SystemExit, match="no finished latents .*index.json.*scripts/cache_latents.py"):
        train("ldm", runs / "other", "--cached-latents", str(tmp_path))
    with pytest.raises(SystemExit, match="cached_latents: .*VAE and a text tower"):
        none = ["--vae", "none", "--unet.in-channels", "3"]
        train("ldm", runs / "other", *flags, *none)


def test_images_of_one_colour_are_refused(runs: Path, tmp_path: Path) -> None:
    for number in range(4):
        plain((0, 0, 0)).save(tmp_path / f"{number}.png")
    vae, text = ("--vae", str(runs / "vae/model")), ("--text.model", f"local-dir:{runs}/clip/model")
    flags = [*SIZE, *vae, *text, "--data.source", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"3 of 3 .* all are of one colour \(0, 0, 0\).*check_data"):
        cache_latents.main(flags)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_changed_file_is_never_read(runs: Path, tmp_path: Path) -> None:
    """2,000 files with bits flipped, bytes cut off or changed: each row is the one that was written, or an error."""
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
    latents.open_columns.cache_clear()
    want = [held_out[SampleKey(i, 0, 0)] for i in range(8)]
    refused = 0
    for number in range(2_000):
        position = draw.choice((draw.randrange(len(whole)), draw.randrange(900)))
        changed = {
            0: whole[:position] + bytes([whole[position] ^ (1 << draw.randrange(8))]) + whole[position + 1 :],
            1: whole[:position],
            2: whole[:position] + draw.randbytes(8) + whole[position + 8 :],
        }[number % 3]
        other = folder / f".changed-{number}"  # a new file each time: the old one is mapped into memory
        other.write_bytes(changed)
        other.replace(file)
        latents.open_columns.cache_clear()
        for i in range(8):
            try:
                found = held_out[SampleKey(i, 0, 0)]
            except ValueError as error:
                assert "test-000-000000.safetensors is missing or damaged: remove it and run" in str(error)
                refused += 1
                break
            assert all(torch.equal(found[name], want[i][name]) for name in found)
    assert refused > 1_900  # the others had a change in what no row of the split is read from
    (folder / "index.json").write_text("{")
    with pytest.raises(ValueError, match="index.json is damaged: run scripts/cache_latents.py again"):
        latents.LatentDataset(folder, "test", seed=0)


def test_a_folder_of_another_version_is_refused(runs: Path, tmp_path: Path) -> None:
    """In one line that says with which version it was made; its files are not taken for valid ones."""
    folder = tmp_path / "latents"
    shutil.copytree(runs / "latents", folder)
    values = json.loads((folder / "index.json").read_text())
    for version, shown in (("ldm-latents-3", "ldm-latents-3"), (None, "None")):
        (folder / "index.json").write_text(json.dumps({**values, "format": version}))
        with pytest.raises(ValueError, match=f"^{folder} holds {shown}, .*run scripts/cache_latents.py again$"):
            latents.LatentDataset(folder, "train", seed=0)
    key = latents.content_key(values["fingerprint"], values["images_per_file"])
    old = str(rng.fold_seed(json.dumps([values["fingerprint"], values["images_per_file"]], sort_keys=True)))
    assert latents.is_valid(folder / "train-000-000000.safetensors", key)
    assert old != key and not latents.is_valid(folder / "train-000-000000.safetensors", old)
