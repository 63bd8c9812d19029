"""The model card, read by huggingface_hub as the Hub reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from hypothesis import example, given
from hypothesis import strategies as st

from tvmerge.checkpoint import Header
from tvmerge.evaluators import QuestionScore, TaskGoal
from tvmerge.hub import ModelId
from tvmerge.recipe import MixtureRecipe, Recipe
from tvmerge.report.card import model_card
from tvmerge.report.sources import SourceCard, inherited_license, read_cards
from tvmerge.results import Candidate

COMMIT = "0" * 40
JA: dict[str, str | None] = {"model": "owner/ja", "revision": COMMIT}
MATH: dict[str, str | None] = {"model": "owner/math", "revision": COMMIT}
LOCAL: dict[str, str | None] = {"model": "/home/me/base", "revision": None}


def recipe_of(**changes: Any) -> Recipe:
    recipe = Recipe(
        target=JA,
        task_vectors=[{"label": "math", "tuned": MATH, "base": LOCAL}],
        granularity="layer",
        weights={"layers.0": 0.5},
    )
    return dataclasses.replace(recipe, **changes)


def as_dict(card: ModelCard) -> dict[str, Any]:
    found: dict[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]
    return found


def card_of(recipe: Recipe, **more: Any) -> str:
    card = model_card(recipe, table="TABLE", verdict_text="VERDICT", weights=recipe.weights, **more)
    # What the Hub's client reads, writes and reads again stays what it is.
    read = ModelCard(card)
    assert as_dict(ModelCard(str(read))) == as_dict(read)
    assert read.text.lstrip().startswith("# A m")
    return card


def header_of(card: str) -> dict[str, Any]:
    return as_dict(ModelCard(card))


def best_of(*scores: QuestionScore) -> Candidate:
    return Candidate("best", scores)


@pytest.mark.parametrize(
    ("granularity", "said"),
    [
        ("uniform", "with one weight."),
        ("layer", "with one weight per layer."),
        ("block:4", "with one weight per 4 layers."),
        ("parameter", "with one weight per kind of parameter."),
        ("all", "with one weight per tensor."),
    ],
)
def test_card_says_what_a_weight_is_of(granularity: str, said: str) -> None:
    assert said in card_of(recipe_of(granularity=granularity))


def test_card_names_hub_models_and_no_folder_in_its_header() -> None:
    card = card_of(recipe_of())
    assert header_of(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "tvmerge"],
        "base_model": ["owner/ja", "owner/math"],
        "base_model_relation": "merge",
    }
    assert f"- target: `owner/ja@{COMMIT}`" in card
    assert "- base: `/home/me/base`" in card
    assert "TABLE\n\nVERDICT" in card
    assert "| layers.0 | 0.5000 |" in card
    assert "](recipe.yaml)" in card
    assert "license" not in card.lower()  # nobody looked
    local = recipe_of(target=LOCAL, task_vectors=[{"label": "math", "tuned": LOCAL, "base": LOCAL}])
    assert not header_of(card_of(local)).keys() & {"base_model", "base_model_relation"}


def test_the_scores_are_a_model_index_of_what_was_measured(tmp_path: Path) -> None:
    scores = [
        *(QuestionScore("jnli", n, float(n > 0)) for n in range(4)),
        *(QuestionScore("text", n, 0.0) for n in range(2)),
        QuestionScore("chat", 0, None),
        QuestionScore("jsquad", 0, 0.25),
        QuestionScore("jsquad", 1, None),
    ]
    goals = {
        "jnli": TaskGoal("acc_norm,none"),
        "text": TaskGoal("perplexity,none", higher_is_better=False, logarithmic=True),
        "jsquad": TaskGoal("exact_match,strict"),
        "chat": TaskGoal("rating"),
    }
    path = tmp_path / "README.md"
    path.write_text(card_of(recipe_of(), best=best_of(*scores), goals=goals), encoding="utf-8")
    index = (metadata_load(path) or {})["model-index"]
    name, results = model_index_to_eval_results(index)
    assert eval_results_to_model_index(name, results) == index
    found = [(r.dataset_name, r.dataset_type, r.metric_type, r.metric_name, r.metric_value) for r in results]
    assert found == [
        ("jnli", "jnli", "acc_norm", "acc_norm", 0.75),
        ("text", "text", "perplexity", "perplexity, lower is better", 1.0),
        ("jsquad", "jsquad", "exact_match", "exact_match, strict", 0.25),
    ]
    assert {(r.task_type, r.verified, r.dataset_split) for r in results} == {
        ("text-generation", False, "held out of the search")
    }
    assert [r.dataset_args for r in results] == [{"questions": 4}, {"questions": 2}, {"questions": 2, "unscored": 1}]

    seen = header_of(card_of(recipe_of(), best=best_of(*scores[:4]), heldout=False))["model-index"]
    assert seen[0]["results"][0]["dataset"]["split"] == "searched on"
    endless = QuestionScore("text", 0, 1e9)
    assert "model-index" not in header_of(card_of(recipe_of(), best=best_of(endless), goals=goals))


def cards(ja: Any, math: Any, base: Any) -> dict[str, SourceCard]:
    names = (f"owner/ja@{COMMIT}", f"owner/math@{COMMIT}", "/home/me/base")
    known = [each if isinstance(each, dict) or each is None else {"license": each} for each in (ja, math, base)]
    return {name: SourceCard(each) for name, each in zip(names, known, strict=True)}


OWN = {"license": "other", "license_name": "mine", "license_link": "LICENSE"}


@pytest.mark.parametrize(
    ("said", "inherited", "sentence"),
    [
        (("mit", "mit", "mit"), {"license": "mit"}, "have the license mit, and so has it"),
        ((OWN, OWN, OWN), OWN, "have the license mine, and so has it"),
        (("mit", "apache-2.0", "mit"), {}, f"`owner/math@{COMMIT}`: apache-2.0"),
        (("mit", None, "mit"), {}, f"`owner/math@{COMMIT}`: none named"),
        (("other", OWN, OWN), {}, "`/home/me/base`: mine"),
        ((None, None, None), {}, "None of the models that it comes from names a license"),
    ],
)
def test_a_license_is_inherited_where_all_sources_agree(said: Any, inherited: dict[str, str], sentence: str) -> None:
    card = card_of(recipe_of(), cards=cards(*said))
    assert {key: value for key, value in header_of(card).items() if "license" in key} == inherited
    assert sentence in card.partition("## License")[2]


def test_a_model_of_weight_0_gives_no_license() -> None:
    known = cards("mit", "gpl-3.0", "mit")
    assert inherited_license(recipe_of(weights={"layers.0": 0.0}), known)[0] == {"license": "mit"}
    assert not inherited_license(recipe_of(), known)[0]
    two = recipe_of(
        task_vectors=[{"label": "math", "tuned": MATH, "base": JA}, {"label": "back", "tuned": LOCAL, "base": JA}],
        weights={"math/layers.0": 0.0, "math/layers.1": 0.0, "back/layers.0": 0.1, "back/layers.1": 0.0},
    )
    assert inherited_license(two, known)[0] == {"license": "mit"}
    assert not inherited_license(dataclasses.replace(two, weights={**two.weights, "math/layers.1": 1}), known)[0]
    mixture = MixtureRecipe(further_targets=[MATH], gate_mode="random", gate_seed=0, router="")
    weights = {"expert1/layers.0": 0.0, "gate/layers.0": 1.0}
    both = recipe_of(mixture=mixture, task_vectors=[{"label": "b", "tuned": LOCAL, "base": LOCAL}], weights=weights)
    assert not inherited_license(both, known)[0]  # each expert's target counts
    assert inherited_license(both, cards("mit", "mit", "gpl-3.0"))[0] == {"license": "mit"}


def test_a_mixture_says_what_it_is() -> None:
    mixture = MixtureRecipe(further_targets=[MATH], gate_mode="random", gate_seed=0, router="")
    card = card_of(recipe_of(mixture=mixture), cards=cards("mit", "mit", "mit"))
    assert header_of(card)["tags"] == ["merge", "moe", "tvmerge"]
    assert header_of(card)["license"] == "mit"
    assert f"- target 2: `owner/math@{COMMIT}`" in card
    assert "# A mixture of experts found by tvmerge" in card


def read(folder: Path, text: str | bytes) -> SourceCard:
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_bytes(text.encode() if isinstance(text, str) else text)
    (card,) = read_cards([Header(ModelId(str(folder), None, folder), {})]).values()
    return card


@pytest.mark.parametrize(
    ("text", "license_id", "languages"),
    [
        ("---\nlicense: Apache-2.0\nlanguage:\n- ja\n- no\n---\n# x", "apache-2.0", ("ja", "no")),
        ("\ufeff---\r\nlicense: mit\r\nlanguage: en\r\n---\r\n", "mit", ("en",)),
        ("---\nlicense: mit\nlanguage: no\n---", "mit", ("no",)),
        ("# no header\nlicense: mit\n", None, ()),
        ("---\nlicense: [mit, apache-2.0]\nlanguage: {a: 1}\n---\n", None, ()),
        ("---\nlicense: 'a\\n---\\nb: c'\nlanguage: ['x: y', 3]\n---\n", None, ()),
        ("---\nlicense: mit\nlanguage: en", None, ()),
        ("---\n- license: mit\n---\n", None, ()),
        ("---\nlicense: !!python/object/apply:os.getcwd []\n---\n", None, ()),
        ("---\nlicense: {" + "[" * 5000 + "\n---\n", None, ()),
        (b"---\nlicense: mit\nlanguage: \xff\xfe\n---\n", "mit", ()),
        (b"\x00\x01\x02", None, ()),
    ],
)
def test_a_header_is_read_as_the_hub_reads_it(
    tmp_path: Path, text: str | bytes, license_id: str | None, languages: tuple[str, ...]
) -> None:
    card = read(tmp_path / "model", text)
    assert (card.license and card.license["license"], card.languages) == (license_id, languages)


def test_a_model_without_a_readme_says_nothing(tmp_path: Path) -> None:
    model = Header(ModelId("owner/ja", COMMIT, tmp_path), {})
    assert read_cards([model]) == {f"owner/ja@{COMMIT}": SourceCard()}


def test_languages_of_all_sources_are_named_once() -> None:
    known: Mapping[str, SourceCard] = {
        f"owner/ja@{COMMIT}": SourceCard(None, ("ja", "en")),
        f"owner/math@{COMMIT}": SourceCard(None, ("en", "no")),
    }
    assert header_of(card_of(recipe_of(), cards=known))["language"] == ["ja", "en", "no"]


def test_pictures_and_many_weights_are_shown() -> None:
    recipe = recipe_of(weights={f"layers.{n}": 0.0 for n in range(60)})
    card = card_of(recipe, pictures=["weights.png", "a b(c).png"])
    assert "![weights](weights.png)" in card
    assert "](a%20b%28c%29.png)" in card
    assert "<details><summary>60 weights</summary>" in card
    assert "| layers.59 | 0.0000 |" in card


HOSTILE = st.one_of(
    st.sampled_from(
        ["a\n---\nlicense: mit\n---\n", "'\"`|<script>", "---", ": {", "\r\n---\r\n", "\u2028---", "- x", "no"]
    ),
    st.text(min_size=1),
)


@example("a", "a", "\x85")
@given(HOSTILE, HOSTILE, HOSTILE)
def test_no_name_breaks_the_header_or_the_text(folder: str, label: str, task: str) -> None:
    source: dict[str, str | None] = {"model": folder, "revision": None}
    vectors = [{"label": label, "tuned": source, "base": source}, {"label": f"{label} 2", "tuned": JA, "base": JA}]
    recipe = recipe_of(
        target=source, task_vectors=vectors, weights={f"{each}/layers.0": 1.0 for each in (label, f"{label} 2")}
    )
    known = {folder: SourceCard({"license": "mit"}), f"owner/ja@{COMMIT}": SourceCard({"license": "gpl-3.0"})}
    card = card_of(recipe, cards=known, best=best_of(QuestionScore(task, 0, 1.0)))
    found = header_of(card)
    assert "license" not in found
    assert found["base_model"] == ["owner/ja"]
    assert found["model-index"][0]["results"][0]["dataset"]["name"] == (" ".join(task.split()) or "task")
    lines = card.splitlines()
    assert lines.count("---") == 2
    assert sum(line.startswith("## ") for line in lines) == 3
    assert yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n")).keys() == found.keys()
