"""Settings: sources, bounds, and errors an operator can act on."""

from pathlib import Path

import pytest

from embedding_server.errors import SettingsError
from embedding_server.settings import DEMO_MODELS, Settings, declared, load, unknown, with_dotenv

MINIMAL = {"INFERENCE_ALLOWED_EMBEDDING_MODELS": "a"}


def read(**changes: str) -> Settings:
    """Settings from the environment alone."""
    return load(MINIMAL | changes, {})


def test_flag_beats_environment_beats_dotenv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flag wins over the environment, which wins over `.env`, which wins over the default."""
    monkeypatch.chdir(tmp_path)
    Path(".env").write_text("INFERENCE_PORT=1\nINFERENCE_MAX_BATCH_SIZE=2\nLOG_LEVEL=debug\n")
    environ = with_dotenv(MINIMAL | {"INFERENCE_PORT": "3", "INFERENCE_MAX_BATCH_SIZE": "4"})
    settings = load(environ, {"port": "5"})
    assert (settings.port, settings.max_batch_size, settings.log_level) == (5, 4, "debug")
    assert settings.queue_timeout_ms == 5000


def test_values_of_every_kind() -> None:
    """Lists, sizes, switches, choices, paths and unset optionals are read as documented."""
    settings = read(
        INFERENCE_ALLOWED_EMBEDDING_MODELS=" a/b , c,a/b,",
        INFERENCE_MAX_BODY_BYTES="2M",
        INFERENCE_MAX_QUEUED_BYTES="1gb",
        INFERENCE_COMPRESS="Yes",
        INFERENCE_READY_POLICY="ANY",
        INFERENCE_MODEL_PATH="/srv/models",
        INFERENCE_MAX_CONCURRENT_REQUESTS="",
        INFERENCE_PROVIDERS="TensorRT, cuda",
        INFERENCE_PRECISION="tf32",
        CUDA_ARENA_SIZE="4G",
        CUDA_ARENA_EXTEND_STRATEGY="same_as_requested",
    )
    assert settings.providers == ("tensorrt", "cuda")
    assert (settings.cuda_arena_size, settings.precision) == (4 << 30, "tf32")
    assert settings.cuda_arena_extend_strategy == "same_as_requested"
    assert settings.allowed_embedding_models == ("a/b", "c")
    assert settings.max_body_bytes == 2 << 20
    assert settings.max_queued_bytes == 1 << 30
    assert settings.compress
    assert settings.ready_policy == "any"
    assert settings.model_path == Path("/srv/models")
    assert settings.max_concurrent_requests is None


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("INFERENCE_PORT", "0", "from 1 to 65535"),
        ("INFERENCE_PORT", "65536", "from 1 to 65535"),
        ("INFERENCE_PORT", "8o90", "a number"),
        ("INFERENCE_PORT", "tcp://10.0.0.1:8090", "Kubernetes Service"),
        ("INFERENCE_MAX_BODY_BYTES", "32Q", "a size such as 64M"),
        ("INFERENCE_MAX_BODY_BYTES", "0", "from 1"),
        ("INFERENCE_QUEUE_TIMEOUT_MS", "-1", "from 0 to 3600000"),
        ("INFERENCE_COMPRESS", "perhaps", "true or false"),
        ("LOG_FORMAT", "xml", "one of json, pretty"),
        ("INFERENCE_READY_POLICY", "some", "one of all, any"),
        ("CUDA_ARENA_SIZE", "4Q", "a size such as 64M"),
        ("CUDA_ARENA_EXTEND_STRATEGY", "kNextPowerOfTwo", "next_power_of_two, same_as_requested"),
    ],
)
def test_wrong_values_name_variable_value_and_bound(name: str, value: str, said: str) -> None:
    """The error says which variable, what it was and what it may be."""
    with pytest.raises(SettingsError) as error:
        read(**{name: value})
    assert f"{name}={value!r}" in str(error.value)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_every_setting_rejects_or_accepts_garbage_cleanly() -> None:
    """No setting lets a foreign exception out."""
    for row in declared():
        for text in ("\x00", "99999999999999999999", "-5", "*", "é"):
            try:
                row.parse(text)
            except SettingsError:
                continue


def test_models_are_required_unless_demo() -> None:
    """Without models the error names the variable and an example; `demo` fills both lists."""
    with pytest.raises(SettingsError, match="INFERENCE_ALLOWED_EMBEDDING_MODELS.*example"):
        load({}, {})
    settings = load({}, {"demo": "true"})
    assert settings.allowed_embedding_models == DEMO_MODELS
    assert settings.allowed_rerank_models == DEMO_MODELS


def test_typos_are_reported() -> None:
    """A variable that is no setting is named with the nearest one; others are left alone."""
    lines = unknown({"INFERENCE_PROT": "1", "INFERENCE_PORT": "1", "OTHER": "1"})
    assert lines == ["INFERENCE_PROT is not a setting, did you mean INFERENCE_PORT?"]
