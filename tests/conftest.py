"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

# torch's two caches contain locks: if a process that holds one is killed, others wait for ever.
CACHES = ("PETLBENCH_CACHE", "TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR")


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give this process its own caches, so that workers do not share them and a user's stay unchanged."""
    with pytest.MonkeyPatch.context() as patch:
        for name in CACHES:
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        yield
