"""Run twenty real steps of a training on this machine, with its configuration, and check them.

The first word names the stage: clip, vae or ldm. Without it the configuration file does, as configs/shapes/vae.yaml;
else it is ldm. All other flags are those of scripts/train_STAGE.py.
"""

import os
import sys
from typing import Any

from ldm.cli import command
from ldm.planning.doctor import examine
from ldm.stages import split_stage


def main(argv: list[str] | None = None) -> None:
    """Command line; the exit status is 1 when a check fails."""
    stage, flags = split_stage(sys.argv[1:] if argv is None else argv)

    def check(config: Any) -> int:
        checks = examine(stage, config)
        if os.environ.get("RANK", "0") == "0":
            print("\n".join(["", *(check.line() for check in checks)]))
        return int(not all(check.ok for check in checks))

    command(stage.Config, check, __doc__, default=stage.default)(flags)


if __name__ == "__main__":
    main()
