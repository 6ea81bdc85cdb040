"""The visible GPUs: what they are, and how much memory they have and use, as NVML tells it.

Of NVML only memory decides anything: a busy GPU is a healthy one, so its utilisation is shown and
never acted on.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol

import msgspec
import pynvml


class Usage(msgspec.Struct, frozen=True):
    """One device: bytes used, by whomever, and there; percent of the last moment it was busy."""

    device: str
    used: int
    total: int
    busy: float | None = None

    @property
    def percent(self) -> float:
        """Memory in use."""
        return 100 * self.used / self.total


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """A visible GPU, or a slice of one.

    `number` is CUDA's, among the visible ones; `memory` in bytes; `capability` is the compute
    capability; `mig` says that it is a slice.
    """

    number: int
    name: str
    uuid: str
    memory: int
    capability: tuple[int, int]
    mig: bool = False


class Monitor(Protocol):
    """Tells what visible devices use."""

    def read(self) -> list[Usage]:
        """One entry per device, in the order of CUDA's numbers; raises `MonitorError`."""


class MonitorError(Exception):
    """The driver does not answer."""


class Nvml:
    """The NVIDIA driver.

    Args:
        visible: as in `CUDA_VISIBLE_DEVICES`, indices, UUIDs (or their beginnings) or MIG UUIDs, up
            to the first that does not exist; None = all. Indices are NVML's, and CUDA's where
            `CUDA_DEVICE_ORDER=PCI_BUS_ID`, which the command line sees to.
        library: speaks NVML.

    Raises:
        MonitorError: there is no driver.
    """

    def __init__(self, visible: Sequence[str] | None, library: Any = pynvml) -> None:
        self._library = library
        try:
            library.nvmlInit()
            self._handles = list(self._find(visible))
        except library.NVMLError as exc:
            raise MonitorError(str(exc)) from exc

    def read(self) -> list[Usage]:
        """See `Monitor`."""
        try:
            return [self._usage(name, handle) for name, handle in self._handles]
        except self._library.NVMLError as exc:
            raise MonitorError(str(exc)) from exc

    def cards(self) -> list[Card]:
        """What the visible devices are, in the order of CUDA's numbers; raises `MonitorError`."""
        try:
            return [self._card(number, handle) for number, (_, handle) in enumerate(self._handles)]
        except self._library.NVMLError as exc:
            raise MonitorError(str(exc)) from exc

    def driver(self) -> str:
        """The driver's version; raises `MonitorError`."""
        try:
            return str(self._library.nvmlSystemGetDriverVersion())
        except self._library.NVMLError as exc:
            raise MonitorError(str(exc)) from exc

    def cuda(self) -> int:
        """The major version of CUDA that the driver is good for; raises `MonitorError`."""
        try:
            return int(self._library.nvmlSystemGetCudaDriverVersion_v2()) // 1000
        except self._library.NVMLError as exc:
            raise MonitorError(str(exc)) from exc

    def count(self) -> int:
        """GPUs of this machine, visible or not; raises `MonitorError`."""
        try:
            return int(self._library.nvmlDeviceGetCount())
        except self._library.NVMLError as exc:
            raise MonitorError(str(exc)) from exc

    def _find(self, visible: Sequence[str] | None) -> Iterator[tuple[str, Any]]:
        """Numbers as CUDA counts them, and handles."""
        count = self._library.nvmlDeviceGetCount()
        wanted = list(map(str, range(count))) if visible is None else visible
        for number, name in enumerate(wanted):
            handle = self._handle(name, count)
            if handle is None:
                return
            yield str(number), self._slice(handle)

    def _handle(self, name: str, count: int) -> Any:
        get = self._library.nvmlDeviceGetHandleByIndex
        if name.isdecimal():
            return get(int(name)) if int(name) < count else None
        if name.startswith("MIG-"):
            try:
                return self._library.nvmlDeviceGetHandleByUUID(name)
            except self._library.NVMLError:
                return None
        handles = [get(index) for index in range(count)]
        uuids = map(self._library.nvmlDeviceGetUUID, handles)
        matching = [one for one, uuid in zip(handles, uuids, strict=True) if uuid.startswith(name)]
        return matching[0] if name and len(matching) == 1 else None

    def _slice(self, handle: Any) -> Any:
        """The first slice of a GPU that is divided, which is all that CUDA sees of it by number.

        See "Device Enumeration" in NVIDIA's MIG user guide.
        """
        library = self._library
        try:
            if not library.nvmlDeviceGetMigMode(handle)[0]:
                return handle
        except library.NVMLError:  # it cannot be divided, or is a slice
            return handle
        for index in range(library.nvmlDeviceGetMaxMigDeviceCount(handle)):
            with suppress(library.NVMLError):
                return library.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
        return handle

    def _card(self, number: int, handle: Any) -> Card:
        library = self._library
        mig = bool(library.nvmlDeviceIsMigDeviceHandle(handle))
        # A slice computes as its GPU does.
        whole = library.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle) if mig else handle
        major, minor = library.nvmlDeviceGetCudaComputeCapability(whole)
        return Card(
            number=number,
            name=str(library.nvmlDeviceGetName(handle)),
            uuid=str(library.nvmlDeviceGetUUID(handle)),
            memory=int(library.nvmlDeviceGetMemoryInfo(handle).total),
            capability=(int(major), int(minor)),
            mig=mig,
        )

    def _usage(self, name: str, handle: Any) -> Usage:
        memory = self._library.nvmlDeviceGetMemoryInfo(handle)
        try:
            busy = float(self._library.nvmlDeviceGetUtilizationRates(handle).gpu)
        except self._library.NVMLError:  # a slice of a card has none
            busy = None
        return Usage(name, int(memory.used), int(memory.total), busy)
