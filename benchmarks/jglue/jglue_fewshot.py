"""Draws few-shot examples as equally as can be from every label, so that no label is suggested by being there more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.samplers import ContextSampler

__all__ = ["StratifiedSampler"]

Doc = Mapping[str, Any]


class StratifiedSampler(ContextSampler):  # type: ignore[misc]  # lm_eval ships no types
    """Draws from every label n // labels examples; which labels give one more, and the order, are drawn too."""

    _groups: list[list[Doc]] | None = None

    def sample(
        self, n: int, eval_doc: Doc | None = None, df: Sequence[Doc] | None = None, **kwargs: Any
    ) -> Sequence[Doc]:
        """Draw examples.

        Args:
            n: how many.
            eval_doc: a question that must not be among them, if they come from the same split.
            df: what to draw from, in place of what there was.
            **kwargs: nothing of use.

        Returns:
            The examples, shuffled. A label that has too few is made up for by the others.

        Raises:
            ValueError: there are fewer than n in all.
        """
        if df:
            self.replace_df(df)
        groups = self._by_label()
        if eval_doc is not None:
            groups = [[doc for doc in group if doc != eval_doc] for group in groups]
        if sum(map(len, groups)) < n:
            raise ValueError(f"{n} few-shot examples are wanted of {sum(map(len, groups))}")
        counts = self._counts(n, [len(group) for group in groups])
        drawn = [doc for group, count in zip(groups, counts, strict=True) for doc in self.rnd.sample(group, count)]
        self.rnd.shuffle(drawn)
        return drawn

    def replace_df(self, df: Sequence[Doc]) -> StratifiedSampler:
        """Draw from other examples from now on."""
        self._groups = None
        super().replace_df(df)
        return self

    def _by_label(self) -> list[list[Doc]]:
        if self._groups is None:
            groups: dict[Any, list[Doc]] = {}
            for doc in self.fewshot_docs():
                groups.setdefault(doc["label"], []).append(doc)
            self._groups = [groups[label] for label in sorted(groups)]
        return self._groups

    def _counts(self, n: int, sizes: Sequence[int]) -> list[int]:
        """How many of each group: one of each in turn, in drawn order, until there are n."""
        counts = [0] * len(sizes)
        order = list(range(len(sizes)))
        self.rnd.shuffle(order)
        while n > 0:
            for i in order:
                if n > 0 and counts[i] < sizes[i]:
                    counts[i] += 1
                    n -= 1
        return counts
