"""How fast rotary positions turn: what config.json says of it -> tables."""

from collections.abc import Callable, Mapping
from typing import Any

from embedding_server.convert.blocks import Net
from embedding_server.convert.errors import ConvertError
from embedding_server.convert.packing import Rotary


def rope(
    net: Net, name: str, given: Mapping[str, Any], *, theta: float, width: int, positions: int
) -> Rotary:
    """Tables of `width` wide heads.

    Args:
        net: the network.
        name: what the tables are called.
        given: `rope_parameters` of transformers 5, or `rope_scaling` of older ones.
        theta: base of the angles, if `given` has none.
        width: of a head.
        positions: so many.

    Raises:
        ConvertError: the type of scaling is not known.
    """
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in _SCALED or given.get("mixed_b") is not None:
        raise ConvertError(f"rope_scaling={dict(given)!r} in config.json is not supported")
    factor = float(given.get("factor") or 1)
    base, stretch = _SCALED[kind](float(given.get("rope_theta") or theta), factor, width)
    return net.rotary(name, base, width, positions, stretch)


_SCALED: dict[str, Callable[[float, float, int], tuple[float, float]]] = {
    "default": lambda theta, *_: (theta, 1.0),
    "linear": lambda theta, factor, _: (theta, factor),
    "ntk": lambda theta, factor, width: (theta * factor, factor ** (2 / width)),
}
"""Type of scaling -> (theta, factor, width) -> theta, and by what all angles are divided.

"ntk" is that of Alibaba's code for GTE, which scales texts of every length.
"""
