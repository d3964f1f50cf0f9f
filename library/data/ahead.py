"""Work done ahead by threads, results in order: the one way in which this room uses threads for pictures."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    threads: int,
    depth: int,
    pool: ThreadPoolExecutor | None = None,
) -> Generator[Result, None, None]:
    """`map(function, items)` in order, at most `depth` results ahead of the reader; 0 threads do it in the caller.

    An exception of `function` reaches the reader at its place in the order. Closing the iterator early cancels what has
    not begun and waits for what has. The threads are those of `pool`, which stays open; None makes them anew.
    """
    if threads <= 0:
        yield from map(function, items)
        return
    workers = pool or ThreadPoolExecutor(threads, thread_name_prefix="data")
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(workers.submit(function, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        wait([future for future in waiting if not future.cancel()])
        if pool is None:
            workers.shutdown()
