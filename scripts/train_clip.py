"""Train a small OpenCLIP from nothing on the images and captions of a data set."""

from collections.abc import Sequence
from functools import partial

from ldm.cli import run
from ldm.stages.clip import CLIPStage
from ldm.training.trainer import train


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; a run that a signal stopped exits with 128 + its number."""
    result = run(CLIPStage.Config, partial(train, CLIPStage), argv, description=__doc__, default=CLIPStage.default)
    if result.exit_status:
        raise SystemExit(result.exit_status)


if __name__ == "__main__":
    main()
