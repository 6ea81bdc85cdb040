"""Qwen3-Embedding's shapes with random weights: converting, memory and speed, beside torch.

`python -m benchmarks.decoders`, about two minutes: 0.6B; memory of 4B and 8B is computed from
shapes. `python -m benchmarks.decoders 8B` converts that size and runs one text; it needs 46 GB of
disk under TMPDIR, and its weights are read from there where memory cannot hold them.
"""

import json
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from embedding_server.convert import convert
from embedding_server.core import Ids, ModelSpec, Pooling
from embedding_server.runtime.cores import usable_cores
from embedding_server.runtime.session import OnnxSession

LENGTHS = (16, 128, 512)
_ROUNDS = 5
_CONVERSIONS = 5
"""The first ones wait for memory that a virtual machine has never used."""
_VOCABULARY = 151_669
_SMALL = "0.6B"
_BLOCK = 1_000_003
"""So many random numbers are repeated; a prime, so that rows differ."""
_SHAPES = {"0.6B": (1024, 28, 16, 3072), "4B": (2560, 36, 32, 9728), "8B": (4096, 36, 32, 12288)}
"""Width, layers, query heads and inner width, from the models' config.json; 8 key heads of 128."""


def config(width: int, layers: int, heads: int, inner: int) -> dict[str, object]:
    """What config.json says."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": inner,
        "vocab_size": _VOCABULARY,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": True,
    }


def shapes(width: int, layers: int, heads: int, inner: int) -> dict[str, tuple[int, ...]]:
    """Of every tensor."""
    found: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (_VOCABULARY, width),
        "norm.weight": (width,),
    }
    for index in range(layers):
        layer = f"layers.{index}"
        linear = {"q": (heads * 128, width), "k": (1024, width), "v": (1024, width)}
        found |= {f"{layer}.self_attn.{one}_proj.weight": shape for one, shape in linear.items()}
        found[f"{layer}.self_attn.o_proj.weight"] = (width, heads * 128)
        found |= {f"{layer}.mlp.{one}_proj.weight": (inner, width) for one in ("gate", "up")}
        found[f"{layer}.mlp.down_proj.weight"] = (width, inner)
        found |= {f"{layer}.self_attn.{one}_norm.weight": (128,) for one in "qk"}
        norms = ("input_layernorm", "post_attention_layernorm")
        found |= {f"{layer}.{one}.weight": (width,) for one in norms}
    return found


def write(directory: Path, size: str) -> int:
    """A bf16 checkpoint, a shard per layer; its bytes."""
    random = np.random.default_rng(0)
    block = (random.standard_normal(_BLOCK, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    one = np.ones(1, ml_dtypes.bfloat16)
    every = shapes(*_SHAPES[size])
    shards: dict[str, str] = {}
    (directory / "config.json").write_text(json.dumps(config(*_SHAPES[size])))
    for shard, names in groupby(every, lambda name: ".".join(name.split(".")[:2])):
        tensors = {
            name: np.resize(block if len(every[name]) > 1 else one, every[name]) for name in names
        }
        save_file(tensors, directory / f"{shard}.safetensors")
        shards |= dict.fromkeys(tensors, f"{shard}.safetensors")
    index = {"metadata": {}, "weight_map": shards}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


@contextmanager
def peak() -> Iterator[Callable[[], float]]:
    """How much anonymous memory this process has at most meanwhile, in MiB."""
    highest, done = [_anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            highest[0] = max(highest[0], _anonymous())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: highest[0]
    finally:
        done.set()
        thread.join()


def _anonymous() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def median(work: Callable[[], object]) -> float:
    """Seconds, of several rounds after one that does not count."""
    work()
    times = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def torch_model(directory: Path, cores: int) -> Callable[[Ids], object] | None:
    """The same model in transformers, fp32; None where it is absent."""
    if find_spec("torch") is None or find_spec("transformers") is None:
        return None
    import torch  # noqa: PLC0415 - may be absent
    from transformers import AutoModel  # noqa: PLC0415

    torch.set_num_threads(cores)
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()

    def run(ids: Ids) -> object:
        with torch.inference_mode():
            return model(input_ids=torch.from_numpy(ids)[None], use_cache=False)

    return run


def converted(directory: Path, cache: Path, size: str) -> OnnxSession:
    """The checkpoint as a session, with what that took."""
    spec = ModelSpec(
        id="q",
        located=directory,
        pooling=Pooling.LAST,
        max_tokens=32_768,
        dimensions=_SHAPES[size][0],
    )
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # its memory is not ours
        stored = pool.submit(write, directory, size).result()
    before = _anonymous()
    for attempt in range(_CONVERSIONS if size == _SMALL else 1):
        shutil.rmtree(cache, ignore_errors=True)
        started = time.perf_counter()
        with peak() as highest:
            graph = convert(spec, cache)
        seconds = time.perf_counter() - started
        print(
            f"{size}: conversion {attempt + 1} of {stored / 1e6:.0f} MB of bf16 in {seconds:.1f} s:"
            f" {stored / seconds / 1e6:.0f} MB/s read, at most {highest() - before:.0f} MiB more"
            " memory",
            flush=True,
        )
    started = time.perf_counter()
    again = convert(spec, cache)
    assert again == graph
    session = OnnxSession(graph, usable_cores())
    print(f"second start: open in {time.perf_counter() - started:.2f} s")
    print(f"anonymous memory with the session: {_anonymous() - before:.0f} MiB", flush=True)
    return session


def compare(session: OnnxSession, directory: Path) -> None:
    """Print how long texts take, in transformers too."""
    random, run = np.random.default_rng(0), partial(session.run, wide=True)
    texts = [random.integers(0, _VOCABULARY, length) for length in LENGTHS]
    ours = [median(partial(run, [ids])) for ids in texts]
    peer = torch_model(directory, usable_cores())
    theirs = [median(partial(peer, ids)) if peer else 0.0 for ids in texts]
    print("tokens  ours, ms  torch fp32, ms  times as fast")
    for length, one, other in zip(LENGTHS, ours, theirs, strict=True):
        beside = f"{1000 * other:14.0f}  {other / one:13.2f}" if other else f"{'absent':>14}"
        print(f"{length:6}  {1000 * one:8.0f}  {beside}")


def once(session: OnnxSession) -> None:
    """Print how long one short text takes, as often as its weights are read from disk or not."""
    for _ in range(2):
        started = time.perf_counter()
        (vector,) = session.run([np.arange(LENGTHS[0])], wide=True)
        seconds = time.perf_counter() - started
        assert np.isfinite(vector).all()
        print(f"{LENGTHS[0]} tokens in {seconds:.1f} s", flush=True)


def computed() -> None:
    """Print what memory each size needs."""
    for name, shape in _SHAPES.items():
        numbers = sum(int(np.prod(one)) for one in shapes(*shape).values())
        part = 4 * max(int(np.prod(one)) for one in shapes(*shape).values())
        print(
            f"{name}: {numbers / 1e9:.2f} billion numbers, {2 * numbers / 1e9:.1f} GB in bf16,"
            f" {4 * numbers / 1e9:.1f} GB as fp32 pages; its largest tensor has {part / 1e9:.1f} GB"
        )


def main(size: str = _SMALL) -> None:
    """Print the figures."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch, "model")
        directory.mkdir()
        session = converted(directory, Path(scratch, "cache"), size)
        if size == _SMALL:
            compare(session, directory)
        else:
            once(session)
    computed()


if __name__ == "__main__":
    main(*sys.argv[1:])
