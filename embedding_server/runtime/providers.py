"""What a session computes with: names of providers -> what ONNX Runtime is given.

Everything here is a pure function of the settings, the machine (`machine`) and what the session is.
CUDA and TensorRT were never run by these options yet; names and values are those of ONNX Runtime
1.31 (onnxruntime.ai/docs/execution-providers/{CUDA,TensorRT}-ExecutionProvider.html).
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from embedding_server.core import Precision
from embedding_server.errors import ProviderError
from embedding_server.runtime.calls import Calls
from embedding_server.runtime.captured import MOST_WEIGHTS
from embedding_server.runtime.machine import Machine
from embedding_server.runtime.memory import Card
from embedding_server.settings import Settings

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
"""ONNX Runtime's names."""

NAMES: Mapping[str, str] = {"tensorrt": TENSORRT, "cuda": CUDA, "cpu": CPU}
"""Those of `INFERENCE_PROVIDERS`."""

Options = dict[str, str]
Providers = Sequence[tuple[str, Options]]
"""What `InferenceSession` takes as `providers`, the first choice first."""

ON_CPU: Providers = ((CPU, {}),)

_AMPERE = (8, 0)
"""Compute capability from which there are TF32 and bfloat16."""
_IN_FLIGHT = 2
"""While one batch runs, the next one is copied."""
_LEAST = {13: (7, 5)}
"""Compute capability by CUDA's major version: onnxruntime-gpu 1.31.1 has machine code for 7.5, 8.0,
8.6, 8.9, 9.0 and 12.0."""
_MARGIN, _CONTEXT_BYTES = 0.05, 512 << 20
"""Of the memory below the threshold, and what CUDA's context and cuBLAS take beside arenas: an
assumption, to be measured on a card."""
_INSTALL = "pip install 'onnxruntime-gpu[cuda,cudnn]'"
_STRATEGIES = {
    "next_power_of_two": "kNextPowerOfTwo",
    "same_as_requested": "kSameAsRequested",
}


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What the settings say of it, in bytes and percent."""

    arena_bytes: int = 0
    arena_strategy: str = "next_power_of_two"
    pressure_threshold: float = 95.0
    cache: Path = Path()


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """Names of providers, the first choice first, and why these."""

    names: tuple[str, ...] = ("cpu",)
    reason: str = ""

    @property
    def first(self) -> str:
        """The one that is to compute, by ONNX Runtime's name."""
        return NAMES[self.names[0]]


class Bucket(msgspec.Struct, frozen=True):
    """A size of batch: texts, and tokens of each."""

    texts: int
    tokens: int


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What a session is.

    Args:
        graph: its file.
        content: hash of what it computes; names what is cached for it.
        precision: what the graph computes in.
        tf32: whether TF32 was asked for; None: as suits the device.
        inputs: the axes of each input with a size that changes: `texts`, `tokens`, or a number.
        buckets: sizes of its batches, smallest first.
        device: the number of its GPU.
        sessions: how many there are on this GPU, this one included.
        weights, all_weights: bytes of its weights, and of those of all these sessions.
    """

    graph: Path
    content: str = ""
    precision: Precision = Precision.FP32
    tf32: bool | None = None
    inputs: Mapping[str, tuple[str | int, ...]] = {}
    buckets: tuple[Bucket, ...] = ()
    device: int = 0
    sessions: int = 1
    weights: int = 0
    all_weights: int = 0


class Compute(msgspec.Struct, frozen=True, kw_only=True):
    """What all sessions have in common; the default is the CPU.

    Every GPU has `sessions` on it, with so many bytes of `weights`; all of them make `calls`.
    """

    choice: Choice = Choice()
    wish: Wish = Wish()
    machine: Machine = Machine()
    sessions: int = 1
    weights: int = 0
    calls: Calls = msgspec.field(default_factory=Calls)

    @classmethod
    def of(cls, settings: Settings, machine: Machine, sizes: Sequence[int] = ()) -> "Compute":
        """As the settings say, for models of so many bytes that may be resident at once.

        Raises:
            ProviderError: a provider that is named cannot be used.
        """
        most = sorted(sizes, reverse=True)[: settings.max_loaded_models or None]
        if settings.cuda_graphs and not settings.reproducible:
            # In half precision these may have a second session for them.
            most += [size for size in most if size <= 2 * MOST_WEIGHTS]
        return cls(
            choice=choose(settings.providers, machine),
            wish=Wish(
                arena_bytes=settings.cuda_arena_size,
                arena_strategy=settings.cuda_arena_extend_strategy,
                pressure_threshold=settings.gpu_pressure_threshold,
                cache=settings.cache_dir,
            ),
            machine=machine,
            sessions=max(1, len(most)),
            weights=sum(most),
        )

    @property
    def on_cpu(self) -> bool:
        """Whether nothing but the CPU computes."""
        return self.choice.first == CPU

    def providers(self, part: Part) -> Providers:
        """What to open a session with."""
        if self.on_cpu:
            return ON_CPU
        shared = msgspec.structs.replace(
            part, sessions=self.sessions, all_weights=max(part.weights, self.weights)
        )
        return providers_of(self.choice, self.wish, self.machine, shared)

    @property
    def where(self) -> str:
        """The kinds of devices that compute; empty for the CPU."""
        cards = () if self.on_cpu else self.machine.cards
        return ", ".join(sorted({card.name for card in cards}))

    @property
    def has_bf16(self) -> bool:
        """Whether every device multiplies bfloat16."""
        cards = () if self.on_cpu else self.machine.cards
        return bool(cards) and all(card.capability >= _AMPERE for card in cards)

    def slots(self, cores: int) -> int:
        """Runs at a time: one per core of the CPU, or two per GPU."""
        return cores if self.on_cpu else _IN_FLIGHT * len(self.machine.cards)


def choose(names: Sequence[str], machine: Machine) -> Choice:
    """The providers to use; `auto` is CUDA where nothing is in its way, else the CPU.

    Raises:
        ProviderError: one that is named cannot be used; what is missing is said.
    """
    if tuple(names) == ("auto",):
        problem = missing("cuda", machine) or _without_cudnn(machine)
        if not problem:
            return Choice(names=("cuda", "cpu"), reason=f"auto: {_described(machine.cards[0])}")
        return Choice(names=("cpu",), reason=f"auto: {problem}")
    for name in names:
        if problem := missing(name, machine):
            raise ProviderError(f"INFERENCE_PROVIDERS={','.join(names)}: {name}: {problem}")
    return Choice(names=tuple(names), reason="INFERENCE_PROVIDERS names it")


def missing(name: str, machine: Machine) -> str:
    """What keeps a provider from being used: package, driver, device or library; empty: nothing."""
    return "" if name == "cpu" else next(_problems(name, machine), "")


def _problems(name: str, machine: Machine) -> Iterator[str]:
    package, wanted = machine.package, machine.wanted
    if NAMES[name] not in machine.offered:
        yield f"the package {package} does not have it: pip uninstall {package}; {_INSTALL}"
    if not machine.driver:
        yield f"no NVIDIA driver: {machine.driver_error}"
    if not machine.cards:
        hidden = f"CUDA_VISIBLE_DEVICES hides all {machine.hidden}" if machine.hidden else "none"
        yield f"no GPU is visible: {hidden}"
    if machine.cuda < wanted:
        good = f"the driver {machine.driver} is good for CUDA {machine.cuda}"
        yield f"{good}, {package} {machine.runtime} wants CUDA {wanted}: update it"
    for card in machine.cards:
        if card.capability < _LEAST.get(wanted, ()):
            yield f"{_described(card)}, is too old for CUDA {wanted}: hide it"
    if lost := machine.missing(name):
        named = ", ".join(one.file for one in lost)
        yield f"{named} cannot be loaded ({lost[0].error}): {_REMEDIES[name]}"


def _without_cudnn(machine: Machine) -> str:
    """ONNX Runtime opens CUDA without cuDNN, and then fails in convolutions and some reductions."""
    if not any(one.file.startswith("libcudnn") for one in machine.missing("lazy")):
        return ""
    return f"libcudnn.so.9 cannot be loaded, which some models need: {_INSTALL}"


_REMEDIES = {
    "cuda": _INSTALL,
    "tensorrt": f"{_INSTALL}; TensorRT 10: pip install 'tensorrt-cu13-libs<11', or LD_LIBRARY_PATH",
}


def _described(card: Card) -> str:
    return f"{card.name}, compute capability {'.'.join(map(str, card.capability))}"


def providers_of(choice: Choice, wish: Wish, machine: Machine, part: Part) -> Providers:
    """What to open a session with."""
    return [
        (NAMES[name], _OPTIONS[name](wish, machine, part))
        for name in choice.names
        if name != "cpu" or len(choice.names) == 1
    ]


def _cpu(_: Wish, __: Machine, ___: Part) -> Options:
    return {}


def _cuda(wish: Wish, machine: Machine, part: Part) -> Options:
    """What is not said is as ONNX Runtime has it: `enable_cuda_graph` 0 and `sdpa_kernel` 0.

    The latter leaves the attention kernel to what the device and the mask allow.
    `cudnn_conv_algo_search` is EXHAUSTIVE by default, which tries all algorithms for every new
    shape, and shapes are new all the time here. `do_copy_in_default_stream` 0 has data races
    (onnxruntime#4829). `enable_skip_layer_norm_strict_mode` adds up in fp32.
    """
    return {
        "device_id": str(part.device),
        "use_tf32": str(int(uses_tf32(machine.cards[part.device], part.tf32))),
        "gpu_mem_limit": str(arena_limit(wish, machine, part)),
        "arena_extend_strategy": _STRATEGIES[wish.arena_strategy],
        "cudnn_conv_algo_search": "HEURISTIC",
        "do_copy_in_default_stream": "1",
        "enable_skip_layer_norm_strict_mode": "1",
    }


def capturing(providers: Providers) -> Providers:
    """What a session for CUDA graphs alone is opened with, beside one of the same graph."""
    (name, options), *_ = providers
    return [(name, options | {"enable_cuda_graph": "1"})]


def _tensorrt(wish: Wish, machine: Machine, part: Part) -> Options:
    """Engines are cached for the GPU, both versions, the graph and the shapes.

    Switches are `True` and `False`, nothing else is understood (onnxruntime_pybind_state.cc).
    ONNX Runtime cannot switch TensorRT's TF32 off: fp32 is TF32 from Ampere on, unless
    NVIDIA_TF32_OVERRIDE=0 is in the environment. The timing cache is kept apart, because it serves
    all graphs: TensorrtExecutionProvider_cache_sm<capability>.timing in its directory
    (tensorrt_execution_provider_utils.h, GetTimingCachePath). Of several profiles only the first
    would be used, so it is one over all buckets: an engine that no batch falls out of is never
    built again.
    """
    card = machine.cards[part.device]
    versions = f"{card.name} {card.capability} {machine.runtime} {machine.tensorrt}"
    shapes = _profile(part)
    key = f"{versions} {part.content or part.graph} {part.precision} {shapes}"
    return {
        "device_id": str(part.device),
        "trt_fp16_enable": str(part.precision is Precision.FP16),
        "trt_bf16_enable": str(part.precision is Precision.BF16 and card.capability >= _AMPERE),
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(_cached(wish, key)),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(_cached(wish, f"timing {versions}")),
        **shapes,
    }


Table = Mapping[str, Callable[[Wish, Machine, Part], Options]]

_OPTIONS: Table = {"tensorrt": _tensorrt, "cuda": _cuda, "cpu": _cpu}


def _cached(wish: Wish, key: str) -> Path:
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    return wish.cache.expanduser() / "engines" / name


def _profile(part: Part) -> Options:
    """Least, most usual and greatest shapes of inputs that change: `name:2x16,other:2`.

    The most usual is that of the middle bucket. Every input that changes has to be there, or none.
    """
    if not part.buckets:
        return {}
    first, *_, last = (*part.buckets, *part.buckets[-1:])
    middle = part.buckets[len(part.buckets) // 2]
    return {
        f"trt_profile_{which}_shapes": ",".join(
            f"{name}:{'x'.join(str(_axis(axis, bucket)) for axis in axes)}"
            for name, axes in part.inputs.items()
        )
        for which, bucket in (("min", first), ("opt", middle), ("max", last))
    }


def _axis(axis: str | int, bucket: Bucket) -> int:
    """How long an axis is; `all` are the tokens of all texts behind one another."""
    if isinstance(axis, int):
        return axis
    sizes = {"texts": bucket.texts, "tokens": bucket.tokens, "all": bucket.texts * bucket.tokens}
    return sizes[axis]


def uses_tf32(card: Card, wanted: bool | None) -> bool:  # noqa: FBT001 - three-valued
    """Whether fp32's matrix products are TF32's: where the card has it and fp32 is not insisted on.

    ONNX Runtime's own default is on (cuda_execution_provider_info.h), so it is said either way.
    """
    return card.capability >= _AMPERE and wanted is not False


def computes_in(providers: Providers, machine: Machine, part: Part) -> Precision:
    """What a session really computes in."""
    (name, options), *_ = providers
    if name == CPU or part.precision is not Precision.FP32:
        return part.precision
    tf32 = options.get("use_tf32") == "1"
    if name == TENSORRT:
        tf32 = uses_tf32(machine.cards[part.device], wanted=None)
    return Precision.TF32 if tf32 else Precision.FP32


def arena_limit(wish: Wish, machine: Machine, part: Part) -> int:
    """Bytes that a session's arena may have; those of all sessions on a GPU sum up to the whole.

    The whole is `CUDA_ARENA_SIZE`, or what is below the threshold of the smallest visible GPU, less
    5 % and what CUDA takes beside arenas: the limit is on the arena alone. Of it a session gets its
    own weights, and an even share of what all weights leave. Where they leave nothing there are no
    shares: whoever comes first is served.
    """
    least = min(card.memory for card in machine.cards)
    below = int(least * wish.pressure_threshold / 100 * (1 - _MARGIN))
    whole = wish.arena_bytes or max(below - _CONTEXT_BYTES, below // 2)
    rest = whole - part.all_weights
    return whole if rest <= 0 else min(whole, part.weights + rest // part.sessions)
