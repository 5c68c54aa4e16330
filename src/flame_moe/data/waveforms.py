"""Waveforms of a release, brought to one rate and length: what a source needs of WFDB records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import signal

from flame_moe.errors import DataError, nearest
from flame_moe.extras import needed

_BROKEN = (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
"""What the reader raises on records that are damaged or not what their name says."""


class Waveform(NamedTuple):
    """A signal at one rate.

    Attributes:
        values: (samples, leads) float32, physical units as the record states them.
        filled: how many missing samples of the record were filled by a straight line between their neighbours.
    """

    values: NDArray[np.float32]
    filled: int


def waveform_leads(path: Path) -> tuple[tuple[str, ...], tuple[str, ...], float]:
    """Names and units of the leads and samples per second, from the header alone.

    Args:
        path: of the header (.hea).

    Raises:
        DataError: if it cannot be read.
        ExtraMissingError: if the extra `waveforms` is not installed.
    """
    library = _wfdb()
    try:
        head = library.rdheader(str(path.with_suffix("")))
        return tuple(head.sig_name), tuple(head.units), float(head.fs)
    except _BROKEN as error:
        raise _unreadable(path, error) from None


def read_waveform(path: Path, leads: Sequence[str], rate: float, seconds: float) -> Waveform:
    """The first seconds of some leads of a WFDB record, resampled.

    The signal is brought to `rate` by polyphase filtering (low-passed where that is lower), after which at most
    `seconds * rate` samples, rounded, are kept. A record that is shorter stays shorter: nothing is padded.

    Args:
        path: of the header (.hea).
        leads: names in the order wanted, compared without case.
        rate: samples per second of the result.
        seconds: how much is read from the start of the record.

    Raises:
        DataError: if the record cannot be read, lacks a lead, or a lead has no sample.
        ExtraMissingError: if the extra `waveforms` is not installed.
    """
    names, _, given = waveform_leads(path)
    known = {name.lower(): i for i, name in enumerate(names)}
    for lead in leads:
        if lead.lower() not in known:
            raise DataError(f"the record has no lead '{lead}'", where=str(path), mend=nearest(lead, names))
    try:
        record = _wfdb().rdrecord(
            str(path.with_suffix("")),
            sampto=min(math.ceil(seconds * given), _length(path)),
            channels=[known[lead.lower()] for lead in leads],
        )
        raw = np.asarray(record.p_signal, dtype=np.float64)
    except _BROKEN as error:
        raise _unreadable(path, error) from None
    order = [list(record.sig_name).index(names[known[lead.lower()]]) for lead in leads]
    filled = fill_gaps(raw[:, order], leads, str(path))
    return Waveform(resample(filled.values, given, rate, seconds), filled.filled)


def resample(values: NDArray[Any], given: float, rate: float, seconds: float) -> NDArray[np.float32]:
    """(samples, leads) at `given` per second -> the first `seconds` at `rate` per second."""
    if given != rate:
        ratio = Fraction(rate / given).limit_denominator(10_000)
        # The ends go on along the line between them: a record does not start and end with a jump to zero.
        values = signal.resample_poly(values, ratio.numerator, ratio.denominator, axis=0, padtype="line")
    return values[: max(1, round(seconds * rate))].astype(np.float32)


def fill_gaps(values: NDArray[Any], leads: Sequence[str], where: str) -> Waveform:
    """Missing samples (NaN) on a straight line between their neighbours, at the ends like the nearest.

    Raises:
        DataError: if a lead has no sample at all.
    """
    missing = ~np.isfinite(values)
    filled = np.array(values, dtype=np.float64)
    steps = np.arange(len(values))
    for lead in np.flatnonzero(missing.any(axis=0)).tolist():
        there = ~missing[:, lead]
        if not there.any():
            name = leads[lead] if leads else str(lead)
            raise DataError(f"lead '{name}' has no sample", where=where, mend="Leave the record or the lead out.")
        filled[:, lead] = np.interp(steps, steps[there], filled[there, lead])
    return Waveform(filled.astype(np.float32), int(missing.sum()))


def _length(path: Path) -> int:
    return int(_wfdb().rdheader(str(path.with_suffix(""))).sig_len)


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"the record cannot be read ({error})", where=str(path), mend="Fetch its files again.")


def _wfdb() -> Any:
    return needed("wfdb", "waveforms", "reading waveforms")
