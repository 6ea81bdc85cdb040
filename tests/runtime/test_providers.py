"""What sessions would be opened with on machines that are not at hand, against goldens."""

from pathlib import Path

import onnxruntime
import pytest

from embedding_server.catalog.local import read_directory
from embedding_server.convert import convert
from embedding_server.core import Precision
from embedding_server.errors import ProviderError
from embedding_server.runtime.errors import FellBackError
from embedding_server.runtime.machine import Machine, look, sonames
from embedding_server.runtime.providers import (
    CPU,
    CUDA,
    ON_CPU,
    TENSORRT,
    Bucket,
    Choice,
    Compute,
    Part,
    Wish,
    arena_limit,
    capturing,
    choose,
    computes_in,
    providers_of,
)
from embedding_server.runtime.session import OnnxSession
from embedding_server.runtime.shapes import buckets, changing
from embedding_server.settings import Settings
from tests import machines
from tests.fakes import FakeNvml
from tests.tiny import export, write_model

PART = Part(graph=Path("/m/model.onnx"), content="abc")
WISH = Wish(cache=Path("/cache"))
BATCHES = (Bucket(1, 8), Bucket(32, 64), Bucket(256, 512))


def cuda(device: int, limit: int, tf32: str, strategy: str = "kNextPowerOfTwo") -> dict[str, str]:
    """All options of CUDA."""
    return {
        "device_id": str(device),
        "use_tf32": tf32,
        "gpu_mem_limit": str(limit),
        "arena_extend_strategy": strategy,
        "cudnn_conv_algo_search": "HEURISTIC",
        "do_copy_in_default_stream": "1",
        "enable_skip_layer_norm_strict_mode": "1",
    }


@pytest.mark.parametrize(
    ("machine", "golden"),
    [
        (machines.NONE, [(CPU, {})]),
        (machines.WRONG_PACKAGE, [(CPU, {})]),
        (machines.NO_DRIVER, [(CPU, {})]),
        (machines.ALL_HIDDEN, [(CPU, {})]),
        (machines.NO_CUDNN, [(CPU, {})]),
        (machines.OLD_DRIVER, [(CPU, {})]),
        (machines.OLD_CARD, [(CPU, {})]),
        (machines.NO_CUBLAS, [(CPU, {})]),
        (machines.T4, [(CUDA, cuda(0, 13998909030, "0"))]),
        (machines.A100S, [(CUDA, cuda(0, 38225208934, "1"))]),
        (machines.MIG, [(CUDA, cuda(0, 8669123051, "1"))]),
        (machines.H200, [(CUDA, cuda(0, 135130408550, "1"))]),
        (machines.H200_TENSORRT, [(CUDA, cuda(0, 135130408550, "1"))]),
    ],
)
def test_auto(machine: Machine, golden: list[tuple[str, dict[str, str]]]) -> None:
    """CUDA where nothing is in its way, never TensorRT; TF32 from Ampere on, said either way."""
    choice = choose(("auto",), machine)
    assert list(providers_of(choice, WISH, machine, PART)) == golden
    assert choice.reason.startswith("auto: ")


@pytest.mark.parametrize(
    ("machine", "names", "said"),
    [
        (machines.NONE, "cuda", "the package onnxruntime does not have it: pip uninstall"),
        (machines.WRONG_PACKAGE, "cuda,cpu", "the package onnxruntime does not have it"),
        (machines.NO_DRIVER, "cuda", "no NVIDIA driver: Driver Not Loaded"),
        (machines.ALL_HIDDEN, "cuda", "no GPU is visible: CUDA_VISIBLE_DEVICES hides all 2"),
        (machines.machine(), "cuda", "no GPU is visible: none"),
        (
            machines.OLD_DRIVER,
            "cuda",
            "the driver 535.104 is good for CUDA 12, onnxruntime-gpu 1.31.1 wants CUDA 13",
        ),
        (machines.OLD_CARD, "cuda", "Tesla P100, compute capability 6.0, is too old for CUDA 13"),
        (
            machines.NO_CUBLAS,
            "cuda",
            "libcublasLt.so.13, libcublas.so.13 cannot be loaded (cannot open shared object",
        ),
        (machines.T4, "tensorrt,cuda", "tensorrt: libnvinfer.so.10, libnvonnxparser.so.10 cannot"),
        (machines.NO_CUDNN, "tensorrt", "tensorrt: libcudnn.so.9, libnvinfer.so.10, libnvonnx"),
    ],
)
def test_what_is_missing_is_said(machine: Machine, names: str, said: str) -> None:
    """A provider that is named and cannot be used is an error of one line with exit status 2."""
    with pytest.raises(ProviderError) as error:
        choose(names.split(","), machine)
    assert said in str(error.value)
    assert str(error.value).startswith(f"INFERENCE_PROVIDERS={names}: ")
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_named_providers() -> None:
    """By name CUDA goes without cuDNN; the CPU may be named; CUDA backs TensorRT only if named."""
    assert choose(("cuda",), machines.NO_CUDNN).names == ("cuda",)
    assert choose(("cpu",), machines.H200).first == CPU
    assert providers_of(Choice(names=("cpu",)), WISH, machines.H200, PART) == [(CPU, {})]
    machine = machines.H200_TENSORRT
    for names in (("tensorrt",), ("tensorrt", "cuda"), ("tensorrt", "cuda", "cpu")):
        given = providers_of(choose(names, machine), WISH, machine, PART)
        assert [name for name, _ in given] == [TENSORRT, CUDA][: len(names)]


@pytest.mark.parametrize(
    ("asked", "machine", "golden", "computed"),
    [
        (None, machines.T4, "0", Precision.FP32),
        (True, machines.T4, "0", Precision.FP32),
        (None, machines.H200, "1", Precision.TF32),
        (True, machines.H200, "1", Precision.TF32),
        (False, machines.H200, "0", Precision.FP32),
    ],
)
def test_tf32(
    asked: bool | None,  # noqa: FBT001 - a case
    machine: Machine,
    golden: str,
    computed: Precision,
) -> None:
    """It follows the card unless fp32 is insisted on, and the session says what it computes in."""
    part = Part(graph=PART.graph, tf32=asked)
    given = providers_of(choose(("cuda",), machine), WISH, machine, part)
    assert given[0][1]["use_tf32"] == golden
    assert computes_in(given, machine, part) is computed
    half = Part(graph=PART.graph, precision=Precision.FP16)
    assert computes_in(given, machine, half) is Precision.FP16
    assert computes_in(ON_CPU, machine, part) is Precision.FP32


def test_arenas_of_a_device_sum_up_to_its_limit() -> None:
    """Each has its weights and an even share of the rest; what does not fit is not divided."""
    weights = [100 << 20, 2 << 30, 5 << 30]
    parts = [
        Part(graph=PART.graph, sessions=3, weights=one, all_weights=sum(weights)) for one in weights
    ]
    limits = [arena_limit(WISH, machines.A100S, part) for part in parts]
    whole = arena_limit(WISH, machines.A100S, PART)
    assert whole == int(40 * 2**30 * 0.95 * 0.95) - (512 << 20)
    assert whole - 3 <= sum(limits) <= whole
    assert all(one > least for one, least in zip(limits, weights, strict=True))
    sized = Wish(arena_bytes=4 << 30)
    assert arena_limit(sized, machines.A100S, PART) == 4 << 30
    assert arena_limit(sized, machines.A100S, parts[0]) == 4 << 30


def test_the_settings_reach_the_options() -> None:
    """Arena size and strategy, the second card, and how many sessions share it."""
    settings = Settings(
        allowed_embedding_models=("a",),
        providers=("cuda",),
        cuda_arena_size=4 << 30,
        cuda_arena_extend_strategy="same_as_requested",
    )
    compute = Compute.of(settings, machines.A100S, [1 << 20] * 4)
    part = Part(graph=PART.graph, device=1, weights=1 << 20)
    limit = (1 << 20) + ((4 << 30) - (4 << 20)) // 4
    assert list(compute.providers(part)) == [(CUDA, cuda(1, limit, "1", "kSameAsRequested"))]
    assert compute.where == "NVIDIA A100-PCIE-40GB, NVIDIA A100-SXM4-80GB"
    assert (compute.slots(16), Compute().slots(16), compute.has_bf16) == (4, 16, True)
    assert Compute().providers(part) == ON_CPU
    limited = Settings(allowed_embedding_models=("a",), max_loaded_models=1, providers=("cuda",))
    assert Compute.of(limited, machines.H200, [5, 9, 7]).weights == 9


def test_cuda_graphs() -> None:
    """Each model may have a second session for them, with a share of the memory of its own."""
    options = cuda(1, 5 << 30, "1")
    assert capturing([(CUDA, options)]) == [(CUDA, options | {"enable_cuda_graph": "1"})]
    settings = Settings(allowed_embedding_models=("a",), cuda_graphs=True, providers=("cuda",))
    compute = Compute.of(settings, machines.H200, [5, 9])
    assert (compute.sessions, compute.weights) == (4, 28)


def test_tensorrt() -> None:
    """Precision, caches by card, versions and graph, and one profile over all buckets."""
    machine = machines.H200_TENSORRT
    part = Part(
        graph=PART.graph,
        content="abc",
        precision=Precision.FP16,
        inputs={"input_ids": ("texts", "tokens"), "lengths": ("texts",), "past": ("texts", 12, 64)},
        buckets=BATCHES,
    )
    ((name, options),) = providers_of(choose(("tensorrt",), machine), WISH, machine, part)
    engines, timing = options.pop("trt_engine_cache_path"), options.pop("trt_timing_cache_path")
    assert (name, options) == (
        TENSORRT,
        {
            "device_id": "0",
            "trt_fp16_enable": "True",
            "trt_bf16_enable": "False",
            "trt_engine_cache_enable": "True",
            "trt_timing_cache_enable": "True",
            "trt_profile_min_shapes": "input_ids:1x8,lengths:1,past:1x12x64",
            "trt_profile_opt_shapes": "input_ids:32x64,lengths:32,past:32x12x64",
            "trt_profile_max_shapes": "input_ids:256x512,lengths:256,past:256x12x64",
        },
    )
    assert Path(engines).parent == Path(timing).parent == Path("/cache/engines")
    assert engines != timing


def test_tensorrt_caches_are_kept_apart() -> None:
    """Another graph, precision, profile, card or version has another engine, but one timing."""
    machine = machines.H200_TENSORRT
    base = {"graph": PART.graph, "content": "abc", "inputs": {"ids": ("all",)}, "buckets": BATCHES}

    def paths(machine: Machine, **changes: object) -> tuple[str, str]:
        part = Part(**(base | changes))  # type: ignore[arg-type]
        options = providers_of(Choice(names=("tensorrt",)), WISH, machine, part)[0][1]
        return options["trt_engine_cache_path"], options["trt_timing_cache_path"]

    first = paths(machine)
    assert paths(machine) == first
    changed = [
        paths(machine, content="abd"),
        paths(machine, precision=Precision.FP16),
        paths(machine, buckets=BATCHES[:2]),
    ]
    assert all(one[0] != first[0] and one[1] == first[1] for one in changed)
    assert all(mine != theirs for mine, theirs in zip(paths(machines.A100S), first, strict=True))


def test_tensorrt_computes_in_tf32_whatever_is_asked() -> None:
    """ONNX Runtime cannot switch it off, so that is what the session says."""
    machine, part = machines.H200_TENSORRT, Part(graph=PART.graph, tf32=False)
    given = providers_of(Choice(names=("tensorrt",)), WISH, machine, part)
    assert computes_in(given, machine, part) is Precision.TF32


def test_sizes_that_change(tmp_path: Path) -> None:
    """Inputs of our graphs and of exported ones; the last bucket takes a text of any length."""
    directory = write_model(tmp_path / "tiny")
    packed = convert(read_directory(directory, "m"), tmp_path)
    assert changing(packed) == {"input_ids": ("all",), "lengths": ("texts",)}
    padded = export(directory) / "onnx" / "model.onnx"
    assert set(changing(padded).values()) == {("texts", "tokens")}
    assert buckets(16)[-1] == Bucket(256, 16)
    assert buckets(8192)[-1] == Bucket(256, 8192)


def test_the_machine_is_looked_at() -> None:
    """Visible cards of the driver, what is hidden, and what ONNX Runtime offers."""
    library = FakeNvml("GPU-a1", "GPU-b22")
    seen = look(["1"], library)
    assert [one.uuid for one in seen.cards] == ["GPU-b22"]
    assert (seen.hidden, seen.driver) == (1, "580.1")
    assert CPU in seen.offered
    gone = look(None, FakeNvml(missing=True))
    assert (gone.cards, gone.driver, gone.driver_error) == ((), "", "Driver Not Loaded")


def test_libraries_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, by its name; TensorRT tells its version itself."""
    tried = []

    class Loaded:
        def getInferLibVersion(self) -> int:  # noqa: N802 - TensorRT's name
            return 101303

    def load(file: str) -> Loaded:
        tried.append(file)
        if "cudnn" in file:
            raise OSError(f"{file}: {machines.LOST}")
        return Loaded()

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime, "set_default_logger_severity", lambda _: None)
    seen = look(None, FakeNvml("GPU-a1"), load)
    assert sorted(tried) == sorted({name for names in sonames().values() for name in names})
    assert [one.file for one in seen.missing("tensorrt")] == ["libcudnn.so.9"]
    assert [one.error for one in seen.missing("lazy")] == [machines.LOST]
    assert (seen.tensorrt, seen.cuda, seen.wanted) == ("10.13.3", 13, 13)


def test_names_of_libraries_follow_cuda() -> None:
    """CUDA 12 has another cuFFT."""
    assert "libcudart.so.13" in sonames()["cuda"]
    assert {"libcudart.so.12", "libcublas.so.12"} < set(sonames(12)["cuda"])
    assert "libcufft.so.11" in sonames(12)["lazy"]


def test_a_session_that_fell_back_is_an_error(tmp_path: Path) -> None:
    """ONNX Runtime opens it on the CPU and says nothing; here nobody gets it."""
    graph = convert(read_directory(write_model(tmp_path / "tiny"), "m"), tmp_path)
    with (
        pytest.warns(UserWarning, match="is not in available provider names"),
        pytest.raises(FellBackError, match=f"{CUDA} was asked for.*fell back to {CPU}"),
    ):
        OnnxSession(graph, 1, providers=[(CUDA, {"device_id": "0"})])
