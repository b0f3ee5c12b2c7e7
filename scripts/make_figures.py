"""Draw the figures of the documentation with a trained model."""

from ldm.cli import command
from ldm.evaluation.figures import FiguresConfig, make_figures

main = command(FiguresConfig, make_figures, __doc__)

if __name__ == "__main__":
    main()
