"""How many images go through a network at once where no gradient is needed, so that any number of them fits in memory.

It is not the free memory that decides, so that numbers do not depend on it.
"""

import math
from collections.abc import Sequence

VAE_PIXELS = 2**20  # 4 images of 512 x 512, which take 3 GiB in the VAE of Stable Diffusion, in float32
UNET_PIXELS = 2**22  # 16 of them, which take 4 GiB in its U-Net, twice each as guidance has them, in bf16


def images_at_once(sides: Sequence[int], pixels: int) -> int:
    """How many images of this height and width have at most so many pixels together; at least 1."""
    return max(1, pixels // math.prod(sides))
