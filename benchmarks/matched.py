"""Measure how much sooner a prompt becomes an image that is as right: few steps of ldm against DDIM in diffusers.

    python benchmarks/matched.py --model runs/exportable/ldm/model

Both have the weights of a model that convert.py can write for diffusers, the same captions of the held-out set, and the
guidance scale of the model. A classifier reads whether an image shows all that its caption asks for. Of the numbers of
steps of the default sampler the least counts whose images are right as often as those of DDIM.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from commit import commit
from comparisons import load_pair
from pydantic import Field
from run import take_turns
from torch import Tensor

from ldm.cli import ScriptConfig, command
from ldm.config import CONFIGS
from ldm.data import DataConfig
from ldm.evaluation.classifier import load_classifier
from ldm.evaluation.drawn import drawn_set
from ldm.evaluation.estimates import Estimate
from ldm.evaluation.machine import measure_machine, recipe_conv
from ldm.evaluation.prompts import prompt_accuracy
from ldm.evaluation.report import markdown_table
from ldm.imaging import pil_to_tensor, to_8_bits
from ldm.interop.diffusers import write
from ldm.io.atomic import write_text
from ldm.pipeline import Pipeline
from ldm.pipeline.inputs import initial_noise
from ldm.pipeline.load import load_components

ROOT = Path(__file__).parents[1]
DOCUMENT, RESULTS = ROOT / "docs/performance.md", ROOT / "benchmarks/results/matched-cpu.json"
DDIM_STEPS, OURS, THEIRS = 50, "ldm", "diffusers, DDIM"
BEGIN, END = "<!-- matched -->\n", "<!-- matched end -->\n"


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
        _, others = load_pair(Path(folder), torch.device("cpu"), "float32", compiled=False)
        [theirs] = others.values()

        def ddim(prompts: list[str], seeds: range) -> Tensor:
            noise = initial_noise(pipeline.latent_shape(pipeline.resolution, pipeline.resolution), seeds)
            settings: dict[str, Any] = {"num_inference_steps": DDIM_STEPS, "guidance_scale": scale, "latents": noise}
            images = theirs(prompts, eta=0.0, **settings).images
            return torch.stack([pil_to_tensor(image, 3) for image in images])

        def few(steps: int) -> Callable[[list[str], range], Tensor]:
            return lambda prompts, seeds: pipeline.sample(prompts, seeds, steps=steps, guidance_scale=scale)

        found = {DDIM_STEPS: accuracy(ddim)}
        print(f"{THEIRS}, {DDIM_STEPS} steps: {found[DDIM_STEPS]}", flush=True)
        ours = {}
        for steps in config.steps:
            ours[steps] = accuracy(few(steps))
            print(f"{OURS}, {steps} steps: {ours[steps]}", flush=True)
        enough = [steps for steps, estimate in ours.items() if estimate.value >= found[DDIM_STEPS].value]
        if not enough:
            raise ValueError(f"--steps {' '.join(map(str, config.steps))}: none is right as often as DDIM: pass more")
        least = enough[0]
        ways = {OURS: lambda: few(least)(spread[:1], range(1)), THEIRS: lambda: ddim(spread[:1], range(1))}
        for action in ways.values():
            action()
        times = take_turns(ways, config.seconds, 3)

    ratio = sorted(b / a for a, b in zip(times[OURS], times[THEIRS], strict=True))[len(times[OURS]) // 2]
    seconds = {who: sorted(values)[len(values) // 2] for who, values in times.items()}
    rows = [[THEIRS, DDIM_STEPS, f"{found[DDIM_STEPS].value:.1%}", f"{1000 * seconds[THEIRS]:,.0f}", ""]]
    for steps, estimate in ours.items():
        timed = [f"{1000 * seconds[OURS]:,.0f}", f"**{ratio:.1f}**"] if steps == least else ["", ""]
        rows.append([f"{OURS}, dpmpp_2m", steps, f"{estimate.value:.1%}", *timed])
    table = markdown_table(["sampler", "steps", "all right", "ms for an image", "times faster"], rows)
    print(table)
    machine = measure_machine(recipe_conv(CONFIGS / "characters"))._asdict()
    result = {
        **machine,
        "commit": commit(),
        "guidance_scale": scale,
        "num_samples": config.num_samples,
        "accuracy": {THEIRS: found[DDIM_STEPS], OURS: ours},
        "steps": least,
        "seconds": seconds,
        "ratio": round(ratio, 2),
    }
    write_text(RESULTS, json.dumps(result, indent=1) + "\n")
    before, rest = DOCUMENT.read_text().split(BEGIN)
    write_text(DOCUMENT, f"{before}{BEGIN}\n{table}\n\n{END}{rest.split(END, 1)[1]}")


main = command(MatchedConfig, run, __doc__)

if __name__ == "__main__":
    main()
