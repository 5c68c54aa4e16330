"""What a clinician would note about the 48 hours, as one row of numbers: statistics, derived quantities, scores.

Each is computed from one record alone, so nothing is fitted and nothing can leak between splits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flame_moe.data.sources._physionet2012_clean import Array, Stay
from flame_moe.data.sources._physionet2012_scores import SAPS, SOFA, saps, sofa
from flame_moe.data.sources._physionet2012_tables import INDEX, VARIABLES, WINDOW_HOURS
from flame_moe.data.statistics import STATISTICS, series_statistics

HALF = WINDOW_HOURS / 2
DERIVED: dict[str, str] = {
    "SBP": "mmHg",
    "DBP": "mmHg",
    "MBP": "mmHg",
    "PulsePressure": "mmHg",
    "ShockIndex": "beats/min/mmHg",
    "PF": "mmHg",
    "BUNCreatinine": "ratio",
}
# Told by other columns: pressures by their merged channels, ventilation and urine by hours and totals.
LEFT_OUT = ("SysABP", "DiasABP", "MAP", "NISysABP", "NIDiasABP", "NIMAP", "MechVent", "Urine")
KEPT: tuple[str, ...] = tuple(v.name for v in VARIABLES if v.name not in LEFT_OUT)
CHANNELS: tuple[str, ...] = (*KEPT, *DERIVED)
LATE: tuple[str, ...] = ("min", "max", "mean")
# A ventilator is charted every few hours; a longer silence means that it was off in between.
VENTILATOR_GAP_HOURS = 8.0

_KEPT_COLUMNS = np.array([INDEX[name] for name in KEPT])
_UNIT = {**{v.name: v.unit for v in VARIABLES}, **DERIVED}
_LATE_COLUMNS = [STATISTICS.index(name) for name in LATE]
_SCALARS: dict[str, str] = {
    "urine_day1": "mL",
    "urine_day2": "mL",
    "urine_per_kg_hour_day1": "mL/kg/h",
    "urine_per_kg_hour_day2": "mL/kg/h",
    "urine_last6h": "mL",
    "urine_count": "entries",
    "ventilated_hours_day1": "h",
    "ventilated_hours_day2": "h",
    "ventilated_at_end": "1 = yes",
    "invasive_pressure_count": "entries",
    "measurements": "entries",
    "saps_points_day1": "points",
    "saps_points_day2": "points",
    "sofa_points_day1": "points",
    "sofa_points_day2": "points",
}


def summary_columns() -> tuple[tuple[str, str], ...]:
    """(name, unit) of every column: `HR.mean`, `HR.late_mean` (hours 24 to 48), ..., then single quantities."""
    columns = [(f"{c}.{s}", _statistic_unit(_UNIT[c], s)) for c in CHANNELS for s in STATISTICS]
    columns += [(f"{c}.late_{s}", _UNIT[c]) for c in CHANNELS for s in LATE]
    return (*columns, *_SCALARS.items())


def _statistic_unit(unit: str, statistic: str) -> str:
    return {"count": "entries", "since_last": "h", "slope": f"{unit} per h"}.get(statistic, unit)


def summarise(stay: Stay) -> Array:
    """The row of `summary_columns` of one stay, NaN where it cannot be told.

    Quantities that need a measurement are NaN without it; counts are 0.
    """
    channels = np.concatenate([stay.values[:, _KEPT_COLUMNS], derived_channels(stay)], axis=1)
    late = stay.hours >= HALF
    whole = series_statistics(channels, stay.hours, WINDOW_HOURS)
    second = series_statistics(channels[late], stay.hours[late], WINDOW_HOURS)[:, _LATE_COLUMNS]
    return np.concatenate([whole.ravel(), second.ravel(), _scalars(stay, channels, late)])


def derived_channels(stay: Stay) -> Array:
    """(L, 7) in the order of `DERIVED`, NaN where an ingredient is missing.

    Pressures are invasive where there is such a line, else from the cuff. PaO2/FiO2 and BUN/creatinine take the
    last known value of their denominator.
    """
    systolic, diastolic, mean = (
        np.where(np.isnan(_column(stay, arterial)), _column(stay, cuff), _column(stay, arterial))
        for arterial, cuff in (("SysABP", "NISysABP"), ("DiasABP", "NIDiasABP"), ("MAP", "NIMAP"))
    )
    oxygen = carry_forward(_column(stay, "FiO2"))
    creatinine = carry_forward(_column(stay, "Creatinine"))
    ratios = (_column(stay, "HR") / systolic, _column(stay, "PaO2") / oxygen, _column(stay, "BUN") / creatinine)
    return np.stack([systolic, diastolic, mean, systolic - diastolic, *ratios], axis=1)


def _column(stay: Stay, name: str) -> Array:
    column: Array = stay.values[:, INDEX[name]]
    return column


def carry_forward(values: Array) -> Array:
    """The last known value at every step, NaN before the first.

    Example:
        >>> carry_forward(np.array([np.nan, 1.0, np.nan, 3.0])).tolist()
        [nan, 1.0, 1.0, 3.0]
    """
    known = np.where(np.isnan(values), -1, np.arange(len(values)))
    last = np.maximum.accumulate(known) if len(known) else known
    return np.where(last >= 0, values[last], np.nan)


def ventilated_hours(hours: Array, start: float, end: float) -> float:
    """Hours of [start, end] that lie between two ventilator entries at most `VENTILATOR_GAP_HOURS` apart.

    Args:
        hours: (k,) times of the entries, ascending.
        start: beginning of the window in hours.
        end: its end.
    """
    left, right = hours[:-1], hours[1:]
    joined = right - left <= VENTILATOR_GAP_HOURS
    overlap = np.minimum(right, end) - np.maximum(left, start)
    return float(np.clip(overlap[joined], 0.0, None).sum())


def _scalars(stay: Stay, channels: Array, late: NDArray[np.bool_]) -> Array:
    """The single quantities, in the order of `_SCALARS`."""
    volume = _column(stay, "Urine")
    weight = _column(stay, "Weight")
    known = weight[~np.isnan(weight)]
    kilograms = float(np.median(known)) if len(known) else np.nan
    age = stay.descriptors.get("Age", np.nan)
    vented = stay.hours[~np.isnan(_column(stay, "MechVent"))]
    at_end = bool(len(vented)) and WINDOW_HOURS - vented[-1] <= VENTILATOR_GAP_HOURS
    urine, on_ventilator, points = [], [], []
    for day, (start, end) in ((~late, (0.0, HALF)), (late, (HALF, WINDOW_HOURS))):
        urine.append(_total(volume[day]))
        on_ventilator.append(ventilated_hours(vented, start, end))
        named = {name: channels[day, i] for i, name in enumerate(CHANNELS) if name in SAPS or name in SOFA}
        charted = bool(((vented >= start) & (vented <= end)).any())
        points.append((saps(named, age, urine[-1], charted), sofa(named, urine[-1], charted)))
    row = [
        *urine,
        *(total / kilograms / HALF for total in urine),
        _total(volume[stay.hours >= WINDOW_HOURS - 6]),
        float((~np.isnan(volume)).sum()),
        *on_ventilator,
        float(at_end),
        float((~np.isnan(_column(stay, "MAP"))).sum()),
        float((~np.isnan(stay.values)).sum()),
        *(score for score, _ in points),
        *(score for _, score in points),
    ]
    return np.array(row)


def _total(volumes: Array) -> float:
    """Sum of what was measured, NaN if nothing was."""
    seen = volumes[~np.isnan(volumes)]
    return float(seen.sum()) if len(seen) else np.nan
