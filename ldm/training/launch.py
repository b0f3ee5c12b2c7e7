"""What `accelerate launch` does, but it waits for a run that saves, and ends with the run's status and no traceback."""

import logging
import os
import signal
import subprocess
import sys
from contextlib import suppress
from types import FrameType

import psutil
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ldm.training.stop import STOP_SIGNALS


def launch(argv: list[str]) -> int:
    """Run the script of a command line of `accelerate launch`; returns its exit status, 128 + the signal that ended it.

    Without a GPU there are as many ranks on the CPU as `--num_processes` says. ValueError: flags that do not fit.
    """
    args = launch_command_parser().parse_args(argv)
    if args.cpu or not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "1"
        if (args.num_processes or 1) > 1:  # accelerate itself would start one
            args.cpu, args.multi_gpu = False, True
    args.signals_to_handle = "SIGHUP"  # torchrun ends ranks that still save after 30 s when it is told to stop
    for number in STOP_SIGNALS:
        signal.signal(number, _hand_on)
    logging.disable(logging.ERROR)  # the ranks have said what is wrong
    try:
        launch_command(args)
    except subprocess.CalledProcessError as error:
        return _status("the run", error.returncode)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _status(f"rank {rank}", failure.exitcode)
    return 0


def _hand_on(number: int, _: FrameType | None) -> None:
    """Signal the ranks and go on to wait; a terminal sends Ctrl-C to all processes of the launcher's group itself."""
    for rank in psutil.Process().children():
        with suppress(psutil.Error, OSError):  # it ended at this moment
            own_group = hasattr(os, "getpgid") and os.getpgid(rank.pid) != os.getpgrp()
            if number != signal.SIGINT or own_group:
                rank.send_signal(number)


def _status(name: str, code: int) -> int:
    """The exit status of a process; one that was killed could not say so itself."""
    if code >= 0:
        return code
    remedy = "restart with --resume latest, with less memory per rank if it was the system's memory that ran out"
    print(f"error: {name} was ended by {signal.Signals(-code).name}; {remedy}", file=sys.stderr)
    return 128 - code
