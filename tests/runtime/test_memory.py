"""Which GPUs are visible, through a fake of NVML."""

import pytest

from embedding_server.runtime.memory import Card, MonitorError, Nvml, Usage
from tests.fakes import FakeNvml

CARDS = FakeNvml("GPU-a1", "GPU-b22", "GPU-b333")


@pytest.mark.parametrize(
    ("visible", "used"),
    [
        (None, [6, 7, 8]),
        (["1"], [7]),
        (["2", "0"], [8, 6]),
        (["GPU-b333"], [8]),
        (["GPU-a"], [6]),
        (["GPU-b"], []),
        (["GPU-c"], []),
        (["MIG-1", "0"], [5, 6]),
        (["MIG-2", "0"], []),
        (["0", "7", "1"], [6]),
        (["-1"], []),
        ([], []),
    ],
)
def test_visible_devices(visible: list[str] | None, used: list[int]) -> None:
    """Numbers, UUIDs, their beginnings and MIG slices, up to the first that does not exist."""
    usages = Nvml(visible, CARDS).read()
    assert [usage.used for usage in usages] == used
    assert [usage.device for usage in usages] == [str(number) for number in range(len(used))]


def test_what_is_read() -> None:
    """Memory of every device, and how busy it is where the driver tells."""
    card, piece = Nvml(["0", "MIG-1"], CARDS).read()
    assert card == Usage("0", 6, 100, 100.0)
    assert piece == Usage("1", 5, 100, None)
    assert card.percent == 6.0


def test_no_driver() -> None:
    """Where there is no driver, that is said, and a driver that goes away is no crash."""
    with pytest.raises(MonitorError, match="Driver Not Loaded"):
        Nvml(None, FakeNvml(missing=True))
    library = FakeNvml("GPU-a1")
    monitor = Nvml(None, library)

    def gone(handle: str) -> None:
        raise library.NVMLError("GPU is lost")

    library.nvmlDeviceGetMemoryInfo = gone  # type: ignore[method-assign]
    with pytest.raises(MonitorError, match="lost"):
        monitor.read()


def test_what_the_cards_are() -> None:
    """Name, UUID, memory and compute capability, numbered as CUDA numbers the visible ones."""
    library = FakeNvml(
        "GPU-a1", "GPU-b22", names={"GPU-b22": "NVIDIA T4"}, capabilities={"GPU-b22": (7, 5)}
    )
    nvml = Nvml(["1", "0"], library)
    assert nvml.cards() == [
        Card(number=0, name="NVIDIA T4", uuid="GPU-b22", memory=100, capability=(7, 5)),
        Card(number=1, name="Fake", uuid="GPU-a1", memory=100, capability=(8, 0)),
    ]
    assert (nvml.driver(), nvml.count()) == ("580.1", 2)


@pytest.mark.parametrize("visible", [None, ["0"], ["MIG-1"]])
def test_a_divided_card(visible: list[str] | None) -> None:
    """CUDA sees the first slice of a divided card, by whichever name; it computes as the card."""
    library = FakeNvml("GPU-a1", divided="GPU-a1", capabilities={"GPU-a1": (9, 0)})
    (card,) = Nvml(visible, library).cards()
    assert (card.uuid, card.mig, card.capability) == ("MIG-1", True, (9, 0))
    assert Nvml(visible, library).read() == [Usage("0", 5, 100, None)]


@pytest.mark.gpu
def test_a_real_card() -> None:
    """The driver tells of at least one card."""
    assert all(0 < usage.used < usage.total for usage in Nvml(None).read())
