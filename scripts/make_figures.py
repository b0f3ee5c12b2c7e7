"""Draw the figures of the documentation with a trained model."""

from ldm.cli import command
from ldm.config import CONFIGS
from ldm.evaluation.figures import FiguresConfig, make_figures

main = command(FiguresConfig, make_figures, __doc__, default=CONFIGS / "characters/figures.yaml")

if __name__ == "__main__":
    main()
