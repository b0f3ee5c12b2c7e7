"""What a run leaves to look at: a progress bar, log.jsonl, trackers and sample pictures."""

import json
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from ldm import imaging
from ldm.io.atomic import disk_errors, write_text

RESUME = "go on with --resume latest"


class RunLogger:
    """Writes on the main process only; other processes may call everything and nothing happens."""

    def __init__(self, run: Path, accelerator: Accelerator, *, steps: int, start: int) -> None:
        self.run, self.accelerator, self.main = run, accelerator, accelerator.is_main_process
        self.bar = tqdm(total=steps, initial=start, disable=not self.main, desc=run.name, unit="step", mininterval=1.0)
        self.file = run / "log.jsonl"
        if self.main:
            _truncate_log(self.file, start)
        self.clock, self.clock_step = time.perf_counter(), start

    def step(self, step: int) -> None:
        """Move the bar to `step`."""
        self.bar.update(step - self.bar.n)

    def train(self, step: int, values: dict[str, float], *, batch_size: int) -> None:
        """Log losses and the rate of images since the last call."""
        now = time.perf_counter()
        rate = (step - self.clock_step) * batch_size / max(now - self.clock, 1e-9)
        self.clock, self.clock_step = now, step
        self.bar.set_postfix({"loss": f"{values['loss']:.4f}", "images/s": f"{rate:.0f}"}, refresh=False)
        self.write(step, {**values, "images_per_second": rate})

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append a line to log.jsonl and tell the trackers."""
        self.write_json(step, {k: _round(v) for k, v in values.items()})
        with disk_errors(self.run / "tensorboard", RESUME):
            self.accelerator.log(values, step=step)

    def write_json(self, step: int, values: dict[str, Any]) -> None:
        """Append what is no scalar to log.jsonl."""
        if self.main:
            with disk_errors(self.file, RESUME), self.file.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    def image(self, step: int, image: Image.Image) -> None:
        """Keep a sample picture of this step."""
        if self.main:
            imaging.save_image(image, self.run / f"samples/step-{step:06d}.png")

    def print(self, message: str) -> None:
        """A line for the person who watches, above the bar."""
        if self.main:
            self.bar.write(message)

    def restart_clock(self, step: int) -> None:
        """Leave the time since the last `train` out of the rate (validation, sampling, saving)."""
        self.clock, self.clock_step = time.perf_counter(), step

    def close(self) -> None:
        """Close the bar and the trackers."""
        self.bar.close()
        try:
            self.accelerator.end_training()
        except OSError as error:
            self.print(f"{self.run}/tensorboard could not be written to the end ({error})")


def _truncate_log(path: Path, start: int) -> None:
    """Leave in the log of a run that goes on after step `start` what is not past its checkpoint."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            step = json.loads(line)["step"]
        except ValueError:  # a line that was cut in the middle
            continue
        if step <= start:
            kept.append(line + "\n")
    write_text(path, "".join(kept))


def _round(value: float) -> float:
    return float(f"{value:.6g}")
