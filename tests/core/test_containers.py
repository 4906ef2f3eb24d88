"""What a container leaves its processes, from files as Linux writes them."""

from pathlib import Path

import pytest

from kvpack.core import containers, resident


def written(root: Path, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "proc", root / "groups"


def test_version_2_counts_files_that_can_be_dropped_as_free(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/box/job\n",
        "groups/box/job/memory.max": "1000\n",
        "groups/box/job/memory.current": "700\n",
        "groups/box/job/memory.stat": "anon 500\ninactive_file 150\n",
    }
    assert containers.room(*written(tmp_path, files)) == 450


def test_the_tightest_group_around_the_process_counts(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/box/job\n",
        "groups/box/job/memory.max": "max\n",
        "groups/box/job/memory.current": "700\n",
        "groups/box/memory.max": "900\n",
        "groups/box/memory.current": "880\n",
        "groups/memory.max": "5000\n",
        "groups/memory.current": "900\n",
    }
    assert containers.room(*written(tmp_path, files)) == 20


def test_version_1(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "5:devices:/\n4:memory:/box\n1:cpu,cpuacct:/\n0::/\n",
        "groups/memory/box/memory.limit_in_bytes": "1000\n",
        "groups/memory/box/memory.usage_in_bytes": "1200\n",
        "groups/memory/box/memory.stat": "inactive_file 7\ntotal_inactive_file 0\n",
    }
    assert containers.room(*written(tmp_path, files)) == 0


def test_inside_a_container_the_path_may_lead_nowhere(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/some/place/outside\n",
        "groups/memory.max": "100\n",
        "groups/memory.current": "40\n",
    }
    assert containers.room(*written(tmp_path, files)) == 60


def test_nothing_limits_a_process_where_there_are_no_groups(tmp_path: Path) -> None:
    assert containers.room(tmp_path, tmp_path) is None


def test_available_memory_is_what_machine_and_container_both_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    free = resident.available_bytes()
    if free is None:
        pytest.skip("this system does not tell")
    monkeypatch.setattr(containers, "room", lambda: 12345)
    assert resident.available_bytes() == 12345
    monkeypatch.setattr(containers, "room", lambda: None)
    assert resident.available_bytes() > 12345
