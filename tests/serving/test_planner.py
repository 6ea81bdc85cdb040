"""The planner: pure functions, driven by generated lengths."""

from hypothesis import given
from hypothesis import strategies as st

from embedding_server.serving.planner import Entry, Pending, window, work
from tests.fakes import ids

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=60)


def fill(lengths: list[int]) -> tuple[Pending, list[Entry]]:
    """A line with one entry per length, in that order of age."""
    pending, entries = Pending(), []
    for sequence, length in enumerate(lengths):
        entry = Entry(ids=ids(1), job=None, index=0, sequence=sequence, length=length)
        pending.add(entry)
        entries.append(entry)
    return pending, entries


@given(LENGTHS, st.integers(16, 600))
def test_drains_everything_once(lengths: list[int], budget: int) -> None:
    """Every entry runs exactly once, in batches that keep the budget or hold one text."""
    pending, entries = fill(lengths)
    ran = []
    while pending:
        batch = pending.plan(budget)
        assert len(batch) == 1 or sum(entry.length for entry in batch) <= budget
        pending.remove(batch)
        ran += batch
    assert sorted(entry.sequence for entry in ran) == [entry.sequence for entry in entries]
    assert pending.tokens == 0


@given(LENGTHS, st.integers(16, 600))
def test_oldest_always_goes(lengths: list[int], budget: int) -> None:
    """The oldest entry is in the next batch, so none starves."""
    pending, entries = fill(lengths)
    assert entries[0] in pending.plan(budget)


@given(LENGTHS, st.integers(16, 600), st.data())
def test_no_window_is_cheaper(lengths: list[int], budget: int, data: st.DataObject) -> None:
    """No window that only drops texts from either end of the chosen one costs less per token."""
    lengths = sorted(lengths)
    anchor = data.draw(st.integers(0, len(lengths) - 1))
    start, stop = window(lengths, anchor, budget)
    assert start <= anchor < stop

    def rate(low: int, high: int) -> float:
        part = lengths[low:high]
        return work(len(part), part[-1], sum(part)) / sum(part)

    for high in range(anchor + 1, stop + 1):
        assert rate(start, stop) <= rate(anchor, high) + 1e-9


def test_far_longer_text_is_left_out() -> None:
    """One long text does not make a batch of short ones pay for its attention."""
    lengths = [10] * 20 + [500]
    assert window(lengths, 0, 1000) == (0, 20)


def test_remove_passes_over_strangers() -> None:
    """Taking out what is not in line changes nothing, and what is, is found among equals."""
    pending, entries = fill([5, 5, 5, 7])
    pending.remove([entries[1]])
    pending.remove([entries[1]])
    assert repr(pending) == "Pending(texts=3, tokens=17)"
    assert pending.oldest is entries[0]
