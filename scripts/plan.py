"""Choose a recipe for some images, a machine and some hours, and print batch, memory, time and the commands.

Memory comes from a dry run of each stage; times from a few real steps on this machine, or from --tflops.
"""

from ldm.cli import command
from ldm.planning.report import PlanConfig, make_plan

main = command(PlanConfig, lambda config: print("\n".join(make_plan(config))), __doc__)

if __name__ == "__main__":
    main()
