"""What the tables of ADNI hold, as data: file names, codes, units, ranges.

Codes and units are those of ADNI's data dictionary (DATADIC). Ranges of vital signs are wide limits of physiology,
wider than those that the case report forms ask for, so that what they remove is a typing error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

STEMS: dict[str, str] = {
    "DXSUM": r"dxsum(_pdxconv_adniall)?",
    "REGISTRY": r"registry",
    "UCSFFSX7": r"ucsffsx7",
    "APOERES": r"apoeres",
    "UPENNBIOMK": r"upennbiomk(_roche_elecsys|9|10|12)?",
    "PTDEMOG": r"ptdemog",
    "MEDHIST": r"medhist",
    "NEUROEXM": r"neuroexm",
    "RECCMEDS": r"reccmeds",
    "VITALS": r"vitals",
    "MMSE": r"mmse",
    "CDR": r"cdr",
    "genomic": r"genomic\w*",
    "images": r"(images|volumes)",
}
"""Table -> regular expression of its file's name; before it "All_Subjects_" and after it a date may stand."""

DATES = ("EXAMDATE", "VISDATE")
"""Columns that say when a visit was, the first that is filled. USERDATE is when it was typed in."""
MISSING = frozenset({"", "-1", "-4", "-1.0", "-4.0", "na", "nan"})
DAYS_PER_MONTH = 30.4375
SCREENING = frozenset({"sc", "bl", "f", "scmri"})

DIAGNOSES: dict[str, dict[str, float]] = {
    "DIAGNOSIS": {"1": 0, "2": 1, "3": 2},
    "DXCHANGE": {"1": 0, "7": 0, "9": 0, "2": 1, "4": 1, "8": 1, "3": 2, "5": 2, "6": 2},
    "DXCURREN": {"1": 0, "2": 1, "3": 2},
}
"""Column -> code -> class (0 CN, 1 MCI, 2 AD). DXCHANGE (ADNIGO, ADNI2): 1 to 3 stable, 4 NL to MCI, 5 MCI to dementia,
6 NL to dementia, 7 MCI to NL, 8 dementia to MCI, 9 dementia to NL: the class is where the change leads. DXCURREN is of
ADNI1."""

YES_NO = {"0": 0.0, "1": 1.0}
FOUND = {"1": 0.0, "2": 1.0}
"""Neurological examination: 1 absent or normal, 2 present or abnormal."""


class Channel(NamedTuple):
    """One feature and where it comes from.

    Attributes:
        name, unit: of the feature.
        table, column: where it is.
        codes: code -> value; None for a number.
        low, high: what a number can be, in `unit`.
        unit_column, units: code of the unit -> factor and offset to `unit`.
        unknown: codes that say that nothing is known.
    """

    name: str
    unit: str
    table: str
    column: str
    codes: Mapping[str, float] | None = None
    low: float = -math.inf
    high: float = math.inf
    unit_column: str = ""
    units: Mapping[str, tuple[float, float]] = {}
    unknown: frozenset[str] = frozenset()


def _one_of(prefix: str, column: str, names: Mapping[str, str], unknown: str) -> tuple[Channel, ...]:
    """One column per documented code; the code for "unknown" is missing in all of them."""
    return tuple(
        Channel(
            f"{prefix}_{name}",
            "1 = yes",
            "PTDEMOG",
            column,
            {other: float(other == code) for other in names},
            unknown=frozenset({unknown}),
        )
        for code, name in names.items()
    )


RACES = {"1": "american_indian", "2": "asian", "3": "pacific", "4": "black", "5": "white", "6": "more_than_one"}
MARRIED = {"1": "married", "2": "widowed", "3": "divorced", "4": "never_married", "6": "domestic_partnership"}
HISTORY = {
    "MHPSYCH": "psychiatric",
    "MH2NEURL": "neurologic_other",
    "MH3HEAD": "head_eyes_ears",
    "MH4CARD": "cardiovascular",
    "MH5RESP": "respiratory",
    "MH6HEPAT": "hepatic",
    "MH7DERM": "dermatologic",
    "MH8MUSCL": "musculoskeletal",
    "MH9ENDO": "endocrine",
    "MH10GAST": "gastrointestinal",
    "MH11HEMA": "hematologic",
    "MH12RENA": "renal",
    "MH13ALLE": "allergy",
    "MH14ALCH": "alcohol_abuse",
    "MH15DRUG": "drug_abuse",
    "MH16SMOK": "smoking",
    "MH17MALI": "malignancy",
    "MH18SURG": "surgery",
}
EXAMINATION = {
    "NXVISUAL": "visual",
    "NXAUDITO": "auditory",
    "NXTREMOR": "tremor",
    "NXCONSCI": "consciousness",
    "NXNERVE": "cranial_nerves",
    "NXMOTOR": "motor",
    "NXFINGER": "finger_to_nose",
    "NXHEEL": "heel_to_shin",
    "NXSENSOR": "sensory",
    "NXTENDON": "tendon_reflexes",
    "NXPLANTA": "plantar_reflexes",
    "NXGAIT": "gait",
    "NXOTHER": "other",
}
CLINICAL: tuple[Channel, ...] = (
    Channel("male", "1 = male", "PTDEMOG", "PTGENDER", {"1": 1.0, "2": 0.0}),
    Channel("education", "years", "PTDEMOG", "PTEDUCAT", low=0, high=30),
    Channel("hispanic", "1 = yes", "PTDEMOG", "PTETHCAT", {"1": 1.0, "2": 0.0}, unknown=frozenset({"3"})),
    Channel("right_handed", "1 = yes", "PTDEMOG", "PTHAND", {"1": 1.0, "2": 0.0, "3": 0.0}),
    Channel("retired", "1 = yes", "PTDEMOG", "PTNOTRT", YES_NO, unknown=frozenset({"2"})),
    *_one_of("race", "PTRACCAT", RACES, "7"),
    *_one_of("status", "PTMARRY", MARRIED, "5"),
    Channel(
        "weight",
        "kg",
        "VITALS",
        "VSWEIGHT",
        low=25,
        high=250,
        unit_column="VSWTUNIT",
        units={"1": (0.45359237, 0.0), "2": (1.0, 0.0)},
    ),
    Channel(
        "height",
        "cm",
        "VITALS",
        "VSHEIGHT",
        low=110,
        high=230,
        unit_column="VSHTUNIT",
        units={"1": (2.54, 0.0), "2": (1.0, 0.0)},
    ),
    Channel("systolic_pressure", "mmHg", "VITALS", "VSBPSYS", low=50, high=280),
    Channel("diastolic_pressure", "mmHg", "VITALS", "VSBPDIA", low=20, high=180),
    Channel("pulse", "1/min", "VITALS", "VSPULSE", low=25, high=220),
    Channel("respiration", "1/min", "VITALS", "VSRESP", low=4, high=60),
    Channel(
        "temperature",
        "C",
        "VITALS",
        "VSTEMP",
        low=30,
        high=43,
        unit_column="VSTMPUNT",
        units={"1": (5.0 / 9.0, -160.0 / 9.0), "2": (1.0, 0.0)},
    ),
    *(Channel(f"history_{name}", "1 = yes", "MEDHIST", column, YES_NO) for column, name in HISTORY.items()),
    *(Channel(f"exam_{name}", "1 = abnormal", "NEUROEXM", column, FOUND) for column, name in EXAMINATION.items()),
)
COGNITION: tuple[Channel, ...] = (
    Channel("mmse", "points, 0 to 30", "MMSE", "MMSCORE", low=0, high=30),
    Channel("cdr_global", "0 to 3", "CDR", "CDGLOBAL", low=0, high=3),
)
BACKWARDS = frozenset({"PTDEMOG", "MEDHIST"})
"""Tables of standing facts: a visit long before the label says them as well; one later than the window does not."""

CSF: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("abeta40", ("ABETA40",), "pg/mL"),
    ("abeta42", ("ABETA42", "ABETA"), "pg/mL"),
    ("tau", ("TAU",), "pg/mL"),
    ("ptau181", ("PTAU",), "pg/mL"),
)
"""Feature, names of its column in the releases, unit; Roche Elecsys assays."""
ALLELES = ("2", "3", "4")

DEMENTIA_DRUGS: tuple[str, ...] = (
    *("donepezil", "aricept", "memantine", "namenda", "namzaric", "rivastigmine", "exelon", "galantamine", "razadyne"),
    *("reminyl", "tacrine", "cognex", "aducanumab", "aduhelm", "lecanemab", "leqembi", "donanemab", "kisunla"),
)
"""Given because of the diagnosis: such an entry is neither a feature nor counted among the medicines."""
DRUGS: dict[str, tuple[str, ...]] = {
    "statin": ("statin", "lipitor", "zocor", "crestor", "pravachol", "vytorin"),
    "blood_pressure": (
        *("pril", "sartan", "olol", "dipine", "thiazide", "furosemide", "lasix", "diovan", "norvasc", "cozaar"),
        *("toprol", "zestril", "benicar"),
    ),
    "antidepressant": (
        *("sertraline", "zoloft", "citalopram", "celexa", "lexapro", "fluoxetine", "prozac", "paroxetine", "paxil"),
        *("venlafaxine", "effexor", "bupropion", "wellbutrin", "trazodone", "mirtazapine", "duloxetine", "cymbalta"),
    ),
    "antidiabetic": ("metformin", "glucophage", "insulin", "glipizide", "glyburide", "gliptin", "gliflozin", "actos"),
    "thyroid": ("levothyroxine", "synthroid", "levoxyl", "thyroid"),
    "aspirin": ("aspirin", "acetylsalicylic", "ecotrin"),
    "anticoagulant": ("warfarin", "coumadin", "apixaban", "eliquis", "rivaroxaban", "xarelto", "dabigatran"),
}
"""Class -> parts of generic and US brand names."""
MEDICINES: tuple[tuple[str, str], ...] = (
    ("medicines", "different names"),
    *((f"takes_{name}", "1 = yes") for name in DRUGS),
)

NOT_GENES = frozenset({"RID", "PTID", "SUBJECT", "FID", "IID", "PAT", "MAT", "SEX", "PHENOTYPE"})
"""Columns of a genomic table that are no variants; PHENOTYPE of PLINK files can be the diagnosis."""
