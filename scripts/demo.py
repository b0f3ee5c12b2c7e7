"""Train all three stages on the shapes set and report the results; a second call continues or reuses what is there."""

from collections.abc import Sequence

from ldm.cli import run
from ldm.evaluation.demo import DemoConfig, run_demo


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    run(DemoConfig, run_demo, argv, description=__doc__)


if __name__ == "__main__":
    main()
