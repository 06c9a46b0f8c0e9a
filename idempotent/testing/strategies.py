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
    steps = [f"{caller}" for caller in range(1, callers + 1)]
    faults: list[tuple[tuple[str, ...], int]] = [
        (("lease",), expiries),
        (tuple(f"{step}:{fault}" for step in steps for fault in ("lost", "refused")), lost_replies),
        (tuple(f"{step}:{fault}" for step in steps for fault in ("dies", "dies-after")), crashes),
    ]
    left = {words: most for words, most in faults if most}

    def within(words: list[str]) -> str:
        """The words, without the faults that are too many."""
        budgets = dict(left)
        kept = []
        for word in words:
            kind = next((kind for kind in budgets if word in kind), None)
            if kind is not None:
                if not budgets[kind]:
                    continue
                budgets[kind] -= 1
            kept.append(word)
        return " ".join(kept)

    # What comes first is what a failure shrinks to: steps of the first callers, without faults.
    word = st.one_of(st.sampled_from(steps), *(st.sampled_from(words) for words in left))
    script = st.lists(word, max_size=moves).map(within)
    return st.builds(_storm, st.integers(2, callers), script)


def _storm(callers: int, moves: str) -> Storm:
    there = [move for move in moves.split() if move == "lease" or int(move.partition(":")[0]) <= callers]
    return Storm(callers, " ".join(there))
