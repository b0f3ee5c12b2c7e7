"""Memory of a machine and of this process, a clock, and numbers as people read them."""

import os
import resource
import sys
import time
from pathlib import Path

import torch

GIB = 2**30
CGROUP_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container


def total_memory(device: torch.device) -> int:
    """Bytes of a GPU, or of the machine: what its container may use, where there is one."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CGROUP_MEMORY_LIMIT.read_text().strip() if CGROUP_MEMORY_LIMIT.is_file() else ""
    return min(total, int(limit)) if limit.isdigit() else total


def peak_memory(device: torch.device) -> int:
    """Largest number of bytes that this process had on a GPU, or resident."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss(resource.RUSAGE_SELF)


def peak_rss(who: int) -> int:
    """Largest resident memory, in bytes, of this process or of its children, as `resource` names them."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(who).ru_maxrss * unit


def clock() -> float:
    """Seconds, for differences; waits until the GPU has finished what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
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
