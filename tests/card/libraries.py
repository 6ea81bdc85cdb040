"""Builds `card.c` into the libraries that onnxruntime-gpu is linked with."""

import re
import subprocess
from collections import defaultdict
from pathlib import Path

_SOURCE = Path(__file__).with_name("card.c")
_DEFINED = re.compile(r"^[\w *]+?\b(\w+)\([^;]*\{", re.MULTILINE)
_HANDLES = re.compile(r"cublas\w*Create|cudaMemPoolCreate|cudaLibrary(LoadData|GetKernel)$")
"""Functions that give a handle in their first argument."""
_OURS = {"nvmlInitWithFlags", "nvmlInit_v2", "nvmlShutdown", "cuCtxSetCurrent"}
"""What nvidia-ml-py and the tests call, beside what ONNX Runtime does."""
_SONAMES = {"libcuda.so.1", "libnvidia-ml.so.1", "libcurand.so.10"}
"""Libraries whose symbols have no versions."""


def build(installed: Path, out: Path) -> Path:
    """One library under all their names, for `LD_LIBRARY_PATH`.

    Args:
        installed: where pip put onnxruntime-gpu, and CUDA's headers.
        out: a directory, which is returned.
    """
    wanted = _undefined(installed / "onnxruntime/capi/libonnxruntime_providers_cuda.so")
    defined = set(_DEFINED.findall(_SOURCE.read_text()))
    lacking = sorted(_OURS.union(*wanted.values()) - defined)
    (out / "stubs.c").write_text("#include <stdlib.h>\n" + "".join(map(_stub, lacking)))
    sonames = {name for name in wanted if name}
    nodes = [f"{name} {{ global: {'; '.join(sorted(wanted[name]))}; }};\n" for name in sonames]
    (out / "versions.map").write_text("".join(nodes))
    headers = next(installed.glob("nvidia/*/include"))
    command = ["gcc", "-shared", "-fPIC", "-O1", f"-I{headers}", str(_SOURCE), "stubs.c"]
    command += ["-Wl,--version-script=versions.map", "-o", "libcards.so"]
    subprocess.run(command, cwd=out, check=True)
    for name in sonames | _SONAMES:
        (out / name).symlink_to("libcards.so")
    return out


def _undefined(library: Path) -> dict[str, set[str]]:
    """CUDA's functions that a library wants, by the soname in their version; "" without."""
    command = ["nm", "--dynamic", "--undefined-only", "--format=just-symbols", str(library)]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    wanted: defaultdict[str, set[str]] = defaultdict(set)
    for symbol in listed.split():
        name, _, soname = symbol.partition("@")
        if name.startswith(("cu", "__cuda")):
            wanted[soname].add(name)
    return wanted


def _stub(name: str) -> str:
    if _HANDLES.match(name):
        return f"int {name}(void **handle) {{ *handle = malloc(1); return 0; }}\n"
    if name == "__cudaRegisterFatBinary":
        return f"void **{name}(void *image) {{ static void *handle; return &handle; }}\n"
    if name.startswith("cublasGetStatus"):
        return f'const char *{name}(int status) {{ return "unknown"; }}\n'
    return f"int {name}(void) {{ return 0; }}\n"
