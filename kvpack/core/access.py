"""What a user allows beyond reading local files."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Access:
    """Permissions: the network, and running code that lies in a model's folder."""

    allow_download: bool = False
    trust_remote_code: bool = False


CLOSED = Access()
"""Neither; the default everywhere."""
