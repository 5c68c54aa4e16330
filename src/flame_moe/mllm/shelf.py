"""Experts that are trained alone, kept for the next method that needs the same.

An expert that is trained with everything else frozen and no other expert in its way does not depend on the method that
routes to it, nor on the tasks before it: on one machine it is the same to the bit. A comparison trains it once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flame_moe.errors import CheckpointError
from flame_moe.training.checkpoint import load_checkpoint, save_checkpoint

_KIND, _VERSION = "flame-moe-expert", 1


class Taught(NamedTuple):
    """What teaching an expert cost, when it was taught.

    Attributes:
        samples: that it was shown, with repetition.
        seconds: of wall time.
    """

    samples: int
    seconds: float


@dataclass(frozen=True)
class Shelf:
    """A folder of experts.

    Attributes:
        folder: where they are.
        base: whatever decides an expert beside what it is asked for with: model, data, device.
    """

    folder: Path
    base: str

    def take(self, what: Mapping[str, object], parameters: Mapping[str, nn.Parameter]) -> Taught | None:
        """Put the weights of an expert into parameters; None if it is not there.

        Args:
            what: task, seed and settings that decide it.
            parameters: name -> parameter of the expert.

        Raises:
            CheckpointError: if what is there is damaged, or has other weights.
        """
        place = self._place(what)
        if not place.exists():
            return None
        tensors, meta = load_checkpoint(place, kind=_KIND, version=_VERSION)
        if {n: t.shape for n, t in tensors.items()} != {n: p.shape for n, p in parameters.items()}:
            mend = "Remove the folder; the expert is then trained again."
            raise CheckpointError("the expert that is kept has other weights", where=str(place), mend=mend)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])
        return Taught(int(meta["samples"]), float(meta["seconds"]))

    def keep(self, what: Mapping[str, object], parameters: Mapping[str, Tensor], taught: Taught) -> None:
        """Keep an expert; whole or not at all."""
        meta = {"what": dict(what), **taught._asdict()}
        save_checkpoint(self._place(what), dict(parameters), meta, kind=_KIND, version=_VERSION)

    def _place(self, what: Mapping[str, object]) -> Path:
        told = json.dumps([self.base, what], sort_keys=True)
        return self.folder / f"{what['task']}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
