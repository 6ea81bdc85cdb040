"""What several tests of the serving layer share."""

from collections.abc import AsyncIterator

import pytest_asyncio

from embedding_server.observability.metrics import Metrics
from embedding_server.serving.device import Device
from tests.fakes import MEMORY


@pytest_asyncio.fixture
async def device() -> AsyncIterator[Device]:
    """A device with one running slot."""
    device = Device(1, 64, MEMORY, Metrics("test"))
    device.start()
    yield device
    device.stop()
