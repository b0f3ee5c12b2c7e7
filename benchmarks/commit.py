"""Which commit of this repository a benchmark measured."""

import subprocess
from pathlib import Path


def commit() -> str:
    """The short hash of the commit that is checked out; "" outside a repository."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
