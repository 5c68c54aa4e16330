"""The 30 channels of the MIMIC-IV source as tables of data: item numbers, units, conversions, plausible ranges.

Item numbers are those of `d_items` and `d_labitems` of MIMIC-IV; the set of channels is that of the published
preprocessing which the FLAME paper follows (9 vital signs, 21 laboratory values of blood). The ranges are wide on
purpose: they hold what a living adult in intensive care can show and nothing of what only a disconnected probe, a
flushed line or a slip of the keyboard can. A value outside is left out, never clipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import polars as pl


class Channel(NamedTuple):
    """One measured variable.

    Attributes:
        name: of the channel.
        unit: of its values in the store.
        low, high: smallest and largest plausible value, in that unit.
        items: item numbers that measure it.
        units: how its unit is written in the release (lower case, no blanks) -> factor into `unit`. A value without a
            unit is taken to be in `unit`.
        arterial: items that measure it through an arterial line; read only if asked for.
    """

    name: str
    unit: str
    low: float
    high: float
    items: tuple[int, ...]
    units: Mapping[str, float]
    arterial: tuple[int, ...] = ()


_PER_MINUTE = {"bpm": 1.0, "insp/min": 1.0, "/min": 1.0}
_PRESSURE = {"mmhg": 1.0, "kpa": 7.50062}
_PERCENT = {"%": 1.0}
_POINTS: Mapping[str, float] = {}
_ION = {"meq/l": 1.0, "mmol/l": 1.0}
_CELLS = {"k/ul": 1.0, "10^9/l": 1.0, "#/ul": 0.001}

VITALS: tuple[Channel, ...] = (
    Channel("heart_rate", "beats/min", 10, 300, (220045,), _PER_MINUTE),
    # Cuff pressures: automatic, and by hand on either arm.
    Channel("sbp", "mmHg", 20, 300, (220179, 224167, 227243), _PRESSURE, arterial=(220050, 225309)),
    Channel("dbp", "mmHg", 5, 225, (220180, 224643, 227242), _PRESSURE, arterial=(220051, 225310)),
    Channel("mbp", "mmHg", 10, 250, (220181,), _PRESSURE, arterial=(220052, 225312)),
    Channel("resp_rate", "breaths/min", 2, 80, (220210, 224690), _PER_MINUTE),
    Channel("spo2", "%", 20, 100, (220277,), _PERCENT),
    Channel("gcs_verbal", "points", 1, 5, (223900,), _POINTS),
    Channel("gcs_eye", "points", 1, 4, (220739,), _POINTS),
    Channel("gcs_motor", "points", 1, 6, (223901,), _POINTS),
)

# Molar masses behind the factors, g/mol: glucose 180.16, creatinine 113.12, nitrogen of urea 28.01, magnesium 24.305,
# calcium 40.078, phosphorus 30.974.
LABS: tuple[Channel, ...] = (
    Channel("glucose", "mg/dL", 10, 2000, (50931, 50809, 52569, 52027), {"mg/dl": 1.0, "mmol/l": 18.016}),
    Channel("potassium", "mEq/L", 1, 13, (50971, 50822, 52610, 52452), _ION),
    Channel("sodium", "mEq/L", 90, 190, (50983, 50824, 52623, 52455), _ION),
    Channel("chloride", "mEq/L", 50, 160, (50902, 50806, 52535, 52434), _ION),
    Channel("creatinine", "mg/dL", 0.05, 40, (50912, 52024, 52546), {"mg/dl": 1.0, "umol/l": 0.011312}),
    Channel("urea_nitrogen", "mg/dL", 1, 300, (51006, 52647), {"mg/dl": 1.0, "mmol/l": 2.801}),
    Channel("bicarbonate", "mEq/L", 2, 60, (50882, 50803), _ION),
    Channel("anion_gap", "mEq/L", -10, 60, (50868, 52500), _ION),
    Channel("hemoglobin", "g/dL", 1, 25, (51222, 50811, 51640), {"g/dl": 1.0, "g/l": 0.1}),
    Channel("hematocrit", "%", 5, 75, (51221, 50810, 51638, 51639, 52028), {"%": 1.0, "l/l": 100.0}),
    Channel("magnesium", "mg/dL", 0.2, 15, (50960,), {"mg/dl": 1.0, "mmol/l": 2.4305, "meq/l": 1.2153}),
    Channel("platelets", "K/uL", 1, 3000, (51265, 51704), _CELLS),
    Channel("phosphate", "mg/dL", 0.1, 25, (50970,), {"mg/dl": 1.0, "mmol/l": 3.0974}),
    Channel("white_cells", "K/uL", 0.01, 600, (51301, 51300, 51755, 51756), _CELLS),
    Channel("calcium", "mg/dL", 2, 20, (50893,), {"mg/dl": 1.0, "mmol/l": 4.0078}),
    Channel("mch", "pg", 10, 60, (51248,), {"pg": 1.0}),
    Channel("red_cells", "m/uL", 0.3, 10, (51279,), {"m/ul": 1.0, "10^12/l": 1.0}),
    # Written as % until the analysers changed: grams per 100 mL, so the number is the same.
    Channel("mchc", "g/dL", 15, 45, (51249,), {"g/dl": 1.0, "%": 1.0, "g/l": 0.1}),
    Channel("mcv", "fL", 40, 150, (51250, 51691), {"fl": 1.0}),
    Channel("rdw", "%", 5, 50, (51277,), _PERCENT),
    Channel("neutrophils", "%", 0, 100, (51256,), _PERCENT),
)

VERBAL = next(i for i, channel in enumerate(VITALS) if channel.name == "gcs_verbal")
NOT_TESTABLE = "no response-ett"
"""What the chart says, in lower case, of a verbal response that a tube in the airway makes impossible to test."""


def item_table(channels: Sequence[Channel], *, arterial: bool = False) -> pl.DataFrame:
    """Item number -> position of its channel: columns itemid (Int32), channel (UInt8)."""
    rows = [(item, i) for i, c in enumerate(channels) for item in (*c.items, *(c.arterial if arterial else ()))]
    return pl.DataFrame(rows, schema={"itemid": pl.Int32, "channel": pl.UInt8}, orient="row")


def unit_table(channels: Sequence[Channel]) -> pl.DataFrame:
    """Channel and unit as written -> factor: columns channel (UInt8), written (String), factor (Float64)."""
    rows = [(i, unit, factor) for i, c in enumerate(channels) for unit, factor in (("", 1.0), *c.units.items())]
    return pl.DataFrame(rows, schema={"channel": pl.UInt8, "written": pl.String, "factor": pl.Float64}, orient="row")


def range_table(channels: Sequence[Channel]) -> pl.DataFrame:
    """Channel -> plausible range: columns channel (UInt8), low, high (Float64)."""
    rows = [(i, float(c.low), float(c.high)) for i, c in enumerate(channels)]
    return pl.DataFrame(rows, schema={"channel": pl.UInt8, "low": pl.Float64, "high": pl.Float64}, orient="row")
