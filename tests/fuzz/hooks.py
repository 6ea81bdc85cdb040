"""What no schema can say: requests that a server may refuse although they fit its document.

Schemathesis's own check for them is off, and this one, which calls it, stands in its place: it
lets pass what is refused for one of `REASONS`, and nothing else.
"""

import re

import schemathesis
from schemathesis.specs.openapi.checks import positive_data_acceptance

REASONS = {
    r"Expected `int.*`, got `float`": "5.0 is an integer to JSON Schema, and none to msgspec",
    r"has token id -?\d+, which is not among": "a model has so many tokens",
    r"has more than \d+ tokens: shorten it": "the limit of a model, where nothing may be cut",
    r"a prompt does not go before token ids": "it may be the model's own, for an `input_type`",
    r"prompt_name is not one of the prompts of": "a model has its own prompts",
    r"dimensions must be": "a model has so many dimensions",
    r"Model \S+ is [\w-]+: POST /\S+ serves it": "`output` has to be one that the model makes",
    r"input_type is required": "where the model has prompts",
    r"no image that can be read|is no base64": "a schema cannot say what is a picture",
    r"input_type is image, and there are texts": "nor which value goes with which field",
    r"inputs mixes texts and images": "a schema cannot compare elements",
    r"text_1 must be one text, or as many as text_2 has": "a schema cannot compare lengths",
}


@schemathesis.check
def valid_data_acceptance(ctx, response, case):  # type: ignore[no-untyped-def]
    """Fails where a request that fits the document is refused without one of the reasons."""
    if re.search("|".join(REASONS), response.text):
        return None
    return positive_data_acceptance(ctx, response, case)
