"""Progress of a run: bars for trials and questions on a terminal, a line for each trial elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

__all__ = ["RunProgress"]


class RunProgress:
    """Shows trials with the best score so far and the time left, and the questions of the trial under way.

    Args:
        n_trials: trials in all.
        n_finished: trials that were finished before this process began.
    """

    def __init__(self, *, n_trials: int, n_finished: int) -> None:
        self._terminal = sys.stderr.isatty()
        # Some terminals say that they have no columns and no rows, and tqdm would show nothing there.
        known = self._terminal and os.get_terminal_size(sys.stderr.fileno()).columns > 0
        self._width: dict[str, Any] = {"dynamic_ncols": True} if known else {"ncols": 110, "nrows": 24}
        self._n_trials = n_trials
        self._n_before = n_finished
        self._n_finished = n_finished
        self._started = time.monotonic()
        self._trials = self._bar(desc="trials", total=n_trials, initial=n_finished, unit="trial")

    def _bar(self, **options: Any) -> tqdm[Any]:
        return tqdm(disable=not self._terminal, file=sys.stderr, **self._width, **options)

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        tqdm.write(text, file=sys.stderr)

    def count_questions(self, total: int, what: str) -> tuple[Callable[[int], None], Callable[[], None]]:
        """A bar for the questions of one model.

        Returns:
            Two functions: call the first with the number of questions just done, the second at the end.
        """
        bar = self._bar(desc=what, total=total, unit="question", leave=False, position=1)

        def advance(n: int) -> None:
            bar.update(n)

        return advance, bar.close

    def finish_trial(
        self, *, n_finished: int, score: float | None, best: tuple[float, int] | None, remarks: Sequence[str] = ()
    ) -> None:
        """Move the trials' bar on.

        Args:
            n_finished: trials that are finished by now, those of other workers too.
            score: of the trial; None if it failed.
            best: score and number of the best trial so far.
            remarks: what else there is to say of it.
        """
        step, self._n_finished = n_finished - self._n_finished, n_finished
        shown = "none yet" if best is None else f"{best[0]:.3f} (trial {best[1]})"
        more = "".join(f", {remark}" for remark in remarks)
        self._trials.set_postfix_str(f"best {shown}{more}", refresh=False)
        self._trials.update(step)
        if not self._terminal:
            per_trial = (time.monotonic() - self._started) / max(self._n_finished - self._n_before, 1)
            left = per_trial * max(self._n_trials - self._n_finished, 0)
            outcome = "failed" if score is None else f"score {score:.3f}"
            self.note(f"trial {self._n_finished}/{self._n_trials}: {outcome}, best {shown}{more}, {left:.0f} s left")

    def close(self) -> None:
        """End the bars."""
        self._trials.close()
