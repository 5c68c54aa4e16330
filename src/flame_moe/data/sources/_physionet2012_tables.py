"""The variables of the PhysioNet 2012 set as tables of data: unit, plausible range, where they go, known slips.

The ranges are wide on purpose: they hold what a living adult in intensive care can show and nothing of what only a
disconnected probe, a flushed line or a slip of the keyboard can. A value outside is set to missing, never clipped.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

WINDOW_HOURS = 48.0
MISSING = -1.0


class Variable(NamedTuple):
    """One measured variable.

    Attributes:
        name: as written in the record files.
        group: the modality that it belongs to.
        unit: of its values.
        low: smallest plausible value.
        high: largest plausible value.
        repeats: what two values at the same minute become: their mean, or their sum where they are volumes.
    """

    name: str
    group: Literal["vitals", "labs", "support"]
    unit: str
    low: float
    high: float
    repeats: Literal["mean", "sum"] = "mean"


class Slip(NamedTuple):
    """A slip of unit that only one reading can explain.

    Values in [low, high] are impossible as written and plausible after `value * factor + offset`.
    """

    name: str
    low: float
    high: float
    factor: float
    offset: float
    text: str


VARIABLES: tuple[Variable, ...] = (
    Variable("HR", "vitals", "beats/min", 10, 300),
    Variable("SysABP", "vitals", "mmHg", 20, 300),
    Variable("DiasABP", "vitals", "mmHg", 5, 200),
    Variable("MAP", "vitals", "mmHg", 10, 220),
    Variable("NISysABP", "vitals", "mmHg", 20, 300),
    Variable("NIDiasABP", "vitals", "mmHg", 5, 200),
    Variable("NIMAP", "vitals", "mmHg", 10, 220),
    Variable("RespRate", "vitals", "breaths/min", 2, 80),
    Variable("SaO2", "vitals", "%", 20, 100),
    Variable("Temp", "vitals", "C", 25, 44),
    Variable("GCS", "vitals", "points", 3, 15),
    Variable("ALP", "labs", "IU/L", 1, 5000),
    Variable("ALT", "labs", "IU/L", 1, 30000),
    Variable("AST", "labs", "IU/L", 1, 30000),
    Variable("Albumin", "labs", "g/dL", 0.5, 8),
    Variable("BUN", "labs", "mg/dL", 1, 300),
    Variable("Bilirubin", "labs", "mg/dL", 0.05, 80),
    Variable("Cholesterol", "labs", "mg/dL", 10, 1000),
    Variable("Creatinine", "labs", "mg/dL", 0.05, 40),
    Variable("Glucose", "labs", "mg/dL", 10, 2000),
    Variable("HCO3", "labs", "mmol/L", 2, 60),
    Variable("HCT", "labs", "%", 5, 75),
    Variable("K", "labs", "mEq/L", 1, 13),
    Variable("Lactate", "labs", "mmol/L", 0.1, 40),
    # Published as mmol/L, but a median of 2.0 is the normal value in mg/dL (0.8 in mmol/L).
    Variable("Mg", "labs", "mg/dL", 0.2, 15),
    Variable("Na", "labs", "mEq/L", 90, 190),
    Variable("PaCO2", "labs", "mmHg", 5, 200),
    Variable("PaO2", "labs", "mmHg", 15, 700),
    Variable("Platelets", "labs", "1/nL", 1, 3000),
    Variable("TroponinI", "labs", "ug/L", 0, 500),
    Variable("TroponinT", "labs", "ug/L", 0, 100),
    Variable("WBC", "labs", "1/nL", 0.05, 800),
    Variable("pH", "labs", "pH", 6.5, 8.0),
    Variable("FiO2", "support", "fraction", 0.21, 1.0),
    # Only ever charted as 1: its absence says nothing on its own, its presence means ventilated at that minute.
    Variable("MechVent", "support", "1 = ventilated", 1, 1),
    Variable("Urine", "support", "mL", 0, 5000, "sum"),
    Variable("Weight", "support", "kg", 20, 350),
)
INDEX: dict[str, int] = {variable.name: i for i, variable in enumerate(VARIABLES)}
GROUPS: tuple[str, ...] = ("vitals", "labs", "support")


class Descriptor(NamedTuple):
    """A variable that is written once, at 00:00: its plausible range and unit."""

    name: str
    unit: str
    low: float
    high: float


DESCRIPTORS: tuple[Descriptor, ...] = (
    Descriptor("RecordID", "", 0, float("inf")),
    Descriptor("Age", "years", 0, 120),
    Descriptor("Gender", "1 = male", 0, 1),
    Descriptor("Height", "cm", 120, 230),
    Descriptor("ICUType", "1 to 4", 1, 4),
)
UNITS_OF_CARE: dict[int, str] = {1: "coronary", 2: "cardiac_surgery", 3: "medical", 4: "surgical"}

SLIPS: tuple[Slip, ...] = (
    Slip("pH", 650, 800, 0.01, 0.0, "pH without its decimal point, divided by 100"),
    Slip("WBC", 1000, 100000, 0.001, 0.0, "WBC per uL instead of per nL, divided by 1000"),
    Slip("FiO2", 21, 100, 0.01, 0.0, "FiO2 in percent, divided by 100"),
    Slip("Temp", 86, 110, 1 / 1.8, -32 / 1.8, "Temp in degrees Fahrenheit, converted"),
    # 365.8 to 462.3 cm are 144 to 182 cm taken for inches and multiplied by 2.54.
    Slip("Height", 330, 510, 1 / 2.54, 0.0, "Height converted from inches though it was in cm, divided by 2.54"),
)
OUTCOME_COLUMNS: tuple[str, ...] = ("SAPS-I", "SOFA", "Length_of_stay", "Survival", "In-hospital_death")
