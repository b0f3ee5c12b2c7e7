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

from ldm.weights import sha256

FORMAT, MANIFEST = "ldm-checkpoint-2", "manifest.json"
WRITING = ".writing-"
PATTERN = re.compile(r"step-(\d{6,})$")

Tensors = dict[str, Tensor]


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, Tensors], progress: dict[str, Any], *, keep: int
) -> Path:
    """Write `folder`/step-XXXXXX, one safetensors file for each group of tensors, then prune all but the newest `keep`.

    The files are written beside, with a manifest of their hashes, synced to the disk and then renamed; a checkpoint of
    this step that is whole already is kept instead. ValueError when that fails, for example on a full disk; what was
    there before is whole.
    """
    target = folder / f"step-{step:06d}"
    temporary = folder / f"{WRITING}step-{step:06d}"
    if target.exists() and damage(target) is None:
        return target
    try:
        for left in folder.glob(f"{WRITING}*"):  # of runs that were killed
            shutil.rmtree(left)
        temporary.mkdir(parents=True)
        for name, group in tensors.items():
            save_file(
                {key: t.detach().cpu().contiguous() for key, t in group.items()}, temporary / f"{name}.safetensors"
            )
        (temporary / "progress.json").write_text(json.dumps({"step": step, **progress}, indent=2))
        files = {path.name: sha256(path) for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps({"format": FORMAT, "sha256": files}, indent=2))
        for path in temporary.iterdir():
            _sync(path)
        _sync(temporary)
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
    """Tensors by group, and the progress, of a checkpoint that `damage` found whole.

    ValueError when it belongs to another kind of run.
    """
    wrong = [name for name in groups if not (path / f"{name}.safetensors").is_file()]
    if wrong:
        raise ValueError(f"{path} has no {wrong[0]}.safetensors: it belongs to another kind of run")
    return {name: load_file(path / f"{name}.safetensors") for name in groups}, _json(path / "progress.json")


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, each file of which must have the hash in its manifest; None when it is whole."""
    if not (path / MANIFEST).is_file():
        return f"it has no {MANIFEST}, as a folder such as RUN/checkpoints/step-000500 has"
    try:
        manifest = _json(path / MANIFEST)
        hashes = dict(manifest["sha256"]) if manifest["format"] == FORMAT else None
    except (ValueError, TypeError, KeyError):
        return f"its {MANIFEST} is damaged"
    if hashes is None:
        return "it was written by another version of ldm"
    if {file.name for file in path.iterdir()} != {*hashes, MANIFEST}:
        return f"its files are not those of its {MANIFEST}"
    wrong = [name for name, digest in hashes.items() if sha256(path / name) != digest]
    return f"{wrong[0]} has not the hash that its {MANIFEST} tells" if wrong else None


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in a folder of checkpoints, if there is one."""
    return next(reversed(_all(folder)), None)


def resolve(resume: str, folder: Path) -> tuple[Path, list[str]]:
    """What `--resume latest|PATH` means: for `latest` the newest that is whole, and what is wrong with newer ones.

    ValueError when there is nothing to resume from.
    """
    newest_first = _all(folder)[::-1] if resume == "latest" else [Path(resume)]
    if not newest_first:
        raise ValueError(f"{folder} holds no checkpoint to resume from; start without --resume")
    damaged: list[str] = []
    for path in newest_first:
        reason = damage(path)
        if reason is None:
            return path, damaged
        damaged.append(f"{path} can not be resumed from: {reason}")
    raise ValueError(f"{'; '.join(damaged)}; name another checkpoint, or start anew with another --run")


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


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


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
