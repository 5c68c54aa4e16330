"""What the generated clinic offers: four cohorts, their modalities, nine tasks, balances and default signal.

Names, modality sets and kinds of target follow Tables 0.3 and 1.2 to 1.5 of the method's engineering specification
(MIMIC-IV, eICU, EMBED and ADNI). Balances of ihm, los and birads are those of the published runs; the others are
typical of the data sets. Nothing here was measured on patients.
"""

from __future__ import annotations

from typing import NamedTuple

from flame_moe.schema import ModalityKind, TaskKind


class View(NamedTuple):
    """A modality of a cohort.

    Attributes:
        kind: kind of the modality.
        features: default width.
        missing: default chance that it is missing.
        steps: fewest and most steps of a sample.
        description: for people.
    """

    kind: ModalityKind
    features: int
    missing: float
    steps: tuple[int, int]
    description: str


class Question(NamedTuple):
    """A task of a cohort.

    Attributes:
        kind: kind of the target.
        classes: names of the outputs.
        balance: prevalence of the positive class, of each class, or of each label.
        factors: latent factors per modality that its labels hang on.
        signal: modality -> strength of its factors in the score, in units of the score's noise.
        focal: whether it is learned with the focal loss.
        description: for people.
    """

    kind: TaskKind
    classes: tuple[str, ...]
    balance: tuple[float, ...]
    factors: int
    signal: dict[str, float]
    focal: bool
    description: str


class Cohort(NamedTuple):
    """Patients who share modalities and tasks."""

    views: dict[str, View]
    questions: dict[str, Question]


# Channel -> typical level and spread, in the units in which it is usually charted.
VITALS: dict[str, tuple[float, float]] = {
    "heart_rate": (85, 15),
    "sbp": (120, 18),
    "dbp": (65, 12),
    "mbp": (80, 13),
    "resp_rate": (18, 4),
    "spo2": (97, 2),
    "gcs_verbal": (4, 1),
    "gcs_eye": (3.5, 0.8),
    "gcs_motor": (5.5, 0.9),
}
LABS: dict[str, tuple[float, float]] = {
    "glucose": (130, 40),
    "potassium": (4.1, 0.5),
    "sodium": (139, 4),
    "chloride": (104, 5),
    "creatinine": (1.2, 0.6),
    "urea_nitrogen": (22, 10),
    "bicarbonate": (25, 4),
    "anion_gap": (13, 3),
    "hemoglobin": (10.5, 1.8),
    "hematocrit": (32, 5),
    "magnesium": (2.0, 0.3),
    "platelets": (210, 80),
    "phosphate": (3.5, 1),
    "white_cells": (10.5, 4),
    "calcium": (8.4, 0.6),
    "mch": (30, 2),
    "red_cells": (3.6, 0.6),
    "mchc": (33, 1.2),
    "mcv": (90, 6),
    "rdw": (14.5, 1.8),
    "neutrophils": (75, 10),
}
CHANNELS = (*VITALS, *LABS)
LEVEL, SPREAD = zip(*VITALS.values(), *LABS.values(), strict=True)

PHENOTYPES = tuple(f"phenotype_{i:02d}" for i in range(1, 26))
PHENOTYPE_BALANCE = tuple(round(0.05 + 0.37 * (1 - i / 24) ** 2, 3) for i in range(25))


def _vector(features: int, missing: float, description: str) -> View:
    return View("patches", features, missing, (1, 1), description)


def _table(features: int, missing: float, description: str) -> View:
    return View("table", features, missing, (1, 1), description)


COHORTS: dict[str, Cohort] = {
    "mimic": Cohort(
        views={
            "ts": View("series", len(CHANNELS), 0.0, (8, 48), "vital signs and laboratory values, irregular"),
            "text": View("timed", 64, 0.2, (1, 5), "one vector per clinical note"),
            "cxr": View("timed", 64, 0.5, (1, 3), "one vector per chest X-ray"),
        },
        questions={
            "ihm": Question(
                "binary",
                ("alive", "died"),
                (0.16,),
                1,
                {"ts": 0.8, "text": 0.5, "cxr": 0.3},
                False,
                "in-hospital mortality",
            ),
            "los": Question(
                "binary",
                ("longer", "shorter"),
                (0.435,),
                1,
                {"ts": 1.0, "text": 0.6, "cxr": 0.0},
                False,
                "short stay",
            ),
            "pheno": Question(
                "multilabel",
                PHENOTYPES,
                PHENOTYPE_BALANCE,
                5,
                {"ts": 0.3, "text": 0.6, "cxr": 0.2},
                False,
                "25 phenotypes",
            ),
        },
    ),
    "eicu": Cohort(
        views={
            "t1": _vector(32, 0.0, "summary of the coded events"),
            "t2": _vector(32, 0.1, "diagnosis codes"),
            "t3": _vector(32, 0.2, "treatment codes"),
            "t4": _vector(32, 0.15, "medication codes"),
            "t5": _vector(32, 0.05, "laboratory codes"),
        },
        questions={
            "rad": Question(
                "binary",
                ("no", "yes"),
                (0.12,),
                1,
                {"t1": 0.3, "t2": 0.6, "t3": 0.0, "t4": 0.5, "t5": 0.2},
                False,
                "readmission",
            ),
            "mor": Question(
                "binary",
                ("alive", "died"),
                (0.06,),
                1,
                {"t1": 0.5, "t2": 0.4, "t3": 0.6, "t4": 0.0, "t5": 0.7},
                False,
                "mortality",
            ),
        },
    ),
    "embed": Cohort(
        views={
            "cc": _vector(64, 0.15, "synthetic 2D, cranio-caudal"),
            "mlo": _vector(64, 0.15, "synthetic 2D, medio-lateral oblique"),
            "ffdm_cc": _vector(64, 0.05, "full-field digital, cranio-caudal"),
            "ffdm_mlo": _vector(64, 0.05, "full-field digital, medio-lateral oblique"),
        },
        questions={
            "birads": Question(
                "multiclass",
                ("negative", "benign", "suspicious"),
                (0.715, 0.165, 0.12),
                1,
                {"cc": 0.7, "mlo": 0.7, "ffdm_cc": 0.4, "ffdm_mlo": 0.4},
                True,
                "assessment",
            ),
            "risk": Question(
                "binary",
                ("no cancer", "cancer"),
                (0.06,),
                1,
                {"cc": 0.0, "mlo": 0.2, "ffdm_cc": 0.4, "ffdm_mlo": 0.4},
                True,
                "cancer in five years",
            ),
            "density": Question(
                "multiclass",
                ("a", "b", "c", "d"),
                (0.11, 0.42, 0.4, 0.07),
                1,
                {"cc": 1.2, "mlo": 1.2, "ffdm_cc": 1.5, "ffdm_mlo": 1.5},
                True,
                "breast density",
            ),
        },
    ),
    "adni": Cohort(
        views={
            "i": _table(96, 0.2, "regional volumes and thicknesses"),
            "g": _table(64, 0.4, "genotypes"),
            "c": _table(32, 0.05, "clinical scores"),
            "b": _table(16, 0.3, "fluid biomarkers"),
        },
        questions={
            "diag": Question(
                "multiclass",
                ("normal", "impaired", "alzheimer"),
                (0.35, 0.42, 0.23),
                1,
                {"i": 0.9, "g": 0.2, "c": 0.7, "b": 0.6},
                False,
                "diagnosis",
            ),
        },
    ),
}
