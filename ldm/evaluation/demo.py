"""The demo: every script, one after the other, as a person runs them, and a report of what they measured."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ldm.cli import ScriptConfig
from ldm.config import CONFIGS, read_yaml
from ldm.evaluation.figures import FiguresConfig, loss_curves
from ldm.evaluation.html import to_html
from ldm.evaluation.machine import MachineSpeed, free_cores, measure_machine, own_cores, recipe_conv
from ldm.evaluation.report import markdown_table
from ldm.io.atomic import write_text
from ldm.io.tensors import sha256
from ldm.planning.device import GIB, peak_rss

STAGE_NAMES = ("clip", "vae", "ldm")
BF16_PAYS = 1.3  # where the convolution is so much faster in bf16


class DemoConfig(ScriptConfig):
    """Settings of the demo."""

    run: Path = Path("runs/demo")
    """folder of the demo"""
    recipe: Path = CONFIGS / "characters"
    """folder with the configuration of each stage, clip.yaml, vae.yaml and ldm.yaml, and figures.yaml"""


def run_demo(config: DemoConfig) -> None:
    """Train what is not trained yet, evaluate, draw the figures, and write the report."""
    figures_file = config.recipe / "figures.yaml"
    figures = FiguresConfig.from_dict(read_yaml(figures_file), source=str(figures_file))
    for stage in STAGE_NAMES:
        check_source(config.run / stage, config.recipe / f"{stage}.yaml")
    previous = read_report(config.run)
    speed = previous.get("speed", {})
    if speed.keys() != set(MachineSpeed._fields):  # none, or of a version that measured less
        speed = measure_machine(recipe_conv(config.recipe))._asdict()
    print(describe_speed(speed), flush=True)
    seconds = {stage: train_stage(stage, config, in_bf16=stage == "ldm" and pays(speed)) for stage in STAGE_NAMES}
    model = config.run / "ldm/model"
    seconds["evaluate"] = run_script("evaluate.py", "--model", str(model))
    drawing = ["--config", str(figures_file), "--model", str(model), "--out", str(config.run)]
    seconds["figures"] = run_script("make_figures.py", *drawing)
    loss_curves([config.run / stage for stage in STAGE_NAMES], config.run / "losses.png")
    report = {"speed": speed, **make_report(previous, model, seconds)}
    write_report(config.run, report, figures)
    print(summary(config.run, model, report, figures.captions[0]))


def read_report(run: Path) -> dict[str, Any]:
    """The report of the previous call, {} where there is none."""
    file = run / "report.json"
    return json.loads(file.read_bytes()) if file.is_file() else {}


def write_report(run: Path, report: dict[str, Any], figures: FiguresConfig) -> None:
    """As JSON, as Markdown with image files beside it, and as one HTML file."""
    text = to_markdown(report, figures)
    write_text(run / "report.json", json.dumps(report, indent=2))
    write_text(run / "report.md", text)
    write_text(run / "report.html", to_html(text, run))


def pays(speed: dict[str, Any]) -> bool:
    """Whether the machine multiplies so much faster in bf16 that a U-Net, of which convolutions are most, is."""
    return bool(speed["conv_bf16_gflops"] > BF16_PAYS * speed["conv_gflops"])


def train_stage(stage: str, config: DemoConfig, *, in_bf16: bool) -> float:
    """Run one training script, from its newest checkpoint if it was stopped; returns the seconds it took."""
    file, run = config.recipe / f"{stage}.yaml", config.run / stage
    if (run / "model/model.json").is_file():
        print(f"{run} is finished; reusing it", flush=True)
        return 0.0
    resume = ["--resume", "latest"] if any((run / "checkpoints").glob("step-*")) else []
    environment = {"ACCELERATE_MIXED_PRECISION": "bf16"} if in_bf16 else {}
    return run_script(f"train_{stage}.py", "--config", str(file), "--run", str(run), *resume, **environment)


def check_source(run: Path, recipe_file: Path) -> None:
    """ValueError where a run that was started trains on another data source than its recipe."""
    if (run / "config.yaml").is_file():
        own, wanted = (read_yaml(file)["data"]["source"] for file in (run / "config.yaml", recipe_file))
        if own != wanted:
            raise ValueError(f"{run} was trained on {own}, not on {wanted} of {recipe_file}: pass another --run")


def run_script(script: str, *arguments: str, **environment: str) -> float:
    """Run a script as a person would, with more variables; returns its seconds. ValueError: it fails or is stopped."""
    environment = {**fewer_threads(), **environment}
    settings = [f"{name}={value}" for name, value in environment.items()]
    print("\n$", " ".join([*settings, "python", f"scripts/{script}", *arguments]), flush=True)
    start = time.perf_counter()
    command = [sys.executable, str(CONFIGS.with_name("scripts") / script), *arguments]
    process = subprocess.Popen(command, env={**os.environ, **environment})
    signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
    try:
        status = process.wait()
    except KeyboardInterrupt:  # which the script got too: it saves first
        status = process.wait()
    if status:
        raise ValueError(f"{script} ended with status {status}; `make demo` continues from there")
    return time.perf_counter() - start


def fewer_threads() -> dict[str, str]:
    """A thread for each free core, where other processes keep some busy: all threads wait for one that has no core.

    It is said in a line, as results differ by rounding errors with the number of threads.
    """
    cores, free = len(own_cores()), free_cores()
    if free == cores or "OMP_NUM_THREADS" in os.environ:
        return {}
    print(f"\nother processes keep {cores - free} of {cores} cores busy: one thread for each free core", flush=True)
    return {"OMP_NUM_THREADS": str(free)}


def make_report(previous: dict[str, Any], model: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """What was measured; the seconds of stages that were reused are those of the previous report."""
    measured = json.loads((model.parent / "evaluation.json").read_bytes())
    before = previous.get("seconds", {})
    spent = {name: round(max(value, before.get(name, 0.0)), 1) for name, value in seconds.items()}
    memory = max(peak_rss(), peak_rss(children=True))
    return {
        "seconds": spent,
        "total_minutes": round(sum(spent.values()) / 60, 2),
        "peak_memory_gib": max(round(memory / GIB, 2), previous.get("peak_memory_gib", 0.0)),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "measures": measured["measures"],
        "model_hash": sha256(model / "unet.safetensors")[:10],
    }


def describe_speed(speed: dict[str, Any]) -> str:
    """What the machine is worth, in a line."""
    return (
        f"{speed['processor']}, {speed['cores']} cores, torch {speed['torch']}, in float32: "
        f"{speed['matmul_gflops']:,.0f} GFLOP/s in a {speed['matmul']} matrix product, "
        f"{speed['conv_gflops']:,.0f} GFLOP/s in the recipe's convolution ({speed['conv']}), in bf16 "
        f"{speed['conv_bf16_gflops']:,.0f} GFLOP/s"
    )


def to_markdown(report: dict[str, Any], figures: FiguresConfig) -> str:
    """The report as Markdown."""
    measures = [
        [name, f"{m['value']:.3f}", f"{m['low']:.3f} to {m['high']:.3f}", m["samples"]]
        for name, m in report["measures"].items()
    ]
    times = [[name, f"{value:.0f}"] for name, value in report["seconds"].items()]
    total = f"{report['total_minutes']} minutes in all; peak memory {report['peak_memory_gib']} GiB."
    parts = [
        "# Demo",
        f"The machine: {describe_speed(report['speed'])}. {report['machine']}.",
        markdown_table(["measure", "value", "95 % interval", "samples"], measures),
        markdown_table(["part", "seconds"], times),
        total,
        "Generated images, with the seeds 0, 1, ...",
        "![samples](samples.png)",
        "Denoising: left what the network gets, z_t, decoded; right what it makes of it, the predicted x0.",
        "![denoising](denoising.gif)",
        f"The seeds 0 to 7 of one caption that leaves something open, “{figures.open_caption}”.",
        "![seeds](seeds.png)",
        "Losses and validation scores of the three trainings.",
        "![losses](losses.png)",
    ]
    return "\n\n".join(parts) + "\n"


def summary(run: Path, model: Path, report: dict[str, Any], prompt: str) -> str:
    """The last lines of the demo."""
    accuracy = report["measures"].get("prompt accuracy, all")
    result = f"all right in {accuracy['value']:.1%} of {accuracy['samples']} unseen captions, " if accuracy else ""
    return (
        f"\n{result}after {report['total_minutes']} minutes\n"
        f"report:    {run}/report.html, and report.md\nsamples:   {run}/samples.png\n"
        f"denoising: {run}/denoising.gif\nseeds:     {run}/seeds.png\n"
        f"losses:    {run}/losses.png\nmodel:     {model}\n\ntry next:\n"
        f'  .venv/bin/python scripts/txt2img.py "{prompt}" --model {model}\n'
        "  .venv/bin/accelerate launch scripts/train_clip.py --config configs/emoji-cpu/clip.yaml"
    )
