"""Launch a script as `accelerate launch` does, with its flags: `scripts/launch.py [FLAGS] scripts/train_vae.py ...`.

It also starts several ranks without a GPU (`--num_processes 2`), hands signals on to them, waits until they have saved,
and ends with their exit status.
"""

import sys

from ldm.cli import exit_on_user_error
from ldm.training.launch import launch


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    with exit_on_user_error():
        status = launch(sys.argv[1:] if argv is None else argv)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
