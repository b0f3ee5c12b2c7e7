"""Measure a model: its VAE, its images against real ones, whether prompts are followed, and what it memorized."""

from ldm.cli import command
from ldm.evaluation.evaluate import evaluate
from ldm.evaluation.subject import EvaluateConfig

main = command(EvaluateConfig, evaluate, __doc__)

if __name__ == "__main__":
    main()
