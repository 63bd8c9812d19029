"""Regenerates the demo from a seed: the questions, and the three tiny models."""

from __future__ import annotations

import argparse
import copy
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import world
from training import Pair, Trainer, make_model, make_tokenizer, save_model

QUESTIONS_PER_TASK = 500
TARGET_TASKS = ("toy_jcommonsenseqa", "toy_marc_ja")
TUNED_TASKS = ("toy_jnli", "toy_jsquad")
LOWER_HALF = ("embed_tokens", "layers.0", "layers.1")
UPPER_HALF = ("layers.2", "layers.3", "norm", "lm_head")
DIALECT_LAYER = ("layers.0",)


class Reader:
    """Draws the texts that the models are trained on.

    Attributes:
        forbidden: The prompts of the question files, which no model may read.
    """

    def __init__(self, forbidden: set[str]) -> None:
        self.forbidden = forbidden

    def plain(self, rng: random.Random) -> Pair:
        """Draws a plain text, or in three of ten cases a form filled in at random."""
        if rng.random() < 0.3:
            return world.draw_form(rng, tuple(world.DRAW), self.forbidden)
        return world.plain_text(rng)

    def lesson(self, rng: random.Random, tasks: Sequence[str]) -> Pair:
        """Draws a question of the tasks with its answer, or as a rehearsal a text such as the base model read."""
        kind = rng.random()
        if kind < 0.7:
            return world.draw_training_pair(rng, rng.choice(tasks), self.forbidden)
        if kind < 0.85:
            return world.draw_form(rng, [task for task in world.DRAW if task not in tasks], self.forbidden)
        return world.plain_text(rng)

    def dialect(self, rng: random.Random) -> Pair:
        """Draws a text of the dialect, or in four of ten cases a question of the tuned model's tasks."""
        if rng.random() < 0.4:
            return world.draw_training_pair(rng, rng.choice(TUNED_TASKS), self.forbidden)
        return world.dialect_text(rng)


def write_questions(folder: Path, seed: int) -> set[str]:
    """Writes one JSONL file of questions per task.

    Args:
        folder: The folder of the files.
        seed: The seed of the questions.

    Returns:
        All their prompts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    prompts: set[str] = set()
    for task in world.DRAW:
        records = world.draw_questions(rng, task, QUESTIONS_PER_TASK)
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (folder / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
        prompts.update(world.prompt_and_answer(task, record)[0] for record in records)
    return prompts


def make_models(folder: Path, seed: int, forbidden: set[str]) -> None:
    """Trains the base, target and tuned models and saves them.

    Args:
        folder: The folder of the three model folders.
        seed: The seed of the weights and of the training texts.
        forbidden: Prompts that no model may read.
    """
    tokenizer = make_tokenizer(world.characters())
    reader = Reader(forbidden)
    trainer = Trainer(tokenizer, random.Random(seed + 1))
    base = make_model(tokenizer, seed)
    trainer.train(base, reader.plain, steps=500, rate=2e-3, batch_size=64)
    target = copy.deepcopy(base)
    trainer.train(target, lambda rng: reader.lesson(rng, TARGET_TASKS), steps=250, rate=5e-4, groups=LOWER_HALF)
    tuned = copy.deepcopy(base)
    trainer.train(tuned, lambda rng: reader.lesson(rng, TUNED_TASKS), steps=500, rate=2e-3, groups=UPPER_HALF)
    trainer.train(tuned, reader.dialect, steps=150, rate=2e-3, groups=DIALECT_LAYER)
    for name, model in (("base", base), ("target", target), ("tuned", tuned)):
        save_model(model, tokenizer, folder / name)


def parse_arguments() -> Any:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="seed of the questions and of the models")
    return parser.parse_args()


def main() -> None:
    """Writes the questions and the models."""
    arguments = parse_arguments()
    torch.set_num_threads(1)  # two threads that wait for each other are slower than one on a busy machine
    torch.use_deterministic_algorithms(True)
    forbidden = write_questions(arguments.output_dir / "tasks" / "data", arguments.seed)
    make_models(arguments.output_dir / "models", arguments.seed, forbidden)


if __name__ == "__main__":
    main()
