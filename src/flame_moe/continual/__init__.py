"""Continual learning: the stage protocol, truncation, and the methods behind one interface."""

from __future__ import annotations

from flame_moe.continual.learner import Learner
from flame_moe.continual.methods import METHODS, Method
from flame_moe.continual.stages import LearnedStage

__all__ = ["METHODS", "LearnedStage", "Learner", "Method"]
