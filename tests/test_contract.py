"""Each of our backends keeps the contract."""

import pytest

from idempotent import Backend, open_backend
from idempotent.testing import BackendContract


class TestOurs(BackendContract):
    @pytest.fixture
    def backend(self, backend_url: str) -> Backend:
        return open_backend(backend_url)
