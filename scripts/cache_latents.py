"""Encode latents and token ids once, so that train_ldm needs neither images nor VAE; a second call continues."""

from ldm.cli import command
from ldm.stages.latents import CacheLatentsConfig, cache_latents

main = command(CacheLatentsConfig, cache_latents, __doc__)

if __name__ == "__main__":
    main()
