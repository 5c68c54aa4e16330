"""What is refused before a stage begins: tasks and modalities that are not there, or are not what the model learned."""

from __future__ import annotations

from collections.abc import Mapping

from flame_moe.data.store import Store
from flame_moe.errors import DataError, RecipeError, nearest
from flame_moe.schema import Modality, Recipe, Task


def resolve_task(recipe: Recipe, store: Store, name: str) -> Task:
    """A store's task with the recipe's changes.

    Raises:
        FlameError: if the store has no such task, or no such modality.
    """
    if name not in store.tasks:
        raise RecipeError(f"unknown task '{name}'", where=f"recipe '{recipe.name}'", mend=nearest(name, store.tasks))
    task = recipe.tasks[name].apply(store.tasks[name]) if name in recipe.tasks else store.tasks[name]
    for modality in task.modalities:
        if modality not in store.modalities:
            mend = nearest(modality, store.modalities)
            raise RecipeError(f"unknown modality '{modality}'", where=f"tasks.{name}.modalities", mend=mend)
    return task


def insist_on_samples(store: Store, task: Task) -> None:
    """Refuse a task that could not be learned from a store.

    Raises:
        DataError: if no training sample of the task has one of the modalities that it declares.
    """
    train = store.indices(task.name, "train", modalities=task.modalities)
    for name in task.modalities:
        if not store.present(name)[train].any():
            what = f"no training sample of task '{task.name}' has the modality '{name}'"
            mend = f"Leave it out with tasks.{task.name}.modalities, or prepare data that have it."
            raise DataError(what, where=str(store.path), mend=mend)


def unlike(known: Modality, here: Modality) -> str | None:
    """How a modality differs from the one of the same name that a model learned, in words; None if it does not."""
    if (known.kind, known.features) != (here.kind, here.features):
        learned = f"the model learned it as {known.kind} with {known.features}"
        return f"is {here.kind} with {here.features} features here, {learned}"
    for key, noun in (("channels", "channel"), ("units", "unit"), ("types", "event type")):
        was, now = getattr(known, key), getattr(here, key)
        if len(was) != len(now):
            return f"names {len(now)} {noun}s here, {len(was)} where the model learned it"
        for i, (a, b) in enumerate(zip(was, now, strict=True)):
            if a != b:
                return f"has {noun} {i} '{b}' here, '{a}' where the model learned it"
    for key in ("shape", "rate"):
        if getattr(known, key) != getattr(here, key):
            return f"has {key} {getattr(here, key)} here, {getattr(known, key)} where the model learned it"
    if _files(known) != _files(here):
        return "was numbered by the tokenizer of another model than the one that learned it"
    return None


def _files(modality: Modality) -> Mapping[str, str] | None:
    return None if modality.pretrained is None else modality.pretrained.files
