"""What of a learner lies on disk: its tensors, and a manifest from which the rest of it is built again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flame_moe.continual.identity import parse, plain
from flame_moe.continual.identity import tensors as gaussians
from flame_moe.continual.methods import MethodState
from flame_moe.continual.stages import LearnedStage
from flame_moe.data.preprocess import Preprocessor
from flame_moe.errors import CheckpointError, ExtraMissingError, FlameError
from flame_moe.nn.stacked import growables
from flame_moe.schema import Modality, Recipe, Task
from flame_moe.training.checkpoint import load_checkpoint, match, save_checkpoint

if TYPE_CHECKING:
    from flame_moe.continual.learner import Learner

KIND, VERSION = "flame-moe-model", 1
_METHOD, _GROUPS = "method|", "group|"
_RESTORE = "Restore the checkpoint from a backup."
_DAMAGED = (KeyError, TypeError, ValueError, AttributeError)
"""What reading plain data of another form than they were written in may raise."""


def save(learner: Learner, folder: str | Path) -> Path:
    """Write a learner atomically: safetensors and a JSON manifest (see `training.checkpoint`)."""
    manifest = {
        "recipe": learner.recipe.plain(),
        "modalities": [m.plain() for m in learner.model.modalities.values()],
        "tasks": [t.plain() for t in learner.tasks.values()],
        "stages": [s.plain() for s in learner.stages],
        "preprocessor": learner.preprocessor.plain(),
        "structure": {name: part.structure() for name, part in growables(learner.model)},
    }
    manifest["groups"] = plain(learner.groups)
    kept = learner.method.state()
    tensors = learner.model.state_dict() | {_METHOD + name: tensor for name, tensor in kept.tensors.items()}
    tensors |= {_GROUPS + name: tensor for name, tensor in gaussians(learner.groups).items()}
    return save_checkpoint(folder, tensors, {**manifest, "method": kept.meta}, kind=KIND, version=VERSION)


def load(make: Callable[[Recipe], Learner], folder: str | Path) -> Learner:
    """Read what `save` wrote, strictly; nothing in the file is executed.

    Args:
        make: a learner that has learned nothing.
        folder: of the checkpoint.

    Raises:
        CheckpointError: if it is missing, damaged, of another version, or does not fit the model it describes.
    """
    tensors, manifest = load_checkpoint(folder, kind=KIND, version=VERSION)
    where = str(folder)
    learner = _built(make, manifest, where)
    kept, numbers = _taken(tensors, _METHOD), _taken(tensors, _GROUPS)
    match(learner.model.state_dict(), tensors, where)
    learner.model.load_state_dict(tensors, strict=True)
    learner.model.requires_grad_(False)
    try:
        learner.groups = parse(manifest.get("groups", []), numbers)
    except _DAMAGED:
        raise CheckpointError("what samples look like is damaged", where=where, mend=_RESTORE) from None
    try:
        learner.method.restore(learner.model, MethodState(kept, manifest.get("method", {})))
    except _DAMAGED:
        raise CheckpointError("the method's state is damaged", where=where, mend=_RESTORE) from None
    return learner


def _built(make: Callable[[Recipe], Learner], manifest: dict[str, Any], where: str) -> Learner:
    """A learner of the form that the manifest describes, with no weights in it yet."""
    try:
        learner = make(Recipe.parse(manifest["recipe"], where=where))
        learner.preprocessor = Preprocessor.parse(manifest["preprocessor"], where=where)
        modalities = {m["name"]: Modality.parse(m, where=where) for m in manifest["modalities"]}
        tasks = {t["name"]: Task.parse(t, where=where) for t in manifest["tasks"]}
        for data in manifest["stages"]:
            record = LearnedStage.parse(data)
            new = [modalities[name] for name in record.new_modalities]
            known = [tasks[name] for name in record.tasks]
            learner.method.add(learner.model, record.index, known, record.modalities, new)
            learner.stages.append(record)
        structure = manifest["structure"]
        for name, part in growables(learner.model):
            part.restore(structure[name])
    except (*_DAMAGED, RuntimeError):
        raise CheckpointError("the manifest does not describe a model", where=where, mend=_RESTORE) from None
    except ExtraMissingError:
        raise
    except FlameError as error:
        what = f"the manifest does not describe a model: {error.what}"
        raise CheckpointError(what, where=where, mend=_RESTORE) from None
    return learner


def _taken(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take out of `tensors` those whose names begin so; named without it."""
    return {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
