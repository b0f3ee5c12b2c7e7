"""Measure how long a recipe takes, from nothing, until held-out captions are obeyed: a row of docs/records.md.

    python benchmarks/speedrun.py --name "Uniform t" --ldm.diffusion.t-distribution uniform

Text tower, VAE and U-Net are trained for each seed; every so many steps of the U-Net, with the clock stopped, images of
held-out captions are generated with its averaged weights. The result is the wall-clock seconds of the three stages
until each share of them shows what its caption asks for, with what the machine is worth. Training ends at the last.
A text tower or a VAE that another row trained with the same settings is used again, with the seconds that it took.
"""

import json
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from candidates import CANDIDATES
from commit import commit
from pydantic import Field, field_validator
from torch import Tensor

from ldm.cli import ScriptConfig, command
from ldm.config import CONFIGS, read_yaml
from ldm.data.sources.base import evenly_spaced, short_hash
from ldm.evaluation.classifier import AttributeClassifier, attributes_shown, load_classifier
from ldm.evaluation.drawn import DrawnSet, drawn_set
from ldm.evaluation.machine import measure_machine, recipe_conv
from ldm.evaluation.report import markdown_table
from ldm.imaging import to_8_bits
from ldm.io.atomic import write_text
from ldm.stages.clip import CLIPStage, TrainCLIPConfig
from ldm.stages.diffusion import DiffusionStage, TrainLDMConfig
from ldm.stages.vae import TrainVAEConfig, VAEStage
from ldm.training.config import TrainingConfig
from ldm.training.trainer import Buildable, Trainer, fit, train

ROOT = Path(__file__).parents[1]
RESULTS, RECORDS = ROOT / "benchmarks/results/speedrun.json", ROOT / "docs/records.md"
MARK = "<!-- measured -->"
TARGETS = (0.90, 0.97)
SAMPLING_STEPS = 16
NEVER = 10**6  # steps
PRECISION = "ACCELERATE_MIXED_PRECISION"
QUIET = {name: NEVER for name in ("validate_every", "sample_every", "checkpoint_every")}


class SpeedrunConfig(ScriptConfig):
    """Settings of the speedrun: the recipe, and the one change to it that is measured."""

    name: str = "The recipe"
    """what was changed, as the row says it"""
    recipe: Path = CONFIGS / "characters"
    """folder with clip.yaml, vae.yaml and ldm.yaml"""
    run: Path = Path("runs/speedrun")
    """folder of all trainings"""
    seeds: tuple[int, ...] = (0, 1, 2)
    num_captions: int = Field(480, ge=1)
    """held-out captions, evenly spaced"""
    measure_every: int = Field(100, ge=1)
    """steps of the U-Net"""
    candidate: str | None = None
    """a change to the training of the U-Net, of candidates.py"""
    clip: TrainCLIPConfig = TrainCLIPConfig()
    vae: TrainVAEConfig = TrainVAEConfig()
    ldm: TrainLDMConfig = TrainLDMConfig()

    @field_validator("candidate")
    @classmethod
    def _check_candidate(cls, name: str | None) -> str | None:
        if name is not None and name not in CANDIDATES:
            raise ValueError(f"candidate {name}: choose one of {', '.join(CANDIDATES)}")
        return name

    def values_below(self) -> dict[str, Any]:
        """The recipe."""
        return {stage: read_yaml(self.recipe / f"{stage}.yaml") for stage in ("clip", "vae", "ldm")}


class TargetReached(Exception):
    """The last share was reached."""


class HeldOutCaptions:
    """Whether generated images show what held-out captions ask for."""

    def __init__(self, drawn: DrawnSet, classifier: AttributeClassifier, count: int) -> None:
        scenes = drawn.by_caption("test")
        every = list(scenes)
        self.captions = [every[i] for i in evenly_spaced(count, len(every))]
        self.asked = [drawn.asked(scenes[caption], caption) for caption in self.captions]
        self.classifier = classifier

    def share_right(self, sample: Callable[[list[str], range], Tensor]) -> float:
        """The share of the captions whose image shows all that it asks for; `sample` takes captions and their seeds."""
        right: list[bool] = []
        for first in range(0, len(self.captions), 60):
            captions, asked = self.captions[first : first + 60], self.asked[first : first + 60]
            images = to_8_bits(sample(captions, range(first, first + len(captions))))
            right += attributes_shown(self.classifier, images, asked)["all"]
        return sum(right) / len(right)


class Stopwatch:
    """Seconds since it was made, without those in which it stood still."""

    def __init__(self) -> None:
        self.begin, self.stopped = time.perf_counter(), 0.0

    def seconds(self) -> float:
        return time.perf_counter() - self.begin - self.stopped

    def leave_out(self, since: float) -> None:
        """Seconds that the watch showed before what does not count."""
        self.stopped += self.seconds() - since


def last_psnr(vae: Path) -> float:
    """Of the validation that ended the training of a VAE, whose model folder this is, in dB."""
    lines = map(json.loads, (vae.parent / "log.jsonl").read_text().splitlines())
    return round([line["validation_psnr"] for line in lines if "validation_psnr" in line][-1], 2)


def train_once(stage: Buildable[Any], config: TrainingConfig, run: Path, seed: int) -> tuple[Path, float]:
    """The model folder of a text tower or VAE, trained where it was not yet, and the seconds that its training took."""
    config = config.model_copy(update={"seed": seed, **QUIET})
    settings = short_hash(json.dumps([config.to_dict(), os.environ.get(PRECISION)], default=str))
    folder = run / f"{config.run.name}-{settings}"
    file = folder / "seconds.json"
    if not file.is_file():
        watch = Stopwatch()
        train(stage, config.model_copy(update={"run": folder}))
        write_text(file, json.dumps(watch.seconds()))
    return folder / "model", json.loads(file.read_bytes())


class Changed:
    """A stage class whose stages a candidate changes, before they train."""

    def __init__(self, candidate: str | None) -> None:
        self.change = CANDIDATES[candidate] if candidate else None

    def build(self, config: TrainLDMConfig, accelerator: Accelerator) -> DiffusionStage:
        stage = DiffusionStage.build(config, accelerator)
        if self.change:
            self.change(stage)
        return stage


def train_unet(
    stage: Buildable[Any], config: TrainLDMConfig, captions: HeldOutCaptions, every: int
) -> dict[int, tuple[float, float]]:
    """From each measured step to the seconds until then and the share of captions that are right."""
    watch, curve = Stopwatch(), dict[int, tuple[float, float]]()

    def on_step(trainer: Trainer) -> None:
        step = trainer.state.step
        if step % every and step < config.steps:
            return
        now, shares = watch.seconds(), list[float]()
        pipeline = cast(DiffusionStage, trainer.stage).pipeline
        sample = partial(pipeline.sample, steps=SAMPLING_STEPS, literal=True)
        trainer.with_ema_weights(lambda: shares.append(captions.share_right(sample)))
        watch.leave_out(now)
        curve[step] = (now, shares[0])
        print(f"\nstep {step}: {shares[0]:.1%} after {now:.0f} s", flush=True)
        if shares[0] >= TARGETS[-1]:
            raise TargetReached

    with suppress(TargetReached):
        train(stage, config, fit=partial(fit, on_step=on_step))
    return curve


def run_seed(config: SpeedrunConfig, seed: int, captions: HeldOutCaptions) -> dict[str, Any]:
    """Train the three stages with one seed; the seconds of each, and those of all until each target."""
    clip, clip_seconds = train_once(CLIPStage, config.clip, config.run, seed)
    vae, vae_seconds = train_once(VAEStage, config.vae, config.run, seed)
    text = config.ldm.text.model_copy(update={"model": f"local-dir:{clip}"})
    update = {"seed": seed, "vae": str(vae), "text": text, "run": config.run / f"ldm-{time.time_ns()}", **QUIET}
    stage, ldm = Changed(config.candidate), config.ldm.model_copy(update=update)
    curve = train_unet(stage, ldm, captions, config.measure_every)
    before = clip_seconds + vae_seconds
    until = {target: [t for t, share in curve.values() if share >= target] for target in TARGETS}
    return {
        "seconds": {"clip": round(clip_seconds, 1), "vae": round(vae_seconds, 1)},
        "vae_psnr": last_psnr(vae),
        "curve": {step: [round(before + t, 1), round(share, 4)] for step, (t, share) in curve.items()},
        "until": {f"{target:.0%}": round(before + t[0], 1) if t else None for target, t in until.items()},
    }


def measure(config: SpeedrunConfig, run_seed: Callable[[Any, int, HeldOutCaptions], dict[str, Any]]) -> None:
    """Run all seeds, and add the row to the results and to the document, or the seeds to the row of that name."""
    drawn = drawn_set(config.ldm.data)
    if drawn is None:
        raise ValueError(f"data.source {config.ldm.data.source}: what its captions ask for cannot be checked")
    config.run.mkdir(parents=True, exist_ok=True)
    classifier = load_classifier(config.run, drawn, config.ldm.data.resolution)
    captions = HeldOutCaptions(drawn, classifier, config.num_captions)
    speed = measure_machine(recipe_conv(config.recipe))
    measured = {"command": command_line(), "commit": commit(), **speed._asdict()}
    results = json.loads(RESULTS.read_bytes()) if RESULTS.is_file() else {}
    for seed in config.seeds:
        results.setdefault(config.name, {})[str(seed)] = {**measured, **run_seed(config, seed, captions)}
        write_text(RESULTS, json.dumps(results, indent=1) + "\n")
    header = ["change", *(f"seconds to {target:.0%}" for target in TARGETS), f"steps to {TARGETS[-1]:.0%}"]
    header += ["at the end", "VAE, dB", "GFLOP/s", "command"]
    table = markdown_table(header, [row(name, list(seeds.values())) for name, seeds in results.items()])
    write_text(RECORDS, f"{RECORDS.read_text().split(MARK)[0]}{MARK}\n\n{table}\n")
    print(table)


def command_line() -> str:
    """The command that was typed, with the precision that it was given."""
    precision = [f"{PRECISION}={os.environ[PRECISION]}"] if PRECISION in os.environ else []
    return " ".join([*precision, "python", f"benchmarks/{Path(sys.argv[0]).name}", *map(shlex.quote, sys.argv[1:])])


def row(name: str, seeds: list[dict[str, Any]]) -> list[str]:
    """A row of the table of records: the median of the seeds, and each of them."""
    cells = []
    for target in TARGETS:
        values = [seed["until"][f"{target:.0%}"] for seed in seeds]
        middle = statistics.median(math.inf if value is None else value for value in values)
        each = ", ".join("never" if value is None else f"{value:.0f}" for value in values)
        cells.append(f"{'never' if middle == math.inf else f'**{middle:.0f}**'} ({each})")
    last = [list(seed["curve"].values())[-1] for seed in seeds]
    steps = [[step for step, (_, share) in seed["curve"].items() if share >= TARGETS[-1]] for seed in seeds]
    cells.append(", ".join(str(reached[0]) if reached else "never" for reached in steps))
    cells.append("; ".join(f"{share:.1%} after {seconds:.0f} s" for seconds, share in last))
    cells.append(", ".join(f"{seed['vae_psnr']:.1f}" for seed in seeds if "vae_psnr" in seed))
    speeds = [f"{seed['matmul_gflops']:.0f}, {seed['conv_gflops']:.0f}" for seed in seeds]
    commands = [f"`{seed['command']}` at {seed['commit']}" for seed in seeds]
    return [name, *cells, *("; ".join(dict.fromkeys(each)) for each in (speeds, commands))]


main = command(SpeedrunConfig, lambda config: measure(config, run_seed), __doc__)

if __name__ == "__main__":
    main()
