"""Measure a trained model on held-out data: the VAE's fidelity and, for shapes, whether prompts are followed."""

from collections.abc import Sequence

from ldm.cli import run
from ldm.evaluation.evaluate import EvaluateConfig, evaluate


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    run(EvaluateConfig, evaluate, argv, description=__doc__)


if __name__ == "__main__":
    main()
