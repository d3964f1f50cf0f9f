"""Work done ahead by threads, results in order: the one way in which this room uses threads for pictures."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int, depth: int
) -> Generator[Result, None, None]:
    """`map(function, items)` in order, at most `depth` results ahead of the reader; 0 threads do it in the caller.

    An exception of `function` reaches the reader at its place in the order. Closing the iterator early cancels what has
    not begun and waits for what has.
    """
    if threads <= 0:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="data")
    waiting: deque[Future[Result]] = deque()
    source = iter(items)
    try:
        for item in source:
            waiting.append(pool.submit(function, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
