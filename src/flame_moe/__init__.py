"""FLAME: one sparse mixture-of-experts model that learns many tasks, and more of them later, without forgetting.

A sample has any subset of modalities, a task names those that it reads, a stage is a set of tasks learned together.
What the model predicts for a task never changes again, bit for bit, whatever it learns afterwards.

Example:
    >>> import flame_moe as fm
    >>> done = fm.run(fm.load_recipe("digits"), "runs/digits")  # doctest: +SKIP
    >>> done.results.final("digit").metrics["auroc"]  # doctest: +SKIP
    0.997

Names are imported when they are first used, so `import flame_moe` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flame_moe.batch import FlexiBatch, Observation, Sample
    from flame_moe.certification import certify, verify
    from flame_moe.continual.learner import Learner
    from flame_moe.data.prepare import prepare
    from flame_moe.data.store import Store
    from flame_moe.data.writer import StoreWriter
    from flame_moe.errors import FlameError
    from flame_moe.nn.model import Flame
    from flame_moe.recipes import load_recipe
    from flame_moe.report.page import write_report
    from flame_moe.results import Results
    from flame_moe.runs import Run, extend, run
    from flame_moe.schema import MethodConfig, Modality, ModelConfig, Recipe, Stage, Task, TrainConfig
    from flame_moe.scoring import evaluate, predict

__version__ = "0.1.0"

__all__ = [
    "Flame",
    "FlameError",
    "FlexiBatch",
    "Learner",
    "MethodConfig",
    "Modality",
    "ModelConfig",
    "Observation",
    "Recipe",
    "Results",
    "Run",
    "Sample",
    "Stage",
    "Store",
    "StoreWriter",
    "Task",
    "TrainConfig",
    "certify",
    "evaluate",
    "extend",
    "load_recipe",
    "predict",
    "prepare",
    "run",
    "verify",
    "write_report",
]

_ROOMS = {
    "batch": ("FlexiBatch", "Observation", "Sample"),
    "certification": ("certify", "verify"),
    "continual.learner": ("Learner",),
    "data.prepare": ("prepare",),
    "data.store": ("Store",),
    "data.writer": ("StoreWriter",),
    "errors": ("FlameError",),
    "nn.model": ("Flame",),
    "recipes": ("load_recipe",),
    "report.page": ("write_report",),
    "results": ("Results",),
    "runs": ("Run", "extend", "run"),
    "schema": ("MethodConfig", "Modality", "ModelConfig", "Recipe", "Stage", "Task", "TrainConfig"),
    "scoring": ("evaluate", "predict"),
}
_HOME = {name: f"{__name__}.{room}" for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
