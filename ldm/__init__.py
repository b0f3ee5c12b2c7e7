"""A latent diffusion toolkit: train a text tower, a VAE and a U-Net from nothing, then generate from prompts."""

import os
import sys

__version__ = "0.1.0"

# Threads that wait for others spin 300,000 times before they sleep where torch uses libgomp. Beside other busy
# processes that takes the cores from those they wait for (benchmarks/spinning.py). It is read once, as torch is loaded.
if sys.platform == "linux" and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
