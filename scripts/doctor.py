"""Run twenty real steps of a training on this machine, with its configuration, and check them.

The first word names the stage: clip, vae or ldm. Without it the name of the configuration file does, as in
configs/shapes/vae.yaml; else it is ldm. All other flags are those of scripts/train_STAGE.py.
"""

import sys
from typing import Any

from accelerate import PartialState

from ldm.cli import exit_on_user_error, parse_cli
from ldm.planning.doctor import examine
from ldm.stages import STAGES, split_stage


def main(argv: list[str] | None = None) -> None:
    """Command line; the exit status is 1 when a check fails."""
    name, flags = split_stage(sys.argv[1:] if argv is None else argv)
    stage: Any = STAGES[name]
    config = parse_cli(stage.Config, flags, default=stage.default, description=str(__doc__))
    with exit_on_user_error():
        checks = examine(stage, config)
    PartialState().print("\n".join(["", *(check.line() for check in checks)]))
    if not all(check.ok for check in checks):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
