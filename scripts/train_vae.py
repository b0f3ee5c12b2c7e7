"""Train the VAE that compresses images to latents, and measure the statistics of those latents."""

from collections.abc import Sequence
from functools import partial

from ldm.cli import run
from ldm.stages.vae import VAEStage
from ldm.training.trainer import train


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; a run that a signal stopped exits with 128 + its number."""
    result = run(VAEStage.Config, partial(train, VAEStage), argv, description=__doc__, default=VAEStage.default)
    if result.exit_status:
        raise SystemExit(result.exit_status)


if __name__ == "__main__":
    main()
