"""The most memory a process held while it did something."""

from __future__ import annotations

from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


class PeakMemory:
    """Peak memory from the moment this is made.

    On a GPU what PyTorch has allocated there; else the resident memory of the process, mapped files included, which the
    system counts (Linux only). The peak belongs to the process: making a new one starts the count anew for all.

    Example:
        >>> peak = PeakMemory()
        >>> peak.bytes is None or peak.bytes > 0
        True
    """

    def __init__(self) -> None:
        self._resident = False
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
            self._resident = True
        except OSError:
            pass

    @property
    def bytes(self) -> int | None:
        """The peak until now; None where the system does not tell."""
        if torch.cuda.is_available() and (allocated := torch.cuda.max_memory_allocated()):
            return int(allocated)
        if not self._resident:
            return None
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        peak = next((line.split()[1] for line in lines if line.startswith("VmHWM:")), None)
        return None if peak is None else int(peak) * 1024
