"""The schedule: driven by generated lengths and arrivals, without threads or time."""

import math
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from embedding_server.serving.cost import Cost, Shape
from embedding_server.serving.schedule import INTERACTIVE_IN_A_ROW, Entry, Lane, Schedule, plan
from tests.fakes import ids

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=60)
BUDGETS = st.integers(16, 600)
REQUEST = st.tuples(
    st.sampled_from(list(Lane)), st.integers(0, 2), st.lists(st.integers(1, 99), max_size=9)
)
REQUESTS = st.lists(REQUEST, max_size=20)
"""Requests as (lane, model, lengths)."""
CLIENTS = st.integers(1, 4)


class Model:
    """A model as the schedule knows it; every other one pads."""

    def __init__(self, *, padded: bool = False, threads: int = 1) -> None:
        self.cost = Cost(padded=padded)
        self.threads = threads
        self.batch_tokens = 256

    def allowed(self, tokens: int) -> int:
        """There is memory enough."""
        return tokens

    def room(self, tokens: int) -> int:
        """The same."""
        return tokens


def fill(
    budget: int, requests: list[tuple[Lane, int, list[int]]], clients: int = 1
) -> tuple[Schedule[Model], list[Entry]]:
    """A schedule with these requests, of clients in turn, and their entries by age."""
    schedule: Schedule[Model] = Schedule(budget)
    models, entries = [Model(padded=number % 2 == 1) for number in range(3)], []
    for number, (lane, model, lengths) in enumerate(requests):
        texts, client = [ids(length) for length in lengths], str(number % clients)
        entries += schedule.add(models[model], lane, client, None, texts)
    return schedule, entries


def drain(schedule: Schedule[Model], free: int = 1) -> list[list[Entry]]:
    """All batches until nothing waits."""
    batches = []
    while taken := schedule.take(free):
        batches.append(taken[1])
    return batches


@given(REQUESTS, BUDGETS, st.integers(1, 4), CLIENTS)
def test_everything_runs_once_within_the_budget(
    requests: Any, budget: int, free: int, clients: int
) -> None:
    """Nothing is lost or doubled; batches keep the budget, or hold one text, of one model."""
    schedule, entries = fill(budget, requests, clients)
    batches = []
    while taken := schedule.take(free):
        model, batch = taken
        batches.append(batch)
        assert {entry.line.model for entry in batch} == {model}
        assert len({entry.line.lane for entry in batch}) == 1
        shape = Shape.of(entry.length for entry in batch)
        assert len(batch) == 1 or model.cost.tokens(shape) <= budget
    assert sorted(e.sequence for batch in batches for e in batch) == [e.sequence for e in entries]
    assert repr(schedule) == "Schedule(interactive=0, bulk=0)"


@given(REQUESTS, BUDGETS)
def test_nobody_waits_longer_than_stated(requests: Any, budget: int) -> None:
    """An entry runs within the number of batches that the module states for its lane."""
    schedule, entries = fill(budget, requests)
    when = {
        entry.sequence: number for number, batch in enumerate(drain(schedule), 1) for entry in batch
    }
    for lane, share in (
        (Lane.INTERACTIVE, 1 + 1 / INTERACTIVE_IN_A_ROW),
        (Lane.BULK, 1 + INTERACTIVE_IN_A_ROW),
    ):
        mine = [entry for entry in entries if entry.line.lane is lane]
        for older, entry in enumerate(mine):
            assert when[entry.sequence] <= math.ceil((older + 1) * share - 1e-9)


class Traffic(RuleBasedStateMachine):
    """Arrivals, departures and batches in any order: the bound holds from whenever a text came."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule: Schedule[Model] = Schedule(128)
        self.models = [Model(padded=number % 2 == 1) for number in range(3)]
        self.waiting: dict[Lane, list[Entry]] = {lane: [] for lane in Lane}
        self.due: dict[int, int] = {}
        """Sequence -> the batch by which it runs."""
        self.batches = 0

    @rule(lane=st.sampled_from(list(Lane)), model=st.integers(0, 2), lengths=LENGTHS)
    def arrive(self, lane: Lane, model: int, lengths: list[int]) -> None:
        """A request comes."""
        texts = [ids(length) for length in lengths]
        share = 1 + (1 / INTERACTIVE_IN_A_ROW if lane is Lane.INTERACTIVE else INTERACTIVE_IN_A_ROW)
        for entry in self.schedule.add(self.models[model], lane, "", None, texts):
            self.waiting[lane].append(entry)
            batches = math.ceil(len(self.waiting[lane]) * share - 1e-9)
            self.due[entry.sequence] = self.batches + batches

    @rule(lane=st.sampled_from(list(Lane)), data=st.data())
    def leave(self, lane: Lane, data: st.DataObject) -> None:
        """A client hangs up."""
        if self.waiting[lane]:
            entry = data.draw(st.sampled_from(self.waiting[lane]))
            self.schedule.remove(entry)
            self.waiting[lane].remove(entry)

    @rule()
    def run(self) -> None:
        """A slot takes a batch, which nobody in it has waited too long for."""
        taken = self.schedule.take(1)
        assert bool(taken) == any(self.waiting.values())
        self.batches += 1
        for entry in taken[1] if taken else ():
            assert self.batches <= self.due[entry.sequence]
            self.waiting[entry.line.lane].remove(entry)

    @invariant()
    def counts(self) -> None:
        """The schedule knows how many texts wait."""
        interactive, bulk = (len(self.waiting[lane]) for lane in Lane)
        assert repr(self.schedule) == f"Schedule(interactive={interactive}, bulk={bulk})"


test_traffic = Traffic.TestCase


@given(REQUESTS)
def test_small_requests_go_first(requests: Any) -> None:
    """While both lanes wait, three batches of four are interactive."""
    schedule, entries = fill(64, requests)
    left = {lane: sum(entry.line.lane is lane for entry in entries) for lane in Lane}
    turn = 0
    for batch in drain(schedule):
        lane = batch[0].line.lane
        if all(left.values()):
            assert lane is (Lane.BULK if turn == INTERACTIVE_IN_A_ROW else Lane.INTERACTIVE)
            turn = 0 if lane is Lane.BULK else turn + 1
        elif lane is Lane.BULK:
            turn = 0
        left[lane] -= len(batch)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=12), BUDGETS, st.data())
def test_close_to_the_best_window(lengths: list[int], budget: int, data: st.DataObject) -> None:
    """Of all windows around the anchor that fit, none makes a run a tenth cheaper per token."""
    lengths, cost = sorted(lengths), Cost(padded=True)
    anchor = data.draw(st.integers(0, len(lengths) - 1))
    start, stop = plan(lengths, anchor, budget, cost)

    def overhead(low: int, high: int) -> float:
        return cost.token + cost.overhead(Shape.of(lengths[low:high]))

    windows = [
        (low, high)
        for low in range(anchor + 1)
        for high in range(anchor + 1, len(lengths) + 1)
        if cost.tokens(Shape.of(lengths[low:high])) <= budget or high - low == 1
    ]
    assert (start, stop) in windows
    assert overhead(start, stop) <= 1.1 * min(overhead(*one) for one in windows)


def test_far_longer_text_is_left_out() -> None:
    """One long text does not make a batch of short ones pay for its length."""
    assert plan([10] * 20 + [50], 0, 2000, Cost(padded=True)) == (0, 20)


def test_without_padding_age_decides() -> None:
    """Where nothing is padded, a batch is the oldest texts that fit, whatever their lengths."""
    schedule, entries = fill(64, [(Lane.BULK, 0, [10, 40, 3, 12, 90, 1])])
    batches = drain(schedule)
    assert [len(batch) for batch in batches] == [3, 1, 1, 1]
    assert [entry for batch in batches for entry in batch] == entries


def test_idle_slots_share() -> None:
    """What waits is divided between idle slots, down to a size that is worth a run."""
    schedule, _ = fill(1000, [(Lane.BULK, 0, [50] * 8)])
    assert len(drain(schedule, 2)[0]) == 4
    schedule, _ = fill(1000, [(Lane.BULK, 0, [10] * 6)])
    assert len(drain(schedule, 2)[0]) == 6


def test_removed_entries_do_not_run() -> None:
    """An entry taken out of line is gone, among others of its length, and only once."""
    schedule, entries = fill(1000, [(Lane.BULK, 0, [5, 5, 5, 7])])
    for _ in range(2):
        schedule.remove(entries[1])
    assert repr(schedule) == "Schedule(interactive=0, bulk=3)"
    assert [entry.index for entry in drain(schedule)[0]] == [0, 2, 3]


def test_oldest_model_goes_first() -> None:
    """Of two models in a lane, the one with the older text goes first."""
    schedule, entries = fill(64, [(Lane.BULK, 1, [60]), (Lane.BULK, 0, [60]), (Lane.BULK, 1, [60])])
    assert [batch[0] for batch in drain(schedule)] == entries


def test_batches_as_suit_the_model() -> None:
    """Without a setting, a batch has as many tokens as were measured best for its model."""
    schedule: Schedule[Model] = Schedule(None)
    schedule.add(Model(), Lane.BULK, "", None, [ids(64)] * 9)
    assert [len(batch) for batch in drain(schedule)] == [4, 4, 1]


def test_nobody_is_passed_by_for_want_of_cores() -> None:
    """While too few cores are free for the model whose turn it is, nobody else gets them."""
    schedule: Schedule[Model] = Schedule(64)
    large, small = Model(threads=2), Model()
    schedule.add(large, Lane.BULK, "", None, [ids(5)])
    schedule.add(small, Lane.BULK, "", None, [ids(5)])
    assert schedule.take(1) is None
    taken = schedule.take(2)
    assert taken
    assert taken[0] is large


@given(
    st.lists(st.tuples(st.sampled_from(list(Lane)), LENGTHS), min_size=2, max_size=5),
    st.booleans(),
)
@example(floods=[(Lane.INTERACTIVE, [271, 1, 32]), (Lane.INTERACTIVE, [2, 1])], padded=True)
def test_clients_get_the_same(floods: Any, padded: bool) -> None:  # noqa: FBT001 - generated
    """Of clients that wait, none is more than two batches or one long text ahead."""
    schedule: Schedule[Model] = Schedule(128)
    model, waits = Model(padded=padded), [0] * len(floods)
    for number, (lane, lengths) in enumerate(floods):
        texts = [ids(length) for length in lengths]
        waits[number] = len(schedule.add(model, lane, str(number), None, texts))
    had = [0] * len(floods)
    while taken := schedule.take(1):
        for entry in taken[1]:
            number = int(entry.line.client)
            waits[number] -= 1
            had[number] += entry.length
        waiting = [had[number] for number, left in enumerate(waits) if left]
        assert max(waiting, default=0) - min(waiting, default=0) <= max(2 * 128, 300)


def test_bulk_sent_as_singles_gains_nothing() -> None:
    """A client whose texts are all small requests gets no more than one that sends bulk."""
    schedule: Schedule[Model] = Schedule(100)
    model = Model()
    schedule.add(model, Lane.BULK, "bulk", None, [ids(10)] * 100)
    for _ in range(100):
        schedule.add(model, Lane.INTERACTIVE, "singles", None, [ids(10)])
    first = [entry.line.client for batch in drain(schedule)[:10] for entry in batch]
    assert first.count("bulk") == first.count("singles") == 50


def test_small_clients_share_a_batch() -> None:
    """Single texts of many clients go together, and a newcomer gets its share at once."""
    schedule: Schedule[Model] = Schedule(100)
    model = Model()
    for client in "abcdefghij":
        schedule.add(model, Lane.INTERACTIVE, client, None, [ids(10)])
    assert len(drain(schedule)) == 1
    schedule.add(model, Lane.BULK, "old", None, [ids(100)] * 50)
    for _ in range(20):
        schedule.take(1)
    schedule.add(model, Lane.BULK, "new", None, [ids(100)] * 3)
    clients = [batch[0].line.client for batch in drain(schedule)[:6]]
    assert sorted(clients) == ["new"] * 3 + ["old"] * 3
