"""A latent diffusion toolkit: train a text tower, a VAE and a U-Net from nothing, then generate from prompts."""

__version__ = "0.1.0"
