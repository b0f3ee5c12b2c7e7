"""Tensors of a PyTorch pickle (.ckpt, .pt, .pth, .bin), read without running anything that is in it."""

import io
import logging
import math
import pickle
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
ZIP_MAGIC, LEGACY_MAGIC = b"PK\x03\x04", 0x1950A86A20F9469CFC6C  # of torch.save since version 1.6, and before
DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "storage.UntypedStorage": torch.uint8,  # whose tensors name their own type
}
ReadStorage = Callable[[str], bytearray]


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle: by what it begins with, or by its name, where it is no safetensors file either."""
    with path.open("rb") as file:
        head = file.read(9)
    return head[:4] == ZIP_MAGIC or (path.suffix.lower() in SUFFIXES and head[8:] != b"{")


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file's `state_dict`, or of its dictionary; what is neither is left out, and counted in the log.

    Names of classes and functions become objects that do nothing, so no code of the file runs. ValueError: damaged, no
    file of torch.save, or nothing but such objects.
    """
    try:
        with path.open("rb") as file:
            open_pickle = _open_zip if zipfile.is_zipfile(file) else _open_legacy
            unpickler, content, read_storage = open_pickle(file, path.stat().st_size)
            state = content.get("state_dict", content) if isinstance(content, dict) else {}
            items = state.items() if isinstance(state, dict) else ()
            read_once = lru_cache(1)(read_storage)  # neighbours can be views of one storage
            tensors = {str(name): item.load(read_once) for name, item in items if isinstance(item, _StoredTensor)}
    except Exception as error:  # a damaged or hostile file can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise _unreadable(path, reason) from None
    inert = unpickler.counts
    names = ", ".join(f"{name} ({count})" for name, count in inert.most_common(5))
    if not tensors:
        keys = ", ".join(str(name)[:50] for name, _ in [*items][:5])
        raise _unreadable(path, f"no tensors, but objects: {names}" if names else f"no tensors below its keys: {keys}")
    if inert:
        log.warning("%s: %d objects that are no tensors are left out: %s", path, inert.total(), names)
    return tensors


def _unreadable(path: Path, reason: str) -> ValueError:
    remedy = "copy or download it again, or use a safetensors file"
    return ValueError(f"{path} cannot be read without running its code, or is damaged ({reason}): {remedy}")


class _StoredTensor(NamedTuple):
    """Where a tensor lies in a file."""

    dtype: torch.dtype
    storage: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def load(self, read_storage: ReadStorage) -> Tensor:
        count = math.prod(self.size)
        if count == 0:
            return torch.zeros(self.size, dtype=self.dtype)
        values = torch.frombuffer(read_storage(self.storage), dtype=self.dtype)
        if count > len(values):  # one number that is expanded to billions
            raise ValueError(f"a tensor of {count:,} numbers where the file has {len(values):,}")
        return values.as_strided(self.size, self.stride, self.offset).clone()


class _Inert(dict[Any, Any]):
    """An object of an unknown class, or the result of an unknown function: takes whatever a pickle does to it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def ignore(self, *args: Any) -> None:
        """Does nothing."""

    __setstate__ = append = extend = add = ignore

    def __call__(self, *args: Any, **kwargs: Any) -> "_Inert":
        return self

    __hash__ = object.__hash__  # type: ignore[assignment]  # it may be a key
    __eq__ = object.__eq__


class _Unpickler(pickle._Unpickler):
    """Builds plain values, `_StoredTensor` and `_Inert` alone.

    It is Python's own in Python: the one in C reserves memory for any number that a file names.
    """

    def load_bytearray8(self) -> None:
        """Take as many bytes as there are, and reserve no more."""
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))  # type: ignore[attr-defined]

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: load_bytearray8}

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="latin1")
        self.counts: Counter[str] = Counter()  # of inert objects, by the name of their class
        self.dtypes: dict[str, torch.dtype] = {}  # of the storages
        self.inert: dict[str, type[_Inert]] = {}
        self.known: dict[str, Any] = {
            "collections.OrderedDict": OrderedDict,
            "torch._utils._rebuild_tensor": self.rebuild,
            "torch._utils._rebuild_tensor_v2": self.rebuild,
            "torch._utils._rebuild_tensor_v3": self.rebuild_typed,
            "torch._utils._rebuild_parameter": self.first,
            "torch._utils._rebuild_parameter_with_state": self.first,
            **{f"torch.{name}": dtype for name, dtype in DTYPES.items()},
            **{str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
        }

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the file stands for."""
        full = f"{module}.{name}".replace("torch.cuda.", "torch.")
        return self.known[full] if full in self.known else self.inert.setdefault(full, self.inert_class(full))

    def inert_class(self, name: str) -> type[_Inert]:
        """A class of its own, so that nothing that is set on it lasts."""
        counts = self.counts

        class Inert(_Inert):
            def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
                counts[name] += 1
                return super().__new__(cls)

        return Inert

    def persistent_load(self, pid: Any) -> Any:
        """The key of a storage: ("storage", dtype, key, device, count), in legacy files with a view at its end."""
        kind, dtype, key, *rest = pid
        if kind == "module":  # a class with its source
            return dtype
        if kind != "storage" or rest[2:] not in ([], [None]):
            raise pickle.UnpicklingError(f"unknown storage {key}")
        self.dtypes[key] = dtype if isinstance(dtype, torch.dtype) else torch.uint8
        return key if isinstance(dtype, torch.dtype) else dtype()

    def rebuild(self, storage: Any, offset: int, size: Any, stride: Any, *rest: Any) -> Any:
        """In the place of torch._utils._rebuild_tensor_v2; the storage itself where it is inert."""
        if not isinstance(storage, str):
            return storage
        return _StoredTensor(self.dtypes[storage], storage, offset, tuple(size), tuple(stride))

    def rebuild_typed(self, *args: Any) -> Any:
        """In the place of torch._utils._rebuild_tensor_v3, which adds a flag, hooks and the type."""
        tensor = self.rebuild(*args[:4])
        return tensor._replace(dtype=args[6]) if isinstance(tensor, _StoredTensor) else tensor

    def first(self, tensor: Any, *rest: Any) -> Any:
        """A parameter is its tensor."""
        return tensor


def _open_zip(file: BinaryIO, length: int) -> tuple[_Unpickler, Any, ReadStorage]:
    archive = zipfile.ZipFile(file)
    roots = [name.removesuffix("data.pkl") for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
    if not roots:
        raise ValueError("not a file of torch.save")

    def read(name: str) -> bytes:
        if archive.getinfo(roots[0] + name).file_size > length:  # torch.save does not compress
            raise ValueError(f"{name} is larger than the file")
        return archive.read(roots[0] + name)

    unpickler = _Unpickler(io.BytesIO(read("data.pkl")))
    return unpickler, unpickler.load(), lambda key: bytearray(read(f"data/{key}"))


def _open_legacy(file: BinaryIO, length: int) -> tuple[_Unpickler, Any, ReadStorage]:
    """Pickles of a magic number, a version, the system, the content and the keys of storages, then their bytes."""
    file.seek(0)
    if _Unpickler(file).load() != LEGACY_MAGIC:
        raise ValueError("not a file of torch.save")
    for _ in ("version", "system"):
        _Unpickler(file).load()
    unpickler, places = _Unpickler(file), {}
    content = unpickler.load()
    for key in _Unpickler(file).load():
        size = int.from_bytes(file.read(8), "little") * unpickler.dtypes[key].itemsize
        places[key] = file.tell(), size
        if file.seek(size, io.SEEK_CUR) > length:
            raise ValueError(f"storage {key} ends after the file")

    def read(key: str) -> bytearray:
        start, size = places[key]
        file.seek(start)
        return bytearray(file.read(size))

    return unpickler, content, read
