"""Machines that are not at hand, as `runtime.machine.look` would see them."""

import msgspec

from embedding_server.runtime.machine import Library, Machine, sonames
from embedding_server.runtime.memory import Card
from embedding_server.runtime.providers import CPU, CUDA, TENSORRT

GIB = 1 << 30
LOST = "cannot open shared object file: No such file or directory"


def card(number: int, name: str, gib: float, capability: tuple[int, int], **more: bool) -> Card:
    """A GPU."""
    return Card(
        number=number,
        name=name,
        uuid=f"GPU-{number}",
        memory=int(gib * GIB),
        capability=capability,
        **more,
    )


def machine(*cards: Card, without: tuple[str, ...] = ("libnvinfer", "libnvonnx")) -> Machine:
    """A machine with onnxruntime-gpu and a driver; `without` begin the names of what is missing."""

    def library(file: str) -> Library:
        lost = file.startswith(without)
        return Library(file=file, path="" if lost else f"/lib/{file}", error=LOST * lost)

    return Machine(
        cards=cards,
        driver="580.95.05",
        cuda=13,
        wanted=13,
        package="onnxruntime-gpu",
        runtime="1.31.1",
        offered=(TENSORRT, CUDA, CPU),
        libraries={kind: tuple(map(library, names)) for kind, names in sonames().items()},
        tensorrt="" if "libnvinfer" in without else "10.13.3.9",
    )


A100 = card(0, "NVIDIA A100-SXM4-80GB", 80, (8, 0))
NONE = Machine(runtime="1.31.1", driver_error="NVML Shared Library Not Found")
T4 = machine(card(0, "Tesla T4", 15, (7, 5)))
A100S = machine(A100, card(1, "NVIDIA A100-PCIE-40GB", 40, (8, 0)))
MIG = machine(card(0, "NVIDIA A100-SXM4-80GB MIG 1g.10gb", 9.5, (8, 0), mig=True))
H200 = machine(card(0, "NVIDIA H200", 140, (9, 0)))
H200_TENSORRT = machine(card(0, "NVIDIA H200", 140, (9, 0)), without=("nothing",))
NO_CUDNN = machine(A100, without=("libcudnn", "libnvinfer", "libnvonnx"))
NO_CUBLAS = machine(A100, without=("libcublas",))
OLD_DRIVER = msgspec.structs.replace(machine(A100), driver="535.104", cuda=12)
OLD_CARD = machine(card(0, "Tesla P100", 16, (6, 0)))
ALL_HIDDEN = Machine(
    hidden=2, driver="580.95.05", package="onnxruntime-gpu", offered=(TENSORRT, CUDA, CPU)
)
NO_DRIVER = Machine(
    driver_error="Driver Not Loaded", package="onnxruntime-gpu", offered=(TENSORRT, CUDA, CPU)
)
WRONG_PACKAGE = Machine(cards=(A100,), driver="580.95.05", runtime="1.31.1")
"""onnxruntime for the CPU on a machine with a GPU."""
