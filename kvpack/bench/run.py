"""The run: one process per column, in turns, so that whatever happens to the machine happens to all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from kvpack.bench.columns import Column, check_memory, fitted
from kvpack.bench.machine import Watch
from kvpack.bench.page_cache import drop, read_through
from kvpack.bench.process import Worker, started
from kvpack.bench.result import Bench, Measure, Rounds
from kvpack.bench.settings import Settings
from kvpack.core.progress import SILENT, Progress

Found = Callable[[Measure], None]
Answers = dict[str, list[dict[str, Any]]]
_MILLI = 1000.0


def bench(
    columns: tuple[Column, ...],
    settings: Settings,
    *,
    found: Found = lambda measure: None,
    progress: Progress = SILENT,
) -> Bench:
    """Measure all columns: loading, a prompt with its continuation, steps at every context.

    Every measurement is made `settings.repeat` times, in rounds: each column has one turn in every
    round while the others sleep. Processes are fresh for every loading; those of the last round
    stay for the rest. Files are read once beforehand, so that every loading finds them in memory; or,
    with `settings.cold`, dropped from memory before every loading.

    Args:
        columns: see `kvpack.bench.columns.columns_of`.
        settings: how long and how often.
        found: called with every measure as soon as it is known.
        progress: told about every turn.

    Raises:
        UsageError: a context is longer than a model allows.
        ResourceError: the models do not fit into memory together.
        KvpackError: a process failed or died; with what it said.
        KeyboardInterrupt: interrupted before anything was measured.
    """
    settings = fitted(columns, settings)
    check_memory(columns, settings)
    watch, run = Watch(), _Run(columns, settings, found, progress)
    complete = True
    try:
        run.all()
    except KeyboardInterrupt:
        if not run.measures:
            raise
        complete = False
    measures = tuple(run.measures)
    warm = tuple(sorted(run.warm))
    return Bench(columns, settings, measures, run.described, run.filled, watch.machine(), complete, warm)


class _Run:
    """The measures so far."""

    def __init__(
        self, columns: tuple[Column, ...], settings: Settings, found: Found, progress: Progress
    ) -> None:
        self.columns, self.settings, self.found, self.progress = columns, settings, found, progress
        self.measures: list[Measure] = []
        self.described: dict[str, Mapping[str, Any]] = {}
        self.filled: dict[int, dict[str, str]] = {}
        self.warm: set[str] = set()
        rounds = settings.repeat * (2 + len(settings.contexts)) + 1 + len(settings.contexts)
        self.turns, self.done = rounds * len(columns), 0

    def all(self) -> None:
        """Everything, one measurement after another."""
        for column in self.columns:
            read_through(column.path)
        with self._loaded() as workers:
            self._prompts(workers)
            for context in self.settings.contexts:
                self._steps(workers, context)

    @contextmanager
    def _loaded(self) -> Iterator[list[Worker]]:
        """Workers whose models are loaded; those of earlier rounds of loading have ended."""
        answers: Answers = {column.name: [] for column in self.columns}
        for _ in range(self.settings.repeat - 1):
            with self._started() as workers:
                self._load(answers, workers)
        with self._started() as workers:
            self._load(answers, workers)
            self.described = {name: given[-1] for name, given in answers.items()}
            where = ", files not in memory" if self.settings.cold else ""
            self._add("load", f"load to first token{where}", "s", _each(answers, "seconds"))
            peak = _each(answers, "peak_bytes")
            self._add("load_peak", "peak memory of loading", "bytes", peak)
            yield workers

    def _load(self, answers: Answers, workers: list[Worker]) -> None:
        """One round of loading."""
        for worker in workers:
            if self.settings.cold and not drop(worker.column.path):
                self.warm.add(worker.column.name)
            self._ask(answers, [worker], "load")

    @contextmanager
    def _started(self) -> Iterator[list[Worker]]:
        with ExitStack() as stack:
            chosen = self.settings
            workers = [
                stack.enter_context(started(column, chosen.threads, chosen.dtype, chosen.seed))
                for column in self.columns
            ]
            for worker in workers:
                worker.ready()
            yield workers

    def _prompts(self, workers: list[Worker]) -> None:
        size = {"tokens": self.settings.prompt_tokens, "new_tokens": self.settings.new_tokens}
        first: Answers = {}
        self._ask(first, workers, "prompt", **size)
        cold = "first prompt and new tokens, kernels compiled on the way"
        self._add("first_prompt", cold, "s", _each(first, "seconds"), compared=False)
        answers = self._rounds(workers, "prompt", **size)
        prompt = f"prefill, {size['tokens']:,} tokens"
        self._add("prefill", prompt, "tokens/s", _each(answers, "prefill"), rising=True)
        decode = f"decode, {size['new_tokens']:,} tokens after it"
        self._add("decode", decode, "tokens/s", _each(answers, "decode"), rising=True)
        self._add("prompt_peak", "peak memory of both", "bytes", _each(answers, "peak_bytes"))

    def _steps(self, workers: list[Worker], context: int) -> None:
        filled: Answers = {}
        how = self.settings.filled_by(context)
        self._ask(filled, workers, "fill", tokens=context, how=how)
        self.filled[context] = {name: given[0]["filled"] for name, given in filled.items()}
        at = f"at {context:,}"
        first = _each(filled, "first_step", _MILLI)
        self._add("first_step", f"first step {at}", "ms", first, context, compared=False)
        answers = self._rounds(workers, "steps", count=self.settings.steps)
        times = {name: _all_times(given) for name, given in answers.items()}
        self._add("step", f"step {at}", "ms", times, context)
        self._add("kv_held", f"KV cache {at}", "bytes", _each(filled, "held_bytes"), context)
        room = _each(filled, "allocated_bytes")
        self._add("kv_allocated", f"KV cache with room to grow {at}", "bytes", room, context)
        grown = _each(filled, "grown_bytes")
        self._add("kv_process", f"growth of the process by it {at}", "bytes", grown, context)
        self._add("step_peak", f"peak memory of steps {at}", "bytes", _each(answers, "peak_bytes"), context)

    def _rounds(self, workers: list[Worker], do: str, **arguments: Any) -> Answers:
        answers: Answers = {}
        for _ in range(self.settings.repeat):
            self._ask(answers, workers, do, **arguments)
        return answers

    def _ask(self, answers: Answers, workers: list[Worker], do: str, **arguments: Any) -> None:
        """One round: every worker in its turn."""
        for worker in workers:
            self.progress("bench", self.done, self.turns, f"{do}, {worker.column.name}")
            answers.setdefault(worker.column.name, []).append(worker.ask(do, **arguments))
            self.done += 1
        self.progress("bench", self.done, self.turns, do)

    def _add(
        self,
        name: str,
        label: str,
        unit: str,
        rounds: Mapping[str, Rounds],
        context: int | None = None,
        *,
        rising: bool = False,
        compared: bool = True,
    ) -> None:
        if any(any(turn) for turns in rounds.values() for turn in turns):
            self.measures.append(Measure(name, label, unit, rounds, context, rising, compared))
            self.found(self.measures[-1])


def _each(answers: Answers, key: str, factor: float = 1.0) -> dict[str, Rounds]:
    """One number per turn; none where the system does not tell."""
    return {
        name: tuple((factor * turn[key],) if turn[key] else () for turn in given)
        for name, given in answers.items()
    }


def _all_times(answers: list[dict[str, Any]]) -> Rounds:
    """The times of all steps, in ms."""
    return tuple(tuple(_MILLI * seconds for seconds in turn["seconds"]) for turn in answers)
