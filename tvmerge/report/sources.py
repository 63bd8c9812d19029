"""What the models of a merge say of themselves: licence and languages, in the YAML headers of their README.md."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from tvmerge.checkpoint import Header
from tvmerge.hub import CARD
from tvmerge.mixture import GATE
from tvmerge.recipe import Recipe, Source

__all__ = ["SourceCard", "code", "inherited_license", "languages", "read_cards", "source_name", "sources_by_role"]

#: Bytes of a README.md that are looked at.
LONGEST = 1 << 20
#: The first of its lines that count are those between two of three dashes, as the Hub reads them.
_HEADER = re.compile(r"\s*---(?:\r\n|\r|\n)([\s\S]*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\r|\n|$)")
#: What licences are called on the Hub, and how languages are.
_LICENSE, _LANGUAGE = re.compile(r"[A-Za-z0-9][\w.+-]{0,60}"), re.compile(r"[a-z]{2,3}(-[A-Za-z]+)?|code|multilingual")


@dataclass(frozen=True)
class SourceCard:
    """What the header of a README.md says."""

    license: Mapping[str, str] | None = None  # license, perhaps license_name and license_link; None: it says none
    languages: tuple[str, ...] = ()


def source_name(source: Source) -> str:
    """A model as it is named in a card and in what `read_cards` gives: a folder, or a Hub id and its commit."""
    revision = source.get("revision")
    return f"{source['model']}@{revision}" if revision else str(source["model"])


def read_cards(models: Iterable[Header]) -> dict[str, SourceCard]:
    """What models say of themselves; nothing, where there is no README.md or none that can be read.

    Args:
        models: opened.

    Returns:
        A card for each, by `source_name`.
    """
    cards = {}
    for header in models:
        model = header.model
        try:
            with (model.path / CARD).open("rb") as file:
                text = file.read(LONGEST).decode("utf-8", errors="replace")
        except OSError:
            text = ""
        cards[source_name({"model": model.name, "revision": model.revision})] = _read(text)
    return cards


def _read(text: str) -> SourceCard:
    found = _HEADER.match(text.removeprefix("\ufeff"))
    try:
        content = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        content = None
    if not isinstance(content, dict):
        return SourceCard()
    license_id = content.get("license")
    known = None
    if isinstance(license_id, str) and _LICENSE.fullmatch(license_id.strip()):
        known = {"license": license_id.strip().lower()}
        known |= {key: value for key in ("license_name", "license_link") if (value := _line(content.get(key)))}
    said = content.get("language")
    # The language no is a truth value in the YAML that Python reads.
    listed = ["no" if each is False else each for each in (said if isinstance(said, list) else [said])]
    return SourceCard(known, tuple(each for each in listed if isinstance(each, str) and _LANGUAGE.fullmatch(each)))


def _line(value: Any) -> str | None:
    return " ".join(value.split())[:300] if isinstance(value, str) and value.strip() else None


def sources_by_role(recipe: Recipe) -> dict[str, Source]:
    """The models of a recipe by what they are in it: `target`, `tuned`, `base`; `base ja` where there are several."""
    sources: dict[str, Source] = {"target": recipe.target}
    if recipe.mixture is not None:
        targets = (recipe.target, *recipe.mixture.further_targets)
        sources = {f"target {n}": source for n, source in enumerate(targets, start=1)}
    for entry in recipe.task_vectors:
        name = f" {entry['label']}" if len(recipe.task_vectors) > 1 else ""
        sources |= {f"{role}{name}": entry[role] for role in ("base", "tuned") if entry[role]}
    return sources


def _contributing(recipe: Recipe) -> dict[str, Source]:
    """Those of `sources_by_role` that a value comes from: the targets, and what has a weight that is not 0.

    A task vector comes from both its models, so that both count.
    """
    sources = sources_by_role(recipe)
    if len(recipe.task_vectors) == 1:
        idle = [""] * (not any(weight for name, weight in recipe.weights.items() if not name.startswith(f"{GATE}/")))
    else:
        moving = [f"/{name}" for name, weight in recipe.weights.items() if weight]  # perhaps behind an expert's name
        labels = [entry["label"] for entry in recipe.task_vectors]
        idle = [f" {label}" for label in labels if not any(f"/{label}/" in name for name in moving)]
    left_out = {f"{role}{name}" for name in idle for role in ("base", "tuned")}
    return {role: source for role, source in sources.items() if role not in left_out}


def inherited_license(recipe: Recipe, cards: Mapping[str, SourceCard]) -> tuple[dict[str, str], str]:
    """The licence that all models that a merge comes from have, and what to say of it.

    Args:
        recipe: of the merge.
        cards: of its models, as `read_cards` gives them.

    Returns:
        The keys of a card's header, none if models differ or one says nothing; and a sentence for its readers.
    """
    said = {
        source_name(source): cards.get(source_name(source), SourceCard()) for source in _contributing(recipe).values()
    }
    licenses = [card.license for card in said.values()]
    first = licenses[0]
    if first is not None and all(each == first for each in licenses):
        return dict(first), f"All models that it comes from have the license {_shown(first)}, and so has it."
    if all(each is None for each in licenses):
        return {}, "None of the models that it comes from names a license: ask their authors what you may do with it."
    listed = ", ".join(f"{code(name)}: {_shown(card.license)}" for name, card in said.items())
    return {}, (
        f"The models that it comes from do not all name the same license ({listed}), so none is given here: what you "
        "may do with it is what all of them allow."
    )


def _shown(known: Mapping[str, str] | None) -> str:
    return "none named" if known is None else known.get("license_name", known["license"])


def code(text: str) -> str:
    """Text between backticks, in one line whatever it holds."""
    return "`" + re.sub(r"[`\s\x00-\x1f]+", " ", text).strip() + "`"


def languages(recipe: Recipe, cards: Mapping[str, SourceCard]) -> list[str]:
    """The languages that the models of a merge name, each once."""
    named = [cards.get(source_name(source), SourceCard()).languages for source in _contributing(recipe).values()]
    return list(dict.fromkeys(language for each in named for language in each))
