"""The training loop and what it keeps; it knows no model."""
