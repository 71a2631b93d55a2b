"""One HTML page with all that it needs inside: texts, tables, plots. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1100px; margin: 2em auto;
  padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.25em; margin-top: 2em; border-bottom: 1px solid #ddd; }
h3 { font-size: 1.05em; margin-bottom: 0.2em; }
p.note { color: #555; margin: 0.2em 0 0.6em; max-width: 75ch; }
pre { background: #f6f6f6; padding: 0.8em; overflow-x: auto; font-size: 13px; }
table { border-collapse: collapse; font-size: 13px; margin: 0.6em 0; }
th, td { padding: 0.2em 0.8em; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap; }
th { color: #555; font-weight: 600; } td:first-child, th:first-child { text-align: left; }
.wide { overflow-x: auto; } svg { max-width: 100%; height: auto; }
summary { cursor: pointer; color: #36c; } footer { color: #777; font-size: 12px; margin: 3em 0 1em; }
"""


def page(title: str, parts: Sequence[str], *, footer: str = "") -> str:
    """The whole page; ``parts`` are HTML, ``title`` and ``footer`` are text."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style>\n</head>\n<body>\n'
        f"<h1>{escape(title)}</h1>\n" + "\n".join(parts) + f"\n<footer>{escape(footer)}</footer>\n</body>\n</html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    """A heading."""
    return f"<h{level}>{escape(text)}</h{level}>"


def note(text: str) -> str:
    """A paragraph that says how to read what follows."""
    return f'<p class="note">{escape(text)}</p>'


def preformatted(text: str) -> str:
    """Text of a terminal."""
    return f"<pre>{escape(text)}</pre>"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of texts; floats get four figures, None is empty."""
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{escape(_cell(cell))}</td>" for cell in row) for row in rows]
    return '<div class="wide"><table>' + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def folded(title: str, content: str) -> str:
    """``content``, which is HTML, behind a line to click on."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
