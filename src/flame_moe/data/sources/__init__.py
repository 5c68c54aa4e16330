"""The registry of sources: one line per source, imported only when it is asked for."""

from __future__ import annotations

import importlib
from typing import Any

from flame_moe.data.sources.base import Source, SplitSpec
from flame_moe.errors import DataError, nearest

__all__ = ["Source", "SplitSpec", "get_source", "source_names"]

_SOURCES: dict[str, str] = {
    "adni": "flame_moe.data.sources.adni",
    "alzheimer_csf": "flame_moe.data.sources.alzheimer_csf",
    "breast_ultrasound": "flame_moe.data.sources.breast_ultrasound",
    "cbis_ddsm": "flame_moe.data.sources.cbis_ddsm",
    "chest_xray": "flame_moe.data.sources.chest_xray",
    "clinic": "flame_moe.data.sources.clinic",
    "covid_cxr": "flame_moe.data.sources.covid_cxr",
    "digits": "flame_moe.data.sources.digits",
    "eicu": "flame_moe.data.sources.eicu",
    "embed": "flame_moe.data.sources.embed",
    "folder": "flame_moe.data.sources.folder",
    "join": "flame_moe.data.sources.join",
    "meds": "flame_moe.data.sources.meds",
    "mimic_iv": "flame_moe.data.sources.mimic_iv",
    "mnist": "flame_moe.data.sources.mnist",
    "mtsamples": "flame_moe.data.sources.mtsamples",
    "oasis": "flame_moe.data.sources.oasis",
    "physionet2012": "flame_moe.data.sources.physionet2012",
    "physionet2019": "flame_moe.data.sources.physionet2019",
}


def source_names() -> tuple[str, ...]:
    """Names of the sources that can be prepared, in alphabetical order."""
    return tuple(sorted(_SOURCES))


def get_source(name: str) -> Source[Any]:
    """The source of that name.

    A hyphen stands for an underscore: `mimic-iv` is `mimic_iv`.

    Raises:
        DataError: if there is none; the message names the nearest.

    Example:
        >>> get_source("digits").needs_raw, get_source("mimic-iv").name
        (False, 'mimic_iv')
    """
    name = name.replace("-", "_")
    if name not in _SOURCES:
        raise DataError(f"unknown source '{name}'", mend=nearest(name, _SOURCES))
    source: Source[Any] = importlib.import_module(_SOURCES[name]).SOURCE
    return source
