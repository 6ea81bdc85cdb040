"""How models are to run, as the settings and the machine say."""

from pathlib import Path

import msgspec

from embedding_server.core import Precision
from embedding_server.runtime.providers import Compute
from embedding_server.settings import Settings


class RunPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The same for all models.

    `precision` None is what suits the device, and `qwen3` for safetensors of that family.
    `threads_per_run` 0 and `warmup` (seconds) leave that to measurement. `cuda_graphs`: small
    batches are such where that is faster, which is measured anew at every load: never where vectors
    are to be reproducible.
    """

    cache: Path
    precision: Precision | None = None
    qwen3: Precision = Precision.BF16
    reproducible: bool = False
    cuda_graphs: bool = False
    threads_per_run: int = 0
    warmup: float = 0.0
    max_image_pixels: int = 1 << 24
    compute: Compute = Compute()

    @classmethod
    def of(cls, settings: Settings, compute: Compute = Compute()) -> "RunPlan":  # noqa: B008 - frozen
        """As the settings say."""
        auto = settings.precision == "auto"
        return cls(
            cache=settings.cache_dir,
            precision=None if auto else Precision(settings.precision),
            qwen3=Precision(settings.qwen3_dtype),
            reproducible=settings.reproducible,
            cuda_graphs=settings.cuda_graphs and not settings.reproducible,
            threads_per_run=settings.threads_per_run,
            warmup=settings.warmup_ms / 1000,
            max_image_pixels=settings.max_image_pixels,
            compute=compute,
        )
