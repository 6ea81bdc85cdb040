"""Every setting, declared once: its environment variable, flag, bounds and README row.

`load` takes each from its flag, else the environment (`with_dotenv`), else the default. A wrong
value is a `SettingsError`: one line that names the variable, the value and what is expected.
"""

import argparse
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
from dotenv import dotenv_values

from embedding_server.errors import SettingsError
from embedding_server.settings.fields import (
    PREFIX,
    Declared,
    Field,
    Names,
    ms,
    said,
    size,
)

__all__ = [
    "DEMO_MODELS",
    "DIALECTS",
    "NO_MODELS",
    "PREFIX",
    "PROVIDERS",
    "Declared",
    "Names",
    "Settings",
    "add_flags",
    "declared",
    "load",
    "unknown",
    "with_dotenv",
]

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


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The server's configuration.

    Field `max_batch_size` is `INFERENCE_MAX_BATCH_SIZE` in the environment and
    `--max-batch-size` on the command line.
    """

    allowed_embedding_models: Annotated[
        Names,
        said("comma list of model ids, or `*`; not needed beside `INFERENCE_MODEL_CONFIG`"),
    ]
    allowed_rerank_models: Annotated[
        Names, said("comma list of model ids, or `*`; an embedding model reranks by cosine")
    ] = ()
    demo: Annotated[bool, said(f"serve the demo model `{DEMO_MODELS[0]}`")] = False
    model_path: Annotated[Path | None, said("directory of own models, a sub-directory each")] = None
    model_config: Annotated[
        Path | None, said("YAML file of models and names of them, all allowed by being there")
    ] = None
    preload: Annotated[
        Names | None,
        said(
            "models to load at start and to keep; unset = all allowed ones, or none if a list is"
            " `*` or residency is limited"
        ),
    ] = None
    max_loaded_models: Annotated[
        int, said("models resident at once, the one used longest ago makes room; 0 = all")
    ] = 0
    model_ttl_seconds: Annotated[
        int, said("unload a model that nobody used for so long; 0 = never", le=1 << 30)
    ] = 0
    default_model: Annotated[
        Names,
        said("models of requests that name none, one per task; unset = the only one of its task"),
    ] = ()
    ready_policy: Annotated[
        Literal["all", "any"], said("ready when `all` preloaded models serve, or `any` of them")
    ] = "all"
    hf_home: Annotated[
        Path, said("huggingface-hub's home, which has its cache of models", "HF_HOME")
    ] = Path("~/.cache/huggingface")
    hf_endpoint: Annotated[str | None, said("a mirror of the hub", "HF_ENDPOINT")] = None
    hf_token: Annotated[str | None, said("for private models", "HF_TOKEN")] = None
    hf_hub_offline: Annotated[
        bool, said("no network call at all, what is cached must do", "HF_HUB_OFFLINE")
    ] = False
    cache_dir: Annotated[Path, said("where converted graphs and measured costs are kept")] = Path(
        "~/.cache/embedding-server"
    )

    hostname: Annotated[str, said("address to listen on")] = "0.0.0.0"  # noqa: S104 - a server
    port: Annotated[int, said("port to listen on", ge=1, le=65535)] = 8090
    dialects: Annotated[
        Names,
        Field(text="APIs to serve beside health, metrics and docs, comma list", among=DIALECTS),
    ] = DIALECTS
    cors_allowed_origins: Annotated[
        Names, said("comma list of origins, without credentials", "CORS_ALLOWED_ORIGINS")
    ] = ("*",)
    ssl_enabled: Annotated[bool, said("serve HTTPS", "SERVER_SSL_ENABLED")] = False
    tls_cert_path: Annotated[
        Path | None, said("certificate chain, PEM", "TLS_SERVER_CERT_PATH")
    ] = None
    tls_key_path: Annotated[Path | None, said("its private key, PEM", "TLS_SERVER_KEY_PATH")] = None
    tls_client_ca_path: Annotated[
        Path | None,
        said(
            "authorities, PEM, one of which must have signed the client's certificate; `/health`"
            " needs none",
            "TLS_CLIENT_CA_PATH",
        ),
    ] = None
    api_keys: Annotated[
        Names,
        said(
            "bearer keys: `key`, `name=key`, `name=sha256:<hex>`, or `@file` with one of these per"
            " line, read again when it changes; health and metrics stay open"
        ),
    ] = ()
    rate_limit: Annotated[
        int,
        said("requests per minute of a key, or else an address, then 429; 0 = any", le=1 << 30),
    ] = 0
    rate_limit_tokens: Annotated[
        int,
        said(
            "tokens per minute of the same, counted when a request ends: who owes some gets 429;"
            " 0 = any",
            le=1 << 40,
        ),
    ] = 0
    trusted_proxies: Annotated[
        Names,
        said(
            "addresses and networks whose `X-Forwarded-For` or `Forwarded` says who the client is"
        ),
    ] = ()
    max_connections: Annotated[
        int,
        said(
            "connections at once, fewer where the system allows fewer open files; one more gets"
            " 503, but on `/health` and `/metrics`",
            ge=1,
            le=1 << 20,
        ),
    ] = 4096
    compress: Annotated[bool, said("gzip the answers for clients that accept it")] = False

    max_batch_size: Annotated[int, said("texts per native embed request", ge=1, le=100_000)] = 128
    max_text_chars: Annotated[int, said("characters per text; 0 = only the model's limit")] = 0
    max_image_pixels: Annotated[
        int, said("width times height of the largest image", ge=1024, le=1 << 28)
    ] = 1 << 24
    max_body_bytes: Annotated[int, size("request body, counted after decompression")] = 32 << 20

    max_concurrent_requests: Annotated[
        int | None, said("requests admitted at once; unset = limited by work", ge=1, le=1 << 20)
    ] = None
    max_queue_depth: Annotated[
        int, said("requests waiting for admission; one more is refused", le=1 << 20)
    ] = 1024
    queue_timeout_ms: Annotated[int, ms("longest wait for admission, then 503")] = 5000
    max_queued_bytes: Annotated[
        int, size("request bytes that may be inside or waiting at once")
    ] = 256 << 20
    request_timeout_ms: Annotated[int, ms("total time per request, then 503; 0 = no limit")] = (
        120_000
    )
    drain_grace_ms: Annotated[
        int, ms("after SIGTERM: answering probes, refusing new work politely")
    ] = 2000
    drain_timeout_ms: Annotated[int, ms("after that: finishing accepted work")] = 20_000

    max_batch_tokens: Annotated[
        int | None,
        said("tokens per model run, a longer text runs alone; unset = measured", ge=16, le=1 << 24),
    ] = None
    precision: Annotated[
        Literal["auto", "fp32", "tf32", "fp16", "bf16", "int8"],
        said(
            "what models compute in; `int8` is faster and less exact; `fp16` and `bf16` are what"
            " weights are rounded to; `tf32` is fp32 but for the GPU's matrix products; auto ="
            " fp32 on a CPU, fp16 on GPUs"
        ),
    ] = "auto"
    qwen3_dtype: Annotated[
        Literal["fp32", "fp16", "bf16", "int8"],
        said("what auto means for safetensors of Qwen3", "QWEN3_DTYPE"),
    ] = "bf16"
    reproducible: Annotated[
        bool, said("every text runs alone: no bit of its vector depends on other texts")
    ] = False
    warmup_ms: Annotated[
        int, ms("measuring how a model runs best, at its first load; 0 = not at all")
    ] = 3000
    providers: Annotated[
        Names,
        Field(
            text="what computes, the first choice first: `tensorrt`, `cuda`, `cpu`; auto = cuda"
            " where it can be used, else cpu",
            among=PROVIDERS,
        ),
    ] = ("auto",)
    cuda_graphs: Annotated[
        bool,
        said(
            "small batches on a GPU as CUDA graphs, where that is over 10 % faster; never tried on"
            " a GPU yet"
        ),
    ] = False
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
        said("by how much that memory grows at a time", "CUDA_ARENA_EXTEND_STRATEGY"),
    ] = "next_power_of_two"
    gpu_pressure_threshold: Annotated[
        float,
        said(
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
        int,
        said(
            "threads that run models, beside GPUs tokenise; 0 = as many as cores we may use",
            le=1024,
        ),
    ] = 0
    threads_per_run: Annotated[
        int, said("threads that share one model run; 0 = measured, usually 1", le=1024)
    ] = 0

    service_name: Annotated[str, said("name in `target_info` and logs", "SERVICE_NAME")] = (
        "embedding-inference-api"
    )
    otel_enabled: Annotated[
        bool, said("send traces by OTLP; nothing is loaded for it otherwise", "OTEL_ENABLED")
    ] = False
    otel_endpoint: Annotated[
        str, said("the collector, gRPC, `http://` or `https://`", "OTEL_EXPORTER_OTLP_ENDPOINT")
    ] = "http://localhost:4317"
    otel_sample_ratio: Annotated[
        float,
        said(
            "share of requests to trace, where the client does not say", "OTEL_SAMPLE_RATIO", le=1
        ),
    ] = 1.0
    otel_logs_enabled: Annotated[
        bool, said("with `OTEL_ENABLED`: send log events too", "OTEL_LOGS_ENABLED")
    ] = False
    log_format: Annotated[Literal["json", "pretty"], said("form of log lines", "LOG_FORMAT")] = (
        "json"
    )
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], said("least severe level", "LOG_LEVEL")
    ] = "info"


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
