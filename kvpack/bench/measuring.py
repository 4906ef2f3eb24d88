"""One model in one process: what is measured on it, a turn at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpack.bench.fill import fill_by_model, fill_randomly, last_only, takes_random
from kvpack.bench.settings import WARM_UP
from kvpack.core.access import Access
from kvpack.core.errors import KvpackError
from kvpack.core.memory import peak_memory_bytes
from kvpack.core.resident import own_bytes, reset_peak, resident_bytes
from kvpack.kernels.choice import found as kernels
from kvpack.loading.load import load, load_source
from kvpack.loading.plain_cache import plain_cache, tensor_nbytes
from kvpack.runtime.cache import KVPackCache
from kvpack.runtime.install import SCHEME, new_cache

Answer = dict[str, Any]
FIRST_PROMPT = 8
"""Tokens of the prompt whose next token is the first one after loading."""


class Measuring:
    """A model, its cache under measurement, and a stopwatch.

    Args:
        kind: "source", "artifact", or the backend of transformers' QuantizedCache as "quantized-<backend>".
        path: folder of the model or artifact.
        dtype: of the computation, "auto" for the model's own.
        trust_remote_code: let transformers run code from the folder.
        seed: of tokens, keys and values.
    """

    def __init__(self, kind: str, path: str, dtype: str, trust_remote_code: bool, seed: int) -> None:
        self.kind, self.path, self.dtype = kind, Path(path), dtype
        self.access = Access(trust_remote_code=trust_remote_code)
        self.generator = torch.Generator().manual_seed(seed)
        self.model: Any = None
        self.cache: Any = None

    @torch.inference_mode()
    def load(self) -> Answer:
        """Load, and make the first token of a short prompt."""
        before, reset = resident_bytes(), reset_peak()
        started = time.perf_counter()
        self.model = self._loaded().eval()
        loaded = time.perf_counter()
        self.cache = self._new_cache()
        self._forward(self._tokens(FIRST_PROMPT)).argmax(-1).item()
        done = time.perf_counter()
        return {
            "seconds": done - started,
            "load_seconds": loaded - started,
            "before_bytes": before,
            "resident_bytes": resident_bytes(),
            "peak_bytes": peak_memory_bytes(),
            "peak_reset": reset,
            **self._described(),
        }

    @torch.inference_mode()
    def prompt(self, tokens: int, new_tokens: int) -> Answer:
        """One prompt in one forward pass, then `new_tokens` greedy tokens, one by one."""
        self.cache = self._new_cache()
        ids = self._tokens(tokens)
        reset_peak()
        started = time.perf_counter()
        token = self._forward(ids).argmax(-1, keepdim=True)
        prefilled = time.perf_counter()
        for _ in range(new_tokens):
            token = self._forward(token).argmax(-1, keepdim=True)
        token.tolist()
        done = time.perf_counter()
        return {
            "prefill": tokens / (prefilled - started),
            "decode": new_tokens / (done - prefilled),
            "seconds": done - started,
            "peak_bytes": peak_memory_bytes(),
        }

    @torch.inference_mode()
    def fill(self, tokens: int, how: str) -> Answer:
        """A fresh cache with a context of `tokens`; `how` is "model", "random", or "auto" for what suits.

        Also the bytes it holds, its own count and the growth of the process, and the first step's time.
        """
        self.cache = None
        before = own_bytes()
        self.cache = self._new_cache()
        if how == "auto":
            how = "random" if takes_random(self.cache) else "model"
        if how == "random":
            fill_randomly(self.model, self.cache, tokens, self.generator)
        else:
            fill_by_model(self.model, self.cache, self._tokens(tokens))
        held, allocated = self._held()
        after = own_bytes()
        grown = None if before is None or after is None else max(after - before, 0)
        first, *_ = self._steps(WARM_UP)
        return {
            "filled": how,
            "held_bytes": held,
            "allocated_bytes": allocated,
            "grown_bytes": grown,
            "first_step": first,
        }

    @torch.inference_mode()
    def steps(self, count: int) -> Answer:
        """Seconds of `count` forward passes of one token each, the context growing by them."""
        reset_peak()
        return {"seconds": self._steps(count), "peak_bytes": peak_memory_bytes()}

    def _steps(self, count: int) -> list[float]:
        ids = self._tokens(count)
        times = []
        for token in torch.split(ids, 1, dim=1):
            started = time.perf_counter()
            self._forward(token)
            times.append(time.perf_counter() - started)
        return times

    def _forward(self, ids: Tensor) -> Tensor:
        """Logits [1, vocabulary] of the last of the tokens [1, T]."""
        made = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **last_only(self.model))
        logits: Tensor = made.logits[:, -1]
        return logits

    def _tokens(self, count: int) -> Tensor:
        """Random token ids [1, count]."""
        vocabulary = int(self.model.config.get_text_config(decoder=True).vocab_size)
        return torch.randint(0, vocabulary, (1, count), generator=self.generator).to(self.model.device)

    def _loaded(self) -> Any:
        if self.kind == "artifact":
            remote = self.access.trust_remote_code
            return load(self.path, dtype=self.dtype, trust_remote_code=remote)
        return load_source(self.path, self.access, self.dtype)

    def _new_cache(self) -> Any:
        if getattr(self.model, SCHEME, None) is not None:
            return new_cache(self.model)
        backend = self.kind.removeprefix("quantized-")
        return plain_cache(self.model, None if backend == self.kind else backend)

    def _held(self) -> tuple[int, int]:
        if isinstance(self.cache, KVPackCache):
            return self.cache.nbytes, self.cache.allocated_nbytes
        return tensor_nbytes(self.cache)

    def _described(self) -> Answer:
        held = {
            id(t): t.numel() * t.element_size() for t in (*self.model.parameters(), *self.model.buffers())
        }
        return {
            "architecture": type(self.model).__name__,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "attention": str(getattr(self.model.config, "_attn_implementation", "")),
            "cache": type(self.cache).__name__,
            "weight_bytes": sum(held.values()),
            "threads": torch.get_num_threads(),
            "kernels": kernels(self.model.device.type).name,
        }


def answer(measuring: Measuring, request: Answer) -> Answer:
    """Do what one request asks for.

    Raises:
        KvpackError: there is no such request; a defect of the caller.
    """
    arguments = {name: value for name, value in request.items() if name != "do"}
    known: dict[str, Callable[..., Answer]] = {
        "load": measuring.load,
        "prompt": measuring.prompt,
        "fill": measuring.fill,
        "steps": measuring.steps,
    }
    if request["do"] not in known:
        raise KvpackError(f"the benchmark knows no measurement {request['do']!r}")
    return known[request["do"]](**arguments)
