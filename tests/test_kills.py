"""Searches that are killed at random moments end as if nobody had killed them (kill_harness.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Trio
from judge_server import JudgeServer
from kill_harness import jglue, mt_bench

KILLS = [5, pytest.param(100, marks=pytest.mark.full)]


@pytest.mark.parametrize("kills", KILLS)
def test_a_killed_search_ends_like_one_that_is_not(trio: Trio, tmp_path: Path, kills: int) -> None:
    found = jglue(trio, tmp_path).run(kills=kills, seed=kills)
    assert found.kills.total() == kills


@pytest.mark.parametrize("kills", KILLS)
def test_a_killed_search_pays_for_no_judgment_again(
    trio: Trio, server: JudgeServer, tmp_path: Path, kills: int
) -> None:
    found = mt_bench(trio, tmp_path, server).run(kills=kills, seed=kills)
    assert found.kills.total() == kills
    assert found.judgments > 100
