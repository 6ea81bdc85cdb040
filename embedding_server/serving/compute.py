"""What the models of a catalogue run on, here."""

from collections.abc import Iterable

import msgspec

from embedding_server.core import ModelSpec, Precision
from embedding_server.runtime.machine import Machine
from embedding_server.runtime.providers import (
    ON_CPU,
    TENSORRT,
    Compute,
    Part,
    Providers,
    computes_in,
)
from embedding_server.runtime.shapes import buckets, changing
from embedding_server.settings import Settings

_WEIGHTS = (".onnx", ".safetensors", ".data", "_data")


def compute_of(settings: Settings, machine: Machine, specs: Iterable[ModelSpec]) -> Compute:
    """As the settings say, for models that may be resident at once.

    Raises:
        ProviderError: a provider that is named cannot be used.
    """
    return Compute.of(settings, machine, [_size(spec) for spec in specs if not spec.fastembed])


def opened_with(compute: Compute, part: Part, max_tokens: int) -> list[tuple[Providers, Precision]]:
    """What a model's session on each device is opened with, and what it then computes in."""
    if compute.on_cpu:
        return [(ON_CPU, part.precision)]
    if compute.choice.first == TENSORRT:
        shapes = changing(part.graph)
        part = msgspec.structs.replace(part, inputs=shapes, buckets=buckets(max_tokens))
    found = []
    for card in compute.machine.cards:
        one = msgspec.structs.replace(part, device=card.number)
        providers = compute.providers(one)
        found.append((providers, computes_in(providers, compute.machine, one)))
    return found


def _size(spec: ModelSpec) -> int:
    """Bytes of its files, published or lying here; 0 where neither is known."""
    if spec.size or not spec.located:
        return spec.size
    files = [path for path in spec.located.rglob("*") if path.name.endswith(_WEIGHTS)]
    return sum(path.stat().st_size for path in files if path.is_file())
