"""torch.compile: the networks are one graph each, which computes the same and is traced once for all prompts."""

from pathlib import Path
from typing import Any

import pytest
import torch
import train_ldm
import txt2img
from accelerate.state import AcceleratorState
from helpers import copy_stages_before, losses, tiny_flags, train
from torch import nn
from torch._dynamo.testing import CompileCounter

from ldm.diffusion.guidance import GuidanceConfig
from ldm.pipeline import Pipeline
from ldm.pipeline.record import read_png

pytestmark = pytest.mark.slow


class CountingBackend(CompileCounter):
    """Also counts the weights that are inputs of a graph, and not part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weights_given = 0

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        self.weights_given += sum(isinstance(value, nn.Parameter) for value in example_inputs)
        return super().__call__(gm, example_inputs)


@pytest.fixture(autouse=True)
def counter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Graphs are traced, counted and run as they are: kernels are torch's business."""
    found, compile_module = CountingBackend(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compile_module(self, backend=found, **options))
    torch._dynamo.reset()
    return found


def test_a_compiled_pipeline_generates_the_same_images(tiny_model: Path, counter: Any) -> None:
    plain, compiled = Pipeline.load(tiny_model), Pipeline.load(tiny_model).compile()
    traced, interval = [], GuidanceConfig(interval=(0.5, 1))
    for prompt, seed in (("a red star", 0), ("a blue circle on white", 1), ("a star to the left of a circle", 2)):
        settings: dict[str, Any] = {"seed": seed, "steps": 4 + seed, "negative_prompt": "a star", "guidance": interval}
        assert compiled(prompt, **settings) == plain(prompt, **settings)
        traced.append(counter.frame_count)
    assert 0 < traced[0] <= traced[1] == traced[2], "prompts of a second length need other graphs, and no third one"
    assert counter.weights_given == 0, "on a CPU they are constants of the graph, which kernels may lay out anew"


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_compiled_training_takes_the_same_steps(
    precision: str, tiny_runs: Path, tmp_path: Path, counter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in ("plain", "compiled"):
        copy_stages_before("ldm", tiny_runs, tmp_path / name)
    train("ldm", tmp_path / "plain/ldm")
    train("ldm", tmp_path / "compiled/ldm", "--compile", "--gradient-checkpointing")
    assert counter.frame_count > 0 and counter.weights_given > 0
    assert losses(tmp_path / "compiled/ldm") == pytest.approx(losses(tmp_path / "plain/ldm"), rel=1e-5)


def test_what_cannot_be_compiled_is_refused(tiny_runs: Path, tmp_path: Path) -> None:
    copy_stages_before("ldm", tiny_runs, tmp_path)
    with pytest.raises(SystemExit, match="error: compile: FSDP2 gathers weights"):
        train_ldm.main(tiny_flags("ldm", tmp_path / "ldm", "--compile", "--fsdp"))


def test_an_image_is_reproduced_as_it_was_compiled(tiny_model: Path, tmp_path: Path, counter: Any) -> None:
    txt2img.main(["a star", "--model", str(tiny_model), "--out", str(tmp_path), "--compile", "--steps", "2"])
    assert read_png(tmp_path / "00000.png").compile
    torch._dynamo.reset()
    before = counter.frame_count
    txt2img.main(["--reproduce", str(tmp_path / "00000.png"), "--out", str(tmp_path / "again")])
    assert counter.frame_count > before
    assert (tmp_path / "again/00000.png").read_bytes() == (tmp_path / "00000.png").read_bytes()
