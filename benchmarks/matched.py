"""Measure how much sooner a prompt becomes an image that is as right: few steps of ldm against DDIM in diffusers.

    python benchmarks/matched.py --model runs/exportable/ldm/model

Both have the weights of a model that convert.py can write for diffusers, the same captions of the held-out set, and the
guidance scale of the model. A classifier reads whether an image shows all that its caption asks for. Of the numbers of
steps of the default sampler the least counts from which on images are right as often as those of DDIM.
"""

import ldm  # noqa: F401  # isort: skip  (before torch: it sets how threads wait)

import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from commit import commit
from comparisons import OURS, THEIRS, load_pair
from document import ROOT, write_table
from pydantic import Field
from run import take_turns
from torch import Tensor

from ldm.cli import ScriptConfig, command
from ldm.config import CONFIGS
from ldm.data import DataConfig
from ldm.diffusion.guidance import GuidanceConfig
from ldm.evaluation.classifier import load_classifier
from ldm.evaluation.drawn import drawn_set
from ldm.evaluation.estimates import Estimate
from ldm.evaluation.machine import measure_machine, recipe_conv
from ldm.evaluation.prompts import prompt_accuracy
from ldm.imaging import pil_to_tensor, to_8_bits
from ldm.interop.diffusers import write
from ldm.io.atomic import write_text
from ldm.pipeline import Pipeline
from ldm.pipeline.inputs import initial_noise
from ldm.pipeline.load import load_components

RESULTS = ROOT / "benchmarks/results/matched-cpu.json"
DDIM_STEPS, CPU = 50, torch.device("cpu")
EVERYWHERE = GuidanceConfig(interval=(0, 1))  # as diffusers guides


class MatchedConfig(ScriptConfig):
    """Settings of the benchmark."""

    model: Path = Path("runs/exportable/ldm/model")
    num_samples: int = Field(240, ge=2)
    batch_size: int = Field(30, ge=1)
    steps: tuple[int, ...] = (4, 5, 6, 7, 8, 10, 12, 16, 20)
    seconds: float = Field(30.0, gt=0)
    """least time for the single images that are timed"""


def generate(action: Callable[[list[str], range], Tensor], captions: Sequence[str], batch_size: int) -> Tensor:
    """Images (n, c, h, w) in [-1, 1] of captions, whose seeds are their numbers."""
    firsts = range(0, len(captions), batch_size)
    parts = [list(captions[first : first + batch_size]) for first in firsts]
    images = [action(part, range(first, first + len(part))) for first, part in zip(firsts, parts, strict=True)]
    return to_8_bits(torch.cat(images))


def run(config: MatchedConfig) -> None:
    """Measure, and write the results and the table."""
    pipeline = Pipeline.load(config.model, device="cpu")
    drawn = drawn_set(DataConfig.from_dict(pipeline.metadata["data"], source=str(config.model)))
    if drawn is None:
        raise ValueError(f"{config.model} was trained on images that no classifier reads: pass one of a drawn set")
    classifier, scenes = load_classifier(config.model.parents[1], drawn, pipeline.resolution), drawn.by_caption("test")
    spread = [list(scenes)[i * len(scenes) // config.num_samples] for i in range(config.num_samples)]
    asked = [drawn.asked(scenes[caption], caption) for caption in spread]
    scale = pipeline.default_guidance_scale

    def accuracy(action: Callable[[list[str], range], Tensor]) -> Estimate:
        images = generate(action, spread, config.batch_size)
        return prompt_accuracy(classifier, images, asked)["prompt accuracy, all"]

    with tempfile.TemporaryDirectory() as folder:
        write(load_components(config.model), Path(folder))
        _, others = load_pair(Path(folder), CPU, "float32", compiled=False)
        [theirs] = others.values()

        def ddim(prompts: list[str], seeds: range) -> Tensor:
            noise = initial_noise(pipeline.latent_shape(pipeline.resolution, pipeline.resolution), seeds)
            settings: dict[str, Any] = {"num_inference_steps": DDIM_STEPS, "guidance_scale": scale, "latents": noise}
            images = theirs(prompts, eta=0.0, **settings).images
            return torch.stack([pil_to_tensor(image, 3) for image in images])

        def few(steps: int) -> Callable[[list[str], range], Tensor]:
            return lambda prompts, seeds: pipeline.sample(
                prompts, seeds, steps=steps, guidance_scale=scale, guidance=EVERYWHERE
            )

        ddim_accuracy, ours = accuracy(ddim), dict[int, Estimate]()
        print(f"{THEIRS}, DDIM, {DDIM_STEPS} steps: {ddim_accuracy}", flush=True)
        for steps in sorted(config.steps):
            ours[steps] = accuracy(few(steps))
            print(f"{OURS}, {steps} steps: {ours[steps]}", flush=True)
        too_few = [steps for steps, estimate in ours.items() if estimate.value < ddim_accuracy.value]
        enough = [steps for steps in ours if steps > max(too_few, default=0)]
        if not enough:
            raise ValueError(f"--steps {' '.join(map(str, ours))}: none is right as often as DDIM: pass more")
        least = enough[0]
        ways = {OURS: lambda: few(least)(spread[:1], range(1)), THEIRS: lambda: ddim(spread[:1], range(1))}
        for action in ways.values():
            action()
        times = take_turns(ways, config.seconds, 3)

    ratio = statistics.median(b / a for a, b in zip(times[OURS], times[THEIRS], strict=True))
    seconds = {who: statistics.median(values) for who, values in times.items()}
    rows: list[list[object]] = [
        [f"{THEIRS}, DDIM", DDIM_STEPS, f"{ddim_accuracy.value:.1%}", f"{1000 * seconds[THEIRS]:,.0f}", ""]
    ]
    for steps, estimate in ours.items():
        timed = [f"{1000 * seconds[OURS]:,.0f}", f"**{ratio:.1f}**"] if steps == least else ["", ""]
        rows.append([f"{OURS}, dpmpp_2m", steps, f"{estimate.value:.1%}", *timed])
    write_table("matched", ["sampler", "steps", "all right", "ms for an image", "times faster"], rows)
    speed = measure_machine(recipe_conv(CONFIGS / "characters"), device=CPU)
    result = {
        **speed._asdict(),
        "commit": commit(),
        "guidance_scale": scale,
        "accuracy": {THEIRS: ddim_accuracy, OURS: ours},
        "steps": least,
        "seconds": seconds,
        "ratio": round(ratio, 2),
    }
    write_text(RESULTS, json.dumps(result, indent=1) + "\n")


main = command(MatchedConfig, run, __doc__)

if __name__ == "__main__":
    main()
