"""Labels of a breast in an exam: assessment, cancer within five years, density."""

from __future__ import annotations

from collections import Counter
from datetime import date

from flame_moe.data.sources._embed_tables import Finding, Woman

HORIZON_DAYS = 1826
"""Five years of 365.25 days; the last day counts."""

CANCER = (0, 1)
"""Pathology severities that are cancer of the breast: invasive, non-invasive."""

ASSESSMENTS = {"A": 0, "N": 1, "B": 2, "P": 3, "S": 4, "M": 5, "K": 6}
"""Assessment letter -> BI-RADS category; X is no assessment."""

GROUPINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "reading": (("negative", "N"), ("benign", "B"), ("incomplete, probably benign or suspicious", "APSM")),
    "management": (
        ("negative or benign: routine screening", "NB"),
        ("incomplete or probably benign: more imaging", "AP"),
        ("suspicious: biopsy", "SM"),
    ),
    "screening": (("negative", "N"), ("benign", "B"), ("incomplete: recalled", "A")),
}
"""Ways to make three classes of the letters: (class, letters), from the least to the most serious."""

DENSITIES = ("a: almost all fat", "b: scattered", "c: heterogeneously dense", "d: extremely dense")


def birads(findings: list[Finding], side: str, grouping: str, tally: Counter[str]) -> int | None:
    """The most serious class of the breast's findings; findings of no single side are of both breasts.

    A breast with any finding whose letter is in no class of the grouping has no label: its most serious class is not
    known.
    """
    letters = {f.assessment for f in findings if f.side in (side, None) and f.assessment not in (None, "X")}
    if not letters:
        tally["no assessment of the breast: no label of birads"] += 1
        return None
    classes = {letter: i for i, (_, group) in enumerate(GROUPINGS[grouping]) for letter in group}
    for letter in sorted(letters - classes.keys(), key=str):
        known = f"BI-RADS {ASSESSMENTS[letter]}" if letter in ASSESSMENTS else "unknown code"
        tally[f"assessment {letter} ({known}) is in no class: no label of birads"] += 1
    if letters - classes.keys():
        return None
    return max(classes[letter] for letter in letters if letter is not None)


def density(findings: list[Finding], tally: Counter[str]) -> int | None:
    """BI-RADS density of the exam, 0 to 3; none if the findings of the exam disagree."""
    found = {f.density for f in findings if f.density is not None}
    usable = {int(value) for value in found if value in (1, 2, 3, 4)}
    tally["density code outside 1 to 4: no label of density"] += bool(found) and not usable
    tally["densities of one exam disagree: no label of density"] += len(usable) > 1
    return next(iter(usable)) - 1 if len(usable) == 1 else None


def risk(woman: Woman, acc: str, side: str, day: date | None, short_followup: str, tally: Counter[str]) -> int | None:
    """1 if cancer of this breast is found within five years after the exam, 0 if the breast is known to stay free.

    Args:
        woman: her record, before and after the exam.
        acc: the exam.
        side: L or R.
        day: of the exam.
        short_followup: `no_label` or `negative`, for breasts without cancer whose record ends before five years.
        tally: says why there is no label.
    """
    cancers = [s for s in woman.specimens if s.severity in CANCER and s.side in (side, None)]
    days = [s.day for s in cancers if s.day is not None]
    reason = "no cancer so far, but less than five years of record"
    if day is None:
        reason = "exam without a date"
    elif len(days) < len(cancers) or any(s.side is None for s in cancers):
        reason = "cancer without a date or side"
    elif any(found <= day for found in days) or _read_as_known(woman, acc, side, day):
        reason = "cancer of this breast known at the exam"
    elif any((found - day).days <= HORIZON_DAYS for found in days):
        return 1
    elif short_followup == "negative" or (woman.last is not None and (woman.last - day).days >= HORIZON_DAYS):
        return 0
    tally[f"{reason}: no label of risk"] += 1
    return None


def _read_as_known(woman: Woman, acc: str, side: str, day: date) -> bool:
    """Whether this or an earlier exam was read as known cancer (K) of the breast."""
    return any(
        f.assessment == "K" and f.side in (side, None)
        for key, findings in woman.exams.items()
        if key == acc or (key in woman.days and woman.days[key] <= day)
        for f in findings
    )
