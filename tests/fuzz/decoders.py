"""What reads strangers' bytes, each as a function that may only refuse them in its own words.

Hypothesis calls them in the test suite, atheris for longer (`make fuzz`): whatever they raise
beyond their `refusals` is a finding.
"""

import asyncio
import gzip
import io
import tempfile
import typing
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import uvicorn
from PIL import Image
from safetensors.numpy import save
from structlog.testing import capture_logs
from uvicorn.server import ServerState

from embedding_server.api import Face
from embedding_server.api.addresses import Proxies, subscriber
from embedding_server.api.decoding import decoded
from embedding_server.api.encodings import decompress
from embedding_server.api.images import image_files
from embedding_server.api.keys import Keys
from embedding_server.catalog.config import read_config
from embedding_server.catalog.images import open_image
from embedding_server.conversion import _reference
from embedding_server.convert.checkpoint import INDEX, WEIGHTS, Checkpoint, stored_precision
from embedding_server.convert.errors import ConvertError
from embedding_server.errors import ServiceError, SettingsError, StartupError
from embedding_server.observability.stages import parent_of
from embedding_server.runtime.encoder import InputError
from embedding_server.server.connection import Connection, Door
from embedding_server.serving.references import stored

LIMIT = 1 << 16
"""Of unpacked bodies here."""


class Decoder(msgspec.Struct, frozen=True):
    """What takes bytes, what it may raise, and some bytes to begin with."""

    read: Callable[[bytes], object]
    refusals: tuple[type[Exception], ...]
    seeds: tuple[bytes, ...]

    def __call__(self, data: bytes) -> None:
        """Read them; raises what is no refusal."""
        with capture_logs(), suppress(*self.refusals):
            self.read(data)


def _unpack(encoding: str) -> Callable[[bytes], object]:
    def read(data: bytes) -> None:
        assert len(decompress(data, encoding, LIMIT)) <= LIMIT

    return read


@cache
def requests() -> list[tuple[str, Any]]:
    """Every path that takes a body, and the type of that."""
    posts = [one for one in Face.of().handlers if "POST" in getattr(one, "http_methods", ())]
    found = [(min(one.paths), typing.get_type_hints(one.fn).get("data")) for one in posts]
    return sorted(((path, target) for path, target in found if target), key=lambda one: one[0])


def _json(data: bytes) -> None:
    """The first byte says which request it is; what is decoded is what a handler reads."""
    _, target = requests()[data[0] % len(requests())] if data else requests()[0]
    body = decoded(data[1:], target)
    for name in ("texts", "input", "files"):
        if callable(given := getattr(body, name, None)):
            given()


def _headers(data: bytes) -> None:
    value = data[1:]
    text = value.decode("latin-1")
    names = (b"x-forwarded-for", b"forwarded", b"authorization", b"x-api-key")
    headers = [(name, value) for at, name in enumerate(names) if data[0] >> at & 1] if data else []
    scope: Any = {"path": "/", "method": "POST", "headers": headers, "client": ("10.0.0.1", 1)}
    assert subscriber(Proxies(("10.0.0.0/8", "fd00::/8")).client(scope))
    subscriber(text)
    if parent := parent_of(text):
        assert len(parent.trace_id) == 32
    Keys(("a=secret",)).caller(scope)


class Peer:
    """A transport to a client that is gone as soon as it has written."""

    closed = False

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def get_extra_info(self, name: str) -> Any:
        """See `asyncio.Transport`."""
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else None

    def is_closing(self) -> bool:
        """See `asyncio.Transport`."""
        return self.closed

    def writelines(self, parts: list[bytes]) -> None:
        """See `asyncio.Transport`."""
        self.written += parts

    def get_write_buffer_size(self) -> int:
        """See `asyncio.Transport`."""
        return 0

    def can_write_eof(self) -> bool:
        """See `asyncio.Transport`."""
        return True

    def close(self) -> None:
        """See `asyncio.Transport`."""
        self.closed = True

    write_eof = pause_reading = resume_reading = abort = close


async def _hello(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
    await send({"type": "http.response.body", "body": b"hello"})


def _http(data: bytes) -> None:
    """Bytes in two parts on a connection; whatever comes back is HTTP."""

    async def talk() -> None:
        config = uvicorn.Config(_hello, http="httptools", log_config=None, lifespan="off")
        config.load()
        queue: Any = None  # nobody is refused
        one, transport = Connection(config, ServerState(), {}, Door(9, queue, None)), Peer()
        one.connection_made(transport)  # type: ignore[arg-type]
        cut = len(data) // 2
        for part in (data[:cut], data[cut:]):
            one.data_received(part)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        one.look(1e9)
        one.connection_lost(None)
        await asyncio.gather(*one.tasks)
        assert not transport.written or transport.written[0].startswith(b"HTTP/1.1 ")

    asyncio.run(talk())


@cache
def _place() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fuzz-", dir="/dev/shm")


def _file(name: str, data: bytes) -> Path:
    path = Path(_place().name, name)
    path.write_bytes(data)
    return path


def _safetensors(data: bytes) -> None:
    directory = _file(WEIGHTS, data).parent
    try:
        stored_precision(directory)
        with Checkpoint(directory) as checkpoint:
            for name in checkpoint:
                checkpoint(name)
                checkpoint.place(name)
    finally:
        (directory / WEIGHTS).unlink()


def _shards(data: bytes) -> None:
    with Checkpoint(_file(INDEX, data).parent):
        pass


def _npz(data: bytes) -> None:
    path = _file("a.npz", data)
    stored(path, [np.zeros(1, np.float32)])
    _reference(path)


def _yaml(data: bytes) -> None:
    read_config(_file("a.yaml", data), Path(_place().name))


def _image(data: bytes) -> None:
    image_files([data.decode("latin-1")])
    open_image(0, data, 1 << 12)


def _images() -> Iterator[bytes]:
    for kind in ("PNG", "JPEG", "WEBP"):
        file = io.BytesIO()
        Image.linear_gradient("L").resize((8, 8)).save(file, kind)
        yield file.getvalue()


def _examples() -> Iterator[bytes]:
    for at, (_, target) in enumerate(requests()):
        yield from (bytes([at]) + msgspec.json.encode(one) for one in target.examples)


def _archive() -> bytes:
    file = io.BytesIO()
    np.savez(file, ids=np.arange(3), layer_0=np.zeros((3, 2)), arr_0=np.zeros(1, np.float32))
    return file.getvalue()


def _half_a_header() -> bytes:
    """An archive of an array whose header does not end: numpy raises `TokenError`."""
    array, file = io.BytesIO(), io.BytesIO()
    np.save(array, np.zeros(1, np.float32))
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("arr_0.npy", array.getvalue().replace(b"}", b" "))
    return file.getvalue()


_BODY = b'{"model":"a","input":"b"}'
_ZSTD = bytes.fromhex("28b52ffd2003190000616263")
_TRACE = b"\x0300-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
_POST = b"POST /a?b HTTP/1.1\r\nHost: x\r\n"
_CONFIG = b"""models:
  a: &a {name: b, type: rerank, max_tokens: 5, prompts: {query: "q: "}}
  c: {<<: *a, pooling: cls, dimensions: 3, file: a.onnx, revision: main}
"""

DECODERS = {
    "gzip": Decoder(_unpack("gzip"), (ServiceError,), (gzip.compress(_BODY), gzip.compress(b""))),
    "zstd": Decoder(_unpack("zstd"), (ServiceError,), (_ZSTD,)),
    "json": Decoder(_json, (ServiceError,), tuple(_examples())),
    "headers": Decoder(
        _headers,
        (ServiceError,),
        (
            _TRACE,
            b"\x01::1, 10.0.0.2, [fd00::1]:80",
            b'\x02for="[::1]:1";by=a',
            b"\x04Bearer secret",
        ),
    ),
    "http": Decoder(
        _http,
        (),
        (
            _POST + b"Content-Length: 2\r\n\r\n{}" + _POST + b"Expect: 100-continue\r\n\r\n",
            _POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
            b"GET / HTTP/1.0\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        ),
    ),
    "safetensors": Decoder(
        _safetensors,
        (ConvertError,),
        (save({"a": np.zeros((2, 2), np.float16)}), save({"b.gamma": np.zeros(3, np.float32)})),
    ),
    "shards": Decoder(_shards, (ConvertError,), (b'{"weight_map":{"a":"a.safetensors"}}',)),
    "npz": Decoder(_npz, (StartupError,), (_archive(), _half_a_header())),
    "yaml": Decoder(_yaml, (SettingsError,), (_CONFIG,)),
    "image": Decoder(_image, (ServiceError, InputError), tuple(_images())),
}
"""By name."""
