"""One module for each kind of source: a subclass of `ImageTextSource` (base.py), chosen in ldm/data/dataset.py."""
