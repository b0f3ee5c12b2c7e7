"""Measure a trained model on held-out data: the VAE's fidelity and, for shapes, whether prompts are followed."""

from ldm.cli import command
from ldm.evaluation.evaluate import EvaluateConfig, evaluate

main = command(EvaluateConfig, evaluate, __doc__)

if __name__ == "__main__":
    main()
