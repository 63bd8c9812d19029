"""What answers in batches save over answers one at a time, as FastChat's gen_model_answer makes them.

`python perf/generation.py` prints a table in Markdown. All times of a row are taken in turns within one run.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jglue import ROUNDS, Timer, live, seconds, table

from tvmerge.models.chat import ChatModel, ChatRequest
from tvmerge.models.chat_template import open_template
from tvmerge.models.transformers import TransformersModel

sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))  # a folder of scripts, too

import world

__all__ = ["Measured", "compare", "continuations", "questions"]

MODELS = Path(__file__).parents[1] / "demo" / "models"


@dataclass(frozen=True)
class Measured:
    """Medians of seconds for all prompts, and what the answers were."""

    alone: float  # model.generate, a prompt at a time
    single: float  # ours, a prompt at a time
    batched: float  # ours
    forward: float  # of `batched`, inside of the model
    tokens: float  # of an answer, mean
    differ: int  # answers of `batched` that are not those of `alone`
    ratio: float  # `alone` over `batched`, the median of the rounds' own


def questions(n: int) -> list[str]:
    """Prompts of the four toy tasks, a quarter each."""
    draw = random.Random(0)
    return [
        world.prompt_and_answer(task, record)[0]
        for task in world.DRAW
        for record in world.draw_questions(draw, task, n // len(world.DRAW))
    ]


def continuations(n: int) -> list[str]:
    """Beginnings of plain texts."""
    draw = random.Random(1)
    return [world.draw_event(draw).text()[: draw.randint(3, 24)] for _ in range(n)]


def one_at_a_time(model: TransformersModel, prompts: Sequence[str], *, max_new_tokens: int) -> list[str]:
    """Greedy answers as FastChat's `get_model_answers` makes them."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([model.tokenizer.encode(prompt)])
        with torch.inference_mode():
            output = model.model.generate(ids, do_sample=False, max_new_tokens=max_new_tokens)
        text = model.tokenizer.decode(output[0][ids.shape[1] :], skip_special_tokens=True)
        answers.append(text.strip())
    return answers


def compare(
    model: TransformersModel, prompts: Sequence[str], *, max_new_tokens: int, rounds: int, batch_size: int = 32
) -> Measured:
    """Answer prompts in three ways.

    Args:
        model: live.
        prompts: texts, put as they are.
        max_new_tokens: of an answer.
        rounds: medians of so many are returned.
        batch_size: of the batched way.
    """
    template = open_template("none", model.tokenizer)
    chat, single = (
        ChatModel(model, template=template, max_new_tokens=max_new_tokens, batch_size=size) for size in (batch_size, 1)
    )
    requests = [ChatRequest([{"role": "user", "content": prompt}], 0.0, 0) for prompt in prompts]
    timer = Timer(model.model)
    expected = one_at_a_time(model, prompts, max_new_tokens=max_new_tokens)
    answers = chat.answer(requests)
    ways: list[tuple[float, float, float, float]] = []
    for _ in range(rounds):
        alone = seconds(lambda: one_at_a_time(model, prompts, max_new_tokens=max_new_tokens))
        one = seconds(lambda: single.answer(requests))
        ways.append((alone, one, *timer.of(lambda: chat.answer(requests))))
    alone, one, batched, forward = (statistics.median(each) for each in zip(*ways, strict=True))
    return Measured(
        alone=alone,
        single=one,
        batched=batched,
        forward=forward,
        tokens=statistics.mean(answer.n_tokens for answer in answers),
        differ=sum(answer.text != want for answer, want in zip(answers, expected, strict=True)),
        ratio=statistics.median(way[0] / way[2] for way in ways),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n_prompts", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, help="of torch; as many as it likes if not given")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    for what, prompts, longest in (
        ("questions", questions(options.n_prompts), 16),
        ("plain texts", continuations(options.n_prompts), 64),
    ):
        for dtype in ("float32", "bfloat16"):
            model = live(MODELS / "tuned", dtype)
            found = compare(model, prompts, max_new_tokens=longest, rounds=options.rounds)
            per_second = [len(prompts) / each for each in (found.alone, found.single, found.batched)]
            rows.append(
                [
                    f"{what}, {found.tokens:.1f} tokens, {dtype}",
                    *(f"{each:.0f}" for each in per_second),
                    f"{found.ratio:.1f}",
                    f"{found.forward / found.batched:.0%}",
                    f"{found.differ} of {len(prompts)}",
                ]
            )
    heads = ["answers per second", "model.generate", "ours, 1", "ours, 32", "ratio", "in forward passes", "differ"]
    print(table(heads, rows))


if __name__ == "__main__":
    main()
