"""`kvpack verify`: prove that an artifact is complete, untampered and decodes."""

from __future__ import annotations

from pathlib import Path

from kvpack.cli.console import table
from kvpack.cli.options import AllowDownload, Artifact, Source, TrustRemoteCode
from kvpack.cli.run import Result, Session
from kvpack.core.access import Access
from kvpack.core.errors import CheckFailed


def verify(
    session: Session,
    path: Artifact,
    source: Source = None,
    allow_download: AllowDownload = False,
    trust_remote_code: TrustRemoteCode = False,
) -> Result:
    """Prove an artifact is complete, undamaged and decodes; with --source, that it is that model's."""
    from kvpack.verify import verify as run

    found = run(
        Path(path),
        source,
        access=Access(allow_download, trust_remote_code),
        progress=session.progress,
    )
    rows = [(c.name, "ok" if c.passed else "FAILED", c.detail) for c in found.checks]
    failed = next((c for c in found.checks if not c.passed), None)
    failure = None if failed is None else CheckFailed(f"{failed.name}: {failed.detail}", hint=failed.hint)
    data = {"passed": found.passed, "checks": found.checks}
    return Result(data, (table(("check", "", ""), rows), "PASS" if found.passed else "FAIL"), failure)
