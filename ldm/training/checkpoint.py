"""Checkpoints: folders of safetensors and JSON, complete or absent, never half-written."""

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh

from ldm.io.atomic import disk_errors
from ldm.io.tensors import sha256
from ldm.training.fsdp import empty_shard, shard_tensor

CHECKPOINT_FORMAT, MANIFEST = "ldm-checkpoint-2", "manifest.json"
WRITING, CORRUPT, SHARD_GLOB = ".writing-", "damaged-", "shard-*.safetensors"
PATTERN = re.compile(r"step-(\d{6,})$")

Tensors = dict[str, Tensor]
Result = TypeVar("Result")
OnMain = Callable[[Callable[[], Result]], Result]


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: dict[str, Tensors],
    progress: dict[str, Any],
    *,
    keep: int,
    on_main: OnMain[Any] = lambda action: action(),
    parts: bool = False,
) -> None:
    """Write `folder`/step-XXXXXX, then prune all but the newest `keep`.

    There is one safetensors file for each group of tensors, or, with `parts`, one for the parts that each process
    holds. The files are written beside, with a manifest of their hashes, synced to the disk and then renamed; a
    checkpoint of this step that is whole already is kept instead. All processes call this; `on_main` does something on
    the main one alone and hands its result, or its ValueError, to all. ValueError when writing fails, for example on a
    full disk; what was there before is whole.
    """
    target = folder / f"step-{step:06d}"
    temporary = folder / f"{WRITING}step-{step:06d}"

    def begin() -> bool:
        if target.exists() and find_corruption(target) is None:
            return False
        for left in folder.glob(f"{WRITING}*"):  # of runs that were killed
            shutil.rmtree(left)
        temporary.mkdir(parents=True)
        return True

    def finish() -> None:
        (temporary / "progress.json").write_text(json.dumps({"step": step, **progress}, indent=2))
        files = {path.name: sha256(path) for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps({"format": CHECKPOINT_FORMAT, "sha256": files}, indent=2))
        for path in temporary.iterdir():
            _sync(path)
        _sync(temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        _sync(folder)
        for old in _list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)

    kept = latest(folder)
    remedy = f"go on with --resume latest, from {kept.name}" if kept else "start again"

    def told(action: Callable[[], Any]) -> Any:
        try:
            with disk_errors(target, remedy):
                return action()
        except ValueError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    if not on_main(lambda: told(begin)):
        return
    if parts:
        told(lambda: _write_sharded(temporary, tensors))
    else:
        on_main(lambda: told(lambda: _write_groups(temporary, tensors)))
    on_main(lambda: told(finish))


def _write_groups(folder: Path, tensors: dict[str, Tensors]) -> None:
    for name, group in tensors.items():
        save_file({key: t.detach().cpu().contiguous() for key, t in group.items()}, folder / f"{name}.safetensors")


def _write_sharded(folder: Path, tensors: dict[str, Tensors]) -> None:
    state = {f"{name}/{key}": t.detach() for name, group in tensors.items() for key, t in group.items()}
    try:
        dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:  # of each process that failed, told to all
        raise next(iter(error.failures.values()))[0] from None


def load_checkpoint(
    path: Path, groups: list[str], mesh: DeviceMesh | None = None
) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Tensors by group, and the progress, of a checkpoint that `damage` found whole.

    With a mesh each process gets its part of each tensor; how many processes wrote it does not matter. ValueError when
    it belongs to another kind of run.
    """
    progress = _json(path / "progress.json")
    if any(path.glob(SHARD_GLOB)):
        tensors = _read_parts(path, mesh)
    else:
        tensors = {name: _read_group(path / f"{name}.safetensors", mesh) for name in groups}
    wrong = [name for name in groups if not tensors.get(name)]
    if wrong:
        raise ValueError(f"{path} has no weights of {wrong[0]}: it belongs to another kind of run")
    return tensors, progress


def _read_group(file: Path, mesh: DeviceMesh | None) -> Tensors:
    tensors = load_file(file) if file.is_file() else {}
    return {name: shard_tensor(tensor, mesh) for name, tensor in tensors.items()} if mesh else tensors


def _read_parts(folder: Path, mesh: DeviceMesh | None) -> dict[str, Tensors]:
    reader = HuggingFaceStorageReader(str(folder))
    found = reader.read_metadata().state_dict_metadata
    state = {name: empty_shard(one.size, one.properties.dtype, mesh) for name, one in found.items()}  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(state, storage_reader=reader, no_dist=mesh is None)
    tensors: dict[str, Tensors] = {}
    for name, tensor in state.items():
        group, key = name.split("/", 1)
        tensors.setdefault(group, {})[key] = tensor
    return tensors


def find_corruption(path: Path) -> str | None:
    """What is wrong with a checkpoint, each file of which must have the hash in its manifest; None when it is whole."""
    try:
        return _damage(path)
    except OSError as error:  # of a disk that fails
        return f"it can not be read ({error})"


def _damage(path: Path) -> str | None:
    if not (path / MANIFEST).is_file():
        return f"it has no {MANIFEST}, as a folder such as RUN/checkpoints/step-000500 has"
    try:
        manifest = _json(path / MANIFEST)
        hashes = dict(manifest["sha256"]) if manifest["format"] == CHECKPOINT_FORMAT else None
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
    return next(reversed(_list_checkpoints(folder)), None)


def resolve(resume: str, folder: Path) -> tuple[Path, list[str]]:
    """What `--resume latest|PATH` means: for `latest` the newest that is whole, and what is wrong with newer ones.

    Those are set aside, so that they neither count as kept nor as the newest. ValueError when there is nothing to
    resume from, and for a PATH where `folder` holds a newer one, which is of another course.
    """
    found, named = _list_checkpoints(folder), Path(resume)
    newest_first = found[::-1] if resume == "latest" else [named]
    if not newest_first:
        raise ValueError(f"{folder} holds no checkpoint to resume from; start without --resume")
    if resume != "latest" and found and found[-1].resolve() != named.resolve():
        raise ValueError(
            f"{folder} holds {found[-1].name}: go on with --resume latest, or from {named} in another --run"
        )
    damaged: list[tuple[Path, str]] = []
    for path in newest_first:
        reason = find_corruption(path)
        if reason is None:
            return path, [f"{told}; it is {_quarantine(bad)} now" for bad, told in damaged]
        damaged.append((path, f"{path} can not be resumed from: {reason}"))
    told_of_all = "; ".join(told for _, told in damaged)
    raise ValueError(f"{told_of_all}; name another checkpoint, or start anew with another --run")


def _quarantine(path: Path) -> str:
    aside = path.with_name(f"{CORRUPT}{path.name}")
    with disk_errors(aside):
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    return aside.name


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


def _list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if PATTERN.match(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
