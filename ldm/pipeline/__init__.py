"""Generating images: from a prompt to a PNG that says how it was made."""

from ldm.pipeline.pipeline import Pipeline

__all__ = ["Pipeline"]
