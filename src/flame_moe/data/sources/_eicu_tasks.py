"""What is predicted from eICU-CRD, in clinical words."""

from __future__ import annotations

from typing import Any

from flame_moe.data.sources._eicu_options import EicuOptions
from flame_moe.data.sources._eicu_yaib import Label
from flame_moe.schema import Task


def tasks_of(options: EicuOptions, modalities: tuple[str, ...], labels: tuple[Label, ...]) -> tuple[Task, ...]:
    """Three tasks, and those of YAIB whose labels are there; each reads every modality."""
    described = [_mortality(options), _readmission(options), _los(options)]
    described += [{"name": label.task, **_yaib(options)[label.task]} for label in labels]
    return tuple(Task.parse({**each, "modalities": modalities}, where=f"tasks.{each['name']}") for each in described)


def _mortality(options: EicuOptions) -> dict[str, Any]:
    return {
        "name": "mortality",
        "kind": "binary",
        "classes": ("left alive", "died in the unit"),
        "family": "outcome",
        "description": f"death in the unit later than {options.hours} h after admission to it",
        "caveat": "Deaths in hospital after this stay count as survival (in the demo 86 of 212); deaths under limited "
        "care are not told apart from deaths under full treatment.",
    }


def _readmission(options: EicuOptions) -> dict[str, Any]:
    seen = (
        "Only the same hospital admission is seen: the database dates no two admissions of a patient against each "
        "other, so a return from home counts as none."
    )
    if options.readmission == "15d":
        what = "another unit stay of the same hospital admission starts within 15 days of the start of this one"
        caveat = f"{seen} Transfers to a step-down unit count as well, and deaths in the unit count as no readmission."
    else:
        what = (
            "return to intensive care within 30 days of leaving the unit alive, in the same hospital admission; a "
            "direct transfer to the next unit and stays in step-down units are no return"
        )
        caveat = f"{seen} Death on the ward without a return counts as no readmission."
    return {
        "name": "readmission",
        "kind": "binary",
        "classes": ("no return", "returned"),
        "family": "outcome",
        "description": what,
        "caveat": f"{caveat} Predicted {options.hours} h after admission, not at discharge.",
    }


def _los(options: EicuOptions) -> dict[str, Any]:
    days = f"{options.los_days:g} days"
    return {
        "name": "los",
        "kind": "binary",
        "classes": (f"up to {days}", f"more than {days}"),
        "family": "stay",
        "description": f"the stay in the unit goes on for more than {days} after hour {options.hours}",
        "caveat": "A death ends a stay, so a short one is not always good; the stay counts to the end of this unit, "
        "even where another unit follows.",
    }


def _yaib(options: EicuOptions) -> dict[str, dict[str, Any]]:
    """Descriptions by name of the task."""

    def onset(illness: str, short: str, caveat: str) -> dict[str, Any]:
        return {
            "kind": "binary",
            "classes": (f"no {short}", short),
            "family": "organ",
            "description": f"onset of {illness} after hour {options.hours}, in the unit and within seven days of "
            "admission, as labelled by YAIB; stays with an onset up to and in that hour have no label",
            "caveat": caveat,
        }

    return {
        "yaib_mortality24": {
            "kind": "binary",
            "classes": ("left alive", "died in the unit"),
            "family": "outcome",
            "description": "death in the unit, stays of at least 30 h, as labelled by YAIB",
            "caveat": "The same outcome as task mortality on a smaller cohort: do not count them as two findings.",
        },
        "yaib_kidney_function": {
            "kind": "regression",
            "classes": ("mg/dL",),
            "family": "organ",
            "description": "creatinine of the second day, as labelled by YAIB",
            "caveat": "Only stays of two days or more with creatinine on both; the creatinine of the first day, an "
            "input, predicts most of it.",
        },
        "yaib_aki": onset(
            "acute kidney injury",
            "kidney injury",
            "The label comes from creatinine and urine, so who is measured less is found less often. Stays end at "
            "discharge: what happens later is not seen.",
        ),
        "yaib_sepsis": onset(
            "sepsis",
            "sepsis",
            "Few onsets come after the first day: on the demo the test split holds a handful, so its figures mean "
            "little. The label needs antibiotics, and in eICU no cultures.",
        ),
        "yaib_los": {
            "kind": "regression",
            "classes": ("hours",),
            "family": "stay",
            "description": f"hours that remain in the unit at hour {options.hours}, at most 168, as labelled by YAIB",
            "caveat": "Heavy-tailed: read ranks and absolute error. A death ends a stay.",
        },
    }
