"""Of MkDocs: docstrings name others by Sphinx's roles, of which the site shows the name alone."""

import re
from typing import Any

ROLE = re.compile(r":(?:py:)?(?:func|class|meth|attr|data|mod|exc|obj):<code>[~.]?([^<]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """The HTML of a page, without the roles."""
    return ROLE.sub(r"<code>\1</code>", html)
