"""`embedding-server doctor` here and on other machines, and start-up errors as users see them."""

import json
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest

from embedding_server import cli
from embedding_server.doctor import show_doctor
from embedding_server.runtime.machine import Machine
from embedding_server.settings import Settings
from tests import machines
from tests.process import environment

COMMAND = [sys.executable, "-m", "embedding_server"]
here_is_no_gpu = pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(),
    reason="onnxruntime-gpu is installed",
)


def run(verb: str, *flags: str, **env: str) -> "subprocess.CompletedProcess[str]":
    """One verb in a process of its own."""
    return subprocess.run(
        [*COMMAND, verb, *flags],
        capture_output=True,
        text=True,
        env=environment(**env),
        check=False,
        timeout=60,
    )


@here_is_no_gpu
@pytest.mark.parametrize("names", ["cuda", "cuda,cpu", "tensorrt,cuda"])
def test_serve_without_what_was_asked_for(models: Path, names: str) -> None:
    """A provider that is named and missing ends the start with one line and the status 2."""
    flags = ("--model-path", str(models), "--allowed-embedding-models", "tiny", "--port", "1")
    ran = run("serve", *flags, INFERENCE_PROVIDERS=names)
    assert ran.returncode == 2
    (line,) = ran.stderr.splitlines()
    assert line.startswith(f"embedding-server: INFERENCE_PROVIDERS={names}: ")
    assert "the package onnxruntime does not have it" in line


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("auto,cuda", "auto stands alone"),
        ("cpu,cuda", "what comes behind it does nothing"),
        ("rocm", "expected a comma list of auto, tensorrt, cuda, cpu"),
        (",", "expected a comma list"),
    ],
)
def test_orders_that_make_no_sense(names: str, said: str) -> None:
    """They are settings errors."""
    ran = run("serve", "--demo", INFERENCE_PROVIDERS=names)
    assert ran.returncode == 2
    (line,) = ran.stderr.splitlines()
    assert said in line


@here_is_no_gpu
def test_here(models: Path, tmp_path: Path) -> None:
    """Text and JSON of a real process; status 1 where a named provider is missing."""
    flags = ("--model-path", str(models), "--allowed-embedding-models", "tiny")
    env = {"INFERENCE_CACHE_DIR": str(tmp_path)}
    ran = run("doctor", *flags, **env)
    assert ran.returncode == 0, ran.stderr
    assert f"onnxruntime {onnxruntime.__version__}: " in ran.stdout
    assert "tiny  CPUExecutionProvider  fp32       model.safetensors" in ran.stdout
    assert f"{tmp_path}: empty; " in ran.stdout
    ran = run("doctor", "--json", *flags, INFERENCE_PROVIDERS="cuda", **env)
    assert ran.returncode == 1
    found = json.loads(ran.stdout)
    assert found["problem"].startswith("INFERENCE_PROVIDERS=cuda: cuda: the package onnxruntime")
    assert (found["providers"], found["models"]) == ([], [])
    assert found["cores"]["threads"] >= 1
    assert run("doctor", **env).returncode == 0


def printed(
    capsys: pytest.CaptureFixture[str],
    machine: Machine,
    models: Path,
    *providers: str,
    as_json: bool = False,
) -> tuple[bool, str]:
    """What it prints about a machine that is not at hand, but for what is of this one."""
    settings = Settings(
        allowed_embedding_models=("tiny",),
        model_path=models,
        cache_dir=models / "cache",
        providers=providers or ("auto",),
    )
    well = show_doctor(settings, machine, as_json=as_json)
    out = capsys.readouterr().out
    if as_json:
        return well, out
    lines = out.splitlines()
    own = ("processor", "cores", "cache")
    return well, "\n".join(line for line in lines if not line.startswith(own))


FOUND = """\
library    libcuda.so.1 (cuda) /lib/libcuda.so.1
library    libcudart.so.13 (cuda) /lib/libcudart.so.13
library    libcublasLt.so.13 (cuda) /lib/libcublasLt.so.13
library    libcublas.so.13 (cuda) /lib/libcublas.so.13
library    libcurand.so.10 (cuda) /lib/libcurand.so.10
library    libcudnn.so.9 (tensorrt) /lib/libcudnn.so.9
library    libnvinfer.so.10 (tensorrt) /lib/libnvinfer.so.10
library    libnvonnxparser.so.10 (tensorrt) /lib/libnvonnxparser.so.10
library    libcufft.so.12 (cuda, for some models) /lib/libcufft.so.12
library    libnvrtc.so.13 (cuda, for some models) /lib/libnvrtc.so.13
"""
RUNTIME = (
    "runtime    onnxruntime-gpu 1.31.1: TensorrtExecutionProvider, CUDAExecutionProvider,"
    " CPUExecutionProvider\n"
)
LOST = "cannot be loaded (cannot open shared object file: No such file or directory)"
INSTALL = "pip install 'onnxruntime-gpu[cuda,cudnn]'"
TENSORRT = f"{INSTALL}; TensorRT 10: pip install 'tensorrt-cu13-libs<11', or LD_LIBRARY_PATH"


def without(*names: str) -> str:
    """The libraries' lines, of which some are missing."""
    lines = []
    for line in FOUND.splitlines():
        file, _, rest = line.removeprefix("library    ").partition(" ")
        kind = rest.rpartition(" ")[0]
        lost = f"{kind} missing: cannot open shared object file: No such file or directory"
        lines.append(f"library    {file} {lost}" if file.startswith(names) else line)
    return "\n".join(lines) + "\n"


TEXTS = [
    (
        machines.NONE,
        f"""\
runtime    onnxruntime 1.31.1: CPUExecutionProvider
driver     none: NVML Shared Library Not Found
GPUs       none visible
tensorrt   the package onnxruntime does not have it: pip uninstall onnxruntime; {INSTALL}
cuda       the package onnxruntime does not have it: pip uninstall onnxruntime; {INSTALL}
cpu        can be used
providers  INFERENCE_PROVIDERS=auto: cpu (auto: the package onnxruntime does not have it: pip \
uninstall onnxruntime; {INSTALL})

id    provider              precision  file
tiny  CPUExecutionProvider  fp32       model.safetensors""",
    ),
    (
        machines.T4,
        RUNTIME
        + "driver     580.95.05\nGPUs       1 visible\n"
        + "  0        Tesla T4, 7.5, 15.0 GiB, GPU-0\n"
        + without("libnvinfer", "libnvonnx")
        + f"""\
tensorrt   libnvinfer.so.10, libnvonnxparser.so.10 {LOST}: {TENSORRT}
cuda       can be used
cpu        can be used
providers  INFERENCE_PROVIDERS=auto: cuda, cpu (auto: Tesla T4, compute capability 7.5)

id    provider               precision  file
tiny  CUDAExecutionProvider  fp16       model.safetensors""",
    ),
    (
        machines.MIG,
        RUNTIME
        + "driver     580.95.05\nGPUs       1 visible\n"
        + "  0        NVIDIA A100-SXM4-80GB MIG 1g.10gb, 8.0, 9.5 GiB, a MIG slice, GPU-0\n"
        + without("libnvinfer", "libnvonnx")
        + f"""\
tensorrt   libnvinfer.so.10, libnvonnxparser.so.10 {LOST}: {TENSORRT}
cuda       can be used
cpu        can be used
providers  INFERENCE_PROVIDERS=auto: cuda, cpu (auto: NVIDIA A100-SXM4-80GB MIG 1g.10gb, \
compute capability 8.0)

id    provider               precision  file
tiny  CUDAExecutionProvider  fp16       model.safetensors""",
    ),
    (
        machines.NO_CUDNN,
        RUNTIME
        + "driver     580.95.05\nGPUs       1 visible\n"
        + "  0        NVIDIA A100-SXM4-80GB, 8.0, 80.0 GiB, GPU-0\n"
        + without("libcudnn", "libnvinfer", "libnvonnx")
        + f"""\
tensorrt   libcudnn.so.9, libnvinfer.so.10, libnvonnxparser.so.10 {LOST}: {TENSORRT}
cuda       can be used
cpu        can be used
providers  INFERENCE_PROVIDERS=auto: cpu (auto: libcudnn.so.9 cannot be loaded, which some models \
need: {INSTALL})

id    provider              precision  file
tiny  CPUExecutionProvider  fp32       model.safetensors""",
    ),
    (
        machines.H200_TENSORRT,
        RUNTIME
        + "driver     580.95.05\nGPUs       1 visible\n"
        + "  0        NVIDIA H200, 9.0, 140.0 GiB, GPU-0\n"
        + FOUND
        + """\
tensorrt   can be used
cuda       can be used
cpu        can be used
providers  INFERENCE_PROVIDERS=auto: cuda, cpu (auto: NVIDIA H200, compute capability 9.0)

id    provider               precision  file
tiny  CUDAExecutionProvider  fp16       model.safetensors""",
    ),
]


@pytest.mark.parametrize(("machine", "golden"), TEXTS)
def test_text(
    capsys: pytest.CaptureFixture[str], models: Path, machine: Machine, golden: str
) -> None:
    """The whole text, but for this machine's cores and disk."""
    assert printed(capsys, machine, models) == (True, golden)


def test_what_is_hidden(capsys: pytest.CaptureFixture[str], models: Path) -> None:
    """Cards that CUDA_VISIBLE_DEVICES hides are counted, and what is said is the reason."""
    well, text = printed(capsys, machines.ALL_HIDDEN, models, "cuda")
    assert not well
    assert "GPUs       none visible, 2 hidden" in text
    assert "INFERENCE_PROVIDERS=cuda: cuda: no GPU is visible: CUDA_VISIBLE_DEVICES hides" in text


@pytest.mark.parametrize(
    ("machine", "providers", "chosen"),
    [
        (machines.WRONG_PACKAGE, ("auto",), ["cpu"]),
        (machines.A100S, ("auto",), ["cuda", "cpu"]),
        (machines.H200_TENSORRT, ("tensorrt", "cuda"), ["tensorrt", "cuda"]),
        (machines.H200, ("tensorrt",), []),
    ],
)
def test_json(
    capsys: pytest.CaptureFixture[str],
    models: Path,
    machine: Machine,
    providers: tuple[str, ...],
    chosen: list[str],
) -> None:
    """The same as JSON."""
    well, text = printed(capsys, machine, models, *providers, as_json=True)
    found = json.loads(text)
    assert (found["providers"], well) == (chosen, bool(chosen))
    assert [one["name"] for one in found["machine"]["cards"]] == [c.name for c in machine.cards]
    assert found["asked"] == list(providers)
    assert bool(found["problem"]) == (not chosen)
    assert set(found["usable"]) == {"tensorrt", "cuda", "cpu"}
    assert found["cache"]["free"] > 0


@pytest.mark.parametrize(
    ("flag", "environ", "seen"),
    [
        (None, {}, None),
        (None, {"CUDA_VISIBLE_DEVICES": "1"}, "1"),
        ("0, 2", {"CUDA_VISIBLE_DEVICES": "1"}, "0,2"),
        (None, {"CUDA_VISIBLE_DEVICES": ""}, ""),
    ],
)
def test_cuda_sees_the_cards_that_are_said(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    flag: str | None,
    environ: dict[str, str],
    seen: str | None,
) -> None:
    """CUDA reads the environment itself: a flag reaches it, and its numbers are NVML's."""
    monkeypatch.chdir(tmp_path)
    changed = dict(environ)
    monkeypatch.setattr("embedding_server.cli.os.environ", changed)
    cli._prepared({"demo": "true", "cuda_visible_devices": flag})
    assert changed.get("CUDA_VISIBLE_DEVICES") == seen
    assert changed["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
