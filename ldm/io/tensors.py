"""A module's tensors and files of them: written, hashed, read back, checked, compared and copied to a device."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ldm.io.atomic import write_tensors
from ldm.io.pickles import is_pickle, read_pickle

INPUT_CONV = "conv_in.weight"  # (out, in, 3, 3); the U-Net's spatial condition has the last input channels


class NonFiniteError(ValueError):
    """Tensors hold NaN or infinite numbers."""


def save_weights(module: nn.Module, path: Path) -> str:
    """Write a module's weights atomically and return the file's SHA-256; NonFiniteError, with nothing written."""
    check_finite(module.state_dict(), path)
    write_tensors(path, module.state_dict())
    return sha256(path)


def weights_sha256(module: nn.Module) -> str:
    """What `save_weights` would return: it is the same for the same weights, whatever file they were read from."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    return hashlib.sha256(save(tensors)).hexdigest()


def read_tensors(path: Path, *, pickles: bool = False) -> dict[str, Tensor]:
    """The tensors of a safetensors file, and with `pickles` of a pickle; ValueError when it is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: the model folder is incomplete, copy it again")
    if is_pickle(path):
        if pickles:
            return read_pickle(path)
        raise ValueError(f"{path} is a pickle, which can hold code: convert it with `python scripts/convert.py`")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}): copy or download it again") from None


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill a module, which may be on the meta device, from a file; ValueError: see `load_strict`, or not finite."""
    tensors = read_tensors(path)
    check_finite(tensors, path)
    load_strict(module, tensors, path, assign=True)


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], where: Path, *, assign: bool = False) -> None:
    """Fill a module with copies of exactly these tensors, or with themselves; ValueError: see `check_shapes`."""
    expected = module.state_dict()
    check_shapes(tensors, expected, where)
    if bad := [n for n, t in tensors.items() if t.is_floating_point() != expected[n].is_floating_point()]:
        raise ValueError(f"{where}: {len(bad)} tensors have another kind of number, such as {bad[0]}: convert the file")
    tensors = {name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()}
    module.load_state_dict(tensors, assign=assign)


def check_shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: object) -> None:
    """ValueError names up to five tensors of `where` that are missing, unexpected or of another shape, with both."""
    wrong = [name for name in {**expected, **tensors} if _shape(expected, name) != _shape(tensors, name)]
    if wrong:
        named = ", ".join(f"{n} expected {_shape(expected, n)}, got {_shape(tensors, n)}" for n in wrong[:5])
        raise ValueError(f"{where} does not fit this network: {len(wrong)} tensors differ: {named}")


def check_finite(tensors: Mapping[str, Tensor], where: object) -> None:
    """NonFiniteError names up to five tensors of `where` that hold NaN or infinite numbers."""
    if bad := nonfinite(tensors):
        raise NonFiniteError(f"{where}: {len(bad)} tensors hold NaN or infinite numbers: {', '.join(bad[:5])}")


def nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that hold NaN or infinite numbers."""
    return [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]


def init_weights(module: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Start a module from the tensors of another model with the same names and shapes.

    Its input convolution may have more input channels than theirs: the last ones start at zero, so that a new spatial
    condition changes nothing at first (as Brooks et al. 2023, section 3.2). ValueError: any other difference.
    """
    conv, source = module.state_dict().get(INPUT_CONV), tensors.get(INPUT_CONV)
    if conv is not None and source is not None and source.ndim == 4 and (new := conv.shape[1] - source.shape[1]) > 0:
        tensors = {**tensors, INPUT_CONV: F.pad(source, (0, 0, 0, 0, 0, new))}
    load_strict(module, tensors, where)


def same_weights(one: object, other: object) -> bool:
    """Whether two networks, on whatever devices, have equal tensors; what is no network has none."""
    ours, theirs = (part.state_dict() if isinstance(part, nn.Module) else {} for part in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name].cpu(), theirs[name].cpu()) for name in ours)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; from the CPU to CUDA through pinned memory, so that nothing waits for the device."""
    if tensor.is_cpu and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def sha256(path: Path) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return str(tuple(tensors[name].shape)) if name in tensors else "none"
