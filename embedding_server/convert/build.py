"""A directory with `model.safetensors` -> an ONNX graph on disk, cached by content."""

import contextlib
import errno
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import structlog

from embedding_server.convert.blocks import Net
from embedding_server.convert.checkpoint import (
    HALVES,
    INDEX,
    WEIGHTS,
    Checkpoint,
    Reading,
    borrowed_name,
    weight_files,
)
from embedding_server.convert.errors import ConvertError
from embedding_server.convert.families import Family, family_of
from embedding_server.convert.fusing import fused
from embedding_server.convert.graph import Graph, Target
from embedding_server.convert.hashes import content_hash
from embedding_server.convert.linear import Linear, Watched, in_fp32, in_int8
from embedding_server.convert.links import place
from embedding_server.convert.origin import GraphOrigin
from embedding_server.convert.packing import Batch, Packing
from embedding_server.convert.packing_cuda import CudaPacking
from embedding_server.convert.progress import Progress
from embedding_server.convert.quantize import Int8, choose
from embedding_server.core import Kind, ModelSpec, Pooling, Precision

VERSION = 5
"""Part of the cache key: raise it whenever the same input would give another graph."""

MODEL_FILE = "model.onnx"
_READABLE = 0o755

log = structlog.get_logger()


def convert(
    spec: ModelSpec,
    cache: Path,
    *,
    rounded: Precision = Precision.FP32,
    int8: Int8 | None = None,
    progress: Progress | None = None,
    target: Target = "cpu",
    computed: Precision | None = None,
) -> Path:
    """The ONNX graph of a model with safetensors, built on first use.

    The graph takes `input_ids` (tokens,) and `lengths` (texts,), int64: the tokens of all texts
    behind one another; one that scores pairs takes `token_type_ids` (tokens,) too. One for CUDA
    takes in place of the lengths whatever it needs of `runtime.packed.INPUTS`. It gives
    `sentence_embedding` (texts, width), float32: vectors, not normalised, scores, or the weights of
    all words of the vocabulary. Vectors come with `token_embeddings` (tokens, width).

    Args:
        spec: the model; its directory holds `config.json` and the weights.
        cache: the graph is kept in `<cache>/graphs/<content hash>/`.
        rounded: the precision that weights are rounded to.
        int8: compute linear layers in 8 bits; for a CPU only.
        progress: told how far it is; None: the log is.
        target: the kind of provider that it is for.
        computed: what it computes in on CUDA; None: as weights are rounded. A CPU has fp32 alone.

    Returns:
        Path of the ONNX file; the weights lie beside it.

    Raises:
        ConvertError: a file is missing, damaged or not the expected one, or its architecture is
            not known, or not for such a model.
    """
    files = weight_files(spec.directory)
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(content_hash, files, repeat(cache)))
    if spec.weights_sha256 not in (None, digests[0]):
        raise ConvertError(
            f"{files[0].name} has sha256 {digests[0]}, expected {spec.weights_sha256}: install the"
            " model again"
        )
    config = _read_config(spec.directory / "config.json")
    words = [str(VERSION), *digests, spec.kind, spec.pooling, rounded]
    words.append(json.dumps(config, sort_keys=True))
    if spec.template:  # the ids of its answers
        words.append(content_hash(spec.directory / "tokenizer.json", cache))
    if int8:
        words.append(f"int8 {int8.key} {int8.limit} {int8.fp32_share}")

    reading = _reading(rounded, progress, target, computed)
    if target != "cpu":
        words += [target] if reading.held is rounded else [target, reading.held]
        if int8:
            raise ConvertError("8-bit graphs are for a CPU: choose fp16")

    def build(out: Path) -> None:
        linear = _linear(spec, config, int8, out, reading)
        _build(spec, config, linear, out, reading, target=target)
        GraphOrigin(
            directory=str(spec.directory.resolve()),
            version=VERSION,
            model=spec.id,
            architecture=config["architectures"][0],
            precision=Precision.INT8 if int8 else rounded,
        ).write(out)

    return cached(cache, " ".join(words), build, files)


def convert_layers(
    spec: ModelSpec,
    out: Path,
    *,
    rounded: Precision = Precision.FP32,
    int8: Int8 | None = None,
    target: Target = "cpu",
) -> Path:
    """The same graph, made in the directory `out` whether or not it is cached, for a closer look.

    Outputs besides are `layer_<index>` (tokens, width): the embeddings, and states behind every
    layer. Raises as `convert` does.
    """
    config, reading = _read_config(spec.directory / "config.json"), _reading(rounded, None, target)
    linear = _linear(spec, config, int8, out, reading)
    _build(spec, config, linear, out, reading, layers=True, target=target)
    return out / MODEL_FILE


def _reading(
    rounded: Precision,
    progress: Progress | None,
    target: Target,
    computed: Precision | None = None,
) -> Reading:
    held = computed or rounded if target == "cuda" else Precision.FP32
    return Reading(rounded, progress, held)


def cached(
    cache: Path, recipe: str, build: Callable[[Path], None], files: Sequence[Path] = ()
) -> Path:
    """The graph that is made by `recipe`; the first time, `build` writes it to a directory.

    It may use `files` as they are; they are put beside it again if they were replaced.

    Raises:
        ConvertError: the cache cannot be used, or whatever `build` finds.
    """
    try:
        key = hashlib.sha256(recipe.encode()).hexdigest()[:32]
        target = cache.expanduser() / "graphs" / key
        for index, path in enumerate(files):
            if (target / borrowed_name(index)).exists():
                place(path, target / borrowed_name(index))
        if not (target / MODEL_FILE).exists():
            with _published(target) as scratch:
                build(scratch)
    except (OSError, RuntimeError) as exc:
        raise ConvertError(f"the cache {cache} cannot be used: {exc}") from exc
    return target / MODEL_FILE


def _linear(
    spec: ModelSpec,
    config: dict[str, Any],
    int8: Int8 | None,
    out: Path,
    reading: Reading,
) -> Linear:
    """Linear layers in fp32 or 8 bits, these by what their inputs are in the model in fp32."""
    if not int8:
        return in_fp32
    watched = Watched()
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        _build(spec, config, watched, Path(scratch), reading)
        samples = int8.sample(Path(scratch, MODEL_FILE), list(watched.groups))
    with Checkpoint(spec.directory, family_of(config).prefix, reading) as weights:
        return in_int8(choose(weights, watched.groups, int8, samples), int8.limit)


def _build(
    spec: ModelSpec,
    config: dict[str, Any],
    linear: Linear,
    out: Path,
    reading: Reading,
    *,
    layers: bool = False,
    target: Target = "cpu",
) -> None:
    family, started = family_of(config), time.monotonic()
    # Beside the graph: a protobuf message holds 2 GiB at most, and writing one stops all threads.
    external = out / f"{MODEL_FILE}_data"
    pairs = spec.kind is Kind.CROSS and family.segments
    with (
        Graph(
            config["architectures"][0], external, target=target, half=HALVES.get(reading.held)
        ) as graph,
        Checkpoint(spec.directory, family.prefix, reading) as weights,
    ):
        net = Net(
            graph,
            weights,
            linear,
            config,
            packing=_BATCHES[target](graph, pairs),
            directory=spec.directory,
            layers=layers,
        )
        try:
            states = family.encoder(net)
            result = _RESULTS[spec.kind](net, family, states, spec.pooling)
        except KeyError as exc:
            raise ConvertError(f"config.json has no {exc}") from exc
        except (TypeError, ValueError, IndexError) as exc:
            raise ConvertError(f"config.json does not fit the weights: {exc}") from exc
        graph.output("sentence_embedding", result, "texts", "width")
        if spec.kind is Kind.DENSE or layers:
            graph.output("token_embeddings", states, "tokens", "width")
        for index, path in enumerate(weight_files(spec.directory)):
            if borrowed_name(index) in graph.borrowed:
                place(path, out / borrowed_name(index))
        if target == "cuda":
            graph.rewrite(fused)
        graph.save(out / MODEL_FILE)
    seconds = round(time.monotonic() - started, 2)
    log.info("graph.built", architecture=graph.name, seconds=seconds)


def _packed(graph: Graph, pairs: bool) -> Batch:  # noqa: FBT001 - see `_BATCHES`
    ids, lengths = graph.input("input_ids", "tokens"), graph.input("lengths", "texts")
    return Packing(graph, ids, lengths, graph.input("token_type_ids", "tokens") if pairs else None)


_BATCHES: Mapping[Target, Callable[[Graph, bool], Batch]] = {
    "cpu": _packed,
    "cuda": lambda graph, pairs: CudaPacking(graph, segments=pairs),
}
"""Target -> what lays out a batch in a graph, of pairs or not."""


def _vectors(net: Net, _: Family, states: str, pooling: Pooling) -> str:
    return net.packing.pool(states, pooling)


def _scores(net: Net, family: Family, states: str, _: Pooling) -> str:
    if not family.classifier:
        raise ConvertError(f"{net.graph.name} has no head that scores")
    return family.classifier(net, states)


def _word_weights(net: Net, family: Family, states: str, _: Pooling) -> str:
    """SPLADE's: the largest logit of any token, log(1 + relu(x)) of it."""
    if not family.words:
        raise ConvertError(f"{net.graph.name} has no head that gives words")
    g, largest = net.graph, net.packing.largest(family.words(net, states))
    return g.node("Log", g.node("Add", g.single(g.node("Relu", largest)), g.exact(1.0)))


_RESULTS: Mapping[Kind, Callable[[Net, Family, str, Pooling], str]] = {
    Kind.DENSE: _vectors,
    Kind.CROSS: _scores,
    Kind.SPARSE: _word_weights,
}
"""Kind of model -> what its graph gives."""


def convertible(directory: Path) -> bool:
    """Whether there are safetensors of a family that is known."""
    try:
        family_of(_read_config(directory / "config.json"))
    except ConvertError:
        return False
    return any((directory / name).exists() for name in (WEIGHTS, INDEX))


def model_type(directory: Path) -> str:
    """What config.json calls the model's type; empty where it does not say."""
    return str(_read_config(directory / "config.json").get("model_type", ""))


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


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except OSError as exc:
        raise ConvertError(f"{path}: {exc.strerror}") from exc
    except ValueError as exc:
        raise ConvertError(f"{path}: {exc}") from exc
    if not isinstance(config, dict):
        raise ConvertError(f"{path}: it is no object")
    return config
