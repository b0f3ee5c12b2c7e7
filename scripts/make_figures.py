"""Draw the figures of the documentation with a trained model."""

from collections.abc import Sequence

from ldm.cli import run
from ldm.evaluation.figures import FiguresConfig, make_figures


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    run(FiguresConfig, make_figures, argv, description=__doc__)


if __name__ == "__main__":
    main()
