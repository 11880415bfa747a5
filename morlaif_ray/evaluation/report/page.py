"""Sections to one HTML file.

Contract: the page asks nothing of the network (its Content-Security-Policy forbids it), runs no script, and shows model
text as text: autoescape is on for every value, and nothing is marked as safe.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"


def render(values: dict[str, Any]) -> str:
    """The page as text. An undefined name in the template is our bug and raises."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html.j2").render(values)
