"""Checkpoints: folders of safetensors and JSON, complete or absent, never half-written."""

import contextlib
import json
import re
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ldm.commands import resume_command
from ldm.io.atomic import disk_errors, save_tensors, sync
from ldm.io.tensors import sha256
from ldm.training.distributed import on_rank0
from ldm.training.fsdp import empty_shard, shard_tensor

CHECKPOINT_FORMAT = "ldm-checkpoint-3"
PROGRESS, MANIFEST, HASHES = "progress.json", "manifest.json", "sha256.json"
WRITING, CORRUPT, SHARD_GLOB = ".writing-", "corrupt-", "shard-*.safetensors"
CORRUPT_REMEDY = "pass another checkpoint, or start in another --run"
PATTERN = re.compile(r"step-(\d{6,})$")

Tensors = dict[str, Tensor]


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: dict[str, Tensors],
    progress: dict[str, Any],
    *,
    keep: int,
    spare: int = 0,
    replace: bool = False,
    shards: Accelerator | None = None,
) -> Path:
    """Write `folder`/step-XXXXXX, then prune all but the newest `keep`; returns its path.

    The newest one that is not past step `spare` is not pruned either.

    Rank 0 calls this and writes one safetensors file for each group of tensors. With `shards` all ranks call it, and
    each writes a file of its own. They are written to a temporary folder with a manifest of their sizes, synced to the
    disk and then renamed. A whole checkpoint of this step is left as it is, unless `replace`. ValueError when writing
    fails, for example on a full disk; the previous checkpoint is whole.
    """
    target = folder / f"step-{step:06d}"
    temporary = folder / f"{WRITING}step-{step:06d}"
    previous = latest(folder)
    remedy = f"restart with {resume_command(folder.parent)}, from {previous.name}" if previous else "start again"
    once: Callable[[Callable[[], Any]], Any] = partial(on_rank0, shards) if shards else lambda action: action()
    write = _write_sharded if shards else _write_groups
    try:
        with disk_errors(target, remedy):
            if once(lambda: _start_writing(temporary, target, replace=replace)):
                write(temporary, tensors)
                once(lambda: _finish_writing(temporary, target, {"step": step, **progress}))
                once(lambda: _prune(folder, keep, spare))
    except ValueError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def _start_writing(temporary: Path, target: Path, *, replace: bool) -> bool:
    """Make the temporary folder; False where the checkpoint is whole already."""
    if not replace and target.exists() and find_corruption(target) is None:
        return False
    for left in target.parent.glob(f"{WRITING}*"):  # of runs that were killed
        shutil.rmtree(left)
    temporary.mkdir(parents=True)
    return True


def _finish_writing(temporary: Path, target: Path, progress: dict[str, Any]) -> None:
    (temporary / PROGRESS).write_text(json.dumps(progress, indent=2))
    sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
    (temporary / MANIFEST).write_text(json.dumps({"format": CHECKPOINT_FORMAT, "bytes": sizes}, indent=2))
    for path in [*temporary.iterdir(), temporary]:
        sync(path)
    old = target.with_name(f"{WRITING}old-{target.name}")
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _prune(folder: Path, keep: int, spare: int) -> None:
    spared = [path for path in _list_checkpoints(folder) if _step(path) <= spare][-1:]
    for old in _list_checkpoints(folder)[:-keep]:
        if old not in spared:
            _remove(old)


def _remove(path: Path) -> None:
    path.unlink() if path.is_symlink() else shutil.rmtree(path)


def go_back(folder: Path, step: int) -> Path | None:
    """The newest whole checkpoint that is not past `step`, if there is one; newer ones are removed then."""
    found = _list_checkpoints(folder)
    good = next((path for path in reversed(found) if _step(path) <= step and find_corruption(path) is None), None)
    for path in found[found.index(good) + 1 :] if good else []:
        _remove(path)
    return good


def add_hashes(path: Path) -> None:
    """Add the SHA-256 of each file of a finished checkpoint."""
    with contextlib.suppress(OSError, ValueError):  # pruned meanwhile, or a full disk: it is whole without them
        files = json.loads((path / MANIFEST).read_bytes())["bytes"]
        hashes, temporary = {name: sha256(path / name) for name in [*files, MANIFEST]}, path / f".{HASHES}"
        temporary.write_text(json.dumps(hashes, indent=2))
        sync(temporary)
        temporary.replace(path / HASHES)


def _write_groups(folder: Path, tensors: dict[str, Tensors]) -> None:
    for name, group in tensors.items():
        save_tensors(folder / f"{name}.safetensors", group)


def _write_sharded(folder: Path, tensors: dict[str, Tensors]) -> None:
    import torch.distributed.checkpoint as dcp  # which takes long to load
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    state = {f"{name}/{key}": t.detach() for name, group in tensors.items() for key, t in group.items()}
    try:
        dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:  # of each rank that failed, on all
        raise next(iter(error.failures.values()))[0] from None


def load_checkpoint(path: Path, mesh: DeviceMesh | None = None) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Tensors by group, and the progress, of a whole checkpoint.

    With a mesh each rank gets its shard of each tensor; how many ranks wrote it does not matter.
    """
    progress = _json(path / PROGRESS)
    if any(path.glob(SHARD_GLOB)):
        return _read_sharded(path, mesh), progress
    groups = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
    if mesh:
        groups = {name: {key: shard_tensor(t, mesh) for key, t in group.items()} for name, group in groups.items()}
    return groups, progress


def _read_sharded(folder: Path, mesh: DeviceMesh | None) -> dict[str, Tensors]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(folder))
    metadata: dict[str, Any] = reader.read_metadata().state_dict_metadata
    state = {name: empty_shard(item.size, item.properties.dtype, mesh) for name, item in metadata.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(state, storage_reader=reader, no_dist=mesh is None)
    tensors: dict[str, Tensors] = {}
    for name, tensor in state.items():
        group, key = name.split("/", 1)
        tensors.setdefault(group, {})[key] = tensor
    return tensors


def find_corruption(path: Path, *, rank: int = 0, world: int = 1, hashed: bool = True) -> str | None:
    """What is wrong with a checkpoint; None when it is whole. Rank `rank` of `world` hashes its part of the files."""
    try:
        manifest = _json(path / MANIFEST)
        written_as, sizes = manifest["format"], dict(manifest.get("bytes", {}))
        if written_as != CHECKPOINT_FORMAT:
            return f"written as {written_as} by another version of ldm, which cannot be resumed by this one"
        files = {file.name: file for file in path.iterdir() if file.name != HASHES and not file.name.startswith(".")}
        if files.keys() != {*sizes, MANIFEST}:
            return f"its files are not those of its {MANIFEST}"
        if wrong := [name for name, size in sizes.items() if files[name].stat().st_size != size]:
            return f"{wrong[0]}: size mismatch with {MANIFEST}"
        has_hashes = hashed and (path / HASHES).is_file() and (path / HASHES).stat().st_size  # else whole without them
        hashes = _json(path / HASHES) if has_hashes else {}
        wrong = [name for name in sorted(hashes)[rank::world] if sha256(files[name]) != hashes[name]]
        return f"{wrong[0]}: SHA-256 mismatch with {HASHES}" if wrong else None
    except (FileNotFoundError, NotADirectoryError):
        return f"no {MANIFEST}: pass a folder such as RUN/checkpoints/step-000500"
    except OSError as error:  # of a disk that fails
        return f"cannot be read ({error})"
    except (ValueError, TypeError, KeyError):
        return f"{MANIFEST} or {HASHES} is corrupt"


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in a folder of checkpoints, if there is one."""
    return next(reversed(_list_checkpoints(folder)), None)


def candidates(resume: str | None, folder: Path) -> list[Path]:
    """The checkpoints that a run may go on from, the newest first; none where it starts.

    ValueError when there is nothing to resume from, or something to overwrite, and for a PATH where `folder` holds a
    newer one, which is of another course.
    """
    found = _list_checkpoints(folder)
    if resume is None:
        if found:
            raise ValueError(
                f"{folder.parent} already has {found[-1].name}: pass --resume latest, or choose another --run"
            )
        return []
    if resume == "latest":
        if not found:
            raise ValueError(f"{folder} has no checkpoint to resume from; start without --resume")
        return found[::-1]
    named = Path(resume)
    if found and found[-1].resolve() != named.resolve():
        raise ValueError(f"{folder} has {found[-1].name}: pass --resume latest, or resume {named} in another --run")
    return [named]


def peek(resume: str | None, folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that a run goes on from, and its progress, before any tensor is read; None where a run starts.

    ValueError as `candidates`, and where no candidate is whole as far as sizes tell.
    """
    damage = []
    for path in candidates(resume, folder):
        reason = find_corruption(path, hashed=False)
        if reason is None:
            with contextlib.suppress(ValueError):
                return path, _json(path / PROGRESS)
        damage.append(f"cannot resume from {path}: {reason or f'{PROGRESS} is corrupt'}")
    if damage:
        raise ValueError(f"{'; '.join(damage)}; {CORRUPT_REMEDY}")
    return None


def resolve(resume: str, folder: Path, accelerator: Accelerator) -> tuple[Path, list[str]]:
    """What `--resume latest|PATH` means: for `latest` the newest whole one, and what is wrong with newer ones.

    Those are renamed, so that they count neither for `keep` nor as the newest. All ranks call this and each hashes its
    part of the files. ValueError: see `candidates`, or none is whole.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    corrupt: list[tuple[Path, str]] = []
    for path in on_rank0(accelerator, lambda: candidates(resume, folder)):
        reasons = [reason for reason in gather_object([find_corruption(path, rank=rank, world=world)]) if reason]
        if not reasons:
            names = on_rank0(accelerator, lambda: [_quarantine(bad) for bad, _ in corrupt])
            return path, [f"{text}; renamed to {name}" for (_, text), name in zip(corrupt, names, strict=True)]
        corrupt.append((path, f"cannot resume from {path}: {reasons[0]}"))
    raise ValueError(f"{'; '.join(text for _, text in corrupt)}; {CORRUPT_REMEDY}")


def _quarantine(path: Path) -> str:
    target = path.with_name(f"{CORRUPT}{path.name}")
    with disk_errors(target):
        shutil.rmtree(target, ignore_errors=True)
        path.rename(target)
    return target.name


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
            raise ValueError(f"the checkpoint has optimizer state of {name}, which this model does not train")
        parameter = parameters[index[name]]
        if value.shape == parameter.shape:  # fused optimizers walk through memory: the layouts must be the same
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(index[name], {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_bytes()))


def _list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((path for path in folder.glob("step-*") if PATTERN.match(path.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
