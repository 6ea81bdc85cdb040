"""Same text, same vector? The largest difference a text's neighbours make."""

from collections.abc import Sequence

import numpy as np

from embedding_server.core import Ids, normalized
from embedding_server.runtime.session import Session

_TEXTS, _ROUNDS, _LARGEST = 64, 20, 16


def largest_difference(session: Session, texts: Sequence[Ids], rounds: int = _ROUNDS) -> float:
    """Over random batches of up to 16 texts, and both thread counts, for vectors of length 1."""
    random = np.random.default_rng(0)
    sample = list(texts[:_TEXTS])
    alone = np.concatenate([normalized(session.run([ids])) for ids in sample])
    largest = 0.0
    for _ in range(rounds):
        order = random.permutation(len(sample))
        while len(order):
            size = int(random.integers(1, _LARGEST + 1))
            batch, order = order[:size], order[size:]
            rows = session.run([sample[at] for at in batch], wide=bool(random.integers(2)))
            largest = max(largest, float(np.abs(normalized(rows) - alone[batch]).max()))
    return largest
