"""Convert a model from one format into another; both must generate the same image, or nothing is written."""

from ldm.cli import command
from ldm.pipeline.convert import ConvertConfig, convert

main = command(ConvertConfig, convert, __doc__)

if __name__ == "__main__":
    main()
