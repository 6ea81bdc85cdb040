"""Fair shares, by what everyone has had."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from embedding_server.serving.shares import Shares


def test_whoever_has_had_least_goes_next() -> None:
    """Turns follow what was charged; a newcomer starts level with whoever is next."""
    shares: Shares[str] = Shares()
    shares.join("a")
    shares.join("b")
    shares.charge("a", 5)
    assert shares.next == "b"
    shares.charge("b", 7)
    shares.join("c")
    assert shares.in_turn("bca", "c", 100) == ["c", "a", "b"]
    assert shares.in_turn("bca", "c", 1) == ["c", "a"]
    shares.charge("c", 1)
    assert shares.next == "a"


def test_nobody_sheds_what_they_had() -> None:
    """Who leaves and comes back between turns gets no more than who stays."""
    shares: Shares[str] = Shares()
    had: Counter[str] = Counter()
    shares.join("stays")
    for _ in range(1000):
        shares.join("leaves")
        turn = shares.next
        amount = 100 if turn == "leaves" else 3
        shares.charge(turn, amount)
        had[turn] += amount
        if turn == "leaves":
            shares.leave("leaves")
    assert abs(had["stays"] - had["leaves"]) <= 103


def test_nobody_saves_up() -> None:
    """Who was away is not owed what others had meanwhile, and is forgotten."""
    shares: Shares[str] = Shares()
    shares.join("old")
    shares.join("busy")
    shares.charge("old", 1)
    shares.leave("old")
    for _ in range(100):
        shares.charge("busy", 10)
    shares.join("new")
    shares.join("old")
    shares.leave("new")
    assert shares._had["old"] == shares._had["busy"] == 1000
    assert shares._away == {}


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 50), st.booleans()), max_size=200),
    st.integers(1, 50),
)
def test_two_that_always_wait_get_the_same(others: list[tuple[int, int, bool]], cost: int) -> None:
    """Whatever others do, two that always wait stay within one turn of each other."""
    shares: Shares[str] = Shares()
    had: Counter[str] = Counter()
    shares.join("a")
    shares.join("b")
    for number, amount, leaves in others:
        shares.join(str(number))
        turn = shares.next
        spent = cost if turn in "ab" else amount
        shares.charge(turn, spent)
        had[turn] += spent
        if leaves:
            shares.leave(str(number))
        assert abs(had["a"] - had["b"]) <= cost
