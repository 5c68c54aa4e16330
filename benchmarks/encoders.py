"""What the encoders of codes, pictures and signals cost: CPU seconds of a training step; and how fast texts are hashed.

    python -m benchmarks.encoders

Batches of 64, model width 64 and every other setting at its default, dropout on, one thread; median of five.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from flame_moe.batch import ModalityBatch
from flame_moe.data.ngrams import ngram_vectors
from flame_moe.nn.encoders import ENCODERS
from flame_moe.schema import Modality, ModelConfig

BATCH = 64
WORDS = ("chest", "pain", "no", "acute", "distress", "stable", "overnight", "lungs", "clear", "afebrile")


def seconds(call: Callable[[], object], times: int = 5) -> float:
    """Median CPU time, after one call that warms up."""
    call()
    found = []
    for _ in range(times):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return statistics.median(found)


def codes(length: int) -> tuple[Modality, ModalityBatch]:
    modality = Modality(name="m", kind="codes", features=2, types=("diagnosis", "drug", "lab", "treatment"))
    values = torch.stack([torch.randint(0, size, (BATCH, length)) for size in (4, 4097)], dim=-1).float()
    return modality, batch(values, torch.rand(BATCH, length).sort(1).values)


def image(side: int, channels: int) -> tuple[Modality, ModalityBatch]:
    shape = (side, side, channels)
    modality = Modality(name="m", kind="image", features=side * side * channels, shape=shape)
    return modality, batch(torch.randn(BATCH, 1, side * side * channels), torch.rand(BATCH, 1))


def waveform(length: int, channels: int) -> tuple[Modality, ModalityBatch]:
    return Modality(name="m", kind="waveform", features=channels), batch(torch.randn(BATCH, length, channels), None)


def batch(values: torch.Tensor, times: torch.Tensor | None) -> ModalityBatch:
    return ModalityBatch(torch.arange(BATCH), values, torch.full((BATCH,), values.shape[1]), times)


def cost(modality: Modality, part: ModalityBatch) -> float:
    net = ENCODERS[modality.kind](modality, ModelConfig(), 0).train()

    def step() -> None:
        x, mask = net(part, 0)
        x[mask].square().sum().backward()

    return seconds(step)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cases = {
        "codes, 128 events": codes(128),
        "codes, 256 events": codes(256),
        "image, 28 x 28 x 1": image(28, 1),
        "image, 64 x 64 x 1": image(64, 1),
        "image, 64 x 64 x 3": image(64, 3),
        "image, 224 x 224 x 1": image(224, 1),
        "waveform, 1,000 x 12": waveform(1000, 12),
        "waveform, 5,000 x 12": waveform(5000, 12),
    }
    for name, (modality, part) in cases.items():
        print(f"{name:24} {1e3 * cost(modality, part):6.0f} ms")
    notes = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 21)) + f" {i}" for i in range(25000)]
    print(f"n-grams, 25,000 notes of {len(notes[0])} characters: {seconds(lambda: ngram_vectors(notes, 256), 1):.1f} s")


if __name__ == "__main__":
    main()
