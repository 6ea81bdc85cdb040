"""Cohere's tokenize and detokenize."""

from typing import ClassVar

import msgspec
from litestar import post
from litestar.params import JSONBody

from embedding_server.api.body import ApiRequest
from embedding_server.api.cohere.answers import ApiVersion
from embedding_server.api.declared import MODEL, answers
from embedding_server.api.inference import Model, TokenId, plain_options
from embedding_server.api.parts import parts


class TokenizeRequest(msgspec.Struct, kw_only=True, frozen=True):
    """A text."""

    examples: ClassVar = [{"model": MODEL, "text": "a cat"}]

    model: Model
    text: str


class TokenizeAnswer(msgspec.Struct):
    """Its tokens, without special ones."""

    tokens: list[int]
    token_strings: list[str]
    meta: dict[str, ApiVersion]


class DetokenizeRequest(msgspec.Struct, kw_only=True, frozen=True):
    """Token ids of a text."""

    examples: ClassVar = [{"model": MODEL, "tokens": [5, 6]}]

    model: Model
    tokens: list[TokenId]


class DetokenizeAnswer(msgspec.Struct):
    """The text."""

    text: str
    meta: dict[str, ApiVersion]


_META = {"api_version": ApiVersion("1")}


@post("/v1/tokenize", status_code=200, responses=answers(TokenizeAnswer))
async def tokenize(request: ApiRequest, data: JSONBody[TokenizeRequest]) -> TokenizeAnswer:
    """The tokens of a text."""
    (pieces,) = await parts(request).engine.pieces(
        data.model, [data.text], plain_options(request), specials=False
    )
    return TokenizeAnswer([one.id for one in pieces], [one.text for one in pieces], _META)


@post("/v1/detokenize", status_code=200, responses=answers(DetokenizeAnswer))
async def detokenize(request: ApiRequest, data: JSONBody[DetokenizeRequest]) -> DetokenizeAnswer:
    """The text of token ids."""
    (text,) = await parts(request).engine.detokenize(
        data.model, [data.tokens], plain_options(request), skip_specials=False
    )
    return DetokenizeAnswer(text, _META)
