"""Names of the files in an artifact. None is a name that plain transformers would load."""

from __future__ import annotations

import re

MANIFEST_FILE = "kvpack.json"
INDEX_FILE = "kvpack.safetensors.index.json"
KV_FILE = "kvpack-kv.safetensors"
SIGNATURE_FILE = "model.sig"
"""A detached OpenSSF model signature; it is made after the manifest and so cannot be listed in it."""

_SHARD = re.compile(r"kvpack-[0-9]{5}-of-[0-9]{5}\.safetensors")


def shard_name(number: int, count: int) -> str:
    """`kvpack-00001-of-00002.safetensors`; numbers start at 1."""
    return f"kvpack-{number:05}-of-{count:05}.safetensors"


def is_shard(name: str) -> bool:
    """Whether a file is a weight shard by its name."""
    return _SHARD.fullmatch(name) is not None
