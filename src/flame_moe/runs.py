"""A run from recipe to report: the calls behind the command line, and the three lines of Python.

A run folder is whole at every moment; it is replaced when a stage is complete:

    recipe.json      what was asked
    model/           the checkpoint (see `flame_moe.training.checkpoint`)
    reference/       each task's test logits right after its own stage, against which drift is measured
    certificate/     after `flame certify` (see `flame_moe.continual.certificate`); kept by later stages
    results.json     everything measured (docs/results.md)
    report.html      the page made from it
    selected/        with select = "per_task": a checkpoint per task of the last stage, at the task's own best epoch
    resume/          only while a stage is being trained: its state after the last whole epoch
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from flame_moe.continual import Learner
from flame_moe.continual.admission import insist_on_samples, resolve_task
from flame_moe.continual.methods import alike, make_method
from flame_moe.continual.rounds import STATE_KIND, STATE_VERSION
from flame_moe.data.store import Store
from flame_moe.errors import CheckpointError, DataError, RecipeError, nearest
from flame_moe.files import replacing_folder, restore_folder, whole, write_text
from flame_moe.locking import writing
from flame_moe.nn import products
from flame_moe.recorder import Recorder, Reference, data_summary
from flame_moe.results import Comparison, Results
from flame_moe.schema import Recipe, Stage
from flame_moe.training.checkpoint import load_checkpoint, save_checkpoint
from flame_moe.training.monitor import Monitor

RECIPE, RESULTS, REPORT = "recipe.json", "results.json", "report.html"
MODEL, REFERENCE, SELECTED, RESUME, CERTIFICATE = "model", "reference", "selected", "resume", "certificate"
OWN = (RECIPE, RESULTS, REPORT, MODEL, REFERENCE, SELECTED, RESUME, CERTIFICATE)
REFERENCE_KIND, REFERENCE_VERSION = "flame-moe-reference", 1


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: its folder.
        learner: the model; `learner.predict` scores samples of a store.
        results: what was measured.
    """

    path: Path
    learner: Learner
    results: Results

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Open a run folder.

        Raises:
            FlameError: if it is not one, or something in it is damaged.
        """
        place = insist_on_run(path)
        learner, results = Learner.load(place / MODEL), Results.load(place / RESULTS)
        _insist_on_one(learner, results, str(path))
        return cls(Path(path), learner, results)


def insist_on_run(path: str | Path) -> Path:
    """Where the files of a run are.

    Raises:
        DataError: if there is no such folder.
    """
    place = whole(path)
    if not place.is_dir():
        raise DataError("there is no such run", where=str(path), mend="Check the path, or make one: `flame run`.")
    return place


def check(recipe: Recipe, store: Store) -> None:
    """Everything about a recipe that can be wrong for a store, before anything is trained or written.

    Raises:
        FlameError: unknown method, task, modality, or a recipe that names tasks it does not learn.
    """
    learned = [name for stage in recipe.stages for name in stage.tasks]
    for name in learned:
        insist_on_samples(store, resolve_task(recipe, store, name))
    for name in recipe.tasks:
        if name not in learned:
            raise RecipeError(
                f"the recipe changes task '{name}' but learns it in no stage", mend=nearest(name, learned)
            )
    for config in (recipe.method, *(alike(name, recipe.method) for name in recipe.compare)):
        method = make_method(config)
        for index, stage in enumerate(recipe.stages):
            method.rounds(index, stage.settings(recipe.train).epochs)


def open_store(recipe: Recipe, store: Store | str | Path | None = None, *, make: bool = True) -> Store:
    """The store of a recipe: the one given, or the one it names.

    Args:
        recipe: whose samples are wanted.
        store: instead of the one that the recipe names.
        make: prepare a store that does not exist yet from the recipe's source, at its place.

    Raises:
        FlameError: if no store is named, or it cannot be opened or made.
    """
    if isinstance(store, Store):
        return store
    place = store if store is not None else recipe.data.store
    if place is None:
        raise RecipeError("the recipe names no store", where="data.store", mend="Name a folder, or give --store.")
    if Path(place).exists() or not make:
        return Store.open(place)
    data = recipe.data
    from flame_moe.data.prepare import prepare  # brings polars, which a store that is there does not need

    return prepare(data.source, data.raw, place, options=data.options, tasks=data.tasks)


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    store: Store | str | Path | None = None,
    monitor: Monitor | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Run:
    """Learn every stage of a recipe, measure after each, and write a run folder.

    Args:
        recipe: what to do.
        out: the run folder; must not exist unless `resume` or `overwrite`.
        store: the samples; default the recipe's own.
        monitor: who is told of progress.
        resume: go on with a run that was cut off; it ends with the same weights as if it had not been.
        overwrite: replace a run that is there, once the first stage of the new one is complete.

    Raises:
        FlameError: before anything is written, if recipe, store and folder do not fit together.
    """
    out = Path(out)
    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    _refuse(out, resume=resume, overwrite=overwrite)
    store = open_store(recipe, store)
    check(recipe, store)
    recipe = at_store(recipe, store)
    out.parent.mkdir(parents=True, exist_ok=True)
    with writing(out, "flame run"):
        restore_folder(out)
        # Looked at again: another process may have made it meanwhile.
        _refuse(out, resume=resume, overwrite=overwrite)
        with _set_aside(out) if overwrite and not resume else nullcontext(), products.again(_multiplied(out)):
            return _run(recipe, out, store, monitor)


def _run(recipe: Recipe, out: Path, store: Store, monitor: Monitor | None) -> Run:
    learner, recorder = _begin(recipe, out)
    recorder.data = recorder.data or data_summary(store)
    recorder.stores = dict.fromkeys([name for stage in recipe.stages for name in stage.tasks], store)
    base = None
    for stage in recipe.stages[len(learner.stages) :]:
        _learn(learner, recorder, store, stage, out, monitor)
        base = copy.deepcopy(learner) if recipe.compare and len(learner.stages) == 1 else base
    done = {other.name for other in recorder.comparison}
    for name in [name for name in recipe.compare if name not in done]:
        recorder.comparison.append(_compare(name, recipe, store, base, monitor))
        _write(learner, recorder, out)
    return Run(out, learner, recorder.results())


def extend(
    path: str | Path,
    tasks: Sequence[str],
    *,
    store: Store | str | Path | None = None,
    epochs: int | None = None,
    monitor: Monitor | None = None,
) -> Run:
    """Learn one more stage on a saved run. Earlier tasks are measured again, to show that they did not change.

    Args:
        path: the run folder; replaced when the stage is complete, untouched before.
        tasks: tasks of the new stage, learned jointly.
        store: samples of the new tasks; default the run's own store. Earlier tasks are measured where this store, or
            the run's own, has them.
        epochs: default the recipe's.
        monitor: who is told of progress.

    Raises:
        FlameError: if run, tasks and store do not fit together, or another process is writing the run.
    """
    path = Path(path)
    insist_on_run(path)
    with writing(path, "flame extend"):
        restore_folder(path)
        with products.again(_multiplied(path)):
            return _extend(Run.open(path), tasks, store, epochs, monitor)


def _extend(
    old: Run,
    tasks: Sequence[str],
    store: Store | str | Path | None,
    epochs: int | None,
    monitor: Monitor | None,
) -> Run:
    path = old.path
    recipe = old.learner.recipe
    chosen = open_store(recipe, store, make=False)
    stage = Stage.parse({"tasks": list(tasks), "epochs": epochs}, where="the new stage")
    old.learner.resolve(chosen, stage)
    recorder = Recorder.resume(old.results, _load_reference(path / REFERENCE))
    homes = [s for s in (_own_store(recipe), chosen) if s is not None]
    recorder.stores = {name: s for name in old.learner.tasks for s in reversed(homes) if name in s.tasks}
    recorder.stores |= dict.fromkeys(stage.tasks, chosen)
    _learn(old.learner, recorder, chosen, stage, path, monitor)
    return Run(path, old.learner, recorder.results())


def at_store(recipe: Recipe, store: Store) -> Recipe:
    """The recipe with the place of the store it is run on, so that the run can find it again."""
    data = recipe.data.model_copy(update={"store": str(store.path.resolve())})
    return recipe.model_copy(update={"data": data})


def _refuse(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Insist that `out` is free, or a run that may be gone on with or replaced; nothing else is ever deleted."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (resume or overwrite):
        mend = "Give another folder, go on with --resume, or replace it with --overwrite."
        raise DataError("there is already something", where=str(out), mend=mend)
    if not (out / RECIPE).is_file():
        raise DataError("what is there is not a run", where=str(out), mend="Give another folder.")
    others = [entry.name for entry in _others(out)]
    if overwrite and not resume and others:
        mend = "Move it away, or give another folder."
        raise DataError(f"the run folder holds '{others[0]}', which is no part of the run", where=str(out), mend=mend)


@contextmanager
def _set_aside(out: Path) -> Iterator[None]:
    """Move an old run out of the way; it comes back if the new one ends before its first stage is complete."""
    old = out.with_name(f".{out.name}.replaced")
    if old.exists() and not (out / MODEL).exists():
        # An earlier replacement was killed before its first stage was complete.
        shutil.rmtree(out, ignore_errors=True)
        old.rename(out)
    if not out.exists():
        yield
        return
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    try:
        yield
    except BaseException:
        if not (out / MODEL).exists():
            shutil.rmtree(out, ignore_errors=True)
            old.rename(out)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _insist_on_one(learner: Learner, results: Results, where: str) -> None:
    """Refuse a folder whose model and results were put together from two runs."""
    one = (learner.recipe, [stage.tasks for stage in learner.stages])
    other = (Recipe.parse(results.recipe, where=where), [stage.tasks for stage in results.stages])
    if one != other:
        what = "the model and the results are of two different runs"
        raise CheckpointError(what, where=where, mend="Restore the run from a backup.")


def _others(out: Path) -> list[Path]:
    """What somebody else put into a run folder; temporary siblings that a crash left behind are not meant."""
    ours = tuple(f".{name}." for name in OWN)
    return sorted(e for e in out.iterdir() if e.name not in OWN and not e.name.startswith(ours))


def _begin(recipe: Recipe, out: Path) -> tuple[Learner, Recorder]:
    """A fresh learner, or the one that a run that was cut off has saved."""
    if not (out / RECIPE).is_file():
        write_text(out / RECIPE, json.dumps(recipe.plain(), indent=1))
        return Learner(recipe), Recorder(recipe)
    # Parsed and written again, so that a key that was added since, at its default, is no difference.
    before = Recipe.parse(json.loads((out / RECIPE).read_text(encoding="utf-8")), where=str(out / RECIPE)).plain()
    if before != recipe.plain():
        changed = sorted(
            key for key in before.keys() | recipe.plain().keys() if before.get(key) != recipe.plain().get(key)
        )
        what = f"the run was begun with another recipe ({', '.join(changed)} differ)"
        raise RecipeError(what, where=str(out), mend="Resume with the same recipe, or start anew with --overwrite.")
    if not (out / MODEL).exists():
        return Learner(recipe), Recorder(recipe)
    found = Run.open(out)
    return found.learner, Recorder.resume(found.results, _load_reference(out / REFERENCE))


def _learn(
    learner: Learner, recorder: Recorder, store: Store, stage: Stage, out: Path, monitor: Monitor | None
) -> None:
    """One stage: learn, measure, and only then replace the run folder."""
    index = len(learner.stages)
    if monitor is not None:
        monitor.stage(index, max(len(learner.recipe.stages), index + 1), learner.recipe.method.name)
    recorder.learn(learner, store, stage, monitor=monitor, state_folder=out / RESUME)
    _write(learner, recorder, out)


def _multiplied(out: Path) -> str | None:
    """The library of matrix products that a run was begun with (`flame_moe.nn.products`); None if it is not known."""
    if (out / RESULTS).is_file():
        return Results.load(out / RESULTS).environment.products
    if not (out / RESUME).is_dir():
        return None
    _, manifest = load_checkpoint(out / RESUME, kind=STATE_KIND, version=STATE_VERSION)
    found: str | None = manifest.get("products")
    return found


def _compare(name: str, recipe: Recipe, store: Store, base: Learner | None, monitor: Monitor | None) -> Comparison:
    """Learn the same stream by another method, from the same first stage (trained anew if it is not at hand)."""
    method = alike(name, recipe.method)
    other = recipe.model_copy(update={"method": method})
    learner = Learner(other) if base is None else base.with_method(method, store)
    recorder = Recorder(recipe, stores=dict.fromkeys([t for stage in recipe.stages for t in stage.tasks], store))
    if learner.stages:
        recorder.after_stage(learner)
    for stage in recipe.stages[len(learner.stages) :]:
        if monitor is not None:
            monitor.stage(len(learner.stages), len(recipe.stages), name)
        recorder.learn(learner, store, stage, monitor=monitor, compressed=False)
    rows = {key: tuple(getattr(recorder, key)) for key in ("stages", "evaluations", "drift", "footprint")}
    return Comparison(name=name, **rows)


def _write(learner: Learner, recorder: Recorder, out: Path) -> None:
    """Replace the run folder by one that holds what is known now, and what others put there."""
    from flame_moe.report import write_report

    results = recorder.results()
    recipe = (out / RECIPE).read_text(encoding="utf-8")
    with replacing_folder(out) as work:
        write_text(work / RECIPE, recipe)
        learner.save(work / MODEL)
        for task, variant in learner.variants.items():
            variant.save(work / SELECTED / task)
        logits = {name: torch.from_numpy(ref.logits) for name, ref in recorder.reference.items()}
        samples = {name: ref.samples for name, ref in recorder.reference.items()}
        kind, version = REFERENCE_KIND, REFERENCE_VERSION
        save_checkpoint(work / REFERENCE, logits, {"samples": samples}, kind=kind, version=version)
        results.save(work / RESULTS)
        write_report(results, work / REPORT)
        for entry in [*_others(out), *out.glob(CERTIFICATE)]:
            (shutil.copytree if entry.is_dir() else shutil.copy2)(entry, work / entry.name)


def _load_reference(folder: Path) -> dict[str, Reference]:
    tensors, manifest = load_checkpoint(folder, kind=REFERENCE_KIND, version=REFERENCE_VERSION)
    try:
        return {name: Reference(tensor.numpy(), manifest["samples"][name]) for name, tensor in tensors.items()}
    except (KeyError, TypeError):
        raise CheckpointError("the manifest is damaged", where=str(folder)) from None


def _own_store(recipe: Recipe) -> Store | None:
    """The store the run was trained on, if it is still there."""
    if recipe.data.store is None or not Path(recipe.data.store).exists():
        return None
    return Store.open(recipe.data.store)
