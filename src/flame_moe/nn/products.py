"""Products of float32 matrices on a processor, by the library that is faster there and no less exact.

PyTorch multiplies with its default library (MKL). On some processors that takes instructions half as wide as there are,
and oneDNN is twice as fast; one asks for it by allowing it bfloat16 inside. Where a processor has no units for matrices
in bfloat16, oneDNN multiplies in float32 all the same; where it has them (AMX), it rounds. So it is taken only where
a probe, once per process, finds it exact and much faster, and only for the products here: what the process has set
itself comes back after each.

The environment variable FLAME_MOE_PRODUCTS, `default` or `onednn`, takes the place of the probe's question of speed.
The last bits of a product depend on the library, so `in_use` is a part of what a run ran on.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flame_moe.errors import RecipeError, nearest

Library = Literal["default", "onednn"]
VARIABLE = "FLAME_MOE_PRODUCTS"
EXACT = 1e-5
"""Largest error, relative to the product of the factors' absolute values; float32 has 1e-6, bfloat16 4e-3."""
FASTER = 1.5
"""How many times as fast oneDNN must be: machines have 1.1 or less, or about 2, so that noise does not decide."""
_ROWS = 64
"""oneDNN compiles a kernel per shape: it gets multiples of this many rows and the default library what is left."""
_FEWEST = 96
"""Below this many rows the default library is the faster one."""
_pinned: Library | None = None


class _Switch:
    """oneDNN for all products of the process while anybody is inside; the setting is read and put back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = ""

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = _setting().fp32_precision
                _setting().fp32_precision = "bf16"
            self._inside += 1

    def __exit__(self, *failure: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                _setting().fp32_precision = self._before


_SWITCH = _Switch()


def in_use() -> Library:
    """The library that multiplies in this process.

    Raises:
        RecipeError: if the environment variable asks for what there is not, or for what is not exact here.
    """
    return _pinned or _default()


@contextmanager
def using(name: str) -> Iterator[None]:
    """Multiply with this library inside, in all threads of the process.

    Raises:
        RecipeError: if there is no such library, or it is not exact on this processor.
    """
    global _pinned
    before, _pinned = _pinned, _known(name, "products.using")
    try:
        yield
    finally:
        _pinned = before


@contextmanager
def again(name: str | None) -> Iterator[None]:
    """Multiply inside as work that is gone on with multiplied before, so that its bits go on too.

    Args:
        name: its library; with None, with one that is not exact on this processor, or where the environment variable
            says otherwise, inside is as outside.
    """
    unknown = name not in get_args(Library) or (name == "onednn" and not exact())
    with nullcontext() if name is None or unknown or os.environ.get(VARIABLE) else using(name):
        yield


@cache
def exact() -> bool:
    """Whether oneDNN can be asked for, and multiplies float32 matrices in float32 on this processor."""
    if not hasattr(_setting(), "fp32_precision") or not torch.backends.mkldnn.is_available():
        return False
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        a, b = _factors()
        try:
            with _SWITCH:
                found = torch.mm(a, b)
        except RuntimeError:  # a process may forbid that flags are changed
            return False
        wide, deep = a.double(), b.double()
        error = (found.double() - wide @ deep).abs() / (wide.abs() @ deep.abs())
    return bool(error.max() < EXACT)


def addmm(bias: Tensor, a: Tensor, b: Tensor, out: Tensor) -> None:
    """out (r, n) = bias (n,) + a (r, m) b (m, n)."""
    split = _split(a)
    if split:
        with _SWITCH:
            torch.addmm(bias, a[:split], b, out=out[:split])
        a, out = a[split:], out[split:]
    torch.addmm(bias, a, b, out=out)


def mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out (r, n) = a (r, m) b (m, n)."""
    split = _split(a)
    if split:
        with _SWITCH:
            torch.mm(a[:split], b, out=out[:split])
        a, out = a[split:], out[split:]
    torch.mm(a, b, out=out)


def add_outer(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (m, n) += a^T b of a (r, m) and b (r, n): the gradient of a matrix, summed over rows."""
    split = _split(a)
    if split:
        with _SWITCH:
            total.addmm_(a[:split].T, b[:split])
        a, b = a[split:], b[split:]
    total.addmm_(a.T, b)


def _split(a: Tensor) -> int:
    """How many of the rows oneDNN gets; the rest, perhaps none, is for the default library."""
    if len(a) < _FEWEST or a.dtype != torch.float32 or in_use() == "default":
        return 0
    return len(a) // _ROWS * _ROWS


@cache
def _default() -> Library:
    asked = os.environ.get(VARIABLE, "")
    if asked:
        return _known(asked, VARIABLE)
    return "onednn" if exact() and _gain() >= FASTER else "default"


def _known(name: str, where: str) -> Library:
    """The library of this name, which is there and exact on this processor."""
    names: dict[str, Library] = {known: known for known in get_args(Library)}
    if name not in names:
        raise RecipeError(f"no library '{name}' for products", where=where, mend=nearest(name, names))
    if name == "onednn" and not exact():
        raise RecipeError(
            "oneDNN rounds float32 matrices on this processor, or this PyTorch has no switch for it",
            where=where,
            mend="Take `default`.",
        )
    return names[name]


def _gain(rounds: int = 9, each: int = 4) -> float:
    """How many times as fast as the default library oneDNN is: the best of rounds that take turns, about 25 ms."""
    best = [float("inf"), float("inf")]
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        a, b = torch.ones(512, 128), torch.ones(128, 256)
        out = torch.empty(512, 256)
        for turn in range(rounds + 1):
            for i in range(2):
                began = time.perf_counter()
                for _ in range(each):
                    if i:
                        with _SWITCH:
                            torch.mm(a, b, out=out)
                    else:
                        torch.mm(a, b, out=out)
                if turn:  # kernels are compiled in the first
                    best[i] = min(best[i], time.perf_counter() - began)
    return best[0] / best[1]


def _factors() -> tuple[Tensor, Tensor]:
    """(128, 384) and (384, 128) over twelve powers of ten, from a generator of their own."""
    source = torch.Generator().manual_seed(0)
    shapes = ((128, 384), (384, 128))
    a, b = (torch.randn(s, generator=source) * 10 ** (12 * torch.rand(s, generator=source) - 6) for s in shapes)
    return a, b


def _setting() -> Any:
    """PyTorch's switch of precision; None where the installed PyTorch has none."""
    return getattr(torch.backends.mkldnn, "matmul", None)
