"""A model of the size that hospitals' recipes use, a batch for it, and stages that were learned without training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from flame_moe.batch import FlexiBatch, Observation, Sample, collate
from flame_moe.continual.methods.growth import unfreeze
from flame_moe.continual.truncation import by_weight
from flame_moe.nn.losses import task_loss
from flame_moe.nn.model import Flame
from flame_moe.nn.stacked import StackedMatrix
from flame_moe.schema import Modality, ModelConfig, Task, TrainConfig
from flame_moe.training.optim import make_optimizer

MODALITIES = (
    Modality(name="vitals", kind="series", features=12),
    Modality(name="notes", kind="timed", features=32),
    Modality(name="film", kind="patches", features=24),
    Modality(name="static", kind="table", features=9),
)
TASK = Task(name="death", kind="binary", modalities=tuple(m.name for m in MODALITIES), classes=("no", "yes"))
RANK = 16


def model(seed: int = 0, **changes: object) -> Flame:
    """A network with one stage."""
    torch.manual_seed(seed)
    net = Flame(ModelConfig(**{"width": 64, "hidden": 128, "experts": 8, "steps": 24, **changes}))
    for modality in MODALITIES:
        net.add_modality(modality, 0)
    net.add_router_heads(TASK.modalities, 0)
    net.add_task(TASK)
    return net


def batch(size: int = 32, seed: int = 0) -> FlexiBatch:
    """Ragged samples, a fifth of the modalities missing."""
    generator = np.random.default_rng(seed)
    samples = []
    for i in range(size):
        parts = {}
        for m in MODALITIES:
            steps = {"series": 40, "timed": 5, "patches": 16}.get(m.kind, 1)
            steps = int(generator.integers(1, steps + 1))
            values = generator.normal(size=(steps, m.features)).astype(np.float32)
            times = np.sort(generator.random(steps)).astype(np.float32) if m.has_times else None
            observed = None
            if m.has_observed:
                observed = generator.random(values.shape) < 0.6
                observed[0, 0] = True
            if generator.random() < 0.8 or not parts:
                parts[m.name] = Observation(values, times, observed)
        target = {TASK.name: np.array([generator.integers(2)], dtype=np.float32)}
        samples.append(Sample(f"s{i}", f"p{i}", parts, target))
    return collate(samples, TASK.name, TASK.modalities, TASK.target_width)


@torch.no_grad()
def learn(net: Flame, stages: int, rank: int = RANK) -> None:
    """Let a network have learned stages up to `stages` in all: random updates of every weight, cut and frozen."""
    for stage in range(1, stages):
        grow(net, stage)
        for _, part in net.growables(TASK.modalities):
            part.commit(by_weight(rank) if isinstance(part, StackedMatrix) else None)
    net.requires_grad_(stages == 1)


@torch.no_grad()
def grow(net: Flame, stage: int) -> None:
    """Begin a stage, with an update that is not zero."""
    net.add_router_heads(TASK.modalities, stage)
    for _, part in net.growables(TASK.modalities):
        part.grow(stage)
        if isinstance(part, StackedMatrix):
            assert part.delta is not None
            part.delta.normal_(std=0.01)
        else:
            for parameter in part.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01 * torch.randn_like(parameter))


def begin(net: Flame, stage: int) -> None:
    """Begin a stage and let only what belongs to it train."""
    grow(net, stage)
    net.requires_grad_(False)
    unfreeze(net, stage, [TASK.name])


def training_step(net: Flame, part: FlexiBatch, cursor: int) -> Callable[[], None]:
    """Forward, backward, clipping and update, as the training loop does them."""
    net.train()
    optimizer = make_optimizer(net, TrainConfig())
    trainable = [p for p in net.parameters() if p.requires_grad]

    def call() -> None:
        optimizer.zero_grad()
        out = net(part, cursor)
        (task_loss(TASK, out.logits, part.target).mean() + out.aux).backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()

    return call


def inference(net: Flame, part: FlexiBatch, cursor: int) -> Callable[[], object]:
    net.eval()

    def call() -> object:
        with torch.inference_mode():
            return net(part, cursor)

    return call
