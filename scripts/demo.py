"""Train all three stages on the characters set and report the results; a second call continues or reuses what is there."""

from ldm.cli import command
from ldm.evaluation.demo import DemoConfig, run_demo

main = command(DemoConfig, run_demo, __doc__)

if __name__ == "__main__":
    main()
