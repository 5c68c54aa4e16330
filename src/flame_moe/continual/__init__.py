"""Continual learning: the stage protocol, truncation, and the methods behind one interface."""

from __future__ import annotations

from flame_moe.continual.learner import LearnedStage, Learner
from flame_moe.continual.methods import METHODS, Method

__all__ = ["METHODS", "LearnedStage", "Learner", "Method"]
