"""The tables of docs/, which benchmarks write between two comments."""

from collections.abc import Sequence
from pathlib import Path

from ldm.evaluation.report import markdown_table
from ldm.io.atomic import write_text

ROOT = Path(__file__).parents[1]
PERFORMANCE = ROOT / "docs/performance.md"


def write_table(name: str, head: Sequence[str], rows: Sequence[Sequence[object]], document: Path | None = None) -> None:
    """Print a table, and put it in the place of that between `<!-- NAME -->` and `<!-- end of NAME -->`.

    It is that of docs/performance.md where no other document is named.
    """
    document = document or PERFORMANCE
    table, begin, end = markdown_table(head, rows), f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    print(table)
    before, rest = document.read_text().split(begin)
    write_text(document, f"{before}{begin}\n{table}\n\n{end}{rest.split(end, 1)[1]}")
