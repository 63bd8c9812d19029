"""Regenerates the demo from a seed: the questions, and the four tiny models."""

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
from transformers import MistralForCausalLM

QUESTIONS_PER_TASK = 500
TARGET_TASKS = ("toy_jcommonsenseqa", "toy_marc_ja")
TUNED_TASKS = ("toy_jnli", "toy_jsquad")
LOWER_HALF = ("embed_tokens", "layers.0", "layers.1")
UPPER_HALF = ("layers.2", "layers.3", "norm", "lm_head")
DIALECT_LAYER = ("layers.0",)
EXPERT_TASKS = ("toy_jcommonsenseqa", "toy_marc_ja", "toy_jsquad")
MLPS = tuple(f"layers.{layer}.mlp" for layer in range(4))
OUTSIDE_OF_MLPS = ("embed_tokens", *(f"layers.{layer}.self_attn" for layer in range(4)))


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

    def dialect_fact(self, rng: random.Random) -> Pair:
        """Draws what the dialect says of a thing, or in four of ten cases a review to judge, as elsewhere."""
        if rng.random() < 0.4:
            return world.draw_training_pair(rng, "toy_marc_ja", self.forbidden)
        return "", world.fact_sentences(rng, world.DIALECT_THINGS, "や")


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
    """Trains the base, target and tuned models and the second expert, and saves them.

    Args:
        folder: The folder of the four model folders.
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
    expert = make_expert(target, Trainer(tokenizer, random.Random(f"{seed}/expert")), reader)
    for name, model in (("base", base), ("target", target), ("tuned", tuned), ("expert", expert)):
        save_model(model, tokenizer, folder / name)


def make_expert(target: MistralForCausalLM, trainer: Trainer, reader: Reader) -> MistralForCausalLM:
    """Trains the second expert of a mixture: MLPs that know more than the target's, around attention that knows less.

    Args:
        target: The model that it goes on from; it is not changed.
        trainer: One with a generator of its own, so that the other models do not depend on this one.
        reader: Draws the texts.

    Returns:
        The expert.
    """
    expert = copy.deepcopy(target)
    trainer.train(expert, lambda rng: reader.lesson(rng, EXPERT_TASKS), steps=300, rate=1e-3, groups=MLPS)
    trainer.train(expert, reader.dialect_fact, steps=150, rate=1e-3, groups=OUTSIDE_OF_MLPS)
    return expert


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
