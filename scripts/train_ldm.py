"""Train the U-Net on noised latents (or pixels) under frozen text embeddings."""

from collections.abc import Sequence
from functools import partial

from ldm.cli import run
from ldm.stages.diffusion import DiffusionStage
from ldm.training.trainer import train


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; a run that a signal stopped exits with 128 + its number."""
    result = run(
        DiffusionStage.Config, partial(train, DiffusionStage), argv, description=__doc__, default=DiffusionStage.default
    )
    if result.exit_status:
        raise SystemExit(result.exit_status)


if __name__ == "__main__":
    main()
