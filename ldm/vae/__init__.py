"""The autoencoder between pixels and latents."""

from ldm.vae.model import VAE, Posterior, VAEConfig

__all__ = ["VAE", "Posterior", "VAEConfig"]
