"""Points of the severity scores SAPS-I and SOFA, as far as the measured variables allow.

Sources: Le Gall et al., Crit Care Med 12:975-977 (1984) for SAPS-I; Vincent et al., Intensive Care Med 22:707-710
(1996) for SOFA. The laboratory scores of Le Gall are in mmol/L; the thresholds here are in the units of the set.
Vasopressor doses are not in the set, so the cardiovascular part of SOFA stops at 1 point.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Points(NamedTuple):
    """Points by interval: `points[i]` for edges[i - 1] <= value < edges[i]."""

    edges: tuple[float, ...]
    points: tuple[int, ...]

    def __call__(self, values: Array) -> Array:
        """Points of each value, NaN for NaN."""
        given = np.asarray(self.points, dtype=np.float64)[np.searchsorted(self.edges, values, side="right")]
        return np.where(np.isnan(values), np.nan, given)


SAPS_AGE = Points((46, 56, 66, 76), (0, 1, 2, 3, 4))
SAPS_URINE = Points((200, 500, 700, 3500, 5000), (4, 3, 2, 0, 1, 2))
SAPS: dict[str, Points] = {
    "HR": Points((40, 55, 70, 110, 140, 180), (4, 3, 2, 0, 2, 3, 4)),
    "SBP": Points((55, 80, 150, 190), (4, 2, 0, 2, 4)),
    "Temp": Points((30, 32, 34, 36, 38.5, 39, 41), (4, 3, 2, 1, 0, 1, 3, 4)),
    "RespRate": Points((6, 10, 12, 25, 35, 50), (4, 2, 1, 0, 1, 3, 4)),
    "BUN": Points((9.8, 21, 81, 101, 154), (1, 0, 1, 2, 3, 4)),
    "HCT": Points((20, 30, 46, 50, 60), (4, 2, 0, 1, 2, 4)),
    "WBC": Points((1, 3, 15, 20, 40), (4, 2, 0, 1, 2, 4)),
    "Glucose": Points((29, 50, 70, 252, 500, 801), (4, 3, 2, 0, 1, 3, 4)),
    "K": Points((2.5, 3, 3.5, 5.5, 6, 7), (4, 2, 1, 0, 1, 3, 4)),
    "Na": Points((110, 120, 130, 151, 156, 161, 180), (4, 3, 2, 0, 1, 2, 3, 4)),
    "HCO3": Points((5, 10, 20, 30, 40), (4, 3, 1, 0, 1, 3)),
    "GCS": Points((4, 7, 10, 13), (4, 3, 2, 1, 0)),
}
SAPS_VENTILATED = 3.0

SOFA: dict[str, Points] = {
    "PF": Points((100, 200, 300, 400), (4, 3, 2, 1, 0)),
    "Platelets": Points((20, 50, 100, 150), (4, 3, 2, 1, 0)),
    "Bilirubin": Points((1.2, 2, 6, 12), (0, 1, 2, 3, 4)),
    "MBP": Points((70,), (1, 0)),
    "GCS": Points((6, 10, 13, 15), (4, 3, 2, 1, 0)),
    "Creatinine": Points((1.2, 2, 3.5, 5), (0, 1, 2, 3, 4)),
}
SOFA_URINE = Points((200, 500), (4, 3, 0))
SOFA_UNVENTILATED_LUNG = 2.0


def worst(table: Mapping[str, Points], values: Mapping[str, Array]) -> dict[str, float]:
    """Most points that any value of each variable gets; NaN for a variable without a value."""
    most: dict[str, float] = {}
    for name, points in table.items():
        seen = values[name][~np.isnan(values[name])]
        most[name] = float(points(seen).max()) if len(seen) else np.nan
    return most


def saps(values: Mapping[str, Array], age: float, urine: float, ventilated: bool) -> float:
    """SAPS-I points of one day; a variable that was not measured gets 0.

    Args:
        values: variable -> its values of the day, NaN where not observed; the keys of `SAPS`.
        age: years, NaN if unknown.
        urine: mL over the whole day, NaN if unknown.
        ventilated: whether mechanically ventilated, which takes the place of the respiratory rate.
    """
    parts = worst(SAPS, values)
    if ventilated:
        parts["RespRate"] = SAPS_VENTILATED
    extra = [float(SAPS_AGE(np.array(age))), float(SAPS_URINE(np.array(urine)))]
    return float(np.nansum([*parts.values(), *extra]))


def sofa(values: Mapping[str, Array], urine: float, ventilated: bool) -> float:
    """SOFA points of one day without vasopressors; a variable that was not measured gets 0.

    Args:
        values: variable -> its values of the day, NaN where not observed; the keys of `SOFA`.
        urine: mL over the whole day, NaN if unknown.
        ventilated: whether mechanically ventilated, without which the lung gets at most 2 points.
    """
    parts = worst(SOFA, values)
    if not ventilated:
        parts["PF"] = min(parts["PF"], SOFA_UNVENTILATED_LUNG)
    parts["Creatinine"] = float(np.fmax(parts["Creatinine"], SOFA_URINE(np.array(urine))))
    return float(np.nansum(list(parts.values())))
