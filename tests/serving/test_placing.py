"""What follows from a GPU for a model's graph and sessions, and for what is stored of it."""

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto

from embedding_server.catalog.local import read_directory
from embedding_server.convert import ConvertError, intact
from embedding_server.core import ModelSpec, Precision, normalized
from embedding_server.observability.metrics import Metrics
from embedding_server.runtime.errors import (
    DeviceLostError,
    FellBackError,
    OutOfMemoryError,
    SessionError,
    translated,
)
from embedding_server.runtime.foreign import ForeignIds
from embedding_server.runtime.machine import Machine
from embedding_server.runtime.providers import CPU, CUDA, TENSORRT, Compute
from embedding_server.runtime.replicas import Replicas
from embedding_server.runtime.session import OnnxSession, Threads
from embedding_server.serving.check import CheckError, tolerance
from embedding_server.serving.device import Device
from embedding_server.serving.loader import Loader, LoadError
from embedding_server.serving.model import Model
from embedding_server.serving.plan import RunPlan
from embedding_server.serving.profile import device_name
from embedding_server.serving.source import Source
from embedding_server.settings import Settings
from tests import machines
from tests.convert.lowering import lowered
from tests.convert.test_families import FAMILIES, Golden
from tests.fakes import MEMORY, FakeSession, ids
from tests.tiny import export, write_model

pytestmark = pytest.mark.filterwarnings("ignore:Specified provider")


def plan_on(root: Path, machine: Machine, *providers: str, precision: str = "auto") -> RunPlan:
    """How models are to run on a machine that is not at hand."""
    settings = Settings(
        allowed_embedding_models=("tiny",),
        cache_dir=root,
        providers=providers or ("auto",),
        precision=precision,  # type: ignore[arg-type]
    )
    return RunPlan.of(settings, Compute.of(settings, machine))


def source_on(root: Path, machine: Machine, *providers: str, precision: str = "auto") -> Source:
    """The tiny model there."""
    if not (root / "tiny").exists():
        write_model(root / "tiny")
    spec = read_directory(root / "tiny", "tiny")
    return Source(spec, plan_on(root, machine, *providers, precision=precision), 2)


def test_keys_on_the_cpu_stay(tmp_path: Path) -> None:
    """Profiles and fingerprints of before are found again, whatever GPU lies idle."""
    source = source_on(tmp_path, machines.NONE)
    key = f"{source._identity} CPUExecutionProvider {device_name()} 2 None"
    assert source.profile_path.stem == hashlib.sha256(key.encode()).hexdigest()[:32]
    key = f"{source._identity} {source._spec.max_tokens} CPUExecutionProvider"
    assert source.fingerprint(CPU) == hashlib.sha256(key.encode()).hexdigest()[:16]
    beside = source_on(tmp_path, machines.H200, "cpu")
    assert beside.profile_path == source.profile_path
    assert beside.fingerprint(CPU) == source.fingerprint(CPU)
    tf32 = source_on(tmp_path, machines.NONE, precision="tf32")
    assert tf32.profile_path == source.profile_path
    assert tf32.open(Threads()).precision is Precision.FP32


def test_keys_tell_gpus_apart(tmp_path: Path) -> None:
    """Another kind of card, provider or TF32 has a profile and fingerprint, not references."""
    sources = [
        source_on(tmp_path, machines.NONE),
        source_on(tmp_path, machines.A100S),
        source_on(tmp_path, machines.H200),
        source_on(tmp_path, machines.A100S, precision="fp32"),
        source_on(tmp_path, machines.A100S, precision="tf32"),
        source_on(tmp_path, machines.H200_TENSORRT, "tensorrt"),
        source_on(tmp_path, machines.H200_TENSORRT, "tensorrt", "cuda"),
    ]
    used = [CPU, CUDA, CUDA, CUDA, CUDA, TENSORRT, TENSORRT]
    assert len({one.profile_path for one in sources}) == len(sources)
    prints = {one.fingerprint(name) for one, name in zip(sources, used, strict=True)}
    assert len(prints) == len(sources)
    assert len({one.reference_path for one in sources}) == 1


def test_cuda_graphs_have_a_fingerprint(tmp_path: Path) -> None:
    """They fill batches up, which may change last bits, if only on a GPU."""
    plain = source_on(tmp_path, machines.H200)
    plan = msgspec.structs.replace(plan_on(tmp_path, machines.H200), cuda_graphs=True)
    with_graphs = Source(plain._spec, plan, 2)
    assert with_graphs.fingerprint(CUDA) != plain.fingerprint(CUDA)
    assert with_graphs.fingerprint(CPU) == plain.fingerprint(CPU)


def test_a_fall_back_keeps_the_graph(tmp_path: Path) -> None:
    """It is an error, and none of the graph's; fp32 on the CPU is to be had all the same."""
    source = source_on(tmp_path, machines.A100S)
    with pytest.raises(FellBackError):
        source.open(Threads())
    assert source.converted
    assert source.converted.exists()
    exact = source.exact()
    assert (exact.provider, exact.precision) == (CPU, Precision.FP32)


def test_a_damaged_graph_is_dropped_there_too(tmp_path: Path) -> None:
    """What cannot be read is made anew next time."""
    source = source_on(tmp_path, machines.A100S)
    graph = source.converted
    assert graph
    graph.write_bytes(graph.read_bytes()[:1000])
    with pytest.raises(SessionError):
        source.open(Threads())
    assert not graph.exists()


def test_threads_do_not_matter_on_a_gpu(tmp_path: Path) -> None:
    """Nothing is tried out there."""
    assert source_on(tmp_path, machines.NONE).fixed_threads is None
    assert source_on(tmp_path, machines.A100S).fixed_threads == Threads()


@pytest.mark.parametrize(
    ("provider", "precision", "most"),
    [
        (CPU, Precision.FP32, 1e-4),
        (CPU, Precision.FP16, 1e-4),
        (CUDA, Precision.FP32, 1e-4),
        (CUDA, Precision.TF32, 2e-3),
        (CUDA, Precision.FP16, 1e-2),
    ],
)
def test_how_far_neighbours_may_move_a_vector(
    provider: str, precision: Precision, most: float
) -> None:
    """On a GPU, as its precision has it."""
    session = FakeSession()
    session.provider, session.precision = provider, precision
    assert tolerance(session) == most


class Picky(Loader):
    """A loader whose device is not good at half precision; it keeps what it was asked for."""

    asked: tuple[Precision | None, ...] = ()

    def _opened(self, spec: ModelSpec, foreign_ids: ForeignIds | None) -> Model:
        self.asked += (spec.precision,)
        if spec.precision is not Precision.TF32:
            raise CheckError("the least cosine with fp32's vectors is 0.9, not 0.999")
        raise SessionError("there is no such device")


@pytest.mark.parametrize(
    ("machine", "precision", "asked", "said"),
    [
        (machines.H200, "auto", (None, Precision.TF32), "no such device"),
        (machines.H200, "fp16", (None,), "the least cosine"),
        (machines.NONE, "auto", (None,), "the least cosine"),
    ],
)
def test_half_precision_that_does_not_suit(
    tmp_path: Path, machine: Machine, precision: str, asked: tuple[Precision | None, ...], said: str
) -> None:
    """Where nobody asked for it the model is loaded in fp32 instead; else that is an error."""
    write_model(tmp_path / "tiny")
    metrics = Metrics("test")
    plan = plan_on(tmp_path, machine, precision=precision)
    with ThreadPoolExecutor(1) as pool:
        device = Device(1, None, MEMORY, metrics)
        loader = Picky(device, plan, lambda spec: spec, pool, metrics)
        with pytest.raises(LoadError, match=said):
            loader(read_directory(tmp_path / "tiny", "tiny"))
    assert loader.asked == asked


@pytest.mark.parametrize(
    ("machine", "providers", "precision", "computed"),
    [
        (machines.NONE, (), "auto", Precision.FP32),
        (machines.H200, (), "auto", Precision.FP16),
        (machines.T4, (), "auto", Precision.FP16),
        (machines.H200, (), "tf32", Precision.FP32),
        (machines.H200, (), "fp32", Precision.FP32),
        (machines.H200, ("cpu",), "auto", Precision.FP32),
        (machines.H200_TENSORRT, ("tensorrt",), "auto", Precision.FP16),
    ],
)
@pytest.mark.parametrize("exported", [False, True])
def test_graphs(  # noqa: PLR0917 - a case
    tmp_path: Path,
    machine: Machine,
    providers: tuple[str, ...],
    precision: str,
    computed: Precision,
    exported: bool,  # noqa: FBT001 - a case
) -> None:
    """What CUDA gets is packed by its own operators, or halved; it computes what the CPU does."""
    directory = write_model(tmp_path / "tiny")
    if exported:
        export(directory)
    spec = read_directory(directory, "tiny")
    source = Source(spec, plan_on(tmp_path, machine, *providers, precision=precision), 1)
    assert source.precision is computed
    graph = onnx.load(source._graph)
    kinds = {node.op_type for node in graph.graph.node}
    on_cuda = not providers and machine is not machines.NONE
    assert ("PackedMultiHeadAttention" in kinds) == (on_cuda and not exported)
    held = {tensor.data_type for tensor in graph.graph.initializer}
    assert (TensorProto.FLOAT16 in held) == (on_cuda and computed is Precision.FP16)
    session = OnnxSession(
        lowered(source._graph, tmp_path / "lowered.onnx"), 1, layout=source._layout
    )
    items = [one.item for one in source.encoder.encode(["the of and", "to", "in is that of"])]
    found = normalized(session.run(items))
    expected = normalized(source.reference().run(items))
    assert np.vecdot(found, expected).min() > 0.9999


def test_an_unknown_family(tmp_path: Path) -> None:
    """Where nobody knows what to make of the safetensors, the exported graph beside is halved."""
    directory = write_model(tmp_path / "tiny")
    weights = (directory / "model.safetensors").read_bytes()
    export(directory)
    (directory / "model.safetensors").write_bytes(weights)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(
        json.dumps(config | {"architectures": ["UnheardOfModel"]})
    )
    source = Source(read_directory(directory, "tiny"), plan_on(tmp_path, machines.H200), 1)
    held = {one.data_type for one in onnx.load(source._graph).graph.initializer}
    assert TensorProto.FLOAT16 in held
    assert source._graph != directory / "onnx/model.onnx"
    plan = plan_on(tmp_path, machines.H200, precision="bf16")
    with pytest.raises(SessionError, match="of a family that is known"):
        Source(read_directory(directory, "tiny"), plan, 1)


@pytest.mark.parametrize(
    ("machine", "held"),
    [(machines.H200, TensorProto.BFLOAT16), (machines.T4, TensorProto.FLOAT)],
)
def test_qwen_in_bf16(tmp_path: Path, machine: Machine, held: int) -> None:
    """It computes in bf16 where every card does; a T4 computes in fp32 on rounded weights."""
    Golden(FAMILIES / "qwen3.npz").write(tmp_path / "golden")
    directory = write_model(tmp_path / "tiny")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "golden" / name, directory)
    source = Source(read_directory(directory, "q"), plan_on(tmp_path, machine), 1)
    assert source.precision is Precision.BF16
    stored = {one.data_type for one in onnx.load(source._graph).graph.initializer}
    assert held in stored
    assert (TensorProto.BFLOAT16 in stored) == (held == TensorProto.BFLOAT16)


def test_what_a_gpu_does_not_do(tmp_path: Path) -> None:
    """8 bits, and bf16 of exported graphs or encoders: what to choose instead is said."""
    with pytest.raises(ConvertError, match="8-bit graphs are for a CPU: choose fp16"):
        source_on(tmp_path, machines.H200, precision="int8")
    with pytest.raises(ConvertError, match="no attention in bf16 on CUDA: choose fp16"):
        source_on(tmp_path, machines.H200, precision="bf16")
    export(write_model(tmp_path / "own"))
    plan = plan_on(tmp_path, machines.H200, precision="bf16")
    with pytest.raises(SessionError, match="bf16 needs model.safetensors"):
        Source(read_directory(tmp_path / "own", "own"), plan, 1)


def test_an_intact_graph_is_kept(tmp_path: Path) -> None:
    """Weights that are cut off are seen; what a GPU cannot open is not the graph's fault."""
    source = source_on(tmp_path, machines.H200)
    graph = source.converted
    assert graph
    assert intact(graph)
    (data,) = graph.parent.glob("*_data")
    data.write_bytes(data.read_bytes()[:-4])
    assert not intact(graph)


async def test_a_batch_goes_to_the_card_with_less_to_do() -> None:
    """Tokens that run count, then those that were; every card gets its share."""
    one, other = FakeSession(), FakeSession()
    both = Replicas([one, other])
    one.block()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(both.run, [ids(9)])
        one.running.acquire()
        for length in (3, 4):
            both.run([ids(length)])
        one.release()
        waiting.result()
    both.run([ids(1)])
    assert one.batches == [[9]]
    assert other.batches == [[3], [4], [1]]
    assert (both.resident_bytes, both.threads, both.has_wide) == (2, one.threads, False)


def test_padding_is_something_to_do() -> None:
    """Where graphs pad, a batch of one long text and a short one counts as two long ones."""
    one, other = FakeSession(), FakeSession()
    one.padded = other.padded = True
    both = Replicas([one, other])
    for lengths in ((9, 1), (15,), (2,)):  # 18, 15, and so the second one again
        both.run([ids(length) for length in lengths])
    assert (one.batches, other.batches) == ([[9, 1]], [[15], [2]])


def test_the_least_exact_card_decides() -> None:
    """How far vectors may be from one another follows from what computes least exactly."""
    old, new = FakeSession(), FakeSession()
    new.precision = Precision.TF32
    assert Replicas([old, new]).precision is Precision.TF32
    assert Replicas([old, old]).precision is Precision.FP32


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("CUDA failure 700: an illegal memory access was encountered ; GPU=0", DeviceLostError),
        ("CUDA failure 719: unspecified launch failure ; GPU=1", DeviceLostError),
        ("CUDA failure 2: out of memory ; GPU=0 ; hostname=a", OutOfMemoryError),
        ("CUDA failure 701: too many resources requested for launch", SessionError),
        ("CUDNN failure 3000: CUDNN_STATUS_NOT_SUPPORTED", SessionError),
    ],
)
def test_what_errors_mean(said: str, kind: type[SessionError]) -> None:
    """Memory that ran out is told from a card that is gone, and both from a failed run."""
    with pytest.raises(SessionError) as info, translated("m: "):
        raise RuntimeError(said)
    assert type(info.value) is kind
    assert str(info.value) == f"m: {said}"
