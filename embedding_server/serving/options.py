"""What a client may say beside its texts, and what it makes of them for a model."""

from collections.abc import Sequence

import msgspec

from embedding_server.core import Kind, ModelSpec, Query, Side, Text, Tokens
from embedding_server.errors import BadRequest, UnsupportedModel

_MAX_PROMPT_CHARS = 10_000

ONE_VECTOR = (Kind.DENSE, Kind.STATIC)
"""Kinds that make one dense vector of a text."""

Input = str | Tokens | bytes
"""A text, as such or as token ids, or an image file."""

_SERVED_BY = {
    Kind.DENSE: "POST /api/embed serves it",
    Kind.STATIC: "POST /api/embed serves it",
    Kind.MULTI: 'POST /api/embed serves it, with "output": "tokens"',
    Kind.SPARSE: "POST /api/embed/sparse serves it",
    Kind.IMAGE: "POST /api/embed/image serves it",
    Kind.CROSS: "POST /api/rerank serves it",
}
"""What to do instead, for a request to a model of another kind than it asked for."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a client may say beside its texts.

    `dimensions` cuts vectors before they are normalised; `truncate` False makes a text over the
    model's limit an error, otherwise it is cut on `side`; `input_type` picks the model's own prompt
    where it has one of that name, `prompt_name` one that it must have, `prompt` replaces it.
    `document_tokens` cuts documents that are reranked; with `raw_scores` False scores of
    cross-encoders become probabilities. `timeout` is in seconds. `client` is who it is: clients
    take turns.
    """

    dimensions: int | None = None
    normalize: bool = True
    truncate: bool = True
    side: Side = "right"
    input_type: str | None = None
    prompt: str | None = None
    prompt_name: str | None = None
    document_tokens: int | None = None
    raw_scores: bool = True
    timeout: float | None = None
    client: str = ""


def check_options(options: Options) -> None:
    """Raise `BadRequest` for what no model can do."""
    prompt = options.prompt
    if prompt is not None and len(prompt) > _MAX_PROMPT_CHARS:
        raise BadRequest(f"prompt has more than {_MAX_PROMPT_CHARS} characters")
    if prompt is not None and options.prompt_name is not None:
        raise BadRequest("give either prompt or prompt_name")


def check_model(
    spec: ModelSpec, inputs: Sequence[Input], options: Options, kinds: Sequence[Kind]
) -> None:
    """Raise `UnsupportedModel` or `BadRequest` where the model cannot do what is asked of it."""
    if spec.kind not in kinds:
        raise UnsupportedModel(f"Model {spec.id} is {spec.kind}: {_SERVED_BY[spec.kind]}")
    if inputs and isinstance(inputs[0], bytes) and not spec.takes_images:
        raise UnsupportedModel(f"Model {spec.id} takes texts, no images")
    if spec.token_ids == "refuse" and any(isinstance(one, Tokens) for one in inputs):  # noqa: S105 - says whose ids they are
        langchain = "with LangChain's OpenAI class by check_embedding_ctx_length=False"
        raise BadRequest(f"Model {spec.id} takes no token ids here: send text, {langchain}")
    dimensions, fewest = options.dimensions, spec.min_dimensions
    if dimensions is not None and not fewest <= dimensions <= spec.dimensions:
        span = f"from {fewest} to {spec.dimensions}"
        raise BadRequest(f"dimensions must be {span}, got {dimensions}")


def prompted(spec: ModelSpec, inputs: Sequence[Input], options: Options) -> list[Text]:
    """The inputs with the prompt that was asked for; raises `BadRequest` if there is none."""
    name = options.prompt_name or options.input_type
    prompt = spec.prompts.get(name or "", "") if options.prompt is None else options.prompt
    if options.prompt_name and options.prompt_name not in spec.prompts:
        known = ", ".join(spec.prompts) or "none"
        raise BadRequest(f"prompt_name is not one of the prompts of {spec.id}: {known}")
    if prompt and any(isinstance(one, Tokens) for one in inputs):
        raise BadRequest("a prompt does not go before token ids: send text, or its ids in front")
    form = Query if name == "query" else str
    return [form(prompt + one) if isinstance(one, str) else one for one in inputs]
