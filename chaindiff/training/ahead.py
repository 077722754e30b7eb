"""Results that a thread makes while the caller is busy with those before them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(make: Callable[[T], R], items: Iterable[T], bound: int = 2) -> Generator[R, None, None]:
    """`make(item)` for every item, in order; at most `bound` of them are made or held beyond the one in use.

    What `make` raises is raised where its result would have come. Closing the iterator, or leaving it by an exception,
    waits for the item that is being made, and makes no more.
    """
    left, waiting = iter(items), deque[Future[R]]()
    maker = ThreadPoolExecutor(1, "ahead")
    try:
        waiting.extend(maker.submit(make, item) for item in islice(left, bound))
        while waiting:
            made = waiting.popleft().result()
            waiting.extend(maker.submit(make, item) for item in islice(left, 1))
            yield made
    finally:
        maker.shutdown(cancel_futures=True)
