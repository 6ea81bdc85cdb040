"""Stand-ins that implement our Protocols and do as they are told."""

import threading
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from embedding_server.core import Ids, Precision, Rows
from embedding_server.observability.metrics import Metrics
from embedding_server.runtime.errors import OutOfMemoryError, SessionError
from embedding_server.runtime.memory import MonitorError, Usage
from embedding_server.runtime.session import Stop, Threads
from embedding_server.serving.batcher import Batcher
from embedding_server.serving.cost import Cost
from embedding_server.serving.device import Device
from embedding_server.serving.memory import MemoryGate
from embedding_server.serving.profile import Profile
from embedding_server.serving.tuning import Way

WIDTH = 4
MEMORY = MemoryGate(None, 95.0, Metrics("test"))
"""No GPU."""


class FakeSession:
    """A session whose rows are the text's length, first and last id, and 1.

    `block()` makes runs wait until `release()`. A text that holds id `poison` fails its run, one
    that holds `nan` gets a row that is not finite, one that holds `deadly` ends the thread. A batch
    of more than `room` tokens runs out of memory.
    """

    provider = "FakeExecutionProvider"
    precision = Precision.FP32
    padded = False
    resident_bytes = 1
    room = 1 << 30
    has_wide = True
    costs_above = 0

    def __init__(
        self,
        *,
        poison: int = -1,
        nan: int = -1,
        deadly: int = -1,
        width: int = WIDTH,
        threads: int = 1,
    ) -> None:
        self.threads = Threads(threads)
        self.poison, self.nan, self.deadly = poison, nan, deadly
        self.width = width
        self.batches: list[list[int]] = []
        """Lengths of the texts of every run so far."""
        self.wide: list[bool] = []
        """Whether each of them was wide."""
        self.lean: list[bool] = []
        """Whether each of them was to be sparing with memory."""
        self.running = threading.Semaphore(0)
        """One release per run that has started."""
        self._open = True
        self._gate = threading.Semaphore(0)

    def block(self) -> None:
        """Make runs wait from now on."""
        self._open = False

    def release_one(self) -> None:
        """Let one waiting run go on."""
        self._gate.release()

    def release(self) -> None:
        """Let the waiting runs go on, and those to come."""
        self._open = True
        self._gate.release(100)

    def run(self, texts: Sequence[Ids], *, wide: bool = False, stop: Stop | None = None) -> Rows:
        """See `Session`; a waiting run can be stopped."""
        self.batches.append([len(ids) for ids in texts])
        self.wide.append(wide)
        self.lean.append(bool(stop and stop.lean))
        self.running.release()
        for _ in range(1000):
            if self._open or self._gate.acquire(timeout=0.01):
                break
            if stop and stop.called:
                try:  # as ONNX Runtime's own error is the cause of ours
                    raise RuntimeError("stopped")  # noqa: TRY301
                except RuntimeError as exc:
                    raise SessionError("stopped") from exc
        if sum(map(len, texts)) > self.room:
            raise OutOfMemoryError("Failed to allocate memory")
        if any(self.poison in ids for ids in texts):
            raise ValueError("poisoned")
        if any(self.deadly in ids for ids in texts):
            raise SystemExit
        rows = np.zeros((len(texts), self.width), np.float32)
        rows[:, :WIDTH] = [(len(ids), ids[0], ids[-1], 1) for ids in texts]
        rows[[self.nan in ids for ids in texts]] = np.nan
        return rows

    def sample(self, tokens: int) -> Ids:
        """See `Session`."""
        return np.ones(tokens, np.int64)


def ids(length: int, first: int = 0) -> Ids:
    """`length` ids counting up from `first`."""
    return np.arange(first, first + length, dtype=np.int64)


class FakeMonitor:
    """A monitor of one device of 1,000 bytes; `used` None = the driver does not answer."""

    def __init__(self, used: int | None = 0) -> None:
        self.used = used

    def read(self) -> list[Usage]:
        """See `Monitor`."""
        if self.used is None:
            raise MonitorError("driver not loaded")
        return [Usage("0", self.used, 1000, 100.0)]


class FakeNvml:
    """What `Nvml` needs of pynvml: cards by UUID, and one slice of a card.

    `names` and `capabilities` are by UUID; `divided` is the card that the slice is of.
    """

    class NVMLError(Exception):
        """See pynvml."""

    def __init__(
        self,
        *uuids: str,
        mig: str = "MIG-1",
        missing: bool = False,
        divided: str = "",
        names: Mapping[str, str] = {},
        capabilities: Mapping[str, tuple[int, int]] = {},
    ) -> None:
        self._uuids = uuids
        self._divided, self._names, self._capabilities = divided, names, capabilities
        self._mig = mig
        self._missing = missing

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's names
        """See NVML."""
        if self._missing:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        """See NVML."""
        return len(self._uuids)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        """See NVML; handles are UUIDs here."""
        return self._uuids[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        """See NVML."""
        if uuid != self._mig:
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetUUID(self, handle: str) -> str:  # noqa: N802
        """See NVML."""
        return handle

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:  # noqa: N802
        """See NVML; how much is used follows from the handle."""
        return SimpleNamespace(used=len(handle), total=100)

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        """See NVML."""
        return "580.1"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:  # noqa: N802
        """See NVML."""
        return 13010

    def nvmlDeviceGetName(self, handle: str) -> str:  # noqa: N802
        """See NVML."""
        return self._names.get(handle, "Fake")

    def nvmlDeviceGetCudaComputeCapability(self, handle: str) -> list[int]:  # noqa: N802
        """See NVML."""
        if handle == self._mig:
            raise self.NVMLError("Not Supported")
        return list(self._capabilities.get(handle, (8, 0)))

    def nvmlDeviceIsMigDeviceHandle(self, handle: str) -> int:  # noqa: N802
        """See NVML."""
        return int(handle == self._mig)

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> str:  # noqa: N802
        """See NVML."""
        return self._divided or self._uuids[0]

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:  # noqa: N802
        """See NVML."""
        if handle == self._mig or not self._divided:
            raise self.NVMLError("Not Supported")
        return [int(handle == self._divided)] * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: str) -> int:  # noqa: N802
        """See NVML."""
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, index: int) -> str:  # noqa: N802
        """See NVML; slices may have any of the numbers."""
        if index != 2:
            raise self.NVMLError("Not Found")
        return self._mig

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:  # noqa: N802
        """See NVML."""
        if handle == self._mig:
            raise self.NVMLError("Not Supported")
        return SimpleNamespace(gpu=100)


class FakeClock:
    """A clock that stands still until `now` is changed."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """See `time.monotonic`."""
        return self.now


def batcher(
    device: Device, session: FakeSession, exact: Callable[[], FakeSession] | None = None
) -> Batcher:
    """A batcher for `session`; `exact` opens it in fp32."""
    profile = Profile(Cost(), Way(), 0.0)
    return Batcher("fake", session, device, Metrics("test"), profile=profile, exact=exact)
