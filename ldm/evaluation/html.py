"""A Markdown page as one HTML file that needs nothing beside it."""

import base64
import html
import mimetypes
import re
from pathlib import Path

import markdown

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; }
th, td { padding: 0.25rem 1rem 0.25rem 0; border-bottom: 1px solid #8886; text-align: left; }
img { max-width: 100%; background: white; border-radius: 4px; }
"""


def to_html(text: str, folder: Path) -> str:
    """A page whose title is its first line; its images are read from `folder` and become data URIs."""
    title = html.escape(text.splitlines()[0].lstrip("# "))
    body = markdown.markdown(text, extensions=["tables"])
    body = re.sub(r'(?<= src=")[^"]+', lambda match: data_uri(folder / match[0]), body)
    head = f'<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n<title>{title}</title>'
    return f'<!doctype html>\n<html lang="en">\n{head}\n<style>{STYLE}</style>\n{body}\n</html>\n'


def data_uri(file: Path) -> str:
    """The content of a file as an address."""
    kind, _ = mimetypes.guess_type(file)
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
