"""A module's tensors and files of them: written, hashed, read back and checked."""

import hashlib
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.io.atomic import write_tensors


def save_weights(module: nn.Module, path: Path) -> str:
    """Write a module's weights whole and return the file's SHA-256."""
    write_tensors(path, module.state_dict())
    return sha256(path)


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill a module, which may be on the meta device, from a file; ValueError names what does not fit."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: the model folder is not whole, copy it again")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again") from None
    own = module.state_dict()
    bad = [n for n, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    bad += [n for n, t in tensors.items() if n in own and t.is_floating_point() != own[n].is_floating_point()]
    if bad:
        raise ValueError(f"{path} holds {len(bad)} tensors with NaN, infinite or no real numbers: {', '.join(bad[:5])}")
    tensors = {name: tensor.to(own[name].dtype) if name in own else tensor for name, tensor in tensors.items()}
    load_strict(module, tensors, path, assign=True)


def load_strict(module: nn.Module, tensors: dict[str, Tensor], source: Path, *, assign: bool = False) -> None:
    """Give a module exactly these tensors; with `assign` they become its own instead of being copied.

    ValueError names the tensors that are missing, foreign or of another shape.
    """
    own = module.state_dict()
    wrong = sorted(own.keys() ^ tensors.keys()) or [n for n in own if own[n].shape != tensors[n].shape]
    if wrong:
        raise ValueError(
            f"{source} holds another model: {len(wrong)} tensors differ, among them {', '.join(wrong[:5])}"
        )
    module.load_state_dict(tensors, assign=assign)


def sha256(path: Path) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
