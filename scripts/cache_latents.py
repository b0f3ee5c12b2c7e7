"""Encode latents and token ids once, so that train_ldm needs neither images nor VAE; a second call continues."""

from collections.abc import Sequence

from ldm.cli import run
from ldm.stages.latents import CacheLatentsConfig, cache_latents


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    run(CacheLatentsConfig, cache_latents, argv, description=__doc__)


if __name__ == "__main__":
    main()
