"""Runs the tiny chain on a system that is not there: `windows`, without what it lacks, or `apple`, on its GPU."""

import errno
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

MISSING = {os: ("fork", "getpgid", "getpgrp", "sched_getaffinity", "setpgrp", "sysconf"), signal: ("SIGUSR1",)}


def be_windows() -> None:
    """Take away what Windows lacks: functions, folders that can be opened, and a flush of what is open for reading."""
    import psutil  # noqa: F401  (whose module for this system needs some of it)

    sys.modules["resource"] = sys.modules["fcntl"] = None  # type: ignore[assignment]
    for module, names in MISSING.items():
        for name in names:
            delattr(module, name)
    readers: set[int] = set()
    os_open, os_fsync = os.open, os.fsync

    def open_file(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        descriptor = os_open(path, flags, *args, **kwargs)
        (readers.discard if flags & (os.O_WRONLY | os.O_RDWR) else readers.add)(descriptor)
        return descriptor

    def fsync(descriptor: int) -> None:
        if descriptor in readers:
            raise OSError(errno.EBADF, "Bad file descriptor")
        os_fsync(descriptor)

    os.open, os.fsync = open_file, fsync  # type: ignore[assignment]
    multiprocessing.set_start_method("spawn")


def run_chain(photos: Path, folder: Path, *, device: str) -> None:
    """Look at images, train all stages on them, cache latents and generate."""
    import cache_latents
    import check_data
    import txt2img
    from helpers import STAGE_NAMES, latent_flags, train

    source = ["--data.source", str(photos), "--data.max-unreadable", "0.5"]
    check_data.main([str(photos)])
    for stage in STAGE_NAMES:
        workers = ["--num-workers", "1"] if stage == "vae" and device == "cpu" else []
        train(stage, folder / stage, *source, *workers, "--steps", "2", "--sample-every", "1")
    cache_latents.main(["--out", str(folder / "latents"), *source, *latent_flags(folder)])
    preview = ["--preview", "--device", device, "--steps", "2"]
    txt2img.main(["a cat", "--model", str(folder / "ldm/model"), "--out", str(folder / "out"), *preview])


def look_ahead(photos: Path, folder: Path) -> None:
    """Plan for another machine, which takes no step, and examine a run."""
    import plan
    from helpers import examine_tiny

    plan.main(["--num-images", "100", "--size", "32", "--hours", "1", "--gpus", "0", "--memory-gib", "64"])
    assert examine_tiny("vae", folder / "vae", "--data.source", str(photos), "--data.max-unreadable", "0.5")


if __name__ == "__main__":
    system, photos, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if system == "windows":
        be_windows()
        run_chain(photos, folder, device="cpu")
        look_ahead(photos, folder)
    else:
        from pretend_mps import pretend_mps

        os.environ |= {"ACCELERATE_TORCH_DEVICE": "mps", "ACCELERATE_USE_CPU": "false"}
        with pretend_mps():
            run_chain(photos, folder, device="mps")
