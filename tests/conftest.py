"""Tiny random models, made once per test session."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# No test may reach for the Hub; the one that tests it starts a server of its own.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import pytest
import torch
import yaml
from judge_server import KEY, JudgeServer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from tvmerge.checkpoint import Checkpoint
from tvmerge.hub import resolve
from tvmerge.writer import write_weights

# A shell that starts the tests in the background has them ignore Ctrl-C, and with them all processes that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
TASKS = Path(__file__).parent / "tasks"
#: Files whose few tests take minutes, which begin first.
LONGEST = ("test_readme", "test_workers", "test_kills")
CHARACTERS = "abcdefghij 東京タワー。\n"


@dataclass(frozen=True)
class Trio:
    """Folders of three models of one family."""

    target: Path
    base: Path
    tuned: Path

    def flags(self) -> list[str]:
        return [
            *("--target_model", str(self.target)),
            *("--base_model", str(self.base)),
            *("--tuned_model", str(self.tuned)),
        ]


def last_target(command: list[str]) -> list[str]:
    """A command in which the last --target_model stands alone, which may be given once."""
    places = [n for n, word in enumerate(command) if word == "--target_model"]
    for n in reversed(places[:-1]):
        del command[n : n + 2]
    return command


def saved_lines(output: Path, split: str = "search") -> list[dict[str, Any]]:
    """The lines of scores.jsonl on the model that is saved, by its recipe."""
    number = yaml.safe_load((output / "best" / "recipe.yaml").read_text())["score"]["trial"]
    wanted = {"model": "recommended" if number is None else "merge", "trial": number, "split": split}
    lines = [json.loads(line) for line in (output / "scores.jsonl").read_text().splitlines()]
    return [line for line in lines if wanted.items() <= line.items()]


def save_tokenizer(folder: Path, characters: str = CHARACTERS) -> None:
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)


def save_mistral(folder: Path, *, seed: int, drift_from: Path | None = None, **changes: object) -> Path:
    """A random Mistral; with `drift_from`, that model plus small noise, as if tuned from it."""
    settings: Mapping[str, object] = {
        "vocab_size": len(CHARACTERS) + 3,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        **changes,
    }
    torch.manual_seed(seed)
    model = MistralForCausalLM(MistralConfig(**settings))
    if drift_from is not None:
        start = MistralForCausalLM.from_pretrained(drift_from, dtype=torch.float32)
        with torch.no_grad():
            for ours, theirs in zip(model.parameters(), start.parameters(), strict=True):
                ours.mul_(0.5).add_(theirs)
    model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def reshard(folder: Path, *, shard_bytes: int) -> None:
    """Split a model's one file of weights into shards."""
    whole, shards = folder / "model.safetensors", folder / "shards"
    shards.mkdir()
    write_weights(Checkpoint(resolve(str(folder))), shards, shard_bytes=shard_bytes)
    whole.unlink()
    for path in shards.iterdir():
        path.rename(folder / path.name)
    shards.rmdir()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the long tests too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(pytest.mark.skip(reason="only with --full"))
    # At the end one of two processes would run them for minutes while the other has nothing left.
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    """A judge on this machine, and keys for it."""
    monkeypatch.setenv("NO_PROXY", "*")
    for provider in ("OPENAI", "ANTHROPIC"):
        monkeypatch.setenv(f"{provider}_API_KEY", KEY)
    judge = JudgeServer()
    judge.start()
    yield judge
    judge.stop()


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    root = tmp_path_factory.mktemp("trio")
    base = save_mistral(root / "base", seed=0)
    return Trio(
        base=base,
        target=save_mistral(root / "target", seed=1, drift_from=base),
        tuned=save_mistral(root / "tuned", seed=2, drift_from=base),
    )
