"""What a run leaves to look at: a progress bar, log.jsonl, trackers and sample images."""

import json
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from ldm.imaging import save_image
from ldm.io.atomic import disk_errors, write_text

REMEDY = "restart with --resume latest"


class RunLogger:
    """Writes on rank 0 only; other ranks may call everything and nothing happens."""

    def __init__(self, run: Path, accelerator: Accelerator, *, steps: int, start: int) -> None:
        self.run, self.accelerator, self.is_rank0 = run, accelerator, accelerator.is_main_process
        hidden = not self.is_rank0
        self.bar = tqdm(total=steps, initial=start, disable=hidden, desc=run.name, unit="step", mininterval=1.0)
        self.file = run / "log.jsonl"
        if self.is_rank0:
            _truncate_log(self.file, start)
        self.restart_clock(start)

    def step(self, step: int) -> None:
        """Move the bar to `step`."""
        self.bar.update(step - self.bar.n)

    def train(self, step: int, values: dict[str, float], *, batch_size: int) -> None:
        """Log losses and the rate of images since the last call."""
        elapsed = max(time.perf_counter() - self._clock, 1e-9)
        rate = (step - self._clock_step) * batch_size / elapsed
        self.restart_clock(step)
        self.bar.set_postfix({"loss": f"{values['loss']:.4f}", "images/s": f"{rate:.0f}"}, refresh=False)
        self.write(step, {**values, "images_per_second": rate})

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append a line to log.jsonl and log to the trackers."""
        self.write_json(step, {name: float(f"{value:.6g}") for name, value in values.items()})
        with disk_errors(self.run / "tensorboard", REMEDY):
            self.accelerator.log(values, step=step)

    def write_json(self, step: int, values: dict[str, Any]) -> None:
        """Append what is not a scalar to log.jsonl."""
        if self.is_rank0:
            with disk_errors(self.file, REMEDY), self.file.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    def image(self, step: int, image: Image.Image | None) -> None:
        """Save the sample image of this step, if there is one."""
        if self.is_rank0 and image is not None:
            save_image(image, self.run / f"samples/step-{step:06d}.png")

    def print(self, message: str) -> None:
        """A line above the bar."""
        if self.is_rank0:
            self.bar.write(message)

    def restart_clock(self, step: int) -> None:
        """Leave the time since the last `train` out of the rate (validation, sampling, saving)."""
        self._clock, self._clock_step = time.perf_counter(), step

    def close(self) -> None:
        """Close the bar and the trackers."""
        self.bar.close()
        try:
            self.accelerator.end_training()
        except OSError as error:
            self.print(f"{self.run}/tensorboard could not be written to the end ({error})")


def _truncate_log(path: Path, start: int) -> None:
    """Remove lines past step `start`, where a resumed run begins, and lines that were cut off."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            step = json.loads(line)["step"]
        except ValueError:
            continue
        if step <= start:
            lines.append(line + "\n")
    write_text(path, "".join(lines))
