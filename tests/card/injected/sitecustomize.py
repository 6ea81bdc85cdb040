"""Python imports this where its directory is on the path: SIGUSR1 breaks the GPU for the process.

As a program it takes all of the GPU's memory, says so, and holds it until its stdin ends.
"""

import ctypes
import signal
import sys

_SIZES = (1 << 26, 1 << 20, 1 << 12)
_PTX = b""".version 7.0
.target sm_75
.address_size 64
.visible .entry breaks() { trap; }
"""


def _driver() -> ctypes.CDLL:
    """CUDA's driver, with the context that its runtime uses, too."""
    driver, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
    _must(driver.cuInit(0))
    _must(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0))
    _must(driver.cuCtxSetCurrent(context))
    return driver


def _break(*_: object) -> None:
    """Run a kernel after which every call of this process fails."""
    driver, module, function = _driver(), ctypes.c_void_p(), ctypes.c_void_p()
    _must(driver.cuModuleLoadData(ctypes.byref(module), _PTX))
    _must(driver.cuModuleGetFunction(ctypes.byref(function), module, b"breaks"))
    _must(driver.cuLaunchKernel(function, *(1,) * 6, 0, None, None, None))


def _take_all() -> None:
    """Take the memory, large pieces first."""
    driver, memory = _driver(), ctypes.c_void_p()
    for size in _SIZES:
        while not driver.cuMemAlloc_v2(ctypes.byref(memory), ctypes.c_size_t(size)):
            pass


def _must(error: int) -> None:
    if error:
        raise RuntimeError(f"CUDA's driver answered {error}")


signal.signal(signal.SIGUSR1, _break)

if __name__ == "__main__":
    _take_all()
    sys.stdout.write("full\n")
    sys.stdout.flush()
    sys.stdin.read()
