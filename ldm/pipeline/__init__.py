"""Generating images: model folders, sampling, and PNGs with the record that reproduces them."""

from ldm.pipeline.pipeline import Pipeline

__all__ = ["Pipeline"]
