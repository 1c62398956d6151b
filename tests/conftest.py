"""What holds for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

# In torch's two there are locks: where a process was killed that held one, others wait for ever.
CACHES = ("PETLBENCH_CACHE", "TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR")


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Caches for this process alone: workers do not meet in them, and a user's own stay as they are."""
    with pytest.MonkeyPatch.context() as patch:
        for name in CACHES:
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        yield
