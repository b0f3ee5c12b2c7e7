"""Generate images from prompts: numbered PNGs, each with what is needed to generate it again, and a grid."""

from ldm.cli import command
from ldm.pipeline.generate import Txt2ImgConfig, generate

main = command(Txt2ImgConfig, generate, __doc__)

if __name__ == "__main__":
    main()
