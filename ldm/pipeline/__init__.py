"""Generating images: model folders, sampling, and PNGs with the record that reproduces them."""

from ldm.interop.components import ModelComponents
from ldm.pipeline.pipeline import Pipeline

__all__ = ["ModelComponents", "Pipeline"]
