"""Tensors of pickles are read, and nothing that is in them runs."""

import io
import itertools
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same, save_lightning
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.io.pickles import read_pickle
from ldm.io.tensors import read_tensors


def state_dict() -> dict[str, Tensor]:
    """Tensors of several types and layouts, of which some share a storage."""
    base = torch.arange(24.0)
    state = OrderedDict(
        matrix=base.view(4, 6), part=base[4:8], transposed=base.view(4, 6).T, scalar=torch.tensor(3), half=base.half(),
        empty=torch.empty(0, 2), brain=base.bfloat16(), flags=base > 3, parameter=nn.Parameter(base + 1).data,
        double=base.double(), channels_last=base.view(1, 2, 3, 4).to(memory_format=torch.channels_last),
    )  # fmt: skip
    state._metadata = OrderedDict(version=1)  # type: ignore[attr-defined]  # as the state_dict of a module has
    return state


@pytest.mark.parametrize("options", [{}, {"pickle_protocol": 5}, {"_use_new_zipfile_serialization": False}])
def test_tensors_are_read_and_what_is_unknown_is_counted(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_lightning(state_dict(), tmp_path / "a.ckpt", **options)
    found = read_pickle(tmp_path / "a.ckpt")
    assert_same(found, state_dict())
    assert all(found[name].dtype == tensor.dtype for name, tensor in state_dict().items())
    assert "objects that are no tensors are left out" in caplog.text and "helpers.Foreign (1)" in caplog.text
    caplog.clear()
    torch.save(state_dict(), tmp_path / "b.pt", **options)  # without anything around, and nothing that is unknown
    assert_same(read_pickle(tmp_path / "b.pt"), state_dict())
    assert not caplog.text


class Call:
    """Pickled as the call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_in_a_pickle_runs(legacy: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Calls, states, keys and subclasses are inert; weights among them are read."""
    ran = tmp_path / "ran"
    calls = [Call(Path.touch, ran), Call(os.system, f"touch {ran}"), Call(exec, f"open({str(ran)!r}, 'w')")]
    content = {
        "state_dict": {"a": torch.ones(2), "b": calls[0]},
        "x": calls,
        "net": nn.Linear(1, 1),
        tmp_path: {1, 2, frozenset([3])},
        "sparse": torch.eye(2).to_sparse(),
    }
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=not legacy, pickle_protocol=4)
    assert_same(read_pickle(tmp_path / "a.ckpt"), {"a": torch.ones(2)})
    assert "objects that are no tensors are left out" in caplog.text
    torch.save(calls[0], tmp_path / "b.ckpt")
    (tmp_path / "c.ckpt").write_bytes(pickle.dumps({"state_dict": {"x": calls[1]}}))
    touch = f"cbuiltins\ngetattr\n(cos\npath\nVsystem\ntR(Vtouch {ran}\ntR(Vx\nVy\ndb.".encode()
    archive(tmp_path / "d.ckpt", touch, {})  # the result of a call is called, and given a state
    for name in ("b.ckpt", "c.ckpt", "d.ckpt"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read without running its code, .*use a safetensors"):
            read_pickle(tmp_path / name)
    assert not ran.exists()


def archive(path: Path, content: Any, storages: dict[str, bytes], *, compression: int = zipfile.ZIP_STORED) -> Path:
    """A file as torch.save writes it, of bytes that it would not write."""
    data = content if isinstance(content, bytes) else pickle.dumps(content, 2)
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, part in ({"data.pkl": data} | {f"data/{key}": part for key, part in storages.items()}).items():
            file.writestr(f"archive/{name}", part)
    return path


def tensor_pickle(size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """The pickle of {"x": a float32 tensor of storage 0}, of this size and stride."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", 4) if isinstance(obj, Storage) else None

    buffer = io.BytesIO()
    rebuild = Call(torch._utils._rebuild_tensor_v2, Storage(), 0, size, stride, False, OrderedDict())
    Pickler(buffer, 2).dump({"x": rebuild})
    return buffer.getvalue()


def test_files_that_lie_are_refused_in_one_line(tmp_path: Path) -> None:
    """Of sizes, of storages, of what they are; none takes memory for what it has not."""
    four = {"0": struct.pack("<4f", 1, 2, 3, 4)}
    assert_same(
        read_pickle(archive(tmp_path / "good.ckpt", tensor_pickle((2, 2), (2, 1)), four)),
        {"x": torch.tensor([[1.0, 2.0], [3.0, 4.0]])},
    )
    bad = tmp_path / "bad.ckpt"
    files = [
        archive(bad, tensor_pickle((10**6, 10**6), (0, 0)), four).read_bytes(),
        archive(bad, tensor_pickle((10**12,), (1,)), four).read_bytes(),
        archive(bad, tensor_pickle((2, 2), (3, 3)), four).read_bytes(),
        archive(bad, tensor_pickle((4,), (1,)), {}).read_bytes(),
        archive(bad, tensor_pickle((4,), (1,)), {"0": bytes(10**6)}, compression=zipfile.ZIP_DEFLATED).read_bytes(),
        archive(bad, b"\x80\x02r\xff\xff\xff\xff.", {}).read_bytes(),
        archive(bad, b"\x80\x05\x96" + struct.pack("<Q", 2**62), {}).read_bytes(),
        archive(bad, b"\x80\x04\x8e" + b"\xff" * 8, {}).read_bytes(),
        archive(tmp_path / "good.ckpt", tensor_pickle((4,), (1,)), four).read_bytes()[:-30],
        b"",
        b"\x80",
        b"<!DOCTYPE html>",
        os.urandom(500),
        pickle.dumps([1]),
    ]
    for content in files:
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.ckpt cannot be .* or is damaged \(.*\): copy") as error:
            read_pickle(bad)
        assert "\n" not in str(error.value)


def test_weights_under_another_key_are_not_taken_for_none(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(1)}, "step": 3}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt cannot be read .*\(no tensors below its keys: model, step\)"):
        read_pickle(tmp_path / "a.pt")


def test_a_file_is_what_it_begins_with(tmp_path: Path) -> None:
    """Safetensors named .ckpt are read as such, and a pickle is one by any name."""
    save_file({"a": torch.ones(1)}, tmp_path / "a.ckpt")
    assert_same(read_tensors(tmp_path / "a.ckpt"), {"a": torch.ones(1)})
    for name, is_zip in itertools.product(
        ("b.ckpt", "b.CKPT", "b.pt", "b.Pth", "b.bin", "b.safetensors"), (True, False)
    ):
        torch.save({"a": torch.ones(1)}, tmp_path / name, _use_new_zipfile_serialization=is_zip)
        if is_zip or name != "b.safetensors":
            with pytest.raises(ValueError, match=rf"{name} is a pickle, which can hold code"):
                read_tensors(tmp_path / name)
            assert_same(read_tensors(tmp_path / name, pickles=True), {"a": torch.ones(1)})
