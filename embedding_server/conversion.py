"""`embedding-server convert`: a model's graph, made before it is served, and how exact it is."""

import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import structlog
from numpy.typing import NDArray
from tqdm import tqdm

from embedding_server.catalog import FilesError, Locator, ModelFilesError, open_catalog
from embedding_server.catalog.local import descriptions, read_directory
from embedding_server.convert import ConvertError, Progress
from embedding_server.convert.links import place
from embedding_server.core import ModelSpec
from embedding_server.errors import StartupError
from embedding_server.runtime.cores import usable_cores
from embedding_server.runtime.errors import SessionError
from embedding_server.runtime.machine import look
from embedding_server.runtime.session import outputs
from embedding_server.runtime.tokenizer import TokenizerError
from embedding_server.serving.compute import compute_of
from embedding_server.serving.plan import RunPlan
from embedding_server.serving.references import arrays
from embedding_server.serving.source import Source
from embedding_server.settings import Settings
from embedding_server.table import show

_KNOWN = (FilesError, ModelFilesError, ConvertError, TokenizerError, SessionError)
_LAYER, _LAST = re.compile(r"layer_(\d+)"), "last_hidden_state"
_LEAST_COSINE = 0.999
_READABLE = 0o755

States = dict[str, NDArray[np.float32]]
"""`layer_<index>` or `last_hidden_state` -> states (tokens, width)."""


def convert_model(
    settings: Settings, wanted: str, out: Path | None = None, compared: Path | None = None
) -> bool:
    """Build the graph that `serve` would use, and print where it is.

    Args:
        settings: those that `serve` will have; it finds the graph by them.
        wanted: a model's directory, an id or an alias.
        out: where to put the graph and what describes the model, by themselves.
        compared: an npz file of one text's `ids` (tokens,) and the states that they should have.

    Returns:
        Whether every layer that was compared is as it should be.

    Raises:
        StartupError: the model cannot be had or converted, or a file is not what it should be.
    """
    if out and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StartupError(f"--out {out}: it is there and not empty, name a new directory")
    ids, expected = _reference(compared) if compared else (None, {})
    try:
        spec = _located(wanted, settings)
        started = time.perf_counter()
        with _progress(spec.id) as progress:
            compute = compute_of(settings, look(settings.cuda_visible_devices), [spec])
            source = Source(spec, RunPlan.of(settings, compute), usable_cores(), progress)
        if not source.converted:
            raise StartupError(f"{spec.id}: there is nothing to convert, it has {spec.file}")
        files = [path for path in source.converted.parent.iterdir() if path.name[0] != "."]
        size = sum(path.stat().st_size for path in files) / 1e6
        seconds = time.perf_counter() - started
        print(f"{spec.id}: {source.converted}, {seconds:.1f} s, {size:.1f} MB")
        if out:
            _put(files, spec.directory, out)
            print(f"{spec.id}: {out}")
        return ids is None or _agree(_states(source, ids, settings.cache_dir), expected)
    except _KNOWN as exc:
        raise StartupError(f"{wanted}: {exc}") from exc


def _located(wanted: str, settings: Settings) -> ModelSpec:
    """The model of that directory or name, with its files."""
    directory = Path(os.path.abspath(Path(wanted).expanduser()))
    if directory.is_dir():
        return read_directory(directory, directory.name)
    return Locator(settings)(open_catalog(settings).find(wanted))


@contextmanager
def _progress(name: str) -> Iterator[Progress | None]:
    """A bar on a terminal; elsewhere the log tells."""
    if not sys.stderr.isatty():
        yield None
        return
    quiet = structlog.make_filtering_bound_logger("warning")
    structlog.configure(wrapper_class=quiet)  # its lines would break the bar
    with tqdm(
        total=1.0, desc=name, bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
    ) as bar:
        yield lambda share: bar.update(share - bar.n)
        bar.update(1.0 - bar.n)


def _put(files: list[Path], model: Path, out: Path) -> None:
    """Make `out` a directory of its own: the graph's files, and those that describe the model."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".converting-", dir=out.parent) as parent:
            scratch = Path(parent, "out")
            for path in files:
                place(path, scratch / path.name)
            for name in descriptions(model):
                (scratch / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(model / name, scratch / name)
            scratch.chmod(_READABLE)
            scratch.rename(out)
    except OSError as exc:
        raise StartupError(f"--out {out}: {exc.strerror}") from exc


def _reference(path: Path) -> tuple[NDArray[np.int64], States]:
    """The ids, and the states by the names of outputs."""
    try:
        found = arrays(path)
    except (OSError, ValueError) as exc:
        raise StartupError(f"--compare {path} is no npz file that can be read: {exc}") from exc
    ids = found.get("ids", np.zeros(0))
    states = {name: one for name, one in found.items() if _LAYER.fullmatch(name) or name == _LAST}
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu" or not states:
        raise StartupError(
            f"--compare {path}: it must have ids (tokens,) and layer_0, layer_1, ..."
        )
    return ids.astype(np.int64), states


def _states(source: Source, ids: NDArray[np.int64], cache: Path) -> States:
    """What the graph, built once more with these outputs, gives for one text."""
    # In the cache, where weights can be links.
    with tempfile.TemporaryDirectory(
        prefix=".building-", dir=cache.expanduser() / "graphs"
    ) as scratch:
        found = outputs(source.with_layers(Path(scratch)), ids)
    return found | {_LAST: found["token_embeddings"]}


def _agree(found: States, expected: States) -> bool:
    """Print how near every layer is; whether all of them are near enough."""
    lines, near = [("layer", "max abs difference", "cosine")], True
    for name in sorted(expected, key=_order):
        if name not in found:
            count = sum(map(bool, map(_LAYER.fullmatch, found)))
            raise StartupError(f"--compare: {name} is not in the model, which has {count} states")
        if found[name].shape != expected[name].shape:
            raise StartupError(
                f"--compare: {name} has shape {expected[name].shape}, the model's"
                f" {found[name].shape}"
            )
        cosine = _least_cosine(found[name], expected[name])
        difference = float(np.abs(found[name] - expected[name]).max())
        lines.append((name, f"{difference:.1e}", f"{cosine:.6f}"))
        near = near and cosine >= _LEAST_COSINE
    show(lines)
    return near


def _order(name: str) -> int:
    match = _LAYER.fullmatch(name)
    return int(match[1]) if match else sys.maxsize


def _least_cosine(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """That of any token."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float((np.vecdot(a, b) / np.maximum(lengths, np.finfo(np.float64).tiny)).min())
