"""Checkpoints: folders of safetensors and JSON, complete or absent, never half-written."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = "ldm-checkpoint-1"
PATTERN = re.compile(r"step-(\d{6,})$")

Tensors = dict[str, Tensor]


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, Tensors], progress: dict[str, Any], *, keep: int
) -> Path:
    """Write `folder`/step-XXXXXX, one safetensors file for each group of tensors, then prune all but the newest `keep`.

    The files are written beside, synced to the disk and then renamed. ValueError when that fails, for example on a full
    disk; what was there before is whole.
    """
    target = folder / f"step-{step:06d}"
    temporary = folder / f".writing-step-{step:06d}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, group in tensors.items():
            save_file(
                {key: t.detach().cpu().contiguous() for key, t in group.items()}, temporary / f"{name}.safetensors"
            )
        (temporary / "progress.json").write_text(json.dumps({"format": FORMAT, "step": step, **progress}, indent=2))
        for path in temporary.iterdir():
            _sync(path)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = latest(folder)
        remedy = f"{kept} is whole: free some space and go on with --resume latest" if kept else "no checkpoint is kept"
        raise ValueError(f"checkpoint of step {step} could not be written to {folder} ({error}); {remedy}") from None
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def load_checkpoint(path: Path, groups: list[str]) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Tensors by group, and the progress; ValueError when the folder is no checkpoint of this kind of run."""
    progress_file = path / "progress.json"
    if not progress_file.is_file():
        raise ValueError(
            f"{path} is no checkpoint (it has no progress.json); name a folder such as RUN/checkpoints/step-000500"
        )
    try:
        progress = json.loads(progress_file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{progress_file} is damaged ({error}); resume from another checkpoint") from None
    if not isinstance(progress, dict) or progress.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by this version of ldm; resume from one that was")
    tensors = {}
    for name in groups:
        file = path / f"{name}.safetensors"
        if not file.is_file():
            raise ValueError(f"{path} has no {file.name}: it belongs to another kind of run")
        try:
            tensors[name] = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); resume from another checkpoint") from None
    return tensors, progress


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in a folder of checkpoints, if there is one."""
    return next(reversed(_all(folder)), None)


def resolve(resume: str, folder: Path) -> Path:
    """What `--resume latest|PATH` means; ValueError when there is nothing to resume from."""
    if resume != "latest":
        return Path(resume)
    found = latest(folder)
    if found is None:
        raise ValueError(f"{folder} holds no checkpoint to resume from; start without --resume")
    return found


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> Tensors:
    """The optimizer's state by parameter name, as NAME/KEY -> tensor."""
    state = optimizer.state_dict()["state"]
    return {
        f"{names[i]}/{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for i, values in state.items()
        for key, value in values.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: Tensors) -> None:
    """The inverse of `optimizer_tensors`."""
    index = {name: i for i, name in enumerate(names)}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, field = key.rsplit("/", 1)
        if name not in index:
            raise ValueError(f"the checkpoint has optimizer state of {name}, which this model has not")
        parameter = parameters[index[name]]
        if value.shape == parameter.shape:  # fused optimizers walk through memory: the layouts must be the same
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(index[name], {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _all(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if PATTERN.match(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
