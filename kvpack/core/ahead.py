"""Independent work on many tensors, done in threads ahead of whoever takes the results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from kvpack.core.lazy import torch

T = TypeVar("T")


def in_background(task: Callable[[], T]) -> Future[T]:
    """Begin a task in a thread of its own; `result()` waits for it and raises what it raised."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(task)
    finally:
        pool.shutdown(wait=False)


MOST_THREADS = 4
"""Results in flight cost memory, so there are not more of them on larger machines."""


def in_order(tasks: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Results of `tasks`, in their order; while one is used, the next ones are worked on.

    As many threads as torch would use, at most `MOST_THREADS`, work on a task each. Within a task
    torch has one thread: a result does not depend on the number of cores. Memory is that of one
    result more than there are threads. The first task that fails ends the work; its error is raised
    when its turn comes.
    """
    inside = torch.get_num_threads()
    threads = min(inside, MOST_THREADS)
    waiting: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        # The initializer set it for threads to come as well.
        torch.set_num_threads(inside)
