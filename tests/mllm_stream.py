"""The reduced stream of the room mllm, opened once for all tests of a worker; its base model is made once for all."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path

from flame_moe.errors import BusyError
from flame_moe.mllm.stream.tiers import Stream, open_stream


@cache
def small_stream(folder: Path) -> Stream:
    """tiny-ci in order a; waits while another worker makes the base model."""
    for _ in range(600):
        try:
            return open_stream("tiny-ci", "a", folder)
        except BusyError:
            time.sleep(0.5)
    raise TimeoutError("another worker did not finish the base model")
