"""Stopping a run from outside, by a signal or a launcher that is gone: `Trainer.run` (trainer.py) polls and saves."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from ldm.training.distributed import has_launcher

STOPPED_FILE = "STOPPED"  # in the folder of a run that a signal ended, for schedulers: launchers change the exit code
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))


class StopRequest:
    """Whether any rank was asked to stop; all ranks see it after the same step.

    `accelerate launch` hands no signal on to a single process, which sees that its launcher is gone. A rank that does
    not answer within `timeout` seconds is an error.
    """

    def __init__(self, *, timeout: int) -> None:
        self.signal = 0  # that this rank got
        self._launcher = os.getppid() if has_launcher() else None
        self._pending: tuple[torch.Tensor, dist.Work] | None = None
        limit = timedelta(seconds=timeout)
        several = dist.is_initialized() and dist.get_world_size() > 1
        # On the CPU, so that no step waits for a device.
        self._group: Any = dist.new_group(backend="gloo", timeout=limit) if several else None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Turn Ctrl-C, and what schedulers announce the end with, into a request; a second stops without saving."""

        def request_stop(number: int, _: FrameType | None) -> None:
            if self.signal == signal.SIGINT == number:
                raise KeyboardInterrupt
            self.signal = number

        handlers = {number: signal.signal(number, request_stop) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def poll(self) -> int:
        """The signal that asked to stop, or 0; to be called by all ranks after each step.

        With several ranks the answer is that of one step ago, which has arrived by now, so that no rank waits for it.
        """
        own = self.signal or (int(signal.SIGTERM) if self._is_orphan() else 0)
        if self._group is None:
            return own
        requested = self.last_answer()
        flag = torch.tensor([own])
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._pending = flag, work
        return requested

    def _is_orphan(self) -> bool:
        """Whether the launcher is gone: its process has another parent then, but on Windows."""
        if sys.platform == "win32" and self._launcher is not None:
            import psutil

            return not psutil.pid_exists(self._launcher)
        return self._launcher not in (None, os.getppid())

    def last_answer(self) -> int:
        """The answer to the last poll with several ranks, which had not arrived then."""
        if self._pending is None:
            return 0
        flag, work = self._pending
        self._pending = None
        work.wait()
        return int(flag.item())
