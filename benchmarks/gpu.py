"""`make bench-gpu`: our graphs for CUDA beside torch and the card's own ceiling; no download.

`--dry-run` runs every row on the CPU with tiny shapes, CUDA's operators replaced by plain ones,
to find mistakes before a card is at hand. What cannot be measured is skipped, and why is said.
"""

import argparse
import statistics
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort
import structlog

from benchmarks.corpus import corpus
from benchmarks.gpu_device import Card, Ceiling, Draw, ceiling, load_libraries
from benchmarks.gpu_http import served
from benchmarks.gpu_models import LENGTHS, SHAPES, TINY, Shape, batches, corpus_lengths, model
from benchmarks.gpu_models import texts as ids_of
from benchmarks.gpu_parity import parity
from benchmarks.gpu_runs import CPU, CUDA, WAYS, Place, Run, SkipError, Vectors, Way, fetched
from embedding_server.core import normalized

_RESULTS = Path(__file__).with_name("results-gpu.json")
_NATURAL, _ALONE = "natural", "alone"
"""The corpus, and one short text per batch."""
_ERRORS = 3
_HTTP_TIMES = 10
_BATCHES = 3
"""So many batches of equally long texts make a pass."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One way to run a model on texts of that length; `skipped` says why it has no numbers.

    `of_ceiling` is its share of the fp16 matmul rate that was measured; `cosine` the least one of
    any text's vector with that of the first row; `of_in_process`, over HTTP, the share of the best
    way of ours in fp16.
    """

    model: str
    load: str
    way: str
    tokens_per_second: float = 0.0
    texts_per_second: float = 0.0
    of_ceiling: float | None = None
    cosine: float | None = None
    of_in_process: float | None = None
    draw: Draw = Draw()
    skipped: str = ""


class Report(msgspec.Struct, kw_only=True):
    """Everything one run measured."""

    machine: str
    onnxruntime: str
    corpus: str
    parity: dict[str, dict[str, float | str]] = {}
    ceiling: Ceiling | None = None
    weights: dict[str, str] = {}
    rows: list[Row] = []
    failures: list[str] = []


class Bench:
    """A run: what it was asked for, and what it found so far.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._card = Card()
        self._end = time.monotonic() + options.deadline
        self._provider = CPU if options.dry_run else CUDA
        self._texts = corpus(options.texts)
        lengths, source = corpus_lengths(self._texts)
        self._natural = lengths
        self.report = Report(
            machine=self._card.name + (f" ({self._card.why})" if self._card.why else ""),
            onnxruntime=f"{ort.__version__} {ort.get_available_providers()}",
            corpus=f"{len(lengths)} texts, mean {statistics.mean(lengths):.1f} tokens, {source}",
        )

    def all(self, scratch: Path) -> None:
        """Everything, in the order of its worth; what fails is noted and the rest goes on."""
        options = self._options
        print(f"{self.report.machine}\nonnxruntime {self.report.onnxruntime}")
        print(f"{self.report.corpus}\n")
        if options.parity:
            self._part("parity", lambda: self._parity(scratch))
        self._part("ceiling", self._ceiling)
        shapes = TINY if options.dry_run else SHAPES
        for name in options.models or shapes:
            self._part(name, lambda name=name: self._model(name, shapes[name], scratch))
        self.store()

    def store(self) -> None:
        """Write what is there."""
        found = msgspec.json.format(msgspec.json.encode(self.report))
        self._options.out.write_bytes(found)

    def _part(self, name: str, work: Any) -> None:
        try:
            work()
        except Exception as exc:  # noqa: BLE001 - a card's time is short: the next part goes on
            self.report.failures.append(f"{name}: {exc!r}")
            print(f"{name} FAILED\n{traceback.format_exc()}", flush=True)
        self.store()

    def _parity(self, scratch: Path) -> None:
        for name, found in parity(scratch, dry=self._options.dry_run):
            self.report.parity[name] = found
            cells = "  ".join(
                f"{key} {one:.2e}" if isinstance(one, float) else f"{key} {one}"
                for key, one in found.items()
            )
            print(f"{name:24} {cells}", flush=True)

    def _ceiling(self) -> None:
        found = self.report.ceiling = ceiling(self._provider, tiny=self._options.dry_run)
        print(
            f"\nceiling by {found.by}: {found.fp16_flops / 1e12:.1f} TFLOP/s fp16,"
            f" {found.copied_bytes / 1e12:.2f} TB/s\n",
            flush=True,
        )

    def _model(self, name: str, shape: Shape, scratch: Path) -> None:
        spec, self.report.weights[name] = model(name, shape, scratch)
        place = Place(spec, scratch, self._options.dry_run)
        print(f"\n{name}, {self.report.weights[name]}")
        heads = ("tokens/s", "texts/s", "of ceiling", "cosine", "in process", "W", "MiB")
        print(f"{'':36}" + "".join(f"{head:>12}" for head in heads))
        longest = shape.positions
        loads = {str(length): [length] * self._count(length) for length in LENGTHS}
        loads[_NATURAL] = [min(length, longest) for length in self._natural]
        split = {
            load: batches(lengths, self._options.tokens)[: None if load == _NATURAL else _BATCHES]
            for load, lengths in loads.items()
        }
        split[_ALONE] = [[LENGTHS[0]]] * _BATCHES
        expected: dict[str, Vectors] = {}
        for way_name, way in WAYS.items():
            if self._options.ways and not any(one in way_name for one in self._options.ways):
                continue
            self._way(way_name, way, place, shape=shape, loads=split, expected=expected)
        if self._options.http:
            self._served(place)

    def _served(self, place: Place) -> None:
        """The natural corpus over HTTP."""
        name = place.spec.id
        row = Row(model=name, load=_NATURAL, way="server, 128 texts in base64")
        if time.monotonic() > self._end:
            self._add(msgspec.structs.replace(row, skipped="out of time"))
            return
        try:
            with self._card.drawing() as drawn:
                found = served(
                    place.spec,
                    place.scratch,
                    self._texts,
                    _HTTP_TIMES * self._options.seconds,
                    dry=place.dry,
                )
                draw = drawn()
        except Exception as exc:  # noqa: BLE001 - as for other rows
            self._add(msgspec.structs.replace(row, skipped=str(exc)[:300]))
            return
        inside = [
            one.tokens_per_second
            for one in self.report.rows
            if (one.model, one.load) == (name, _NATURAL) and one.way.startswith("ours, fp16")
        ]
        rate = found.tokens_per_second
        row = msgspec.structs.replace(
            row,
            tokens_per_second=rate,
            texts_per_second=found.texts_per_second,
            of_in_process=rate / max(inside) if inside else None,
            draw=draw,
        )
        self._add(row)

    def _count(self, length: int) -> int:
        tokens: int = self._options.tokens
        return _BATCHES * max(1, tokens // length)

    def _way(
        self,
        name: str,
        way: Way,
        place: Place,
        *,
        shape: Shape,
        loads: dict[str, list[list[int]]],
        expected: dict[str, Vectors],
    ) -> None:
        """All loads of one way, with one session."""
        if time.monotonic() > self._end:
            self._add(Row(model=place.spec.id, load="all", way=name, skipped="out of time"))
            return
        every = [one for load in loads.values() for one in load]
        try:
            runs = way.prepare(place, [ids_of(lengths, shape.vocabulary) for lengths in every])
        except SkipError as exc:
            self._add(Row(model=place.spec.id, load="all", way=name, skipped=str(exc)))
            return
        except Exception as exc:  # noqa: BLE001 - one way must not end the others
            traceback.print_exc()
            self._add(Row(model=place.spec.id, load="all", way=name, skipped=repr(exc)[:300]))
            return
        at = 0
        for load, parts in loads.items():
            some, at = runs[at : at + len(parts)], at + len(parts)
            try:
                row = self._measured(
                    place.spec.id, load, name, runs=some, parts=parts, threads=way.threads
                )
                row = self._rated(row, parts, shape, fetched(some[0]()), expected)
            except Exception as exc:  # noqa: BLE001 - one load must not end the others
                row = Row(model=place.spec.id, load=load, way=name, skipped=repr(exc)[:300])
            self._add(row)

    def _measured(
        self,
        model_id: str,
        load: str,
        way: str,
        *,
        runs: Sequence[Run],
        parts: Sequence[Sequence[int]],
        threads: int,
    ) -> Row:
        """Passes over all batches, for so many seconds; the median one counts."""
        tokens, count = sum(map(sum, parts)), sum(map(len, parts))
        with ThreadPoolExecutor(threads) as pool:

            def once() -> None:
                if threads == 1:
                    for run in runs:
                        run()
                else:
                    list(pool.map(lambda run: run(), runs))

            for _ in range(2):
                once()
            times: list[float] = []
            begun = time.perf_counter()
            with self._card.drawing() as drawn:
                while len(times) < 2 or time.perf_counter() - begun < self._options.seconds:
                    started = time.perf_counter()
                    once()
                    times.append(time.perf_counter() - started)
                draw = drawn()
        seconds = statistics.median(times)
        return Row(
            model=model_id,
            load=load,
            way=way,
            tokens_per_second=tokens / seconds,
            texts_per_second=count / seconds,
            draw=draw,
        )

    def _rated(
        self,
        row: Row,
        parts: Sequence[Sequence[int]],
        shape: Shape,
        vectors: Vectors,
        expected: dict[str, Vectors],
    ) -> Row:
        flops = sum(map(shape.flops, parts)) / sum(map(sum, parts)) * row.tokens_per_second
        first = expected.setdefault(row.load, vectors)
        cosine = float(np.vecdot(normalized(vectors), normalized(first)).min())
        limit = self.report.ceiling
        share = flops / limit.fp16_flops if limit else None
        return msgspec.structs.replace(row, of_ceiling=share, cosine=cosine)

    def _add(self, row: Row) -> None:
        self.report.rows.append(row)
        name = f"{row.load:>8} {row.way:27}"
        if row.skipped:
            print(f"{name} skipped: {row.skipped}", flush=True)
            return
        cells = [f"{row.tokens_per_second:.0f}", f"{row.texts_per_second:.0f}"]
        cells.append("" if row.of_ceiling is None else f"{row.of_ceiling:.3f}")
        cells.append("" if row.cosine is None else f"{row.cosine:.6f}")
        cells.append("" if row.of_in_process is None else f"{row.of_in_process:.3f}")
        cells += ["" if one is None else f"{one:.0f}" for one in (row.draw.watts, row.draw.memory)]
        print(name + "".join(f"{cell:>12}" for cell in cells), flush=True)


def _options(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument("--no-parity", dest="parity", action="store_false")
    parser.add_argument("--no-http", dest="http", action="store_false")
    parser.add_argument("--models", nargs="*", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--ways", nargs="*", help="rows whose name has one of these in it")
    parser.add_argument("--tokens", type=int, help="in a batch")
    parser.add_argument("--texts", type=int, help="of the corpus")
    parser.add_argument("--seconds", type=float, help="per number")
    parser.add_argument("--deadline", type=float, default=3600.0, help="seconds; then rows skip")
    parser.add_argument("--out", type=Path, default=_RESULTS)
    options = parser.parse_args(given)
    shapes = TINY if options.dry_run else SHAPES
    if unknown := set(options.models or ()) - set(shapes):
        parser.error(f"--models: {', '.join(unknown)} is none of {', '.join(shapes)}")
    defaults = (1024, 40, 0.0) if options.dry_run else (32_768, 1984, 1.0)
    for name, value in zip(("tokens", "texts", "seconds"), defaults, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main(given: Sequence[str] | None = None) -> None:
    """Measure, print as it goes, and store; `given` are the command line's words."""
    options = _options(given)
    ort.set_default_logger_severity(_ERRORS)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("warning"))
    if not options.dry_run:
        load_libraries()
    bench = Bench(options)
    with tempfile.TemporaryDirectory() as scratch:
        bench.all(Path(scratch))
    print(f"\n{options.out}; {len(bench.report.failures)} parts failed")


if __name__ == "__main__":
    main()
