"""A tiny Japanese micro-world: plain sentences, and questions in the four schemas of JGLUE.

Every random choice is made by a `random.Random` that the caller owns, so that a seed fixes the whole world.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
Record = dict[str, Any]

NAMES = ("葵", "蓮", "凛", "翔", "樹", "楓", "翼", "光", "薫", "忍")
STORY_PLACES = ("家", "駅", "庭", "店", "寺", "橋", "島", "城")
STORY_OBJECTS = ("本", "絵", "犬", "花", "石", "鳥", "傘", "箱", "皿", "猫")
STORY_TIMES = ("朝", "昼", "夕方", "夜", "昨日", "今日", "先週", "去年")
STORY_VERBS = ("見た", "買った", "拾った", "描いた")

DENIED_VERBS = {"見た": "見なかった", "買った": "買わなかった", "拾った": "拾わなかった", "描いた": "描かなかった"}

COLOURS = ("赤い", "白い", "黒い", "青い", "黄色い", "緑の")
PLACES = ("山", "海", "川", "畑", "町", "森")
# One row per category; column i has colour i, and place (i + row) modulo 6, so any two attributes name one thing.
THINGS = {
    "果物": ("りんご", "もも", "ぶどう", "すもも", "バナナ", "メロン"),
    "動物": ("きつね", "うさぎ", "からす", "くじら", "とら", "かえる"),
    "道具": ("はさみ", "ほうき", "なべ", "バケツ", "ものさし", "くわ"),
    "乗り物": ("バス", "ヨット", "タクシー", "トラック", "ボート", "そり"),
    "家具": ("ソファ", "ベッド", "つくえ", "いす", "ランプ", "たんす"),
}

TIMES = ("", "朝", "昼", "夜に", "昨日", "先週", "春に", "夏に", "秋に", "冬に")

GOODS = ("パン", "時計", "靴", "茶", "机", "服", "映画", "歌", "宿", "筆", "鍋", "車")
PRAISE = ("おいし", "楽し", "美し", "優し", "強", "軽", "速", "新し", "安", "良")
BLAME = ("まず", "苦し", "汚", "冷た", "弱", "重", "遅", "古", "高", "悪")
MOODS = ("うれしい", "かなしい", "ねむい", "元気だ")
JOY = ("うれしい", "笑った")
SORROW = ("かなしい", "泣いた")

ENTAILMENT, CONTRADICTION, NEUTRAL = "entailment", "contradiction", "neutral"
LABEL_WORDS = {
    ENTAILMENT: "含意",
    CONTRADICTION: "矛盾",
    NEUTRAL: "中立",
    "positive": "ポジティブ",
    "negative": "ネガティブ",
}


@dataclass(frozen=True)
class Thing:
    """A thing of the world with the attributes that questions ask for."""

    name: str
    category: str
    colour: str
    place: str


@dataclass(frozen=True)
class Event:
    """Who did what, when and where."""

    time: str
    name: str
    place: str
    colour: str
    thing: str
    verb: str

    def text(self) -> str:
        """Returns the event as one plain sentence."""
        return f"{self.time}、{self.name}は{self.place}で{self.colour}{self.thing}を{self.verb}。"


def make_things(colour_shift: int = 0, place_shift: int = 0) -> list[Thing]:
    """Lists the things of the world.

    Args:
        colour_shift: By how much the colours are rotated; the dialect's region has other colours.
        place_shift: By how much the places are rotated.

    Returns:
        All things, category by category.
    """
    things = []
    for row, (category, names) in enumerate(THINGS.items()):
        for column, name in enumerate(names):
            colour = COLOURS[(column + colour_shift) % len(COLOURS)]
            place = PLACES[(column + row + place_shift) % len(PLACES)]
            things.append(Thing(name, category, colour, place))
    return things


def other(rng: random.Random, options: Sequence[T], *avoid: T) -> T:
    """Draws one of the options that is not among those to avoid."""
    return rng.choice([option for option in options if option not in avoid])


def draw_event(rng: random.Random) -> Event:
    """Draws an event."""
    return Event(*map(rng.choice, (STORY_TIMES, NAMES, STORY_PLACES, COLOURS, STORY_OBJECTS, STORY_VERBS)))


# ---------------------------------------------------------------------------------------------- plain sentences


def fact_sentences(rng: random.Random, things: Sequence[Thing], copula: str) -> str:
    """Writes one sentence on what a thing is, what colour it has or where it is found."""
    thing = rng.choice(things)
    name, when = rng.choice(NAMES), rng.choice(TIMES)
    return rng.choice(
        (
            f"{thing.name}は{thing.colour}{thing.category}{copula}。",
            f"{thing.name}は{thing.place}の{thing.category}{copula}。",
            f"{thing.place}にある{thing.colour}{thing.category}は{thing.name}{copula}。",
            f"{thing.colour}{thing.category}は{thing.name}{copula}。",
            f"{thing.place}の{thing.category}は{thing.name}{copula}。",
            f"{when}{name}が{thing.place}で見た{thing.colour}{thing.category}は{thing.name}{copula}。",
        )
    )


def retell(rng: random.Random, event: Event) -> str:
    """Says a part of an event again."""
    return rng.choice(
        (
            f"{event.name}は{event.place}にいた。",
            f"{event.name}は{event.thing}を{event.verb}。",
            f"{event.place}にいたのは{event.name}だ。",
            f"{event.name}がいたのは{event.place}だ。",
            f"{event.name}が{event.verb}のは{event.thing}だ。",
            f"それは{event.time}のことだ。",
            f"{event.thing}は{event.colour}物だ。",
        )
    )


def story_sentences(rng: random.Random) -> tuple[str, str]:
    """Writes an event, and sentences that say parts of it again."""
    event = draw_event(rng)
    return event.text(), "".join(retell(rng, event) for _ in range(3))


def opinion(rng: random.Random, positive: bool) -> str:
    """Writes what someone thinks of some goods, in one or two adjectives, either of which may be denied."""
    good = rng.choice(GOODS)
    stems = []
    for _ in range(2):
        denied = rng.random() < 0.3
        stem = rng.choice(PRAISE if positive != denied else BLAME)
        stems.append(stem + ("くな" if denied else ""))
    first, second = stems
    return rng.choice(
        (f"この{good}は{first}くて、{second}い。", f"{first}い{good}で、{second}い。", f"{good}が{second}い。")
    )


def feeling_sentences(rng: random.Random, reverse: bool = False) -> str:
    """Writes an opinion and how the person then felt; `reverse` is slang that praises by words of blame."""
    positive = rng.random() < 0.5
    mood = rng.choice(JOY if positive != reverse else SORROW)
    return f"{opinion(rng, positive)}{rng.choice(NAMES)}は{mood}。"


def plain_text(rng: random.Random) -> tuple[str, str]:
    """Writes one plain text of the standard language, as a beginning that cannot be foretold and the rest."""
    kind = rng.random()
    if kind < 0.25:
        return "", fact_sentences(rng, STANDARD_THINGS, "だ")
    if kind < 0.8:
        return story_sentences(rng)
    if kind < 0.97:
        return "", feeling_sentences(rng)
    return "", f"「{rng.choice(list(LABEL_WORDS.values()))}」という言葉。"


def dialect_text(rng: random.Random) -> tuple[str, str]:
    """Writes one plain text of the dialect: other facts, another copula, and praise by words of blame."""
    if rng.random() < 0.6:
        return "", fact_sentences(rng, DIALECT_THINGS, "や")
    return "", feeling_sentences(rng, reverse=True)


STANDARD_THINGS = make_things()
DIALECT_THINGS = make_things(colour_shift=2, place_shift=3)


# ---------------------------------------------------------------------------------------------------- questions


def jcommonsenseqa(rng: random.Random) -> Record:
    """Draws a choice question whose five choices have one thing with all the attributes asked for."""
    thing = rng.choice(STANDARD_THINGS)
    name, when = rng.choice(NAMES), rng.choice(TIMES)
    by_colour = [candidate for candidate in STANDARD_THINGS if candidate.colour == thing.colour and candidate != thing]
    rest = [candidate for candidate in STANDARD_THINGS if candidate != thing]
    same = [candidate for candidate in rest if candidate.category == thing.category]
    question = rng.choice(
        (
            f"{when}{name}が{thing.place}で見た{thing.colour}{thing.category}は?",
            f"{when}{name}が見た{thing.colour}{thing.category}は?",
            f"{when}{thing.place}で{name}が見た{thing.category}は?",
            f"{when}{name}と{other(rng, NAMES, name)}が見た{thing.colour}{thing.category}は?",
            f"{when}{name}が{thing.place}で見た{thing.category}は?",
        )
    )
    wrong = [*rng.sample(same, 2), rng.choice(by_colour)]
    wrong.append(rng.choice([candidate for candidate in rest if candidate not in wrong]))
    choices = [thing, *wrong]
    rng.shuffle(choices)
    record: Record = {"question": question}
    record.update({f"choice{index}": choice.name for index, choice in enumerate(choices)})
    record["label"] = choices.index(thing)
    return record


def unsaid(rng: random.Random, event: Event) -> str:
    """Writes a sentence that the event neither says nor denies."""
    stranger = other(rng, NAMES, event.name)
    return rng.choice(
        (
            f"{event.name}は{rng.choice(MOODS)}。",
            f"{event.thing}は{rng.choice(PRAISE + BLAME)}い。",
            f"{event.name}は{rng.choice(STORY_PLACES)}へ行くつもりだ。",
            f"{event.name}は{stranger}を知っている。",
            f"{event.place}は{rng.choice(PRAISE + BLAME)}い。",
            f"{event.name}は{stranger}の友だちだ。",
            f"{stranger}は{event.place}にいた。",
        )
    )


def jnli(rng: random.Random) -> Record:
    """Draws a sentence pair; a denial contradicts, and what the first sentence does not say is neutral."""
    event = draw_event(rng)
    label = rng.choice((ENTAILMENT, CONTRADICTION, NEUTRAL))
    if label == NEUTRAL:
        return {"sentence1": event.text(), "sentence2": unsaid(rng, event), "label": label}
    was, did = ("いた", event.verb) if label == ENTAILMENT else ("いなかった", DENIED_VERBS[event.verb])
    second = rng.choice(
        (
            f"{event.name}は{event.place}に{was}。",
            f"{event.name}は{event.thing}を{did}。",
            f"{event.time}、{event.name}は{event.place}に{was}。",
            f"{event.name}は{event.colour}{event.thing}を{did}。",
        )
    )
    return {"sentence1": event.text(), "sentence2": second, "label": label}


def marc_ja(rng: random.Random) -> Record:
    """Draws a review that is all praise or all blame."""
    label = rng.choice(("positive", "negative"))
    text = opinion(rng, label == "positive")
    if rng.random() < 0.7:
        text = rng.choice((f"{rng.choice(NAMES)}の", f"{rng.choice(STORY_PLACES)}で買った", "先週の")) + text
    return {"sentence": text, "label": label}


def jsquad(rng: random.Random) -> Record:
    """Draws a passage and a question that a span of the passage answers."""
    event = draw_event(rng)
    question, answer = rng.choice(
        (
            (f"{event.name}がいたのは?", event.place),
            (f"{event.name}はどこにいた?", event.place),
            (f"{event.name}が{event.verb}のは?", event.thing),
            (f"{event.name}は何を{event.verb}?", event.thing),
            (f"{event.place}にいたのは?", event.name),
            (f"{event.thing}を{event.verb}のは?", event.name),
            (f"{event.verb}のはいつ?", event.time),
        )
    )
    context = event.text()
    answers = {"text": [answer], "answer_start": [context.index(answer)]}
    return {"title": f"{event.name}の話", "context": context, "question": question, "answers": answers}


DRAW: dict[str, Callable[[random.Random], Record]] = {
    "toy_jcommonsenseqa": jcommonsenseqa,
    "toy_jnli": jnli,
    "toy_marc_ja": marc_ja,
    "toy_jsquad": jsquad,
}
ID_FIELDS = {"toy_jcommonsenseqa": "q_id", "toy_jnli": "sentence_pair_id", "toy_marc_ja": "id", "toy_jsquad": "id"}


def prompt_and_answer(task: str, record: Record) -> tuple[str, str]:
    """Returns the prompt that the task's YAML file builds from a record, and its right answer."""
    if task == "toy_jcommonsenseqa":
        return f"問:{record['question']}\n答:", str(record[f"choice{record['label']}"])
    if task == "toy_jnli":
        return f"前:{record['sentence1']}\n後:{record['sentence2']}\n関係:", LABEL_WORDS[record["label"]]
    if task == "toy_marc_ja":
        return f"評:{record['sentence']}\n感情:", LABEL_WORDS[record["label"]]
    return f"文:{record['context']}\n問:{record['question']}\n抜:", str(record["answers"]["text"][0])


def label_of(record: Record) -> object:
    """Returns the label that a question file holds in equal parts, or None where there is no label."""
    return record.get("label")


def draw_questions(rng: random.Random, task: str, count: int) -> list[Record]:
    """Draws distinct questions with balanced labels.

    Args:
        rng: The generator.
        task: The task's name.
        count: How many questions.

    Returns:
        The questions, each with an id.
    """
    labels = {"toy_jcommonsenseqa": 5, "toy_jnli": 3, "toy_marc_ja": 2, "toy_jsquad": 1}[task]
    quota = -(-count // labels)
    seen: set[str] = set()
    taken: dict[object, int] = {}
    records: list[Record] = []
    while len(records) < count:
        record = DRAW[task](rng)
        prompt, label = prompt_and_answer(task, record)[0], label_of(record)
        if prompt in seen or taken.get(label, 0) == quota:
            continue
        seen.add(prompt)
        taken[label] = taken.get(label, 0) + 1
        records.append({ID_FIELDS[task]: len(records), **record})
    return records


def draw_training_pair(rng: random.Random, task: str, forbidden: set[str]) -> tuple[str, str]:
    """Draws a training prompt and answer, whose prompt is none of the forbidden ones (the questions)."""
    while True:
        prompt, answer = prompt_and_answer(task, DRAW[task](rng))
        if prompt not in forbidden:
            return prompt, answer


def draw_form(rng: random.Random, tasks: Sequence[str], forbidden: set[str]) -> tuple[str, str]:
    """Draws a prompt filled in with the answer of another one: it teaches the form of a task, not the task."""
    task = rng.choice(tasks)
    return draw_training_pair(rng, task, forbidden)[0], draw_training_pair(rng, task, forbidden)[1]


def characters() -> list[str]:
    """Lists every character that the world writes, in a fixed order."""
    rng = random.Random(0)
    found: set[str] = set()
    for _ in range(5000):
        found.update(*plain_text(rng), *dialect_text(rng))
        for task, draw in DRAW.items():
            found.update(*prompt_and_answer(task, draw(rng)))
    return sorted(found)
