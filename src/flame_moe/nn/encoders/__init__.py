"""Encoders by kind of modality: a new kind is one new file and one line here."""

from __future__ import annotations

from flame_moe.nn.encoders.base import Encoder
from flame_moe.nn.encoders.codes import CodeEncoder
from flame_moe.nn.encoders.image import ImageEncoder
from flame_moe.nn.encoders.patches import PatchEncoder
from flame_moe.nn.encoders.series import SeriesEncoder
from flame_moe.nn.encoders.table import TableEncoder
from flame_moe.nn.encoders.timed import TimedEncoder
from flame_moe.nn.encoders.tokens import TokenEncoder
from flame_moe.nn.encoders.waveform import WaveformEncoder

ENCODERS: dict[str, type[Encoder]] = {
    "series": SeriesEncoder,
    "timed": TimedEncoder,
    "patches": PatchEncoder,
    "table": TableEncoder,
    "codes": CodeEncoder,
    "image": ImageEncoder,
    "waveform": WaveformEncoder,
    "tokens": TokenEncoder,
}

__all__ = [
    "ENCODERS",
    "CodeEncoder",
    "Encoder",
    "ImageEncoder",
    "PatchEncoder",
    "SeriesEncoder",
    "TableEncoder",
    "TimedEncoder",
    "TokenEncoder",
    "WaveformEncoder",
]
