"""What the models of a catalogue run on, here."""

from collections.abc import Iterable

from embedding_server.core import ModelSpec
from embedding_server.runtime.machine import Machine
from embedding_server.runtime.providers import Compute
from embedding_server.settings import Settings

_WEIGHTS = (".onnx", ".safetensors", ".data", "_data")


def compute_of(settings: Settings, machine: Machine, specs: Iterable[ModelSpec]) -> Compute:
    """As the settings say, for models that may be resident at once.

    Raises:
        ProviderError: a provider that is named cannot be used.
    """
    return Compute.of(settings, machine, [_size(spec) for spec in specs if not spec.fastembed])


def _size(spec: ModelSpec) -> int:
    """Bytes of its files, published or lying here; 0 where neither is known."""
    if spec.size or not spec.located:
        return spec.size
    files = [path for path in spec.located.rglob("*") if path.name.endswith(_WEIGHTS)]
    return sum(path.stat().st_size for path in files if path.is_file())
