"""The mathematics of diffusion: tensors and callables only."""
