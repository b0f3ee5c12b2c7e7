"""Files: written whole or not at all, tensors checked when read, model folders that explain themselves."""
