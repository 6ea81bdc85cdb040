"""What follows from a GPU for a model's sessions and for what is stored of it."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from embedding_server.catalog.local import read_directory
from embedding_server.core import Precision
from embedding_server.observability.metrics import Metrics
from embedding_server.runtime.machine import Machine
from embedding_server.runtime.providers import CPU, CUDA, TENSORRT, Compute
from embedding_server.runtime.session import FellBackError, SessionError, Threads
from embedding_server.serving.check import tolerance
from embedding_server.serving.device import Device
from embedding_server.serving.loader import Loader
from embedding_server.serving.profile import device_name
from embedding_server.serving.source import RunPlan, Source
from embedding_server.settings import Settings
from tests import machines
from tests.fakes import MEMORY, FakeSession
from tests.tiny import write_model

pytestmark = pytest.mark.filterwarnings("ignore:Specified provider")


def source_on(
    root: Path, machine: Machine, *providers: str, device: int = 0, precision: str = "auto"
) -> Source:
    """The tiny model on a machine that is not at hand."""
    if not (root / "tiny").exists():
        write_model(root / "tiny")
    settings = Settings(
        allowed_embedding_models=("tiny",),
        cache_dir=root,
        providers=providers or ("auto",),
        precision=precision,  # type: ignore[arg-type]
    )
    plan = RunPlan.of(settings, Compute.of(settings, machine))
    spec = read_directory(root / "tiny", "tiny")
    return Source(spec, msgspec.structs.replace(plan, device=device), 2)


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
        source_on(tmp_path, machines.A100S, device=1),
        source_on(tmp_path, machines.A100S, precision="fp32"),
        source_on(tmp_path, machines.H200_TENSORRT, "tensorrt"),
        source_on(tmp_path, machines.H200_TENSORRT, "tensorrt", "cuda"),
    ]
    used = [CPU, CUDA, CUDA, CUDA, TENSORRT, TENSORRT]
    assert len({one.profile_path for one in sources}) == len(sources)
    prints = {one.fingerprint(name) for one, name in zip(sources, used, strict=True)}
    assert len(prints) == len(sources)
    assert len({one.reference_path for one in sources}) == 1


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
    """What the CPU cannot open either is made anew next time."""
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


def test_the_next_model_goes_where_the_fewest_bytes_are(tmp_path: Path) -> None:
    """Models that were unloaded count no more."""
    compute = source_on(tmp_path, machines.A100S)._plan.compute
    metrics = Metrics("test")
    with ThreadPoolExecutor(1) as pool:
        loader = Loader(
            Device(1, None, MEMORY, metrics),
            RunPlan(cache=tmp_path, compute=compute),
            lambda spec: spec,
            pool,
            metrics,
        )
    assert loader._place().device == 0
    session = FakeSession()
    loader._placed[session] = 0
    assert loader._place().device == 1
    del session
    assert loader._place().device == 0


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
