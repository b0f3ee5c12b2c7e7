"""Where images and captions come from: one module for each kind of source."""
