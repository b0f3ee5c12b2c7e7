"""Run twenty real steps of a training on this machine, with its configuration, and check them.

The first word names the stage: clip, vae or ldm. Without it the name of the configuration file does, as in
configs/shapes/vae.yaml; else it is ldm. All other flags are those of scripts/train_STAGE.py.
"""

import os
import sys
from collections.abc import Sequence
from functools import partial

from ldm.cli import command
from ldm.planning.doctor import examine
from ldm.stages import STAGES, split_stage
from ldm.training.trainer import Buildable, Config


def check(stage: Buildable[Config], config: Config) -> None:
    """Print what was checked; the exit status is 1 when a check fails."""
    checks = examine(stage, config)
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(["", *(check.line() for check in checks)]))
    if not all(check.ok for check in checks):
        raise SystemExit(1)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    name, flags = split_stage(list(sys.argv[1:] if argv is None else argv))
    stage = STAGES[name]
    command(stage.Config, partial(check, stage), __doc__, default=stage.default)(flags)


if __name__ == "__main__":
    main()
