"""Who waits for the device: whatever reads a tensor's values in Python, or makes a shape depend on them.

On a GPU each of them stops the processor until everything queued so far is done. They are watched where Python calls
them, because some (`tolist` of a tensor in main memory) dispatch nothing, and where they are dispatched.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flame_moe

ROOT = Path(flame_moe.__file__).parent
CALLS = ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "nonzero", "masked_select")
DISPATCHED = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "bincount")
SIZED = "repeat_interleave"
"""Waits for the size of its result, unless it is told."""
MASKED = ("index", "index_put", "index_put_", "_index_put_impl_")


class Sync(NamedTuple):
    """Where in the package a wait is, and what waits."""

    file: str
    function: str
    what: str


ALLOWED = frozenset({Sync("nn/grouped.py", "apply_experts", "tolist")})
"""The one place per block, on a processor only: the rows per expert are numbers of the host, which starts one product
for each. On a GPU grouped products take them from the device."""


class _Calls(TorchFunctionMode):
    def __init__(self, found: list[Sync]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in CALLS:
            self.found.append(_place(name))
            # What it dispatches is the same wait: once is enough.
            with torch._C._DisableTorchDispatch():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Dispatched(TorchDispatchMode):
    def __init__(self, found: list[Sync]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        options = kwargs or {}
        masks = [t for t in tree_leaves(args[1:2]) if isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8)]
        unsized = name == SIZED and options.get("output_size") is None
        if name in DISPATCHED or unsized or (name in MASKED and masks):
            self.found.append(_place("boolean index" if name in MASKED else name))
        return func(*args, **options)


class Syncs:
    """Collects every wait while it is entered.

    Attributes:
        found: of them, in order.
    """

    def __init__(self) -> None:
        self.found: list[Sync] = []
        self._modes = (_Dispatched(self.found), _Calls(self.found))

    def __enter__(self) -> Self:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)


def _place(what: str) -> Sync:
    """The innermost function of the package that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT):
            return Sync(file.relative_to(ROOT).as_posix(), frame.f_code.co_name, what)
        frame = frame.f_back
    return Sync("", "", what)
