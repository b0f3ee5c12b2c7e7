"""Choose a recipe for some images, a machine and some hours, and print batch, memory, time and the commands.

Memory comes from a dry run of each stage; times from a few real steps on this machine, or from --tflops.
"""

from collections.abc import Sequence

from ldm.cli import run
from ldm.planning.report import PlanConfig, make_plan


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    print("\n".join(run(PlanConfig, make_plan, argv, description=__doc__)))


if __name__ == "__main__":
    main()
