"""Encoders by kind of modality: a new kind is one new file and one line here."""

from __future__ import annotations

from flame_moe.nn.encoders.base import Encoder
from flame_moe.nn.encoders.patches import PatchEncoder
from flame_moe.nn.encoders.series import SeriesEncoder
from flame_moe.nn.encoders.table import TableEncoder
from flame_moe.nn.encoders.timed import TimedEncoder

ENCODERS: dict[str, type[Encoder]] = {
    "series": SeriesEncoder,
    "timed": TimedEncoder,
    "patches": PatchEncoder,
    "table": TableEncoder,
}

__all__ = ["ENCODERS", "Encoder", "PatchEncoder", "SeriesEncoder", "TableEncoder", "TimedEncoder"]
