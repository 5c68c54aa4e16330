"""Several stores as one: what other sources prepared, side by side, for one model over all of them.

Each part keeps its cohort, its labels and its split. Its modalities, tasks, samples and subjects get the part's name in
front (`mimic_vitals`, `mimic_ihm`), so nothing is mixed up by accident. Modalities of several parts that mean the same,
with the same channels in the same units, can be given one common name; then one encoder and one router serve them all:

    [data]
    source = "join"
    store = "stores/both"

    [data.options.parts.here]
    source = "physionet2012"
    raw = "raw/physionet2012"
    store = "stores/physionet2012"       # prepared from `raw` if it is not there yet

    [data.options.parts.there]
    store = "stores/their-data"
    common = { their_vitals = "vitals" }
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from flame_moe.batch import Sample
from flame_moe.data.funnel import Funnel
from flame_moe.data.sources.base import Source, SplitSpec
from flame_moe.data.store import Store
from flame_moe.data.work import Work
from flame_moe.description import Description
from flame_moe.errors import DataError, RecipeError, nearest
from flame_moe.schema import SPLITS, Modality, Name, Task


class Part(Description):
    """One store of a join.

    Attributes:
        store: where it is, or is put when it is prepared.
        source, raw, options: how to prepare it if it is not there, as in a recipe's `[data]`.
        tasks: which of its tasks; default all.
        common: its modality -> the common name under which several parts share it.
    """

    store: str
    source: Name | None = None
    raw: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    tasks: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    common: dict[Name, Name] = Field(default_factory=dict)

    def open(self, alias: str) -> Store:
        """The store; prepared first if it is not there and the part says how.

        Raises:
            FlameError: if it is neither there nor can be prepared, or lacks a task or modality that the part names.
        """
        if Path(self.store).exists() or self.source is None:
            store = Store.open(self.store)
        else:
            # Imported here because preparing knows all sources, this one among them.
            from flame_moe.data.prepare import prepare

            store = prepare(self.source, self.raw, self.store, options=self.options, tasks=self.tasks)
        for kind, named, known in (
            ("task", self.tasks or (), store.tasks),
            ("modality", self.common, store.modalities),
        ):
            for name in named:
                if name not in known:
                    raise RecipeError(f"unknown {kind} '{name}'", where=f"parts.{alias}", mend=nearest(name, known))
        return store

    def modality(self, alias: str, name: str) -> str:
        """What a modality of the part is called in the join."""
        return self.common.get(name, f"{alias}_{name}")


class JoinOptions(Description):
    """Which stores are joined.

    Attributes:
        parts: name -> part, in the order in which their samples are written.
    """

    parts: dict[Name, Part] = Field(default_factory=dict)

    def opened(self) -> dict[str, Store]:
        """Every part's store by its name.

        Raises:
            FlameError: if there is no part, or one cannot be opened.
        """
        if not self.parts:
            mend = "Describe each in a table [data.options.parts.NAME] of the recipe."
            raise RecipeError("a join needs parts", where="options of source 'join'", mend=mend)
        return {alias: part.open(alias) for alias, part in self.parts.items()}


def describe(raw: Path | None, options: JoinOptions) -> tuple[tuple[Modality, ...], tuple[Task, ...]]:
    """Modalities and tasks of all parts under their joint names.

    Raises:
        DataError: if a common modality is not the same in two parts.
    """
    modalities: dict[str, Modality] = {}
    tasks: list[Task] = []
    for alias, store in options.opened().items():
        part = options.parts[alias]
        wanted = [store.tasks[name] for name in part.tasks or store.tasks]
        read = {name for task in wanted for name in task.modalities}
        for name, modality in store.modalities.items():
            if name in read:
                joint = _renamed(modality, part.modality(alias, name))
                _refuse_unlike(modalities.setdefault(joint.name, joint), joint, alias)
        tasks += [
            _renamed(task, f"{alias}_{task.name}", modalities=[part.modality(alias, m) for m in task.modalities])
            for task in wanted
        ]
    return tuple(modalities.values()), tuple(tasks)


def read(raw: Path | None, options: JoinOptions, funnel: Funnel, work: Work) -> Iterator[Sample]:
    """Stream the samples of one part after the other; what each part's own funnel says is counted under its name."""
    stores = options.opened()
    steps = {alias: Funnel.parse(store.manifest["funnel"]).steps for alias, store in stores.items()}
    funnel.start(sum(s[0].before if s else len(stores[alias]) for alias, s in steps.items()), "records of all parts")
    funnel.rule("kept by the rules of their part", sum(len(store) for store in stores.values()))
    for alias, store in stores.items():
        for step in steps[alias]:
            if step.dropped:
                funnel.count(f"{alias}: not in the cohort, by the rule: {step.text}", step.dropped)
        for text, n in store.manifest["funnel"]["counts"].items():
            funnel.count(f"{alias}: {text}", n)
        part, wanted = options.parts[alias], set(options.parts[alias].tasks or store.tasks)
        read_here = {name for task in wanted for name in store.tasks[task].modalities}
        kept = 0
        for i in range(len(store)):
            sample = store.sample(i)
            present = {part.modality(alias, m): o for m, o in sample.modalities.items() if m in read_here}
            targets = {f"{alias}_{name}": t for name, t in sample.targets.items() if name in wanted}
            if present:
                kept += 1
                split = SPLITS[store.splits[i]]
                yield Sample(f"{alias}/{sample.id}", f"{alias}/{sample.subject}", present, targets, split)
        if kept < len(store):
            funnel.count(f"{alias}: without any modality that its tasks read, left out", len(store) - kept)


def split(options: JoinOptions) -> SplitSpec:
    """Not asked: every part keeps its own split."""
    return SplitSpec()


def _renamed(described: Any, name: str, **changes: Any) -> Any:
    """A modality or task under another name."""
    return type(described).parse({**described.plain(), "name": name, **changes}, where=f"join: '{name}'")


def _refuse_unlike(first: Modality, other: Modality, alias: str) -> None:
    for key in ("kind", "features", "channels", "units", "types", "vocabulary", "shape", "rate", "scaling"):
        here, there = getattr(first, key), getattr(other, key)
        if here != there:
            what = f"modality '{other.name}' is not the same in all parts: {key} is {here} before and {there} here"
            raise DataError(what, where=f"parts.{alias}", mend="Share only what means the same; rename the other.")


SOURCE = Source(
    name="join",
    summary="Several stores side by side, with the name of each part in front of its modalities and tasks.",
    needs_raw=False,
    options=JoinOptions,
    describe=describe,
    read=read,
    split=split,
)
