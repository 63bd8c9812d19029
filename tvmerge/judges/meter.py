"""What judges cost: tokens and money of a run, and a limit that is not passed."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvmerge.errors import BudgetError, ConfigError, RunError
from tvmerge.judges import Completion, Prompt
from tvmerge.judges.remote import text_bytes

__all__ = ["KNOWN_PRICES", "LEDGER", "Meter", "Prices", "Reservation", "Usage", "known_prices"]

#: The ledger's name in a run's folder.
LEDGER = "judge_usage.jsonl"
#: Tokens that a chat's frame adds to a prompt of two messages; a few are usual.
FRAME_TOKENS = 64


MOST_USD = 1_000_000


@dataclass(frozen=True)
class Prices:
    """USD per million tokens."""

    input: float
    output: float

    def __post_init__(self) -> None:
        """Refuse what is no price.

        Raises:
            ConfigError: with the value.
        """
        for price in (self.input, self.output):
            if not 0 <= price <= MOST_USD:
                raise ConfigError(
                    f"a judge's price is {price}, it must be from 0 to {MOST_USD:,} USD per million tokens"
                )

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """In USD."""
        return (tokens_in * self.input + tokens_out * self.output) / 1e6


#: List prices of the providers' own addresses, read in November 2026. They change: prices given by flag win. No model
#: of another name is guessed from these: gpt-5-pro costs twelve times as much as gpt-5.
KNOWN_PRICES: Mapping[str, Prices] = {
    "claude-3-5-haiku": Prices(0.8, 4),
    "claude-3-5-sonnet": Prices(3, 15),
    "claude-3-haiku": Prices(0.25, 1.25),
    "claude-haiku-4-5": Prices(1, 5),
    "claude-opus-4": Prices(15, 75),
    "claude-opus-4-0": Prices(15, 75),
    "claude-opus-4-1": Prices(15, 75),
    "claude-opus-4-5": Prices(5, 25),
    "claude-sonnet-4": Prices(3, 15),
    "claude-sonnet-4-0": Prices(3, 15),
    "claude-sonnet-4-5": Prices(3, 15),
    "gpt-3.5-turbo": Prices(0.5, 1.5),
    "gpt-3.5-turbo-0125": Prices(0.5, 1.5),
    "gpt-4": Prices(30, 60),
    "gpt-4-0613": Prices(30, 60),
    "gpt-4-turbo": Prices(10, 30),
    "gpt-4.1": Prices(2, 8),
    "gpt-4.1-mini": Prices(0.4, 1.6),
    "gpt-4.1-nano": Prices(0.1, 0.4),
    "gpt-4o": Prices(2.5, 10),
    "gpt-4o-2024-05-13": Prices(5, 15),  # the first one kept its price
    "gpt-4o-mini": Prices(0.15, 0.6),
    "gpt-5": Prices(1.25, 10),
    "gpt-5-mini": Prices(0.25, 2),
    "gpt-5-nano": Prices(0.05, 0.4),
}


def known_prices(model: str) -> Prices | None:
    """The list price of a model at its provider's own address; None: not known.

    Args:
        model: its name; a date or `-latest` at its end does not matter.
    """
    undated = re.sub(r"-(\d{4}-\d\d-\d\d|\d{8}|latest)$", "", model)
    return KNOWN_PRICES.get(model) or KNOWN_PRICES.get(undated)


@dataclass(frozen=True)
class Usage:
    """What was taken of a judge."""

    requests: int = 0  # that were answered, and so are paid for
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = 0.0  # USD; None: a price is not known

    def __add__(self, other: Usage) -> Usage:
        """Both together; an unknown cost stays unknown."""
        cost = None if self.cost is None or other.cost is None else self.cost + other.cost
        return Usage(
            self.requests + other.requests, self.tokens_in + other.tokens_in, self.tokens_out + other.tokens_out, cost
        )


@dataclass(frozen=True, eq=False)
class Reservation:
    """Money set aside for a request that is under way."""

    name: str  # of the model whose answer is judged
    cost: float


class Meter:
    """Counts tokens and money, keeps a ledger, and sets money aside before it is spent. For several threads.

    A request whose reply was lost is not counted: what a provider takes for it is not known here.

    Args:
        path: the ledger, `judge_usage.jsonl` in the run's folder, with what earlier processes spent; None: no file.
        judge: the judge's name, for the ledger.
        prices: of the judge; None: not known, or nothing to pay.
        max_cost: USD that the run may spend, together with earlier processes; None: no limit.

    Raises:
        ConfigError: a limit without prices, or one that is no amount; the ledger cannot be read.
    """

    def __init__(
        self, *, path: Path | None, judge: str, prices: Prices | None = None, max_cost: float | None = None
    ) -> None:
        if max_cost is not None and not (math.isfinite(max_cost) and max_cost >= 0):
            raise ConfigError(f"max_cost is {max_cost}, it must be 0 or more USD")
        if max_cost is not None and prices is None:
            raise ConfigError(f"max_cost is {max_cost} USD and the prices of {judge} are not known, give them")
        self.name = ""  # of the model that is judged now
        self._path, self._judge, self._prices, self._max_cost = path, judge, prices, max_cost
        self._lock = threading.Lock()
        self._used: dict[str, Usage] = {}
        self._under_way: set[Reservation] = set()
        self._torn = False
        self._unwritten = ""  # while there is no folder
        if path is not None:
            for name, usage in self._ledger(path):
                self._used[name] = self._used.get(name, Usage()) + usage

    @property
    def total(self) -> Usage:
        """Of the run, in all its processes."""
        with self._lock:
            return self._total()

    def of(self, name: str) -> Usage:
        """Of one model's answers, in all processes of the run."""
        with self._lock:
            return self._used.get(name, Usage())

    def begin(self, name: str) -> None:
        """Count what is submitted from now on for this model, for instance `trial-0007`."""
        self.name = name

    def reserve(self, prompt: Prompt, max_tokens: int, *, name: str) -> Reservation | None:
        """Set aside what a request can cost at most.

        Args:
            prompt: what will be asked.
            max_tokens: of the completion.
            name: of the model whose answer is judged.

        Returns:
            None: not enough is left before others that are under way are settled. Ask again then.

        Raises:
            BudgetError: not enough is left, and nothing is under way.
        """
        with self._lock:
            worst = 0.0
            if self._prices is not None:
                read = text_bytes(prompt.system) + text_bytes(prompt.user) + FRAME_TOKENS
                worst = self._prices.cost(read, max_tokens)
            if self._max_cost is not None:
                spent, aside = self._total().cost or 0.0, sum(each.cost for each in self._under_way)
                if spent + aside + worst > self._max_cost:
                    if self._under_way:
                        return None
                    raise BudgetError(
                        f"the judge has cost {spent:.6f} USD, the next request could cost {worst:.6f} more, and the "
                        f"limit is {self._max_cost:g} (--max_judge_cost): raise it, and the same command goes on"
                    )
            reservation = Reservation(name=name, cost=worst)
            self._under_way.add(reservation)
            return reservation

    def settle(self, reservation: Reservation, completion: Completion) -> None:
        """Count a completion in the place of what was set aside for it.

        Raises:
            RunError: the ledger cannot be written.
        """
        tokens_in, tokens_out = completion.tokens_in, completion.tokens_out
        cost = self._prices.cost(tokens_in, tokens_out) if self._prices is not None else None
        with self._lock:
            self._under_way.discard(reservation)
            used = self._used.get(reservation.name, Usage())
            self._used[reservation.name] = used + Usage(1, tokens_in, tokens_out, cost)
            self._write(
                {
                    "model": reservation.name,
                    "judge": self._judge,
                    "tokens_in": tokens_in,
                    "tokens_out": tokens_out,
                    "estimated": completion.estimated,
                    "cost": cost,
                }
            )

    def release(self, reservation: Reservation) -> None:
        """Take back what was set aside for a request that failed."""
        with self._lock:
            self._under_way.discard(reservation)

    def _total(self) -> Usage:
        return sum(self._used.values(), Usage())

    def _ledger(self, path: Path) -> Iterator[tuple[str, Usage]]:
        try:
            text = path.read_bytes().decode("utf-8", "replace") if path.exists() else ""
        except OSError as error:
            raise ConfigError(f"the ledger {path} cannot be read: {error.strerror}") from error
        self._torn = bool(text) and not text.endswith("\n")
        for line in text.split("\n"):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):  # what a power cut leaves
                continue
            if (usage := self._usage(entry)) is not None:
                yield str(entry["model"]), usage

    def _usage(self, entry: Any) -> Usage | None:
        """A line of the ledger; None: it is none."""
        if not isinstance(entry, dict) or not entry.keys() >= {"model", "tokens_in", "tokens_out"}:
            return None
        tokens_in, tokens_out, cost = entry["tokens_in"], entry["tokens_out"], entry.get("cost")
        if not (isinstance(tokens_in, int) and isinstance(tokens_out, int) and min(tokens_in, tokens_out) >= 0):
            return None
        # Without a cost it was written when prices were not known.
        if not isinstance(cost, int | float) or not 0 <= cost < math.inf:
            cost = self._prices.cost(tokens_in, tokens_out) if self._prices is not None else None
        return Usage(1, tokens_in, tokens_out, cost)

    def _write(self, entry: Mapping[str, Any]) -> None:
        """Add a line in one write, which a kill does not tear."""
        if self._path is None:
            return
        self._unwritten += json.dumps(entry, ensure_ascii=False) + "\n"
        if not self._path.parent.is_dir():
            return  # a run makes its folder when all else is checked, the judge too
        line = (("\n" if self._torn else "") + self._unwritten).encode("utf-8", "replace")
        self._torn, self._unwritten = True, ""
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                if os.write(descriptor, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(descriptor)
        except OSError as error:
            raise RunError(
                f"the ledger {self._path} cannot be written: {error.strerror}; free some space, and the same command "
                "goes on"
            ) from error
        self._torn = False
