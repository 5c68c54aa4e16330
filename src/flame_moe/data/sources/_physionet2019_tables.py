"""The variables of the PhysioNet 2019 set as tables of data: unit, plausible range, where they go, known slips.

The ranges are wide on purpose: they hold what a living patient in intensive care can show and nothing of what only a
disconnected probe or a slip of the keyboard can. A value outside is set to missing, never clipped.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Variable(NamedTuple):
    """One hourly variable: name as published, modality, unit, smallest and largest plausible value."""

    name: str
    group: Literal["vitals", "labs"]
    unit: str
    low: float
    high: float


class Slip(NamedTuple):
    """Values of `name` in [low, high] belong to `target` after division by `divisor`."""

    name: str
    low: float
    high: float
    target: str
    divisor: float
    text: str


IONISED = "Calcium_ionised"
"""Not a published column: the published `Calcium` holds two measurements, see `SLIPS`."""

VARIABLES: tuple[Variable, ...] = (
    Variable("HR", "vitals", "beats/min", 10, 300),
    Variable("O2Sat", "vitals", "%", 20, 100),
    Variable("Temp", "vitals", "C", 25, 44),
    Variable("SBP", "vitals", "mmHg", 20, 300),
    Variable("MAP", "vitals", "mmHg", 10, 220),
    Variable("DBP", "vitals", "mmHg", 5, 200),
    Variable("Resp", "vitals", "breaths/min", 2, 80),
    Variable("EtCO2", "vitals", "mmHg", 5, 110),
    Variable("BaseExcess", "labs", "mmol/L", -40, 40),
    Variable("HCO3", "labs", "mmol/L", 2, 60),
    Variable("FiO2", "labs", "fraction", 0.2, 1.0),
    Variable("pH", "labs", "pH", 6.5, 8.0),
    Variable("PaCO2", "labs", "mmHg", 5, 200),
    Variable("SaO2", "labs", "%", 20, 100),
    Variable("AST", "labs", "IU/L", 1, 30000),
    Variable("BUN", "labs", "mg/dL", 1, 300),
    Variable("Alkalinephos", "labs", "IU/L", 1, 5000),
    Variable("Calcium", "labs", "mg/dL", 3, 20),
    Variable(IONISED, "labs", "mmol/L", 0.3, 2.5),
    Variable("Chloride", "labs", "mmol/L", 50, 160),
    Variable("Creatinine", "labs", "mg/dL", 0.05, 40),
    Variable("Bilirubin_direct", "labs", "mg/dL", 0.0, 60),
    Variable("Glucose", "labs", "mg/dL", 10, 2000),
    Variable("Lactate", "labs", "mmol/L", 0.1, 40),
    Variable("Magnesium", "labs", "mg/dL", 0.2, 15),
    Variable("Phosphate", "labs", "mg/dL", 0.1, 25),
    Variable("Potassium", "labs", "mmol/L", 1, 13),
    Variable("Bilirubin_total", "labs", "mg/dL", 0.05, 80),
    Variable("TroponinI", "labs", "ug/L", 0, 500),
    Variable("Hct", "labs", "%", 5, 75),
    Variable("Hgb", "labs", "g/dL", 1, 26),
    Variable("PTT", "labs", "s", 10, 300),
    Variable("WBC", "labs", "1/nL", 0.05, 800),
    Variable("Fibrinogen", "labs", "mg/dL", 10, 2000),
    Variable("Platelets", "labs", "1/nL", 1, 3000),
)
INDEX: dict[str, int] = {variable.name: i for i, variable in enumerate(VARIABLES)}
GROUPS: tuple[str, ...] = ("vitals", "labs")

SLIPS: tuple[Slip, ...] = (
    # Total calcium (mg/dL, about 8) and ionised calcium (mmol/L, about 1.15) share the column; nothing lies between.
    Slip("Calcium", 0.3, 2.5, IONISED, 1.0, "Calcium of 0.3 to 2.5 taken as ionised calcium in mmol/L"),
    Slip("FiO2", 20, 100, "FiO2", 100.0, "FiO2 in percent, divided by 100"),
)

STATIC: tuple[tuple[str, str], ...] = (
    ("age", "years"),
    ("male", "1 = male"),
    ("medical_unit", "1 = yes"),
    ("surgical_unit", "1 = yes"),
    ("hours_in_hospital_before", "h"),
)
HOUR, LABEL = "ICULOS", "SepsisLabel"
DESCRIPTORS: tuple[str, ...] = ("Age", "Gender", "Unit1", "Unit2", "HospAdmTime")
MEASURED: tuple[str, ...] = tuple(variable.name for variable in VARIABLES if variable.name != IONISED)
COLUMNS: tuple[str, ...] = (*MEASURED, *DESCRIPTORS, HOUR)
