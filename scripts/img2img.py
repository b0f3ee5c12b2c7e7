"""Generate images from an image: change it, fill what a mask covers, or continue it beyond its edges."""

from ldm.cli import command
from ldm.pipeline.generate import Img2ImgConfig, generate

main = command(Img2ImgConfig, generate, __doc__)

if __name__ == "__main__":
    main()
