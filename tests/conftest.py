from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from tests.tiny_models import make_model

# Tiny tensors run faster on one thread, and parallel test workers do not fight over cores.
torch.set_num_threads(1)
logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests measure of this machine does not end in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVPACK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny checkpoint of a family, made once."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_model(tmp_path_factory.mktemp("models") / family, family)
        return made[family]

    return get
