"""The card itself: what it is, what it can do at most, and what it draws."""

import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

_SIZE, _TINY_SIZE = 8192, 64
_COPIED, _TINY_COPIED = 1 << 30, 1 << 12
_ROUNDS = 20


class Ceiling(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of the card: floating-point operations and bytes per second."""

    fp16_flops: float
    copied_bytes: float
    by: str


class Draw(msgspec.Struct, frozen=True):
    """Mean power in W while something ran, and the card's memory in use then, in MiB."""

    watts: float | None = None
    memory: float | None = None


def load_libraries() -> None:
    """CUDA's libraries: those that torch brings, or of NVIDIA's packages, or the system's.

    ONNX Runtime itself looks for packages beside its own alone.
    """
    if find_spec("torch"):
        import torch  # noqa: F401, PLC0415 - importing it loads them
    beside = [Path(base, "nvidia", "cu13", "lib") for base in sys.path]
    found = next((str(one) for one in beside if one.is_dir()), None)
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls(directory=found)


class Card:
    """The first visible card by NVML; without it, nothing is known."""

    def __init__(self) -> None:
        self.name, self.why = "no card", ""
        self._handle: Any = None
        try:
            import pynvml  # noqa: PLC0415 - may be absent, or find no driver

            pynvml.nvmlInit()
            self._nvml, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)
            self.name = str(pynvml.nvmlDeviceGetName(self._handle))
            self.name += f", driver {pynvml.nvmlSystemGetDriverVersion()}"
        except Exception as exc:  # noqa: BLE001 - whatever it is, the benchmark goes on without it
            self.why = f"{type(exc).__name__}: {exc}"

    @contextmanager
    def drawing(self) -> Iterator[Callable[[], Draw]]:
        """Watches the card meanwhile; call what it gives after it."""
        watts: list[float] = []
        memory: list[float] = []
        done = threading.Event()

        def watch() -> None:
            while self._handle and not done.is_set():
                memory.append(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used / (1 << 20))
                with suppress(self._nvml.NVMLError):  # slices of a card do not tell
                    watts.append(self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000)
                done.wait(0.05)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield lambda: Draw(
                statistics.mean(watts) if watts else None, max(memory) if memory else None
            )
        finally:
            done.set()
            thread.join()


def ceiling(provider: str, *, tiny: bool) -> Ceiling:
    """By torch where it sees a card, else by ONNX Runtime."""
    size, copied = (_TINY_SIZE, _TINY_COPIED) if tiny else (_SIZE, _COPIED)
    if find_spec("torch"):
        import torch  # noqa: PLC0415 - may be absent

        if torch.cuda.is_available():
            found = _by_torch(torch, size, copied)
            torch.cuda.empty_cache()
            return found
    product, seconds = 2.0 * size**3, _by_onnx(provider, "MatMul", (size, size))
    side = int((copied // 2) ** 0.5)
    moved = 2 * 2 * side * side  # read and written, two bytes each
    return Ceiling(
        fp16_flops=product / seconds,
        copied_bytes=moved / _by_onnx(provider, "Neg", (side, side)),
        by="ONNX Runtime",
    )


def _by_torch(torch: Any, size: int, copied: int) -> Ceiling:
    one, other = (torch.randn(size, size, device="cuda", dtype=torch.float16) for _ in range(2))
    source = torch.randn(copied // 4, device="cuda")
    target = torch.empty_like(source)

    def timed(work: Callable[[], object]) -> float:
        times: list[float] = []
        for _ in range(_ROUNDS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(float(begin.elapsed_time(end)) / 1000)
        return statistics.median(times)

    return Ceiling(
        fp16_flops=2.0 * size**3 / timed(lambda: one @ other),
        copied_bytes=2 * copied / timed(lambda: target.copy_(source)),
        by=f"torch {torch.__version__}",
    )


def _by_onnx(provider: str, op: str, shape: tuple[int, int]) -> float:
    """Seconds of one operator on random fp16 numbers that lie on the device."""
    names = ["a", "b"] if op == "MatMul" else ["a"]
    half = TensorProto.FLOAT16
    graph = helper.make_graph(
        [helper.make_node(op, names, ["y"])],
        op,
        [helper.make_tensor_value_info(name, half, shape) for name in names],
        [helper.make_tensor_value_info("y", half, shape)],
    )
    opsets = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=[provider])
    device = "cuda" if provider.startswith("CUDA") else "cpu"
    numbers = np.random.default_rng(0).standard_normal(shape, np.float32).astype(np.float16)
    binding = session.io_binding()
    for name in names:
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(numbers, device, 0))
    binding.bind_output("y", device, 0)
    times = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
