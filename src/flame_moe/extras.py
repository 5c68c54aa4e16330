"""Packages that only some users need: found when they are used, and told of by name when they are not there."""

from __future__ import annotations

import importlib
from typing import Any

from flame_moe.errors import ExtraMissingError


def needed(module: str, extra: str, purpose: str) -> Any:
    """A module of an optional package.

    Args:
        module: its name.
        extra: of flame-moe, that installs it.
        purpose: what needs it, the beginning of the message.

    Raises:
        ExtraMissingError: if it is not installed.

    Example:
        >>> needed("a_package_that_nobody_has", "text", "reading minds")
        Traceback (most recent call last):
        ...
        flame_moe.errors.ExtraMissingError: reading minds needs a_package_that_nobody_has, which is not installed. \
Install it with: pip install 'flame-moe[text]'
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        what = f"{purpose} needs {module.split('.')[0]}, which is not installed"
        raise ExtraMissingError(what, mend=f"Install it with: pip install 'flame-moe[{extra}]'") from None
