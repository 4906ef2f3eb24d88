"""The process that holds one model: `python -m kvpack.bench.worker`.

It reads one JSON object per line from standard input, does what it asks for, and writes one to standard
output. The first says which model. It ends when its input does. While another process measures it sleeps
in a read: it answers only after its own threads, which may wait for work by spinning, have gone to sleep.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any, TextIO

from kvpack.core.errors import KvpackError

_POLL_SECONDS, _MOST_SECONDS = 0.02, 0.6
_IDLE_SHARE = 0.1
"""Of a core; spinning threads take a whole one each."""


def main() -> None:
    """Serve requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks decides when to stop
    with _quiet_stdout() as answers:
        begun = time.perf_counter()
        first = json.loads(sys.stdin.readline())
        measuring = _begin(**first)
        _say(answers, {"import_seconds": time.perf_counter() - begun})
        for line in sys.stdin:
            _say(answers, _answered(measuring, json.loads(line)))


def _quiet_stdout() -> TextIO:
    """A stream to what was standard output; that itself becomes standard error, as libraries print."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


def _begin(threads: int | None, **arguments: Any) -> Any:
    import torch

    from kvpack.bench.measuring import Measuring

    if threads is not None:
        torch.set_num_threads(threads)
    return Measuring(**arguments)


def _answered(measuring: Any, request: dict[str, Any]) -> dict[str, Any]:
    """An answer, or an error that the user can do something about; others end the process."""
    from kvpack.bench.measuring import answer

    try:
        found = answer(measuring, request)
    except KvpackError as error:
        return {"error": error.code, "message": error.message, "hint": error.hint}
    _fall_asleep()
    return found


def _fall_asleep() -> None:
    """Wait until the threads of this process use no processor time."""
    stop = time.perf_counter() + _MOST_SECONDS
    while time.perf_counter() < stop:
        used = time.process_time()
        time.sleep(_POLL_SECONDS)
        if time.process_time() - used < _IDLE_SHARE * _POLL_SECONDS:
            return


def _say(stream: TextIO, content: dict[str, Any]) -> None:
    stream.write(json.dumps(content) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
