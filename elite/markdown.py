"""Tables in Markdown, and shares in their cells."""

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A line of cells for each row, below the names of the columns."""
    first, *others = (f"| {' | '.join(cells)} |" for cells in (head, *rows))
    return "\n".join([first, "|---" * len(head) + "|", *others])


def percent(share: float, low: float, high: float) -> str:
    """A share with its interval: '93.2 (90.7-95.1)'."""
    return f"{100 * share:.1f} ({100 * low:.1f}-{100 * high:.1f})"
