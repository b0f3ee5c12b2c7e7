"""Memory of a machine and of this process, a clock, and numbers as people read them."""

import os
import sys
import time
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

GIB = 2**30
CGROUP_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container


def total_memory(device: torch.device) -> int:
    """Bytes of a GPU, or of the machine: what its container may use, where there is one."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if hasattr(os, "sysconf"):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        import psutil

        total = psutil.virtual_memory().total
    limit = CGROUP_MEMORY_LIMIT.read_text().strip() if CGROUP_MEMORY_LIMIT.is_file() else ""
    return min(total, int(limit)) if limit.isdigit() else total


def peak_memory(device: torch.device) -> int:
    """Largest number of bytes that this process had on a GPU, or resident."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss()


def peak_rss(*, children: bool = False) -> int:
    """Largest resident memory of this process, or of its children, in bytes; 0 where the system does not report it."""
    if resource is None:
        try:
            import psutil
        except ImportError:  # on other systems it needs `resource` itself
            return 0
        return 0 if children else getattr(psutil.Process().memory_info(), "peak_wset", 0)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF).ru_maxrss * unit


def clock() -> float:
    """Seconds, for differences; waits until the GPU has finished what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()
    return time.perf_counter()


def format_bytes(count: float) -> str:
    """A number of bytes as people read it."""
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{count / 2**20:,.1f} MiB"


def format_duration(seconds: float) -> str:
    """A duration as people read it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min"
