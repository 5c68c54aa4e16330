"""What the pages share: templates with everything escaped, the style, pictures inlined."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from flame_moe.report.svg import Picture


def environment() -> Environment:
    """Templates of this room by file name."""
    made = Environment(
        loader=FunctionLoader(_text), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters["breakable"] = breakable
    return made


def style() -> Markup:
    """The style sheet, for a style element."""
    return Markup(_text("style.css"))


def inline(drawn: Mapping[str, Picture | None]) -> dict[str, dict[str, str] | None]:
    """Pictures as the macro `draw` takes them."""
    return {
        name: None if picture is None else {"svg": Markup(picture.svg), "caption": picture.caption}
        for name, picture in drawn.items()
    }


def breakable(text: str) -> Markup:
    """Escaped text whose long snake_case names may break after an underscore."""
    return Markup("_<wbr>").join(escape(part) for part in text.split("_"))


def _text(name: str) -> str:
    return files("flame_moe.report").joinpath(name).read_text(encoding="utf-8")
