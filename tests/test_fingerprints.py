"""Routing fingerprints say what the network did: counted against a loop over samples."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from flame_moe.training.routing import fingerprints
from tests.tiny import EVERYTHING, batch_of, flame, sample


def test_fingerprints_count_what_every_single_sample_does() -> None:
    model, draw = flame(), np.random.default_rng(0)
    names = EVERYTHING.modalities
    samples = [sample(i, draw, names if i % 3 == 0 else names[i % 3 :: 2]) for i in range(12)]
    found = {f.modality: f for f in fingerprints(model, [batch_of(samples[:5]), batch_of(samples[5:])], 0)}
    assert set(found) == set(names)
    for name in names:
        own = [s for s in samples if name in s.modalities]
        with torch.inference_mode():
            alone = [model(batch_of([s]), 0).routing[0][name] for s in own]
        sets = Counter(tuple(sorted(r.chosen[0].tolist())) for r in alone)
        activation = [sum(e in chosen for chosen in sets.elements()) / len(own) for e in range(model.config.experts)]
        assert found[name].activation == pytest.approx(activation)
        assert found[name].gate == pytest.approx(torch.stack([r.sparse()[0] for r in alone]).mean(0).tolist(), abs=1e-5)
        assert found[name].usual == pytest.approx(max(sets.values()) / len(own))


def test_a_router_that_ignores_the_sample_is_told() -> None:
    model, draw = flame(), np.random.default_rng(0)
    for router in model.blocks[0].routers.values():
        head = router.head(0)
        with torch.no_grad():
            head.gate.copy_(torch.arange(4.0)[:, None].expand(4, 8) * 100)
    batches = [batch_of([sample(i, draw, EVERYTHING.modalities) for i in range(6)])]
    assert {f.usual for f in fingerprints(model, batches, 0)} == {1.0}
