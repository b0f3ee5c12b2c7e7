"""A GPU that is not there: tensors that say cuda:0 and compute on the CPU, and fail where devices are mixed.

What would make the host wait for the GPU is counted, with the line of ldm that does it.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from ldm.config import CONFIGS

GPU = torch.device("cuda:0")
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)  # what may have tensors of two devices
INDEXING = (aten.index.Tensor, aten.index_put_.default)  # what takes indices on the CPU
READ_BACK = (aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default,
             aten._unique2.default, aten.bincount.default, aten.repeat_interleave.Tensor)  # fmt: skip
PACKAGE = str(CONFIGS.with_name("ldm"))

waits: Counter[str] = Counter()  # of the host for the GPU, since they were last cleared: by the kind and its line


class OnGPU(Tensor):
    """Wraps a CPU tensor. To C++ it is one, so that autograd asks no driver; to Python it is on the GPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnGPU":
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        tensor: OnGPU = Tensor._make_wrapper_subclass(cls, inner.size(), device="cpu", **layout)
        tensor.inner = inner
        return tensor

    def __init__(self, inner: Tensor) -> None:
        pass

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The few attributes and methods that C++ would answer for the CPU."""
        own = isinstance(args[0] if args else None, OnGPU)
        if own and getattr(func, "__self__", None) in (Tensor.device, Tensor.is_cuda, Tensor.is_cpu):
            return {Tensor.device: GPU, Tensor.is_cuda: True, Tensor.is_cpu: False}[func.__self__]
        if own and func in (Tensor.numpy, Tensor.__array__):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if own and func is Tensor.tolist:
            _count_wait("tolist")
            return args[0].inner.tolist()
        if own and func is Tensor.cpu:
            return aten._to_copy(args[0], device=torch.device("cpu"))
        if func is Tensor.to:
            return _moved(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _moved(tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
    """`Tensor.to`, for a target on either device."""
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    device, dtype = device or tensor.device, dtype or tensor.dtype
    if (device.type, dtype, copy) == (tensor.device.type, tensor.dtype, False):
        return tensor
    return aten._to_copy(tensor, device=device, dtype=dtype, non_blocking=non_blocking)


class Mode(TorchDispatchMode):
    """Sees what makes a tensor on the GPU from none that is there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the CPU whose result is on the GPU where its tensors, or the wanted device, are."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_gpu = [isinstance(tensor, OnGPU) for tensor in tensors]
    wanted = kwargs.get("device")
    backward = torch._C._current_graph_task_id() != -1  # in C++, where all is on the CPU
    to_gpu = any(on_gpu) if wanted is None or backward else torch.device(wanted).type == "cuda"
    pinned = kwargs.get("pin_memory")
    kwargs = {**kwargs, "pin_memory": False} if pinned else kwargs
    if not any(on_gpu) and not to_gpu:
        out = func(*args, **kwargs)
        return _pin(out) if pinned else out
    if not backward:
        _find_wait(func, args, kwargs, to_gpu=to_gpu)
    if func in INDEXING:
        tensors, on_gpu = tensors[:1], on_gpu[:1]
    on_cpu = [tuple(tensor.shape) for tensor, gpu in zip(tensors, on_gpu, strict=True) if not gpu and tensor.ndim]
    if on_cpu and any(on_gpu) and func not in COPIES and not backward:
        raise RuntimeError(f"Expected all tensors to be on the same device, found cuda:0 and cpu {on_cpu} ({func})")
    to_gpu = isinstance(args[0], OnGPU) if func is aten.copy_.default else to_gpu
    inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
    if wanted is not None:
        inner_kwargs["device"] = torch.device("cpu")
    out = func(*inner_args, **inner_kwargs)
    if func is aten._to_copy.default and out is inner_args[0]:
        out = out.clone()
    if not to_gpu:
        return args[0] if func is aten.copy_.default else out
    return return_and_correct_aliasing(func, args, kwargs, tree_map(_wrapped, out))


def _find_wait(func: Any, args: Any, kwargs: dict[str, Any], *, to_gpu: bool) -> None:
    """Count an operation for which the host must wait: what reads the GPU, and copies but from pinned memory."""
    name = func.overloadpacket.__name__
    if func in READ_BACK:
        _count_wait(name)
    elif func in INDEXING:
        indices = [index for index in args[1] if isinstance(index, Tensor)]
        if any(not isinstance(index, OnGPU) or index.dtype == torch.bool for index in indices):
            _count_wait("index of the CPU, or of a mask")
    elif func in COPIES:
        source, target = (args[1], isinstance(args[0], OnGPU)) if func is aten.copy_.default else (args[0], to_gpu)
        non_blocking = kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2])
        waits_for_copy = not non_blocking or (target and not getattr(source, "is_pretended_pinned", False))
        if isinstance(source, OnGPU) != target and waits_for_copy:
            _count_wait("copy to the GPU" if target else "copy to the CPU")


def _count_wait(kind: str) -> None:
    """With the innermost line of the package."""
    frame = sys._getframe(1)
    while frame.f_back and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    waits[f"{kind}: {frame.f_code.co_filename.removeprefix(PACKAGE)[1:]}:{frame.f_lineno}"] += 1


def _pin(tensor: Tensor) -> Tensor:
    tensor.is_pretended_pinned = True  # type: ignore[attr-defined]
    return tensor


def _inner(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, OnGPU) else leaf


def _wrapped(leaf: Any) -> Any:
    return OnGPU(leaf) if isinstance(leaf, Tensor) and not isinstance(leaf, OnGPU) else leaf


@contextmanager
def pretend_gpu() -> Iterator[torch.device]:
    """The device, within which `.to`, factories and modules know it."""
    lifted = torch._C._only_lift_cpu_tensors()
    replace = torch.__future__.get_overwrite_module_params_on_conversion()
    with ExitStack() as stack:
        stack.enter_context(mock.patch("torch.cuda._lazy_init", lambda: None))
        stack.enter_context(mock.patch("torch.Tensor.pin_memory", lambda tensor: _pin(tensor.clone())))
        torch._C._ensureCUDADeviceGuardSet()
        torch._C._set_only_lift_cpu_tensors(True)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.enter_context(Mode())
        try:
            yield GPU
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(replace)
            torch._C._set_only_lift_cpu_tensors(lifted)
