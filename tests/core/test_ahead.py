"""Threads that work ahead: order, bounds, errors, and torch's own threads."""

import threading
import time

import pytest
import torch

from kvpack.core.ahead import MOST_THREADS, in_order


@pytest.fixture(params=[1, 2, 16])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_keep_the_order_of_the_tasks(threads: int) -> None:
    def task(i: int) -> int:
        time.sleep(0.002 * (i % 3))
        return i

    assert list(in_order([lambda i=i: task(i) for i in range(20)])) == list(range(20))
    assert list(in_order([])) == []


def test_few_results_are_in_flight(threads: int) -> None:
    begun = []
    results = in_order([lambda i=i: begun.append(i) for i in range(50)])
    for taken in range(1, 6):
        next(results)
        time.sleep(0.01)
        assert len(begun) <= taken + min(threads, MOST_THREADS)
    results.close()
    assert len(begun) < 50


def test_torch_has_one_thread_inside_and_all_outside(threads: int) -> None:
    seen = set()

    def task() -> None:
        seen.add((threading.current_thread() is threading.main_thread(), torch.get_num_threads()))

    for _ in in_order([task] * 5):
        assert torch.get_num_threads() == threads
    assert seen == {(False, 1)}
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [torch.get_num_threads()] == [threads]


def test_an_error_comes_in_its_turn_and_ends_the_work(threads: int) -> None:
    begun = []

    def task(i: int) -> int:
        begun.append(i)
        if i == 3:
            raise ValueError("three")
        return i

    results = in_order([lambda i=i: task(i) for i in range(50)])
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
    assert len(begun) < 50
