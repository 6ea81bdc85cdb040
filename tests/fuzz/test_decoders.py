"""Decoders of strangers' bytes only ever refuse: damaged examples, and bytes of any kind."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.decoders import DECODERS, Decoder

EXAMPLES = 200


@st.composite
def damaged(draw: st.DrawFn, decoder: Decoder) -> bytes:
    """Something that can be read, with bytes changed, taken out and put in."""
    data = bytearray(draw(st.sampled_from(decoder.seeds)))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(data)


@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name: str) -> None:
    """What cannot be read is refused in the decoder's own words, and nothing else is raised."""
    decoder = DECODERS[name]
    for seed in decoder.seeds:
        decoder(seed)

    @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True)
    @given(st.one_of(damaged(decoder), st.binary(max_size=200)))
    def read(data: bytes) -> None:
        decoder(data)

    read()
