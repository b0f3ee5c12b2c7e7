"""Take twenty real steps of a training on this machine, with its configuration, and tell what they show.

The first word names the stage: clip, vae or ldm. Without it the name of the configuration file does, as in
configs/shapes/vae.yaml; else it is ldm. All other flags are those of scripts/train_STAGE.py.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from functools import partial

from ldm.cli import config_flag, exit_on_user_error, parse_cli
from ldm.planning.checks import DoctorCheck
from ldm.planning.doctor import run_doctor

STAGES = ("clip", "vae", "ldm")


def parse_stage(args: list[str]) -> tuple[str, list[str]]:
    """The stage that a command line names, and the flags that remain."""
    if args and args[0] in STAGES:
        return args[0], args[1:]
    file = config_flag(args)
    return (file.stem if file and file.stem in STAGES else "ldm"), args


def run_stage(stage: str, args: list[str]) -> list[DoctorCheck]:
    """Parse the flags of a training script, and let it run under the doctor's eyes, beside its own run."""
    script = importlib.import_module(f"train_{stage}")  # that one alone: train_clip takes seconds to import
    settings = getattr(script, f"Train{stage.upper()}")
    config = parse_cli(settings, args, default=script.DEFAULT, description=str(__doc__))
    found: list[DoctorCheck] = []
    with exit_on_user_error():
        run = config.run.resolve()
        beside = run.with_name(f".{run.name}-doctor")  # from where `latest` finds the stages before
        changed = {"run": beside, "trackers": (), "resume": None}
        script.train(config.model_copy(update=changed), fit=partial(run_doctor, found=found))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; the exit status is 1 when something is not well."""
    found = run_stage(*parse_stage(list(sys.argv[1:] if argv is None else argv)))
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(["", *(check.line() for check in found)]))
    if not all(check.ok for check in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
