"""Choose a recipe for some images, a machine and some hours, and print batch, memory, time and the commands.

Memory comes from a dry run of each stage; times from a few real steps on this machine, or from --tflops.
"""

from ldm.cli import command
from ldm.planning.report import PlanConfig, make_plan


def show(config: PlanConfig) -> None:
    """Print the plan."""
    print("\n".join(make_plan(config)))


main = command(PlanConfig, show, __doc__)

if __name__ == "__main__":
    main()
