"""The cohort funnel: how many samples each rule of a source keeps, and which defects it handles."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flame_moe.errors import DataError, StoreError


class Step(NamedTuple):
    """One rule of a cohort: what it says and how many samples stand before and after it."""

    text: str
    before: int
    after: int

    @property
    def dropped(self) -> int:
        return self.before - self.after


@dataclass
class Funnel:
    """An ordered account of how raw records became samples.

    Attributes:
        steps: the start and the rules, in the order in which they were applied.
        counts: defects that were handled without dropping a sample, by what was done.

    Example:
        >>> funnel = Funnel()
        >>> funnel.start(10, "records found")
        >>> funnel.rule("has at least one measurement", 8)
        >>> funnel.count("impossible temperature set to missing", 3)
        >>> funnel.steps[-1].dropped, funnel.remaining
        (2, 8)
    """

    steps: list[Step] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def start(self, n: int, text: str = "records found") -> None:
        """Say how many records there are before any rule.

        Raises:
            DataError: if the funnel has already started or `n` is negative.
        """
        if self.steps:
            raise DataError("the cohort funnel has already started", where=text, mend="Call start once, first.")
        if n < 0:
            raise DataError(f"a funnel cannot start with {n} records", where=text)
        self.steps.append(Step(text, n, n))

    def rule(self, text: str, n_after: int) -> None:
        """Record a rule that keeps `n_after` of the samples that stand so far.

        Raises:
            DataError: if the funnel has not started, or the rule would keep more than there are.
        """
        if not self.steps:
            raise DataError("a rule came before the start of the cohort funnel", where=text, mend="Call start first.")
        if not 0 <= n_after <= self.remaining:
            raise DataError(f"a rule cannot keep {n_after} of {self.remaining} samples", where=text)
        self.steps.append(Step(text, self.remaining, n_after))

    def count(self, text: str, n: int = 1) -> None:
        """Add `n` to a defect that was handled but dropped no sample."""
        if n < 0:
            raise DataError(f"a defect cannot be counted {n} times", where=text)
        self.counts[text] = self.counts.get(text, 0) + n

    @property
    def remaining(self) -> int:
        """Samples that stand after the last rule; 0 before the start."""
        return self.steps[-1].after if self.steps else 0

    def plain(self) -> dict[str, Any]:
        """The funnel as JSON-ready data; `parse` reads it back."""
        steps = [{"text": s.text, "before": s.before, "after": s.after, "dropped": s.dropped} for s in self.steps]
        return {"steps": steps, "counts": dict(self.counts)}

    @classmethod
    def parse(cls, data: Any) -> Funnel:
        """Read back what `plain` wrote.

        Raises:
            StoreError: if the data is not a funnel.
        """
        try:
            steps = [Step(str(s["text"]), int(s["before"]), int(s["after"])) for s in data["steps"]]
            counts = {str(text): int(n) for text, n in data["counts"].items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise StoreError("the cohort funnel cannot be read", mend="Prepare the store again.") from None
        return cls(steps, counts)
