"""Other people's file formats, and nothing else."""
