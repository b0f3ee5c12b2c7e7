"""Train all three stages on the shapes set and show what came of it; a second call goes on or reuses what is there."""

import json
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.cli import ScriptConfig, parse_cli
from ldm.evaluation import figures
from ldm.io.tensors import sha256
from ldm.planning.device import GIB, peak_rss

ROOT = Path(__file__).parents[1]


class DemoConfig(ScriptConfig):
    """Settings of the demo."""

    run: Path = Path("runs/demo")
    """folder of the demo"""


def demo(config: DemoConfig) -> None:
    """Train what is not trained yet, evaluate, paint, and write the report."""
    stages = {stage: config.run / stage for stage in ("clip", "vae", "ldm")}
    seconds = {stage: train(stage, run) for stage, run in stages.items()}
    model = stages["ldm"] / "model"
    seconds["evaluate"] = run_script("evaluate.py", "--model", str(model))
    seconds["figures"] = run_script("figures.py", "--model", str(model), "--out", str(config.run))
    figures.loss_curves(list(stages.values()), config.run / "losses.png")
    write_report(config.run, stages, seconds)


def train(stage: str, run: Path) -> float:
    """Run one training script, from its newest checkpoint if it was stopped; returns the seconds it took."""
    if (run / "model/model.json").is_file():
        print(f"{run} is finished; reusing it", flush=True)
        return 0.0
    resume = ["--resume", "latest"] if any((run / "checkpoints").glob("step-*")) else []
    return run_script(f"train_{stage}.py", "--run", str(run), *resume)


def run_script(script: str, *arguments: str) -> float:
    """Run a script as a person would and return the seconds it took; stop where it fails or is stopped."""
    print("\n$", " ".join(["python", f"scripts/{script}", *arguments]), flush=True)
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(ROOT / "scripts" / script), *arguments])
    signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
    try:
        status = process.wait()
    except KeyboardInterrupt:  # which the script got too: it saves first
        status = process.wait()
    if status:
        raise SystemExit(f"{script} stopped with status {status}; `make demo` goes on from there")
    return time.perf_counter() - start


def write_report(run: Path, stages: dict[str, Path], seconds: dict[str, float]) -> None:
    """report.json and report.md with what was measured, and where everything is."""
    found = json.loads((stages["ldm"] / "evaluation.json").read_text())
    report_file = run / "report.json"
    before = json.loads(report_file.read_text()) if report_file.is_file() else {"seconds": {}}
    spent = {name: round(max(value, before["seconds"].get(name, 0.0)), 1) for name, value in seconds.items()}
    measures = {name: value for name, value in found.items() if isinstance(value, dict)}
    memory = max(peak_rss(who) for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF))
    report: dict[str, Any] = {
        "seconds": spent,
        "total_minutes": round(sum(spent.values()) / 60, 2),
        "peak_memory_gib": max(round(memory / GIB, 2), before.get("peak_memory_gib", 0.0)),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "measures": measures,
        "model_hash": sha256(stages["ldm"] / "model/unet.safetensors")[:10],
    }
    report_file.write_text(json.dumps(report, indent=2))
    rows = "\n".join(
        f"| {name} | {m['value']:.3f} | {m['low']:.3f} to {m['high']:.3f} | {m['samples']} |"
        for name, m in measures.items()
    )
    times = ", ".join(f"{name} {value:.0f} s" for name, value in spent.items())
    text = (
        "# Demo\n\n![samples](samples.png)\n\n"
        f"| measure | value | 95 % interval | samples |\n|---|---|---|---|\n{rows}\n\n"
        f"{report['total_minutes']} minutes ({times}); peak memory {report['peak_memory_gib']} GiB.\n\n"
        "Denoising, step by step: what the sampler holds, and its guess of the end.\n\n![denoising](denoising.png)\n\n"
        "![losses](losses.png)\n"
    )
    (run / "report.md").write_text(text)
    model = stages["ldm"] / "model"
    print(
        f"\nall five attributes right: {measures['prompt accuracy, all']['value']:.1%} of "
        f"{measures['prompt accuracy, all']['samples']} unseen captions, after {report['total_minutes']} minutes\n"
        f"report:    {run}/report.md\nsamples:   {run}/samples.png\ndenoising: {run}/denoising.png\n"
        f"losses:    {run}/losses.png\nmodel:     {model}\n\ntry next:\n"
        f'  .venv/bin/python scripts/txt2img.py "a large blue star in the center on a red background" --model {model}\n'
        "  .venv/bin/accelerate launch scripts/train_clip.py --config configs/emoji-cpu/clip.yaml"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    demo(parse_cli(DemoConfig, argv, default=None, description=__doc__))


if __name__ == "__main__":
    main()
