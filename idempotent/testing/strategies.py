"""Hypothesis strategies for storms of duplicate calls."""

from hypothesis import strategies as st

from idempotent.testing.storms import Storm

__all__ = ["duplicates"]


def duplicates(
    *, callers: int = 3, moves: int = 20, crashes: int = 1, expiries: int = 1, lost_replies: int = 1
) -> st.SearchStrategy[Storm]:
    """Storms of duplicate calls, for tests of a decorated function of your own; they shrink to the shortest.

        @given(storm=duplicates(), amount=st.integers(1, 999))
        def test_an_order_is_charged_once(storm, amount):
            storm.run(charge, (new_key(), amount), effects=lambda: len(ledger))

    `st.from_type(Storm)` gives them with the defaults below.

    Args:
        callers: how many duplicates there are at the most; at least two.
        moves: how many moves the storm decides at the most; afterwards the callers go on one after another.
        crashes: how many of them may die.
        expiries: how many times leases may end while their holders live.
        lost_replies: how many commands to the store may be lost, before or after they were applied.

    Raises ValueError for fewer than two callers, and for a negative number.
    """
    if callers < 2 or min(moves, crashes, expiries, lost_replies) < 0:
        raise ValueError("there are at least two callers, and no fewer than no moves and no faults")

    def of(number: int) -> st.SearchStrategy[Storm]:
        return st.builds(Storm, callers=st.just(number), moves=_moves(number, moves, crashes, expiries, lost_replies))

    return st.integers(2, callers).flatmap(of)


def _moves(callers: int, most: int, crashes: int, expiries: int, lost_replies: int) -> st.SearchStrategy[str]:
    steps = [f"{caller}" for caller in range(1, callers + 1)]
    faults: list[tuple[list[str], int]] = [
        (["lease"], expiries),
        ([f"{step}:{fault}" for step in steps for fault in ("lost", "refused")], lost_replies),
        ([f"{step}:{fault}" for step in steps for fault in ("dies", "dies-after")], crashes),
    ]

    def within(words: list[str]) -> str:
        """The words, without the faults that are too many."""
        left = [limit for _, limit in faults]
        kept = []
        for word in words:
            kind = next((kind for kind, (of_kind, _) in enumerate(faults) if word in of_kind), None)
            if kind is not None:
                left[kind] -= 1
            if kind is None or left[kind] >= 0:
                kept.append(word)
        return " ".join(kept)

    # What comes first is what a failure shrinks to: steps of the first callers, without faults.
    word = st.one_of(st.sampled_from(steps), *(st.sampled_from(words) for words, limit in faults if limit))
    return st.lists(word, max_size=most).map(within)
