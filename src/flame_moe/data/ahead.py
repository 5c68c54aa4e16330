"""Work on many items by several processes, with the results in the order of the items."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from flame_moe.errors import DataError

Item = TypeVar("Item")
Made = TypeVar("Made")

AHEAD = 8
"""Results per worker that may wait to be asked for, so that memory does not grow with the number of items."""


def in_order(make: Callable[[Item], Made], items: Iterable[Item], workers: int) -> Iterator[Made]:
    """`map(make, items)`, computed ahead; the results do not depend on the number of workers.

    Args:
        make: a pure function that can be pickled, as its items and results can.
        items: read as far as the work goes ahead.
        workers: processes; 1 works here, as `map` does.

    Raises:
        DataError: if a process ends without a result. Whatever `make` raises is raised where its result would be.
    """
    if workers == 1:
        yield from map(make, items)
        return
    waiting: deque[Future[Made]] = deque()
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) >= AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        mend = "Set workers = 1; a script of your own needs `if __name__ == '__main__':` around what it runs."
        raise DataError("a process that reads files ended without a result", mend=mend) from None
    finally:
        pool.shutdown(cancel_futures=True)
