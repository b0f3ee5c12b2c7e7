"""The suite that measures ldm against diffusers: both must compute the same, before either is timed."""

import copy
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import run as suite
import torch
import yaml
from comparisons import Comparison, Pair, encode_text, make_pair, prompt_to_image, unet_forward, vae_decode
from helpers import CONFIGS
from training_steps import check_gradients, training_steps

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exportable recipe, narrower."""
    folder = tmp_path_factory.mktemp("recipe")
    changes: dict[str, dict[str, Any]] = {
        "clip": {"clip": {"width": 32, "num_layers": 2, "num_heads": 2, "embed_dim": 16}},
        "vae": {"vae": {"base_channels": 32, "channel_mult": [1, 1]}},
        "ldm": {"unet": {"model_channels": 32, "context_dim": 32}, "batch_size": 2, "data": {"resolution": 16}},
    }
    for stage, parts in changes.items():
        values = yaml.safe_load((CONFIGS / f"exportable/{stage}.yaml").read_text())
        for name, part in parts.items():
            values[name] = {**values[name], **part} if isinstance(part, dict) else part
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture(scope="module")
def pair(recipe: Path) -> Iterator[Pair]:
    with make_pair(recipe, CPU) as made:
        yield made


@pytest.mark.parametrize(
    "make", [partial(unet_forward, batch=2), partial(vae_decode, side=16), partial(encode_text, batch=2)]
)
def test_both_compute_the_same(pair: Pair, make: Callable[[Pair], Comparison]) -> None:
    found = suite.measure(make(pair), seconds=0, rounds=1)
    assert found["difference"]["diffusers"] < 1e-4
    assert found["ratio"]["diffusers"] > 0
    assert found["gflop"]["ldm"] == pytest.approx(found["gflop"]["diffusers"], rel=0.05)
    assert min(found["memory"].values()) > 0


def test_both_generate_the_same_image(pair: Pair) -> None:
    assert suite.measure(prompt_to_image(pair, steps=2), seconds=0, rounds=1)["difference"]["diffusers"] < 1e-2


def test_a_wrong_answer_is_not_timed() -> None:
    wrong = Comparison("Halving", lambda: torch.ones(3), {"another": lambda: torch.full((3,), 2.0)}, 1e-3)
    with pytest.raises(ValueError, match="Halving: ldm differs from another by 0.5"):
        suite.measure(wrong, seconds=0, rounds=1)


def test_a_training_step_trains(pair: Pair, recipe: Path) -> None:
    """Each of its own network; the weights of the pair stay as they are."""
    before = pair.theirs.unet.state_dict()["conv_in.weight"].clone()
    with training_steps(pair, recipe) as comparison:
        for step in (comparison.ours, *comparison.theirs.values()):
            assert step().isfinite() and step().isfinite()
        assert set(comparison.theirs) == {"bare network", "diffusers' script", "diffusers' script, latents cached"}
    assert torch.equal(pair.theirs.unet.state_dict()["conv_in.weight"], before)


def test_different_gradients_are_found(pair: Pair) -> None:
    other = copy.deepcopy(pair.ours.unet)
    with torch.no_grad():
        other.conv_in.weight.mul_(2)
    with pytest.raises(ValueError, match="training step: the gradients differ"):
        check_gradients(other, pair)


def test_results_chart_and_table(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("benchmarks/results", "docs/images"):
        (tmp_path / folder).mkdir(parents=True)
    document = tmp_path / "docs/performance.md"
    document.write_text("# Title\n\n<!-- cpu -->\nold\n<!-- end -->\n\n<!-- cuda -->\nother\n<!-- end -->\n")
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.setattr(suite, "DOCUMENT", document)
    suite.main(["--recipes", str(recipe), "--only", "U-Net", "--seconds", "0.01", "--rounds", "1"])
    results = json.loads((tmp_path / "benchmarks/results/performance-cpu.json").read_text())
    [found] = [found for name, found in results["comparisons"][recipe.name].items() if "batch 1" in name]
    table = document.read_text()
    assert f"| {found['ratio']['diffusers']:.2f} |" in table
    assert "old" not in table and "other" in table
    assert (tmp_path / "docs/images/performance-cpu.png").is_file()
    assert results["diffusers"] and results["matmul_gflops"] > 0
