"""What codes of a MEDS data set become: the mapping file, and the table that routes each code to its place."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import polars as pl
from pydantic import Field, field_validator, model_validator

from flame_moe.data.codes import code_id
from flame_moe.description import Description
from flame_moe.errors import DataError
from flame_moe.schema import Modality, Name, TaskKind

OTHER = "other"
# Types are part of a model: they are a fixed list, not what happens to be in a data set, so that new records get the
# same numbers. First parts of codes as data sets in MEDS form write them, from MIMIC-IV, eICU and OMOP.
# fmt: off
TYPES: tuple[str, ...] = (
    "DIAGNOSIS", "PROCEDURE", "MEDICATION", "LAB", "VITAL", "INFUSION_START", "INFUSION_END", "SUBJECT_FLUID_OUTPUT",
    "SUBJECT_WEIGHT_AT_INFUSION", "HOSPITAL_ADMISSION", "HOSPITAL_DISCHARGE", "ICU_ADMISSION", "ICU_DISCHARGE",
    "ED_REGISTRATION", "ED_OUT", "TRANSFER_TO", "DRG", "HCPCS", "GENDER", "RACE", "ETHNICITY", "MEDS_BIRTH",
    "MEDS_DEATH", "TREATMENT", "ALLERGY", "NOTE", "IMAGING", "SNOMED", "LOINC", "RXNORM", "ICD10CM", "ICD9CM",
    "ICD10PCS", "ICD9PROC", "CPT4", "VISIT",
)
# fmt: on


class Match(Description):
    """Which codes are meant.

    Attributes:
        code: codes or first parts of codes up to a separator: "LAB//220045" means that code and "LAB//220045//bpm".
        regex: or a regular expression that is searched for in the code.
    """

    code: tuple[str, ...] = ()
    regex: str | None = None

    @field_validator("code", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("regex")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"no regular expression ({error})") from None
        return value

    def fits(self, code: str) -> bool:
        return begins(code, self.code) or (self.regex is not None and re.search(self.regex, code) is not None)


class Channel(Match):
    """One channel of a series: `value * factor + offset`, kept where it is from `low` to `high`."""

    name: str
    unit: str = ""
    factor: float = 1.0
    offset: float = 0.0
    low: float = float("-inf")
    high: float = float("inf")

    @model_validator(mode="after")
    def _means_something(self) -> Channel:
        if not self.code and self.regex is None:
            raise ValueError(f"channel '{self.name}' needs code or regex")
        return self


class SeriesRule(Description):
    """One modality of kind series."""

    name: Name
    channels: Annotated[tuple[Channel, ...], Field(min_length=1)]
    description: str = ""


class TypeRule(Match):
    """One event type."""

    name: str


class CodesRule(Description):
    """The modality of kind codes; `rest` says what becomes of codes of no type, `vocabulary` how many get a row."""

    name: Name = "codes"
    types: tuple[TypeRule, ...] = ()
    rest: Literal["other", "drop"] = "other"
    vocabulary: Annotated[int, Field(ge=1)] = 4096


class StaticColumn(Match):
    """One column of the static table, known at the prediction time.

    Attributes:
        kind: flag: 1 if the code was there, 0 if not; value: the latest number; age: years since the code, by default
            MEDS_BIRTH.
        opposite: of a flag: codes that make it 0; it is missing then where neither was there.
    """

    name: str
    kind: Literal["flag", "value", "age"] = "flag"
    unit: str = ""
    opposite: tuple[str, ...] = ()
    low: float = float("-inf")
    high: float = float("inf")

    @field_validator("opposite", mode="before")
    @classmethod
    def _one_or_more_opposites(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def fits(self, code: str) -> bool:
        return begins(code, ("MEDS_BIRTH",)) if self.kind == "age" and not self.code else super().fits(code)


class TaskRule(Description):
    """What is said about a task of the label files, beside what they hold."""

    name: Name
    kind: TaskKind | None = None
    classes: tuple[str, ...] = ()
    family: str = "default"
    description: str = ""
    caveat: str = ""


class ColumnNames(Description):
    """How the event files call the columns of MEDS."""

    subject_id: str = "subject_id"
    time: str = "time"
    code: str = "code"
    numeric_value: str = "numeric_value"


class Mapping(Description):
    """The mapping file. One that names no series, no codes and no static column maps all codes to one modality."""

    columns: ColumnNames = ColumnNames()
    series: tuple[SeriesRule, ...] = ()
    codes: CodesRule | None = None
    static: tuple[StaticColumn, ...] = ()
    tasks: tuple[TaskRule, ...] = ()

    @model_validator(mode="after")
    def _something(self) -> Mapping:
        if not self.series and not self.static and self.codes is None:
            return self.model_copy(update={"codes": CodesRule()})
        return self

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """In the order codes, series, static; a code's place is (position here, slot)."""
        return (*self._codes(), *(_series(rule) for rule in self.series), *self._static())

    def _codes(self) -> Iterator[Modality]:
        if self.codes is not None:
            yield Modality(
                name=self.codes.name,
                kind="codes",
                features=2,
                types=tuple(name for name, _ in types(self.codes)),
                vocabulary=self.codes.vocabulary,
                description="events of the history, by code",
            )

    def _static(self) -> Iterator[Modality]:
        if self.static:
            yield Modality(
                name="static",
                kind="table",
                features=len(self.static),
                channels=tuple(c.name for c in self.static),
                units=tuple(_unit(c) for c in self.static),
                scaling="quantile",
                description="what is known of the person at the prediction time",
            )


class Route(NamedTuple):
    """A code's place: modality (position), slot (type, channel or column), 1 or -1 (opposite), conversion and range."""

    code: str
    modality: int
    slot: int
    sign: int
    id: int
    factor: float
    offset: float
    low: float
    high: float


def load_mapping(path: Path | None) -> Mapping:
    """The mapping file, or the default without one.

    Raises:
        DataError, RecipeError: if it cannot be read, or a key or value is wrong.
    """
    if path is None:
        return Mapping.parse({}, where="mapping")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"the mapping cannot be read ({error.strerror})", where=str(path), mend="Check it.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"the mapping is not valid TOML: {error}", where=str(path)) from None
    return Mapping.parse(data, where=str(path))


def types(rule: CodesRule) -> list[tuple[str, Match]]:
    """Name and meaning of every event type."""
    named: list[tuple[str, Match]] = [(t.name, t) for t in rule.types]
    if not named:
        named = [(name.lower(), Match(regex=f"(?i)^{re.escape(name)}(/|$)")) for name in TYPES]
    return [*named, (OTHER, Match())] if rule.rest == "other" else named


def route(codes: Iterable[str], mapping: Mapping) -> pl.DataFrame:
    """Where each of these codes goes, (code, modality) at most once; codes that go nowhere have no row."""
    return pl.DataFrame(
        [r for code in sorted(codes) for r in _routes(code, mapping)],
        schema={
            "code": pl.String,
            "modality": pl.Int16,
            "slot": pl.Int32,
            "sign": pl.Int8,
            "id": pl.Int64,
            **dict.fromkeys(("factor", "offset", "low", "high"), pl.Float64),
        },
        orient="row",
    )


def _routes(code: str, mapping: Mapping) -> Iterator[Route]:
    place = 0
    if mapping.codes is not None:
        named = types(mapping.codes)
        slot = next((i for i, (_, match) in enumerate(named) if match.fits(code)), None)
        if slot is None and mapping.codes.rest == "other":
            slot = len(named) - 1
        if slot is not None:
            yield Route(code, place, slot, 1, code_id(code), 1.0, 0.0, float("-inf"), float("inf"))
        place += 1
    for rule in mapping.series:
        for i, c in enumerate(rule.channels):
            if c.fits(code):
                yield Route(code, place, i, 1, 0, c.factor, c.offset, c.low, c.high)
                break
        place += 1
    for i, column in enumerate(mapping.static):
        if column.fits(code):
            yield Route(code, place, i, 1, 0, 1.0, 0.0, column.low, column.high)
        elif begins(code, column.opposite):
            yield Route(code, place, i, -1, 0, 1.0, 0.0, column.low, column.high)


def begins(code: str, parts: Iterable[str]) -> bool:
    """Whether the code is one of these or goes on after a separator."""
    return any(code == part or (code.startswith(part) and code[len(part)] == "/") for part in parts)


def _series(rule: SeriesRule) -> Modality:
    return Modality(
        name=rule.name,
        kind="series",
        features=len(rule.channels),
        channels=tuple(c.name for c in rule.channels),
        units=tuple(c.unit for c in rule.channels),
        scaling="quantile",
        description=rule.description,
    )


def _unit(column: StaticColumn) -> str:
    return column.unit or {"flag": "1 = yes", "age": "years", "value": ""}[column.kind]
