"""What `flame.toml` of a folder says: the samples, one rule per modality, one per task."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from flame_moe.data.text import TextOptions
from flame_moe.description import Description
from flame_moe.errors import DataError, RecipeError, nearest
from flame_moe.schema import Name, TaskKind

Names = tuple[str, ...]
Positive = Annotated[float, Field(gt=0)]


class SamplesRule(Description):
    """The table of samples.

    Attributes:
        file: one row per sample.
        id, subject, split: its columns; without a subject each sample is its own, without a split one is dealt.
        origin: column with the date and time that counts as time 0, for modalities whose unit is "datetime".
        unknown: what becomes of ids in a modality that the table does not have: count or refuse.
    """

    file: str
    id: str = "id"
    subject: str | None = None
    split: str | None = None
    origin: str | None = None
    unknown: Literal["count", "refuse"] = "count"


class TaskRule(Description):
    """One task: a column of the table of samples, or several for multilabel and regression."""

    kind: TaskKind
    column: str | None = None
    columns: Names = ()
    classes: Names = ()
    modalities: tuple[Name, ...] = ()
    family: str = "default"
    loss: Literal["plain", "weighted", "focal"] = "plain"
    description: str = ""
    caveat: str = ""

    @model_validator(mode="after")
    def _columns_fit(self) -> TaskRule:
        if (self.column is None) == (not self.columns):
            raise ValueError("a task needs either column or columns")
        if len(self.labels) > 1 and self.kind in ("binary", "multiclass"):
            raise ValueError(f"a {self.kind} task has one column, not {len(self.labels)}")
        if self.kind == "multiclass" and not self.classes:
            raise ValueError("a multiclass task needs its classes")
        return self

    @property
    def labels(self) -> Names:
        return self.columns if self.column is None else (self.column,)

    @property
    def outputs(self) -> Names:
        return self.classes or (("no", "yes") if self.kind == "binary" else self.labels)


class ModalityRule(Description):
    """What all modalities may say: where the data are, and the column of ids where that is a table."""

    kind: str
    file: str | None = None
    folder: str | None = None
    id: str | None = None
    description: str = ""

    @model_validator(mode="after")
    def _one_place(self) -> ModalityRule:
        if (self.file is None) == (self.folder is None):
            raise ValueError("a modality needs either file or folder")
        return self


class TimedRule(ModalityRule):
    """What all modalities with times may say.

    Attributes:
        time: column of times since the sample's origin; without it everything is at the origin.
        unit: of the times; "datetime": they are dates and times, counted from the sample's `origin`.
        window: hours that count as 1; default that of the whole file.
        outside: what becomes of times below 0 or after the window: refuse or drop (and count).
    """

    time: str | None = None
    unit: Literal["hours", "minutes", "seconds", "days", "datetime"] = "hours"
    window: Positive | None = None
    outside: Literal["refuse", "drop"] = "refuse"


class SeriesRule(TimedRule):
    """Wide: a column per channel in `columns`. Long: columns `channel` and `value`, with the names in `channels`."""

    columns: Names = ()
    channel: str | None = None
    value: str | None = None
    channels: Names = ()
    units: Names = ()
    scaling: Literal["standard", "quantile", "none"] = "quantile"

    @model_validator(mode="after")
    def _one_form(self) -> SeriesRule:
        long = self.channel is not None and self.value is not None and bool(self.channels)
        if long == bool(self.columns):
            raise ValueError("a series needs either columns, or channel, value and channels")
        return self

    @property
    def names(self) -> Names:
        return self.columns or self.channels


class TableRule(ModalityRule):
    """One row per sample: a column per feature, or an array file."""

    columns: Names = ()
    units: Names = ()
    scaling: Literal["standard", "quantile", "none"] = "quantile"


class VectorsRule(TimedRule):
    """Whole vectors at times: a column per number, or an array file (ID and, with times, ID.times)."""

    columns: Names = ()
    scaling: Literal["standard", "quantile", "none"] = "standard"


class CodesRule(TimedRule):
    """Events: a column of codes and, with `types`, a column `type` that holds one of them."""

    code: str = "code"
    type: str | None = None
    types: Names = ("event",)
    vocabulary: Annotated[int, Field(ge=1)] = 4096

    @model_validator(mode="after")
    def _types_fit(self) -> CodesRule:
        if self.type is None and len(self.types) > 1:
            raise ValueError("several types need the column type that says which one an event has")
        return self


class TextRule(TimedRule):
    """Texts: a column `text`, or files ID.txt; they become what `flame_moe.data.text` says."""

    text: str = "text"
    encoder: str = "ngrams"
    width: Annotated[int, Field(ge=8)] = 256
    chunk: Annotated[int, Field(ge=8)] = 256
    overlap: Annotated[int, Field(ge=0)] = 32
    finetune: bool = False

    @property
    def options(self) -> TextOptions:
        plain = {name: getattr(self, name) for name in TextOptions.model_fields}
        return TextOptions.parse(plain, where="text")


class ImageRule(TimedRule):
    """Pictures: files ID.png or ID/*.png (also JPEG, DICOM), a table with a column `path`, or an array file."""

    path: str = "path"
    shape: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Literal[1, 3]] = (64, 64, 1)


class VolumeRule(ModalityRule):
    """Volumes ID.nii or ID.nii.gz, or arrays (right, anterior, superior), resampled to `size` and cut into blocks.

    Attributes:
        size: voxels of the result.
        block: voxels of a block.
        spacing: of arrays: millimetres from voxel to voxel.
    """

    spacing: tuple[Positive, Positive, Positive] = (1.0, 1.0, 1.0)
    size: tuple[int, int, int] = (32, 32, 32)
    block: tuple[int, int, int] = (8, 8, 8)

    @model_validator(mode="after")
    def _divides(self) -> VolumeRule:
        if any(b < 1 or s < 1 or s % b for s, b in zip(self.size, self.block, strict=True)):
            raise ValueError(f"size {self.size} is no multiple of block {self.block}")
        return self


class PatchesRule(ModalityRule):
    """Sequences of vectors (steps, features) in an array file."""

    scaling: Literal["standard", "none"] = "standard"


class WaveformRule(ModalityRule):
    """WFDB records ID.hea with these leads, or an array file whose arrays are at `rate` already."""

    leads: Names = ()
    rate: Positive
    seconds: Positive


KINDS: dict[str, type[ModalityRule]] = {
    "series": SeriesRule,
    "table": TableRule,
    "timed": VectorsRule,
    "codes": CodesRule,
    "text": TextRule,
    "image": ImageRule,
    "volume": VolumeRule,
    "patches": PatchesRule,
    "waveform": WaveformRule,
}


class FolderFile(Description):
    """All of `flame.toml`."""

    samples: SamplesRule
    window: Positive = 24.0
    modalities: Annotated[dict[Name, dict[str, Any]], Field(min_length=1)]
    tasks: dict[Name, TaskRule] = Field(default_factory=dict)

    def rules(self, where: str) -> dict[str, ModalityRule]:
        """The rule of each modality.

        Raises:
            RecipeError: naming the key, what is wrong with it and the nearest known key.
        """
        found: dict[str, ModalityRule] = {}
        for name, plain in self.modalities.items():
            place = f"{where}: modalities.{name}"
            kind = str(plain.get("kind", ""))
            if kind not in KINDS:
                raise RecipeError(f"unknown kind '{kind}'", where=place, mend=nearest(kind, KINDS))
            rule = found[name] = KINDS[kind].parse(plain, where=place)
            if isinstance(rule, TimedRule) and rule.unit == "datetime" and self.samples.origin is None:
                mend = "Set origin under [samples]: the column with the date and time from which they are counted."
                raise RecipeError("dates and times need an origin", where=f"{place}: unit", mend=mend)
        return found


def load_folder_file(raw: Path | None, name: str) -> tuple[FolderFile, dict[str, ModalityRule]]:
    """The description of a folder.

    Raises:
        DataError: if it is missing or no TOML.
        RecipeError: if a key or value is wrong.
    """
    if raw is None or not raw.is_dir():
        where = None if raw is None else str(raw)
        raise DataError("this source needs a folder", where=where, mend=f"Give the folder that holds {name}.")
    path = raw / name
    if not path.is_file():
        mend = f"Write one, or let `flame init {raw}` draft it."
        raise DataError(f"the folder has no description '{name}'", where=str(raw), mend=mend)
    try:
        plain = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"the description is not valid TOML: {error}", where=str(path)) from None
    described = FolderFile.parse(plain, where=str(path))
    return described, described.rules(str(path))
