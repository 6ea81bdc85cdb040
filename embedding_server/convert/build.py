"""A directory with `model.safetensors` -> an ONNX graph on disk, cached by content."""

import contextlib
import errno
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from embedding_server.convert.blocks import ConvertError, Packing, Weights
from embedding_server.convert.families import FAMILIES
from embedding_server.convert.graph import Graph
from embedding_server.convert.linear import Linear, Watched, in_fp32, in_int8
from embedding_server.convert.quantize import Int8, choose
from embedding_server.core import Pooling

VERSION = 3
"""Part of the cache key: raise it whenever the same input would give another graph."""

MODEL_FILE, WEIGHTS = "model.onnx", "model.safetensors"
_PROGRESS_SECONDS = 1.0
_READABLE = 0o755

log = structlog.get_logger()


def convert(
    directory: Path,
    pooling: Pooling,
    cache: Path,
    *,
    expected_sha256: str | None = None,
    int8: Int8 | None = None,
) -> Path:
    """The ONNX graph of the model in `directory`, built on first use.

    The graph takes `input_ids` (tokens,) and `lengths` (texts,), int64: the tokens of all texts
    behind one another. It gives `sentence_embedding` (texts, hidden), pooled and not normalised,
    and `token_embeddings` (tokens, hidden), both float32.

    Args:
        directory: holds `config.json` and `model.safetensors`.
        pooling: part of the graph.
        cache: the graph is kept in `<cache>/graphs/<content hash>/`.
        expected_sha256: refuse any other weights.
        int8: compute linear layers in 8 bits.

    Returns:
        Path of the ONNX file; the weights lie beside it.

    Raises:
        ConvertError: a file is missing, damaged or not the expected one, or its architecture is
            not known.
    """
    weights_file = directory / WEIGHTS
    digest = _sha256(weights_file)
    if expected_sha256 not in (None, digest):
        raise ConvertError(
            f"{weights_file.name} has sha256 {digest}, expected {expected_sha256}: install the"
            " model again"
        )
    config = _read_config(directory / "config.json")
    recipe = f"{VERSION} {digest} {pooling} {json.dumps(config, sort_keys=True)}"
    if int8:
        recipe += f" int8 {int8.key} {int8.limit} {int8.fp32_share}"
    try:
        target = cache.expanduser() / "graphs" / hashlib.sha256(recipe.encode()).hexdigest()[:32]
        if not (target / MODEL_FILE).exists():
            with _published(target) as scratch:
                linear: Linear = in_fp32
                if int8:
                    linear = _quantized(weights_file, config, pooling, int8, scratch)
                _build(weights_file, config, pooling, linear, scratch)
    except (OSError, RuntimeError) as exc:
        raise ConvertError(f"the cache {cache} cannot be used: {exc}") from exc
    return target / MODEL_FILE


def _quantized(
    weights_file: Path, config: dict[str, Any], pooling: Pooling, int8: Int8, out: Path
) -> Linear:
    """8-bit linear layers, by what their inputs are in the same model in fp32."""
    watched = Watched()
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        _build(weights_file, config, pooling, watched, Path(scratch))
        samples = int8.sample(Path(scratch, MODEL_FILE), list(watched.groups))
    with _open_weights(weights_file) as weights:
        return in_int8(choose(weights, watched.groups, int8, samples), int8.limit)


def _build(
    weights_file: Path, config: dict[str, Any], pooling: Pooling, linear: Linear, out: Path
) -> None:
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in FAMILIES:
        raise ConvertError(
            f"architecture {architecture} in config.json is not one of {', '.join(FAMILIES)}"
        )
    started = time.monotonic()
    # Beside the graph: a protobuf message holds 2 GiB at most, and writing one stops all threads.
    external = out / f"{MODEL_FILE}_data"
    with Graph(architecture, external) as graph, _open_weights(weights_file) as weights:
        try:
            hidden = config["hidden_size"]
            ids, lengths = graph.input("input_ids", "tokens"), graph.input("lengths", "texts")
            packing = Packing(graph, ids, lengths, hidden)
            states = FAMILIES[architecture](graph, weights, linear, config, packing)
        except KeyError as exc:
            raise ConvertError(f"config.json has no {exc}") from exc
        graph.output("sentence_embedding", packing.pool(states, pooling), "texts", hidden)
        graph.output("token_embeddings", states, "tokens", hidden)
        graph.save(out / MODEL_FILE)
    log.info("graph.built", architecture=architecture, seconds=round(time.monotonic() - started, 2))


@contextlib.contextmanager
def _open_weights(path: Path) -> Iterator[Weights]:
    """Look tensors up by name, as float32.

    A model with a task head has a prefix before the encoder's names, such as `bert.`.
    """
    total, done, shown = path.stat().st_size, 0, time.monotonic()
    try:
        with safe_open(path, framework="numpy") as file:
            full = {name.removeprefix("bert."): name for name in file.keys()}  # noqa: SIM118 - no dict

            def weights(name: str) -> NDArray[Any]:
                nonlocal done, shown
                if name not in full:
                    raise ConvertError(f"{path.name} has no tensor {name}")
                tensor: NDArray[Any] = file.get_tensor(full[name])
                done += tensor.nbytes
                if time.monotonic() - shown > _PROGRESS_SECONDS:
                    shown = time.monotonic()
                    log.info("graph.building", percent=round(100 * done / total))
                return tensor.astype(np.float32, copy=False)

            yield weights
    except SafetensorError as exc:
        raise ConvertError(f"{path.name}: {exc}") from exc


@contextlib.contextmanager
def _published(target: Path) -> Iterator[Path]:
    """A scratch directory that becomes `target` in one step.

    Of two processes that do this at once the first one wins and the other's work is dropped; an
    interrupted one leaves only a scratch directory.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".building-", dir=target.parent))
    try:
        yield scratch
        scratch.chmod(_READABLE)
        try:
            scratch.rename(target)
        except OSError as exc:
            if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise ConvertError(f"{path}: {exc.strerror}") from exc


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except OSError as exc:
        raise ConvertError(f"{path}: {exc.strerror}") from exc
    except ValueError as exc:
        raise ConvertError(f"{path}: {exc}") from exc
    return dict(config)
