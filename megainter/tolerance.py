"""How many bad ones among many are let pass: one rule for photos, lines, entries, and images that a store has no regions of."""


def tolerated(share: float, total: int) -> int:
    """How many of ``total`` may be bad: ``share`` of them in whole ones, and one of several in any case unless ``share`` is 0.

    One bad photo is no sign of a bad collection, however small; and what was let pass once (by `extract`) is in the way nowhere later.
    """
    return max(int(share * total + 1e-9), 1 if share > 0 and total > 1 else 0)
