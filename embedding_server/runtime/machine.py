"""What there is to compute with: GPUs, the driver, CUDA's libraries, and what ONNX Runtime offers.

Read once, at the start. What follows from it is decided elsewhere (`providers`), by functions that
tests call with machines that are not at hand.
"""

import contextlib
import ctypes
import io
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import onnxruntime as ort

from embedding_server.runtime.memory import Card, MonitorError, Nvml

_MAPS = Path("/proc/self/maps")
_CUDA_MAJOR = 13
"""What ONNX Runtime 1.31 is built with; the CPU's package does not say."""

_FATAL_ONLY = 4


class Library(msgspec.Struct, frozen=True, kw_only=True):
    """A shared library that a provider loads: where it is, or why it cannot be loaded."""

    file: str
    path: str = ""
    error: str = ""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to compute with.

    `driver` is its version, empty where there is none, and then `driver_error` says why. `hidden`
    GPUs are there and not visible. `cuda` is the major version that the driver is good for, and
    `wanted` the one that the package was built with; 0: not known. `libraries` are by provider,
    `lazy` ones those that CUDA loads only for some operators; `tensorrt` is its version. `package`
    is what onnxruntime was installed as.
    """

    cards: tuple[Card, ...] = ()
    hidden: int = 0
    driver: str = ""
    driver_error: str = ""
    cuda: int = 0
    wanted: int = 0
    package: str = "onnxruntime"
    runtime: str = ""
    offered: tuple[str, ...] = ("CPUExecutionProvider",)
    libraries: Mapping[str, tuple[Library, ...]] = {}
    tensorrt: str = ""

    def missing(self, provider: str) -> list[Library]:
        """Libraries without which a provider cannot be opened."""
        return [one for one in self.libraries.get(provider, ()) if one.error]


def sonames(cuda_major: int = _CUDA_MAJOR) -> dict[str, tuple[str, ...]]:
    """Shared libraries by provider, those first that others need.

    They are what `readelf -d` names as NEEDED in libonnxruntime_providers_{cuda,tensorrt}.so of
    onnxruntime-gpu 1.31.1. cuDNN, cuFFT and NVRTC are not among CUDA's there: it opens them when an
    operator asks for them (onnxruntime/core/providers/cuda/{cudnn,cufft}_loader.cc), which is how a
    machine without cuDNN runs everything but convolutions and their like.
    """
    cuda = tuple(f"{name}.so.{cuda_major}" for name in ("libcudart", "libcublasLt", "libcublas"))
    cufft = 12 if cuda_major >= 13 else 11
    return {
        "cuda": ("libcuda.so.1", *cuda, "libcurand.so.10"),
        "tensorrt": (
            *("libcuda.so.1", *cuda, "libcudnn.so.9"),
            *("libnvinfer.so.10", "libnvonnxparser.so.10"),
        ),
        "lazy": ("libcudnn.so.9", f"libcufft.so.{cufft}", f"libnvrtc.so.{cuda_major}"),
    }


def look(
    visible: Sequence[str] | None, library: Any = None, load: Callable[[str], Any] = ctypes.CDLL
) -> Machine:
    """This machine, with its visible GPUs.

    Args:
        visible: as in `CUDA_VISIBLE_DEVICES`; None = all.
        library: speaks NVML; None = the driver's.
        load: opens a shared library by its name, or raises `OSError`.
    """
    cards: tuple[Card, ...] = ()
    hidden, cuda, driver, error = 0, 0, "", ""
    try:
        nvml = Nvml(visible, library) if library else Nvml(visible)
        cards, driver = tuple(nvml.cards()), nvml.driver()
        cuda = nvml.cuda()
        hidden = max(0, nvml.count() - len(cards))
    except MonitorError as exc:
        error = str(exc)
    offered = tuple(ort.get_available_providers())
    package = str(getattr(ort, "package_name", "onnxruntime"))
    named = re.match(r"\d+", str(getattr(ort, "cuda_version", None) or ""))
    # Libraries are of no interest where nothing would load them.
    major = int(named[0]) if named else _CUDA_MAJOR
    wanted = sonames(major) if _of_gpu(offered) else {}
    if wanted:
        ort.set_default_logger_severity(_FATAL_ONLY)  # what it would say is found out here
        _preload()
    handles: dict[str, Any] = {}
    files = dict.fromkeys(name for names in wanted.values() for name in names)
    found = {name: _load(name, load, handles) for name in files}
    return Machine(
        cards=cards,
        hidden=hidden,
        driver=driver,
        driver_error=error,
        cuda=cuda,
        wanted=major if wanted else 0,
        package=package,
        runtime=ort.__version__,
        offered=offered,
        libraries={kind: tuple(found[name] for name in names) for kind, names in wanted.items()},
        tensorrt=_tensorrt_version(handles),
    )


def _of_gpu(offered: Sequence[str]) -> bool:
    return any(name.startswith(("CUDA", "Tensorrt")) for name in offered)


def _preload() -> None:
    """Load CUDA's libraries out of the wheels beside onnxruntime, where no linker looks for them.

    `onnxruntime.preload_dlls` (1.21 and later) prints on stdout what it cannot load; that is found
    out here in our own way.
    """
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()


def _load(file: str, load: Callable[[str], Any], handles: dict[str, Any]) -> Library:
    """Load a library into `handles`; once it is there, whoever needs it by name has it."""
    error = ""
    for name in (file, *_in_wheels(file)):
        try:
            handles[file] = load(name)
        except OSError as exc:
            error = error or str(exc).removeprefix(f"{file}: ")
        else:
            return Library(file=file, path=_path(file))
    return Library(file=file, error=error)


def _in_wheels(file: str) -> list[str]:
    """Where TensorRT's wheels (tensorrt-cu13-libs) have it, which ONNX Runtime does not preload."""
    spec = find_spec("tensorrt_libs")
    folders = (spec.submodule_search_locations or []) if spec else []
    return [str(Path(folder) / file) for folder in folders]


def _tensorrt_version(handles: Mapping[str, Any]) -> str:
    """As the library tells (NvInferRuntime.h): 101303 is 10.13.3."""
    tell = getattr(handles.get("libnvinfer.so.10"), "getInferLibVersion", None)
    number = tell() if tell else 0
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}" if number else ""


def _path(file: str) -> str:
    """Where a loaded library lies; a name of it may be a link to another name."""
    stem = file.partition(".so")[0] + ".so"
    try:
        paths = [line.split()[-1] for line in _MAPS.read_text().splitlines()]
    except OSError:
        return ""
    return next((path for path in paths if Path(path).name.startswith(stem)), "")
