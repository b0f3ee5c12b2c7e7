"""Files: written whole or not at all, tensors checked when read, images of any metadata, model folders that explain themselves."""
