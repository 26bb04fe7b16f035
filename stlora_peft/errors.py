"""The one form of an error message in this package."""

from __future__ import annotations


def message(where: str, *, expected: str, got: str, fix: str) -> str:
    """Build an error text that names the place, what was expected, what came and how to mend it.

    Args:
        where: Place and problem, in one line without a full stop.
        expected: What would have been right.
        got: What came instead.
        fix: What the user can do about it.

    Returns:
        Four lines of text.

    Example:
        >>> print(message("city 'x'", expected="3 nodes", got="2 nodes", fix="check the file"))
        city 'x'.
          expected: 3 nodes
          got:      2 nodes
          to fix:   check the file
    """
    return f"{where}.\n  expected: {expected}\n  got:      {got}\n  to fix:   {fix}"
