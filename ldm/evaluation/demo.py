"""The demo: every script, one after the other, as a person runs them, and a report of what they measured."""

import json
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ldm.cli import ScriptConfig
from ldm.config import CONFIGS
from ldm.evaluation.figures import loss_curves
from ldm.io.atomic import write_text
from ldm.io.tensors import sha256
from ldm.planning.device import GIB, peak_rss


class DemoConfig(ScriptConfig):
    """Settings of the demo."""

    run: Path = Path("runs/demo")
    """folder of the demo"""


def run_demo(config: DemoConfig) -> None:
    """Train what is not trained yet, evaluate, draw the figures, and write the report."""
    runs = {stage: config.run / stage for stage in ("clip", "vae", "ldm")}
    seconds = {stage: train_stage(stage, run) for stage, run in runs.items()}
    model = runs["ldm"] / "model"
    seconds["evaluate"] = run_script("evaluate.py", "--model", str(model))
    seconds["figures"] = run_script("make_figures.py", "--model", str(model), "--out", str(config.run))
    loss_curves(list(runs.values()), config.run / "losses.png")
    report = make_report(config.run, model, seconds)
    write_text(config.run / "report.json", json.dumps(report, indent=2))
    write_text(config.run / "report.md", to_markdown(report))
    print(summary(config.run, model, report))


def train_stage(stage: str, run: Path) -> float:
    """Run one training script, from its newest checkpoint if it was stopped; returns the seconds it took."""
    if (run / "model/model.json").is_file():
        print(f"{run} is finished; reusing it", flush=True)
        return 0.0
    resume = ["--resume", "latest"] if any((run / "checkpoints").glob("step-*")) else []
    return run_script(f"train_{stage}.py", "--run", str(run), *resume)


def run_script(script: str, *arguments: str) -> float:
    """Run a script as a person would; returns the seconds it took. ValueError where it fails or is stopped."""
    print("\n$", " ".join(["python", f"scripts/{script}", *arguments]), flush=True)
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(CONFIGS.with_name("scripts") / script), *arguments])
    signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
    try:
        status = process.wait()
    except KeyboardInterrupt:  # which the script got too: it saves first
        status = process.wait()
    if status:
        raise ValueError(f"{script} ended with status {status}; `make demo` continues from there")
    return time.perf_counter() - start


def make_report(run: Path, model: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """What was measured; the seconds of stages that were reused are those of the previous report."""
    measured = json.loads((model.parent / "evaluation.json").read_bytes())
    file = run / "report.json"
    previous = json.loads(file.read_bytes()) if file.is_file() else {"seconds": {}}
    spent = {name: round(max(value, previous["seconds"].get(name, 0.0)), 1) for name, value in seconds.items()}
    memory = max(peak_rss(), peak_rss(children=True))
    return {
        "seconds": spent,
        "total_minutes": round(sum(spent.values()) / 60, 2),
        "peak_memory_gib": max(round(memory / GIB, 2), previous.get("peak_memory_gib", 0.0)),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "measures": measured["measures"],
        "model_hash": sha256(model / "unet.safetensors")[:10],
    }


def to_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    rows = "\n".join(
        f"| {name} | {m['value']:.3f} | {m['low']:.3f} to {m['high']:.3f} | {m['samples']} |"
        for name, m in report["measures"].items()
    )
    times = ", ".join(f"{name} {value:.0f} s" for name, value in report["seconds"].items())
    return (
        "# Demo\n\n![samples](samples.png)\n\n"
        f"| measure | value | 95 % interval | samples |\n|---|---|---|---|\n{rows}\n\n"
        f"{report['total_minutes']} minutes ({times}); peak memory {report['peak_memory_gib']} GiB.\n\n"
        "Denoising, step by step: z_t, and the denoised latents.\n\n![denoising](denoising.png)\n\n"
        "![losses](losses.png)\n"
    )


def summary(run: Path, model: Path, report: dict[str, Any]) -> str:
    """The last lines of the demo."""
    accuracy = report["measures"]["prompt accuracy, all"]
    return (
        f"\nall five attributes right: {accuracy['value']:.1%} of {accuracy['samples']} unseen captions, "
        f"after {report['total_minutes']} minutes\n"
        f"report:    {run}/report.md\nsamples:   {run}/samples.png\ndenoising: {run}/denoising.png\n"
        f"losses:    {run}/losses.png\nmodel:     {model}\n\ntry next:\n"
        f'  .venv/bin/python scripts/txt2img.py "a large blue star in the center on a red background" --model {model}\n'
        "  .venv/bin/accelerate launch scripts/train_clip.py --config configs/emoji-cpu/clip.yaml"
    )
