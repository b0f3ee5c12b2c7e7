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
from comparisons import (
    OURS,
    THEIRS,
    Comparison,
    Pair,
    encode_text,
    first_image,
    make_pair,
    prompt_to_image,
    unet_forward,
    vae_decode,
)
from helpers import CONFIGS
from training_steps import check_gradients, narrow_training_steps, step_config, training_steps

from ldm.pipeline.load import load_components

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
    found = suite.measure(make(pair), CPU, seconds=0, rounds=1)
    assert found["difference"]["diffusers"] < 1e-4
    assert found["ratio"]["diffusers"] > 0
    assert found["gflop"]["ldm"] == pytest.approx(found["gflop"]["diffusers"], rel=0.05)
    assert min(found["memory"].values()) > 0


def test_both_generate_the_same_image(pair: Pair) -> None:
    found = suite.measure(prompt_to_image(pair, steps=2), CPU, seconds=0, rounds=1)
    assert found["difference"]["diffusers"] < 1e-2


def test_both_generate_from_a_process_of_their_own(pair: Pair) -> None:
    ways = first_image(pair).ways
    assert [ways[name]().shape for name in (OURS, THEIRS)] == [(16, 16, 3)] * 2


def test_a_wrong_answer_is_not_timed() -> None:
    wrong = Comparison({"ldm": lambda: torch.ones(3), "another": lambda: torch.full((3,), 2.0)}, 1e-3)
    with pytest.raises(ValueError, match="ldm differs from another by 0.5"):
        suite.measure(wrong, CPU, seconds=0, rounds=1)


def test_each_round_begins_with_another() -> None:
    calls: list[str] = []
    ways = {name: partial(calls.append, name) for name in "abc"}
    times = suite.take_turns(ways, seconds=0, rounds=3)
    assert "".join(calls) == "abcbcacab" and {len(values) for values in times.values()} == {3}


@pytest.mark.parametrize("drawn", [True, False])
def test_a_training_step_trains(drawn: bool, pair: Pair, recipe: Path) -> None:
    """Each of its own network; also where photographs are the data."""
    config = step_config(recipe, cache_latents=drawn)
    if not drawn:
        config = config.model_copy(update={"data": config.data.model_copy(update={"source": "photographs"})})
    with training_steps(pair.folder, config, CPU) as comparison:
        for step in comparison.ways.values():
            assert step().isfinite() and step().isfinite()
        script = {"diffusers' script"} | ({"diffusers' script, latents cached"} if drawn else set())
        assert comparison.ways.keys() == {"ldm", "bare network"} | script


def test_a_step_of_another_width_has_the_rest_of_the_recipe(recipe: Path) -> None:
    config = step_config(recipe, model_channels=64)
    with narrow_training_steps(recipe, config, CPU) as comparison:
        assert all(step().isfinite() for step in comparison.ways.values())
    assert step_config(recipe).unet == config.unet.model_copy(update={"model_channels": 32})


def test_different_gradients_are_found(pair: Pair) -> None:
    ours, theirs = load_components(pair.folder).unet, copy.deepcopy(pair.theirs[THEIRS].unet)
    check_gradients(ours, theirs, CPU)
    with torch.no_grad():
        ours.conv_in.weight.mul_(1.1)
    with pytest.raises(ValueError, match="training step: the gradients differ"):
        check_gradients(ours, theirs, CPU)


def test_results_chart_and_table(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    all_of = suite.comparisons
    for folder in ("benchmarks/results", "docs/images"):
        (tmp_path / folder).mkdir(parents=True)
    document = tmp_path / "docs/performance.md"
    document.write_text(
        "# Title\n\n<!-- cpu -->\nold\n<!-- end of cpu -->\n\n<!-- cuda -->\nother\n<!-- end of cuda -->\n"
    )
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.setattr("document.PERFORMANCE", document)
    few = ["--recipes", str(recipe), "--seconds", "0.01", "--rounds", "1"]
    monkeypatch.setattr(suite, "comparisons", lambda folder, config: list(all_of(folder, config))[:2])
    monkeypatch.setattr(suite, "starts", lambda config: [])
    with pytest.raises(SystemExit, match="--only V-Net: no comparison has this in its name"):
        suite.main([*few, "--only", "V-Net"])
    suite.main(few)
    suite.main([*few, "--only", "batch 1"])  # the other keeps its result
    results = json.loads((tmp_path / "benchmarks/results/performance-cpu.json").read_text())
    [found] = [found for name, found in results["comparisons"][recipe.name].items() if "batch 1" in name]
    table = document.read_text()
    assert f"| {found['ratio']['diffusers']:.2f} |" in table
    assert "old" not in table and "other" in table
    assert (tmp_path / "docs/images/performance-cpu.png").is_file()
    assert results["diffusers"] and results["matmul_gflops"] > 0
