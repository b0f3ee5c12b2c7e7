"""The demo: every script, one after the other, as a person runs them, and a report of what they measured."""

import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ldm.cli import ScriptConfig
from ldm.config import CONFIGS, read_yaml
from ldm.data.sources.emoji_font import OPENMOJI_CREDIT
from ldm.evaluation.figures import FiguresConfig, loss_curves
from ldm.evaluation.html import to_html
from ldm.evaluation.machine import MachineSpeed, free_cores, measure_machine, own_cores, recipe_conv
from ldm.evaluation.report import markdown_table
from ldm.io.atomic import write_text
from ldm.io.model_dir import read_json
from ldm.io.tensors import sha256
from ldm.planning.device import GIB, clock, peak_rss

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
    report = read_report(config.run)
    if report["speed"].keys() != set(MachineSpeed._fields):  # none, or of a version that measured less
        report["speed"] = measure_machine(recipe_conv(config.recipe))._asdict()
    print(describe_speed(report["speed"]), flush=True)
    for stage in STAGE_NAMES:
        train_stage(stage, config, report)
    model = config.run / "ldm/model"
    run_part("evaluate", config.run, report, "evaluate.py", "--model", str(model))
    drawing = ["--config", str(figures_file), "--model", str(model), "--out", str(config.run)]
    run_part("figures", config.run, report, "make_figures.py", *drawing)
    loss_curves([config.run / stage for stage in STAGE_NAMES], config.run / "losses.png")
    finish_report(report, model)
    write_report(config.run, report, figures)
    print(summary(config.run, model, report, figures.captions[0]))


def read_report(run: Path) -> dict[str, Any]:
    """What the calls before have measured."""
    file = run / "report.json"
    read = json.loads(file.read_bytes()) if file.is_file() else {}
    return {"speed": {}, "seconds": {}, "threads": {}, "peak_memory_gib": 0.0, **read}


def write_report(run: Path, report: dict[str, Any], figures: FiguresConfig) -> None:
    """As JSON, as Markdown with image files beside it, and as one HTML file."""
    text = to_markdown(report, figures)
    write_text(run / "report.json", json.dumps(report, indent=2))
    write_text(run / "report.md", text)
    write_text(run / "report.html", to_html(text, run))


def pays(speed: dict[str, Any]) -> bool:
    """Whether the machine multiplies so much faster in bf16 that a U-Net, of which convolutions are most, is."""
    return bool(speed["conv_bf16_gflops"] > BF16_PAYS * speed["conv_gflops"])


def is_finished(run: Path) -> bool:
    """Whether a training has written its model."""
    return (run / "model/model.json").is_file()


def train_stage(stage: str, config: DemoConfig, report: dict[str, Any]) -> None:
    """Run one training script, from its newest checkpoint if it was stopped, unless it is finished."""
    file, run = config.recipe / f"{stage}.yaml", config.run / stage
    if is_finished(run):
        print(f"{run} is finished; reusing it", flush=True)
        return
    goes_on = any((run / "checkpoints").glob("step-*"))
    if not goes_on:
        report["seconds"].pop(stage, None)
    resume = ["--resume", "latest"] if goes_on else []
    environment = {"ACCELERATE_MIXED_PRECISION": "bf16"} if stage == "ldm" and pays(report["speed"]) else {}
    flags = ["--config", str(file), "--run", str(run), *resume]
    run_part(
        stage, config.run, report, f"train_{stage}.py", *flags, before=report["seconds"].get(stage, 0.0), **environment
    )


def check_source(run: Path, recipe_file: Path) -> None:
    """ValueError where a run that was started trains on another data source than its recipe."""
    if (run / "config.yaml").is_file():
        own, wanted = (read_yaml(file)["data"]["source"] for file in (run / "config.yaml", recipe_file))
        if own != wanted:
            raise ValueError(f"{run} was trained on {own}, not on {wanted} of {recipe_file}: pass another --run")


def run_part(
    part: str, run: Path, report: dict[str, Any], script: str, *arguments: str, before: float = 0.0, **environment: str
) -> None:
    """Run a script; report.json has its seconds at once, also where it is stopped, with those of the calls before."""
    threads = num_threads()
    if threads < torch.get_num_threads():
        environment["OMP_NUM_THREADS"] = str(threads)
    start = clock()
    try:
        run_script(script, *arguments, **environment)
    finally:
        seconds = round(before + clock() - start, 1)  # less than before where the classifier is there already
        report["seconds"][part] = max(seconds, report["seconds"].get(part, 0.0))
        report["total_minutes"] = round(sum(report["seconds"].values()) / 60, 2)
        report["threads"][part] = threads
        memory = max(peak_rss(), peak_rss(children=True))
        report["peak_memory_gib"] = max(round(memory / GIB, 2), report["peak_memory_gib"])
        write_text(run / "report.json", json.dumps(report, indent=2))


def run_script(script: str, *arguments: str, **environment: str) -> None:
    """Run a script as a person would, with more variables. ValueError: it fails or is stopped."""
    settings = [f"{name}={value}" for name, value in environment.items()]
    print("\n$", " ".join([*settings, "python", f"scripts/{script}", *arguments]), flush=True)
    command = [sys.executable, str(CONFIGS.with_name("scripts") / script), *arguments]
    process = subprocess.Popen(command, env={**os.environ, **environment})
    handler = signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
    try:
        status = process.wait()
    except KeyboardInterrupt:  # which the script got too: it saves first
        status = process.wait()
    finally:
        signal.signal(signal.SIGTERM, handler)
    if status:
        raise ValueError(f"{script} ended with status {status}; `make demo` continues from there")


def num_threads() -> int:
    """As many as torch takes, but no more than cores are free, as all threads wait for one that has none.

    Fewer are reported in a line: results differ by rounding errors with the number of threads.
    """
    cores, free, usual = len(own_cores()), free_cores(), torch.get_num_threads()
    if free >= usual or "OMP_NUM_THREADS" in os.environ:
        return usual
    print(f"\nother processes keep {cores - free} of {cores} cores busy: one thread for each free core", flush=True)
    return free


def finish_report(report: dict[str, Any], model: Path) -> None:
    """Add what was measured of the model."""
    measured = json.loads((model.parent / "evaluation.json").read_bytes())
    report |= {
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "measures": measured["measures"],
        "model_hash": sha256(model / "unet.safetensors")[:10],
        "data": read_json(model / "model.json")["metadata"]["data"],
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
    times = [[name, f"{value:.0f}", report["threads"].get(name, "")] for name, value in report["seconds"].items()]
    total = f"{report['total_minutes']} minutes in all; peak memory {report['peak_memory_gib']} GiB."
    parts = [
        "# Demo",
        f"The machine: {describe_speed(report['speed'])}. {report['machine']}.",
        markdown_table(["measure", "value", "95 % interval", "samples"], measures),
        markdown_table(["part", "seconds", "threads"], times),
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
    if report["data"]["source"] == "characters" and report["data"]["emoji_font"] is None:
        parts.append(OPENMOJI_CREDIT)
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
