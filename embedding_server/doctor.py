"""`embedding-server doctor`: what there is to compute with here, and what each model would use."""

import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from embedding_server.cache import FOLDERS
from embedding_server.catalog import Catalog, open_catalog
from embedding_server.core import ModelSpec, Precision
from embedding_server.errors import ProviderError
from embedding_server.runtime.cores import quota, sums_bytes_exactly, usable_cores
from embedding_server.runtime.machine import Library, Machine
from embedding_server.runtime.providers import CPU, NAMES, Compute, missing, uses_tf32
from embedding_server.serving.compute import compute_of
from embedding_server.serving.plan import RunPlan
from embedding_server.serving.precision import of_graph, tf32
from embedding_server.serving.profile import device_name
from embedding_server.settings import Settings
from embedding_server.table import show

_LABEL = 11
_LAZY = "cuda, for some models"


class Cores(msgspec.Struct, frozen=True):
    """The processor: cores by affinity, by quota, and threads that would run models."""

    name: str
    affinity: int
    quota: float | None
    threads: int
    exact_bytes: bool


class Disk(msgspec.Struct, frozen=True):
    """`INFERENCE_CACHE_DIR`, in bytes."""

    path: str
    folders: dict[str, int]
    free: int


class Use(msgspec.Struct, frozen=True):
    """What a model would use."""

    id: str
    provider: str
    precision: str
    file: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is shown. `problem`: why a provider that was asked for cannot be used."""

    machine: Machine
    visible: tuple[str, ...] | None
    asked: tuple[str, ...]
    usable: dict[str, str]
    providers: tuple[str, ...]
    reason: str
    problem: str
    cores: Cores
    cache: Disk
    models: tuple[Use, ...]


def show_doctor(settings: Settings, machine: Machine, *, as_json: bool) -> bool:
    """Print it, and return whether every provider that was asked for by name can be used.

    Raises:
        StartupError: an allow-list cannot be satisfied.
    """
    report = examine(settings, machine)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        for label, text in _lines(report):
            print(f"{label:{_LABEL}}{text}")
        if report.models:
            print()
            fields = Use.__struct_fields__
            show([fields, *(msgspec.structs.astuple(one) for one in report.models)])
    return not report.problem


def examine(settings: Settings, machine: Machine) -> Report:
    """What there is, and what would be used of it; raises `StartupError`."""
    catalog, problem = open_catalog(settings), ""
    compute = Compute()
    try:
        compute = compute_of(settings, machine, catalog.models.values())
    except ProviderError as exc:
        problem = str(exc)
    limit = quota()
    return Report(
        machine=machine,
        visible=settings.cuda_visible_devices,
        asked=settings.providers,
        usable={name: missing(name, machine) for name in NAMES},
        providers=() if problem else compute.choice.names,
        reason=compute.choice.reason,
        problem=problem,
        cores=Cores(
            name=device_name(),
            affinity=len(os.sched_getaffinity(0)),
            quota=None if math.isinf(limit) else limit,
            threads=settings.threads or usable_cores(),
            exact_bytes=sums_bytes_exactly(),
        ),
        cache=_disk(settings.cache_dir.expanduser()),
        models=() if problem else tuple(_uses(settings, compute, catalog)),
    )


def _uses(settings: Settings, compute: Compute, catalog: Catalog) -> Iterator[Use]:
    """What each allowed model would use; of `*`, those that lie here."""
    plan = RunPlan.of(settings, compute)
    everything = "*" in settings.allowed_embedding_models + settings.allowed_rerank_models
    for spec in catalog.models.values():
        if everything and not spec.located:
            continue
        provider = CPU if spec.fastembed else compute.choice.first
        file = spec.file or ("" if spec.fastembed else "model.safetensors")
        yield Use(spec.id, provider, _precision(spec, plan, provider), file)


def _precision(spec: ModelSpec, plan: RunPlan, provider: str) -> str:
    """What it would compute in; of a model whose files are elsewhere, what was asked for."""
    if not spec.located and not spec.file:
        return str(spec.precision or plan.precision or "auto")
    precision = of_graph(spec, plan)
    if provider == CPU or precision is not Precision.FP32:
        return str(precision)
    card = plan.compute.machine.cards[0]
    return str(Precision.TF32 if uses_tf32(card, tf32(spec, plan)) else precision)


def _disk(cache: Path) -> Disk:
    there = next(path for path in (cache, *cache.parents) if path.exists())
    sizes = {folder: _bytes((cache / folder).rglob("*")) for folder in FOLDERS}
    found = {folder: size for folder, size in sizes.items() if size}
    return Disk(str(cache), found, shutil.disk_usage(there).free)


def _bytes(paths: Iterable[Path]) -> int:
    """Of files; one that goes away meanwhile counts nothing."""
    return sum(path.lstat().st_size for path in paths if path.is_file() and not path.is_symlink())


def _lines(report: Report) -> Iterator[tuple[str, str]]:
    machine = report.machine
    yield "runtime", f"{machine.package} {machine.runtime}: {', '.join(machine.offered)}"
    yield "driver", machine.driver or f"none: {machine.driver_error}"
    yield from _cards(report)
    yield from _libraries(machine)
    for name, problem in report.usable.items():
        yield name, problem or "can be used"
    asked = f"INFERENCE_PROVIDERS={','.join(report.asked)}"
    chosen = f"{', '.join(report.providers)} ({report.reason})"
    yield "providers", report.problem or f"{asked}: {chosen}"
    cores = report.cores
    limit = "none" if cores.quota is None else f"{cores.quota:g}"
    exact = "" if cores.exact_bytes else ", no VNNI: int8 weights have 7 bits"
    yield "processor", f"{cores.name}{exact}"
    yield "cores", f"{cores.affinity} by affinity, quota {limit}; {cores.threads} run models"
    folders = ", ".join(f"{name} {_size(size)}" for name, size in report.cache.folders.items())
    yield "cache", f"{report.cache.path}: {folders or 'empty'}; {_size(report.cache.free)} free"


def _cards(report: Report) -> Iterator[tuple[str, str]]:
    machine = report.machine
    hidden = f", {machine.hidden} hidden" if machine.hidden else ""
    said = "" if report.visible is None else f" (CUDA_VISIBLE_DEVICES={','.join(report.visible)})"
    yield "GPUs", f"{len(machine.cards) or 'none'} visible{hidden}{said}"
    for card in machine.cards:
        capability = ".".join(map(str, card.capability))
        slice_ = ", a MIG slice" if card.mig else ""
        size = f"{card.memory / 2**30:.1f} GiB"
        yield f"  {card.number}", f"{card.name}, {capability}, {size}{slice_}, {card.uuid}"


def _libraries(machine: Machine) -> Iterator[tuple[str, str]]:
    shown: set[str] = set()
    for kind, libraries in machine.libraries.items():
        for one in libraries:
            if one.file not in shown:
                shown.add(one.file)
                yield "library", _library(one, kind)


def _library(one: Library, kind: str) -> str:
    found = f"missing: {one.error}" if one.error else one.path or "found"
    return f"{one.file} ({_LAZY if kind == 'lazy' else kind}) {found}"


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
