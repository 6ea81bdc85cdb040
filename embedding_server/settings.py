"""Every setting, declared once: its environment variable, flag, bounds and README row.

`load` takes each from its flag, else the environment (`with_dotenv`), else the default. A wrong
value is a `SettingsError`: one line that names the variable, the value and what is expected.
"""

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from dotenv import dotenv_values

from embedding_server.errors import SettingsError

PREFIX = "INFERENCE_"
DEMO_MODELS = ("sentence-transformers/all-MiniLM-L6-v2", "Qdrant/all-MiniLM-L6-v2-onnx")
"""Two names of one model."""
NO_MODELS = (
    "name the models to serve, for example"
    f" INFERENCE_ALLOWED_EMBEDDING_MODELS={DEMO_MODELS[0]}, or try `embedding-server serve --demo`"
)
DIALECTS = ("native", "openai", "cohere", "tei", "unified", "fast")
"""APIs that the server speaks."""
PROVIDERS = ("auto", "tensorrt", "cuda", "cpu")
"""What `INFERENCE_PROVIDERS` may name."""
Names = tuple[str, ...]
_SWITCH = dict.fromkeys(("true", "1", "yes", "on"), True)
_SWITCH |= dict.fromkeys(("false", "0", "no", "off"), False)


class Field(msgspec.Struct, frozen=True, kw_only=True):
    """What an annotation says about a setting beyond its type; bounds are inclusive."""

    text: str
    env: str | None = None
    ge: int = 0
    le: int = 1 << 50
    size: bool = False
    among: Names = ()
    """What the names in a list may be; empty: anything."""
    empty: bool = False
    """Whether an empty value means something."""


def _field(text: str, env: str | None = None, ge: int = 0, le: int = 1 << 50) -> Field:
    return Field(text=text, env=env, ge=ge, le=le)


def _size(text: str) -> Field:
    return Field(text=text, ge=1, size=True)


def _ms(text: str) -> Field:
    return Field(text=text, le=3_600_000)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The server's configuration.

    Field `max_batch_size` is `INFERENCE_MAX_BATCH_SIZE` in the environment and
    `--max-batch-size` on the command line.
    """

    allowed_embedding_models: Annotated[
        Names, _field("comma list of model ids, or `*`; not needed beside `INFERENCE_MODEL_CONFIG`")
    ]
    allowed_rerank_models: Annotated[
        Names, _field("comma list of model ids, or `*`; an embedding model reranks by cosine")
    ] = ()
    demo: Annotated[bool, _field(f"serve the demo model `{DEMO_MODELS[0]}`")] = False
    model_path: Annotated[Path | None, _field("directory of own models, a sub-directory each")] = (
        None
    )
    model_config: Annotated[
        Path | None, _field("YAML file of models and names of them, all allowed by being there")
    ] = None
    preload: Annotated[
        Names | None,
        _field(
            "models to load at start and to keep; unset = all allowed ones, or none if a list is"
            " `*` or residency is limited"
        ),
    ] = None
    max_loaded_models: Annotated[
        int, _field("models resident at once, the one used longest ago makes room; 0 = all")
    ] = 0
    model_ttl_seconds: Annotated[
        int, _field("unload a model that nobody used for so long; 0 = never", le=1 << 30)
    ] = 0
    default_model: Annotated[
        Names,
        _field("models of requests that name none, one per task; unset = the only one of its task"),
    ] = ()
    ready_policy: Annotated[
        Literal["all", "any"], _field("ready when `all` preloaded models serve, or `any` of them")
    ] = "all"
    hf_home: Annotated[
        Path, _field("huggingface-hub's home, which has its cache of models", "HF_HOME")
    ] = Path("~/.cache/huggingface")
    hf_endpoint: Annotated[str | None, _field("a mirror of the hub", "HF_ENDPOINT")] = None
    hf_token: Annotated[str | None, _field("for private models", "HF_TOKEN")] = None
    hf_hub_offline: Annotated[
        bool, _field("no network call at all, what is cached must do", "HF_HUB_OFFLINE")
    ] = False
    cache_dir: Annotated[Path, _field("where converted graphs and measured costs are kept")] = Path(
        "~/.cache/embedding-server"
    )

    hostname: Annotated[str, _field("address to listen on")] = "0.0.0.0"  # noqa: S104 - a server
    port: Annotated[int, _field("port to listen on", ge=1, le=65535)] = 8090
    dialects: Annotated[
        Names,
        Field(text="APIs to serve beside health, metrics and docs, comma list", among=DIALECTS),
    ] = DIALECTS
    cors_allowed_origins: Annotated[
        Names, _field("comma list of origins, without credentials", "CORS_ALLOWED_ORIGINS")
    ] = ("*",)
    ssl_enabled: Annotated[bool, _field("serve HTTPS", "SERVER_SSL_ENABLED")] = False
    tls_cert_path: Annotated[
        Path | None, _field("certificate chain, PEM", "TLS_SERVER_CERT_PATH")
    ] = None
    tls_key_path: Annotated[Path | None, _field("its private key, PEM", "TLS_SERVER_KEY_PATH")] = (
        None
    )
    api_keys: Annotated[
        Names,
        _field("bearer keys, or `@file` with one per line; health and metrics stay open"),
    ] = ()
    rate_limit: Annotated[
        int,
        _field("requests per minute of a key, or else an address, then 429; 0 = any", le=1 << 30),
    ] = 0
    compress: Annotated[bool, _field("gzip the answers for clients that accept it")] = False

    max_batch_size: Annotated[int, _field("texts per native embed request", ge=1, le=100_000)] = 128
    max_text_chars: Annotated[int, _field("characters per text; 0 = only the model's limit")] = 0
    max_image_pixels: Annotated[
        int, _field("width times height of the largest image", ge=1024, le=1 << 28)
    ] = 1 << 24
    max_body_bytes: Annotated[int, _size("request body, counted after decompression")] = 32 << 20

    max_concurrent_requests: Annotated[
        int | None, _field("requests admitted at once; unset = limited by work", ge=1, le=1 << 20)
    ] = None
    max_queue_depth: Annotated[
        int, _field("requests waiting for admission; one more is refused", le=1 << 20)
    ] = 1024
    queue_timeout_ms: Annotated[int, _ms("longest wait for admission, then 503")] = 5000
    max_queued_bytes: Annotated[
        int, _size("request bytes that may be inside or waiting at once")
    ] = 256 << 20
    request_timeout_ms: Annotated[int, _ms("total time per request, then 503; 0 = no limit")] = (
        120_000
    )
    drain_grace_ms: Annotated[
        int, _ms("after SIGTERM: answering probes, refusing new work politely")
    ] = 2000
    drain_timeout_ms: Annotated[int, _ms("after that: finishing accepted work")] = 20_000

    max_batch_tokens: Annotated[
        int | None,
        _field(
            "tokens per model run, a longer text runs alone; unset = measured", ge=16, le=1 << 24
        ),
    ] = None
    precision: Annotated[
        Literal["auto", "fp32", "tf32", "fp16", "bf16", "int8"],
        _field(
            "what models compute in; `int8` is faster and less exact; `fp16` and `bf16` are what"
            " weights are rounded to; `tf32` is fp32 but for the GPU's matrix products; auto ="
            " fp32, and tf32 on GPUs that have it"
        ),
    ] = "auto"
    qwen3_dtype: Annotated[
        Literal["fp32", "fp16", "bf16", "int8"],
        _field("what auto means for safetensors of Qwen3", "QWEN3_DTYPE"),
    ] = "bf16"
    reproducible: Annotated[
        bool, _field("every text runs alone: no bit of its vector depends on other texts")
    ] = False
    warmup_ms: Annotated[
        int, _ms("measuring how a model runs best, at its first load; 0 = not at all")
    ] = 3000
    providers: Annotated[
        Names,
        Field(
            text="what computes, the first choice first: `tensorrt`, `cuda`, `cpu`; auto = cuda"
            " where it can be used, else cpu",
            among=PROVIDERS,
        ),
    ] = ("auto",)
    cuda_arena_size: Annotated[
        int,
        Field(
            text="memory of a GPU that all models on it take at most, such as 4G; 0 = what"
            " `GPU_PRESSURE_THRESHOLD` leaves of the smallest GPU",
            env="CUDA_ARENA_SIZE",
            size=True,
        ),
    ] = 0
    cuda_arena_extend_strategy: Annotated[
        Literal["next_power_of_two", "same_as_requested"],
        _field("by how much that memory grows at a time", "CUDA_ARENA_EXTEND_STRATEGY"),
    ] = "next_power_of_two"
    gpu_pressure_threshold: Annotated[
        float,
        _field(
            "percent of GPU memory in use from which no batch may need more than ever before",
            "GPU_PRESSURE_THRESHOLD",
            ge=1,
            le=100,
        ),
    ] = 95.0
    cuda_visible_devices: Annotated[
        Names | None,
        Field(
            text="GPUs to use: numbers, UUIDs or MIG UUIDs; empty = none, unset = all",
            env="CUDA_VISIBLE_DEVICES",
            empty=True,
        ),
    ] = None
    threads: Annotated[
        int, _field("threads that run models; 0 = as many as cores we may use", le=1024)
    ] = 0
    threads_per_run: Annotated[
        int, _field("threads that share one model run; 0 = measured, usually 1", le=1024)
    ] = 0

    service_name: Annotated[str, _field("name in `target_info` and logs", "SERVICE_NAME")] = (
        "embedding-inference-api"
    )
    log_format: Annotated[Literal["json", "pretty"], _field("form of log lines", "LOG_FORMAT")] = (
        "json"
    )
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], _field("least severe level", "LOG_LEVEL")
    ] = "info"


class Declared(msgspec.Struct, frozen=True, kw_only=True):
    """One setting as the outside sees it."""

    name: str
    type: Any
    field: Field
    default: Any

    @property
    def env(self) -> str:
        """Its environment variable."""
        return self.field.env or PREFIX + self.name.upper()

    @property
    def flag(self) -> str:
        """Its flag of `serve`."""
        return "--" + self.name.replace("_", "-")

    @property
    def expected(self) -> str:
        """What a value must be, for error texts and `--help`."""
        if get_origin(self.type) is Literal:
            return "one of " + ", ".join(get_args(self.type))
        if self.type is bool:
            return "true or false"
        if self.field.among:
            return "a comma list of " + ", ".join(self.field.among)
        if self.type not in (int, float):
            return {Names: "a comma list", Path: "a path"}.get(self.type, "text")
        bounds = f"from {self.field.ge} to {self.field.le}"
        return (
            f"bytes, or a size such as 64M, {bounds}" if self.field.size else f"a number {bounds}"
        )

    def parse(self, text: str) -> Any:
        """The value that `text` stands for; raises `SettingsError`."""
        value = self._read(text.strip())
        number = type(value) in (int, float)
        if value is None or (number and not self.field.ge <= value <= self.field.le):
            raise SettingsError(f"{self.env}={text!r}: expected {self.expected}{self._hint(text)}")
        return value

    def _read(self, text: str) -> Any:
        if get_origin(self.type) is Literal:
            return text.lower() if text.lower() in get_args(self.type) else None
        if self.type is bool:
            return _SWITCH.get(text.lower())
        if self.type is int:
            return _bytes(text) if self.field.size else _whole(text)
        if self.type is float:
            return float(text) if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text) else None
        if self.type == Names:
            among = self.field.among
            said = text.lower() if among else text
            names = dict.fromkeys(part.strip() for part in said.split(",") if part.strip())
            return None if among and not names.keys() <= set(among) else tuple(names)
        return self.type(text) if text else None

    def _hint(self, text: str) -> str:
        if self.name == "port" and text.startswith("tcp://"):
            return (
                " (a Kubernetes Service named `inference` sets this variable: rename the Service,"
                " or set enableServiceLinks: false)"
            )
        return ""


def _whole(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[+-]?\d{1,18}", text) else None


def _bytes(text: str) -> int | None:
    match = re.fullmatch(r"(\d{1,18})\s*([KMGT]?)B?", text.upper())
    return int(match[1]) << 10 * " KMGT".index(match[2] or " ") if match else None


def declared() -> list[Declared]:
    """All settings in the order of declaration."""
    hints = get_type_hints(Settings, include_extras=True)
    rows = []
    for info in msgspec.structs.fields(Settings):
        type_, field = get_args(hints[info.name])
        if isinstance(type_, UnionType):
            type_ = next(part for part in get_args(type_) if part is not type(None))
        rows.append(Declared(name=info.name, type=type_, field=field, default=info.default))
    return rows


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give `parser` one flag per setting; flags that are not used stay None."""
    for row in declared():
        switch: dict[str, Any] = {"nargs": "?", "const": "true"} if row.type is bool else {}
        parser.add_argument(
            row.flag, dest=row.name, metavar=row.name.upper(), **switch,
            help=f"{row.field.text} [{row.env}]",
        )  # fmt: skip


def with_dotenv(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` over what `.env` in the working directory says."""
    try:
        dotenv = dotenv_values(".env")
    except (OSError, UnicodeError) as exc:
        raise SettingsError(f".env cannot be read: {exc}") from exc
    return {key: text for key, text in dotenv.items() if text} | dict(environ)


def load(environ: Mapping[str, str], flags: Mapping[str, str | None]) -> Settings:
    """Settings from flags (by field name), environment and defaults, in that order.

    Raises:
        SettingsError: a value is missing, malformed or out of bounds.
    """
    values: dict[str, Any] = {}
    for row in declared():
        text = flags.get(row.name) or environ.get(row.env)
        if text is not None and (text.strip() or row.field.empty):
            values[row.name] = row.parse(text)
    if values.get("demo"):
        values.setdefault("allowed_embedding_models", DEMO_MODELS)
        values.setdefault("allowed_rerank_models", DEMO_MODELS)
    if values.get("model_config"):
        values.setdefault("allowed_embedding_models", ())
    elif not values.get("allowed_embedding_models"):
        raise SettingsError(f"INFERENCE_ALLOWED_EMBEDDING_MODELS is not set: {NO_MODELS}")
    _check_providers(values.get("providers", ("auto",)))
    return Settings(**values)


def _check_providers(names: Names) -> None:
    """Raise `SettingsError` for an order in which a name means nothing."""
    said = f"INFERENCE_PROVIDERS={','.join(names)!r}: "
    if not names:
        raise SettingsError(said + "expected a comma list of " + ", ".join(PROVIDERS))
    if "auto" in names and len(names) > 1:
        raise SettingsError(said + "auto stands alone")
    if "cpu" in names[:-1]:
        raise SettingsError(said + "cpu computes everything, what comes behind it does nothing")


def unknown(environ: Mapping[str, str]) -> list[str]:
    """A line for every `INFERENCE_*` variable that is no setting, with the nearest one."""
    known = [row.env for row in declared()]
    lines = []
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in known:
            near: Sequence[str] = difflib.get_close_matches(name, known, n=1)
            lines.append(
                f"{name} is not a setting" + (f", did you mean {near[0]}?" if near else "")
            )
    return lines
