"""The model that comes with ldm, in models/characters, and how a trained model becomes such a small one."""

import shutil
import tomllib
from pathlib import Path

import convert
import numpy as np
import pytest
import torch
import txt2img
from helpers import train
from safetensors.torch import save_file

import ldm.pipeline.convert
from ldm.data.sources.base import a_or_an
from ldm.data.sources.characters import BACKGROUNDS, held_out_pairs
from ldm.io.tensors import read_tensors
from ldm.pipeline import Pipeline
from ldm.pipeline.generate import SHIPPED_MODEL
from ldm.text.weights import TOKEN_IDS

ROOT = Path(__file__).parents[1]
TOWER = "text/open_clip_model.safetensors"


@pytest.fixture(scope="module")
def shipped() -> Pipeline:
    return Pipeline.load(SHIPPED_MODEL, device="cpu")


def test_it_is_small_and_half_precision() -> None:
    files = [path for path in SHIPPED_MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert {path.name for path in weights} == {
        "unet.safetensors",
        "vae.safetensors",
        "preview.safetensors",
        "open_clip_model.safetensors",
    }
    for path in weights:
        assert {tensor.dtype for name, tensor in read_tensors(path).items() if name != TOKEN_IDS} == {torch.float16}


def test_it_paints_without_a_model_and_tells_of_unknown_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    txt2img.main(["a cat astronaut", "--steps", "2"])
    err = capsys.readouterr().err
    assert f"no finished pipeline below runs: {SHIPPED_MODEL} is used, which comes with ldm\n" in err
    assert "never seen" not in err and (tmp_path / "outputs/00000.png").is_file()
    txt2img.main(["a cat glorfindel", "--steps", "1"])
    assert "words never seen in training: glorfindel\n" in capsys.readouterr().err


def test_a_run_of_ones_own_comes_first(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, tmp_path / "runs/mine/model")
    txt2img.main(["a cat", "--steps", "1"])
    err = capsys.readouterr().err
    assert "runs/mine/model: a model of ldm\n" in err and "comes with ldm" not in err


def test_backgrounds_of_unseen_pairs_are_as_asked(shipped: Pipeline) -> None:
    creature, role = held_out_pairs()[0]
    for name, color in BACKGROUNDS.items():
        image = np.asarray(shipped(f"a {creature} {role} on {a_or_an(name)} background")[0], dtype=float)
        corners = np.stack([image[:4, :4], image[:4, -4:]])
        assert abs(corners.mean((0, 1, 2)) - color).max() < 25, name


@pytest.mark.parametrize("name", ["unet.safetensors", "vae.safetensors", "text/open_clip_model.safetensors"])
def test_a_weight_file_that_was_cut_off(name: str, tmp_path: Path) -> None:
    model = shutil.copytree(SHIPPED_MODEL, tmp_path / "model")
    content = (model / name).read_bytes()
    (model / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(SystemExit, match=f"{name} is damaged .*: copy or download it again"):
        txt2img.main(["a cat", "--model", str(model), "--out", str(tmp_path)])


def test_an_installed_package_has_all_its_files() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["ldm.models"]
    models = SHIPPED_MODEL.parent
    packed = {path for pattern in patterns for path in models.glob(pattern) if path.is_file()}
    assert packed == {path for path in models.rglob("*") if path.is_file()}


# How it is made.


def small_copy(model: Path, target: Path) -> Path:
    convert.main([str(model), str(target), "--precision", "fp16", "--prune-tokens"])
    return target


def embeddings(model: Path, prompt: str) -> torch.Tensor:
    text = Pipeline.load(model, device="cpu").text
    assert text is not None
    return text.encode_prompts([prompt]).hidden_states


def test_convert_to_half_precision_without_unused_tokens(tiny_model: Path, tmp_path: Path) -> None:
    small = small_copy(tiny_model, tmp_path / "small")
    for name in ("unet.safetensors", "vae.safetensors", TOWER):
        dtypes = {tensor.dtype for key, tensor in read_tensors(small / name).items() if key != TOKEN_IDS}
        assert dtypes == {torch.float16}, name
    assert (small / TOWER).stat().st_size < (tiny_model / TOWER).stat().st_size / 20
    known = " ".join(sorted(Pipeline.load(small, device="cpu").vocabulary)) + "... it's, (a1) b!"
    assert (embeddings(tiny_model, known) - embeddings(small, known)).abs().max() < 0.01
    assert (embeddings(tiny_model, "glorfindel") - embeddings(small, "glorfindel")).abs().max() > 0.1
    convert.main([str(small), str(tmp_path / "again")])
    one, other = (
        {path.name: path.read_bytes() for path in (folder / "text").iterdir()} for folder in (small, tmp_path / "again")
    )
    assert one == other


def test_a_training_tells_that_its_tower_was_pruned(
    tiny_runs: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = small_copy(tiny_model, tmp_path / "small")
    flags = ["--text.model", f"local-dir:{small / 'text'}", "--vae", str(tiny_runs / "vae/model"), "--steps", "1"]
    train("ldm", tmp_path / "run", *flags)
    warning = f"warning: text tower local-dir:{small / 'text'}: it was pruned to the tokens of the captions of its own"
    assert warning in capsys.readouterr().out
    assert (tmp_path / "run/model" / TOWER).read_bytes() == (small / TOWER).read_bytes()


def test_only_towers_with_known_words_are_pruned(tiny_runs: Path, tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "vocab.txt").write_text("")
    for source in (tiny_runs / "vae/model", model):
        with pytest.raises(SystemExit, match="holds no text tower with its captions' words: leave out --prune-tokens"):
            convert.main([str(source), str(tmp_path / "small"), "--prune-tokens"])


def test_a_pruned_tower_whose_ids_do_not_fit(tiny_model: Path, tmp_path: Path) -> None:
    small = small_copy(tiny_model, tmp_path / "small")
    tensors = read_tensors(small / TOWER)
    for ids in (tensors[TOKEN_IDS] + 49408, tensors[TOKEN_IDS][1:], tensors[TOKEN_IDS].half()):
        save_file({**tensors, TOKEN_IDS: ids}, small / TOWER)
        with pytest.raises(
            ValueError, match="token_embedding.weight does not fit token_embedding.ids: copy or download"
        ):
            Pipeline.load(small)


def test_a_vae_alone_in_half_precision(tiny_runs: Path, tmp_path: Path) -> None:
    convert.main([str(tiny_runs / "vae/model"), str(tmp_path / "small"), "--precision", "fp16"])
    sizes = [(folder / "vae.safetensors").stat().st_size for folder in (tiny_runs / "vae/model", tmp_path / "small")]
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize("flags", [["--precision", "fp16"], ["--prune-tokens"]])
def test_other_formats_are_written_whole(flags: list[str], tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="are for --format ldm: leave them out with diffusers"):
        convert.main([str(tiny_model), str(tmp_path / "out"), "--format", "diffusers", *flags])


def test_half_precision_that_changes_the_image_is_not_written(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ldm.pipeline.convert, "compare", lambda one, other: 3.0)
    with pytest.raises(SystemExit, match="differ by 3 of 255, so nothing was written: leave out --precision fp16"):
        small_copy(tiny_model, tmp_path / "small")
