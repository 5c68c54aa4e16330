"""What a source is: a name, its options, what it offers, and a stream of samples.

A source is one file in this folder with a module constant `SOURCE` and one line in the registry table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Generic, Self, TypeVar

from pydantic import Field, model_validator

from flame_moe.batch import Sample
from flame_moe.data.funnel import Funnel
from flame_moe.description import Description
from flame_moe.schema import Modality, Task

if TYPE_CHECKING:  # it brings polars, which nobody needs who only looks sources up
    from flame_moe.data.work import Work

Part = Annotated[float, Field(ge=0.0, le=1.0)]
Options = TypeVar("Options", bound=Description)


class SplitSpec(Description):
    """How subjects are dealt to train, val and test.

    Attributes:
        fractions: parts of the subjects in train, val and test; they add up to 1.
        seed: reorders the subjects; the split depends on nothing else but the subject names.
    """

    fractions: tuple[Part, Part, Part] = (0.7, 0.1, 0.2)
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if abs(sum(self.fractions) - 1.0) > 1e-6:
            raise ValueError(f"split fractions {self.fractions} add up to {sum(self.fractions):g}, not 1")
        return self


@dataclass(frozen=True)
class Source(Generic[Options]):
    """A place that samples come from.

    Attributes:
        name: how recipes and the command line call it.
        summary: one sentence for people.
        needs_raw: whether `read` needs a folder of raw data.
        options: the source's options, a description whose fields all have defaults.
        describe: (raw folder or None, options) -> the modalities and tasks of the store that is made with them; looks
            at names and headers only.
        read: (raw folder or None, options, funnel, work) -> samples, streamed; the funnel is complete once the stream
            is exhausted, and `work` knows the raw files that were read. Samples without a label for some or all tasks
            are allowed: the entry is left out.
        split: options -> how subjects are split.
    """

    name: str
    summary: str
    needs_raw: bool
    options: type[Options]
    describe: Callable[[Path | None, Options], tuple[tuple[Modality, ...], tuple[Task, ...]]]
    read: Callable[[Path | None, Options, Funnel, Work], Iterator[Sample]]
    split: Callable[[Options], SplitSpec]
