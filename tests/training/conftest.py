from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.processes import VERSE


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "verse.txt").write_text(VERSE)
    (tmp_path / "short.txt").write_text(VERSE[:200])
    return tmp_path / "verse.txt"
