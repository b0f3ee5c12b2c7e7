"""What a run leaves to look at: a progress bar, log.jsonl, trackers and sample images."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from ldm.commands import resume_command
from ldm.imaging import save_image
from ldm.io.atomic import disk_errors, write_text


class RunLogger:
    """Writes on rank 0 only; other ranks may call everything and nothing happens."""

    def __init__(self, run: Path, accelerator: Accelerator, *, steps: int, start: int) -> None:
        self.run, self.accelerator, self.is_rank0 = run, accelerator, accelerator.is_main_process
        hidden = not self.is_rank0
        self.bar = tqdm(total=steps, initial=start, disable=hidden, desc=run.name, unit="step", mininterval=1.0)
        self.file, self.remedy = run / "log.jsonl", f"restart with {resume_command(run)}"
        self.validation: tuple[int, dict[str, float]] = (0, {})  # the last one, and its step
        self.start_from(start)

    def start_from(self, step: int) -> None:
        """Forget what was logged past `step`, from which training goes on."""
        if self.is_rank0:
            with disk_errors(self.file, self.remedy):
                lines = _truncate_log(self.file, step)
            for line in lines:
                if any(name.startswith("validation") for name in line):
                    self.validation = line.pop("step"), line
        self.step(step)
        self.restart_clock(step)

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

    def validate(self, step: int, values: dict[str, float]) -> None:
        """Log the measures of a validation."""
        self.validation = step, {name: _rounded(value) for name, value in values.items()}  # as a resumed run reads them
        self.write(step, values)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append a line to log.jsonl and log to the trackers."""
        self.write_json(step, {name: _rounded(value) for name, value in values.items()})
        with disk_errors(self.run / "tensorboard", self.remedy):
            self.accelerator.log(values, step=step)

    def write_json(self, step: int, values: dict[str, Any]) -> None:
        """Append what is not a scalar to log.jsonl."""
        if self.is_rank0:
            with disk_errors(self.file, self.remedy), self.file.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    def image(self, step: int, image: Image.Image | None) -> None:
        """Save the sample image of this step, if there is one, and log it to the trackers."""
        if not self.is_rank0 or image is None:
            return
        save_image(image, self.sample_file(step))
        with disk_errors(self.run / "tensorboard", self.remedy):
            for tracker in self.accelerator.trackers:  # TensorBoard takes an array (images, h, w, c), W&B the same
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": np.array(image.convert("RGB"))[None]}, step=step, **layout)

    def sample_file(self, step: int) -> Path:
        """Where the sample image of a step is saved."""
        return self.run / f"samples/step-{step:06d}.png"

    def print(self, message: str) -> None:
        """A line above the bar."""
        if self.is_rank0:
            self.bar.write(message)

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Name on the bar what the run does beside its steps."""
        self.bar.set_description(f"{self.run.name}, {what}")
        try:
            yield
        finally:
            self.bar.set_description(self.run.name)

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


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _truncate_log(path: Path, start: int) -> list[dict[str, Any]]:
    """Remove lines past step `start`, where training goes on, and lines that were cut off; returns what is left."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):
            lines.append(json.loads(line))
    lines = [line for line in lines if line["step"] <= start]
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return lines
