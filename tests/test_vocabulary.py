"""Models of other vocabularies: refused with counts, or merged row by row for the tokens that all of them have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CHARACTERS, save_mistral, save_tokenizer

from tvmerge.checkpoint import Checkpoint
from tvmerge.errors import IncompatibleError, RecipeError
from tvmerge.granularity import Grouping
from tvmerge.hub import resolve
from tvmerge.rebuild import apply_recipe
from tvmerge.recipe import Recipe, source_entries
from tvmerge.sources import MergeSettings, Sources, open_sources

SPECIAL = ("<unk>", "<s>", "</s>")
#: The target's characters: three of the others' are missing, two are new, the rest are in another order.
OTHERS = "京東タ。ワあい\nfedcba"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vocabularies")
    base = save_mistral(root / "base", seed=0)
    tuned = save_mistral(root / "tuned", seed=1, drift_from=base)
    target = save_mistral(root / "target", seed=2, vocab_size=len(SPECIAL) + len(OTHERS) + 2)  # two rows of padding
    save_tokenizer(target, OTHERS)
    wider = save_mistral(root / "wider", seed=3, vocab_size=len(SPECIAL) + len(CHARACTERS) + 1)  # one token more
    save_tokenizer(wider, CHARACTERS + "終")
    return {"target": target, "base": base, "tuned": tuned, "wider": wider}


def opened(models: dict[str, Path], vocabulary: str, *, target: str = "target", tuned: str = "tuned") -> Sources:
    return open_sources(
        target=str(models[target]),
        tuned=[str(models[tuned])],
        base=str(models["base"]),
        vocabulary=vocabulary,
        cache_dir=None,
    )


def test_vocabularies_that_differ_are_refused_with_counts(models: dict[str, Path]) -> None:
    with pytest.raises(
        IncompatibleError, match=r"2 tokens only in the former, 6 only in the latter, 12 with another id"
    ):
        opened(models, "same")


@pytest.mark.parametrize(("target", "tuned"), [("target", "tuned"), ("target", "wider"), ("base", "wider")])
def test_rows_are_merged_by_token_and_the_rest_is_the_targets(models: dict[str, Path], target: str, tuned: str) -> None:
    sources = opened(models, "intersect", target=target, tuned=tuned)
    merge = sources.merge(MergeSettings(grouping=Grouping("uniform"), vocabulary="intersect"))
    merged = merge.at({"uniform": 0.5})
    t, u, b = (Checkpoint(resolve(str(models[name]))) for name in (target, tuned, "base"))
    characters = {"target": OTHERS, "base": CHARACTERS, "tuned": CHARACTERS, "wider": CHARACTERS + "終"}
    ours, theirs, bases = ([*SPECIAL, *characters[name]] for name in (target, tuned, "base"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert merged.spec(name) == t.spec(name)
        rows = merged.read(name)
        for i, old in enumerate(t.read(name)):
            token = ours[i] if i < len(ours) else None
            if token in theirs and token in bases:
                delta = u.read(name)[theirs.index(token)].double() - b.read(name)[bases.index(token)].double()
                assert torch.equal(rows[i], (old.double() + 0.5 * delta).bfloat16()), token
            else:
                assert torch.equal(rows[i], old), token
    name = "model.layers.0.mlp.up_proj.weight"
    expected = t.read(name).double() + 0.5 * (u.read(name).double() - b.read(name).double())
    assert torch.equal(merged.read(name), expected.bfloat16())


def test_the_same_vocabulary_is_not_aligned(models: dict[str, Path]) -> None:
    sources = opened(models, "intersect", target="base")
    assert sources.tuned_state_dict(sources.tuned[0], MergeSettings(vocabulary="intersect")) is not None
    sources = opened(models, "intersect")
    assert sources.tuned_state_dict(sources.tuned[0], MergeSettings(vocabulary="intersect")) is None


def test_a_model_without_a_tokenizer_cannot_be_aligned(models: dict[str, Path], tmp_path: Path) -> None:
    bare = save_mistral(tmp_path / "bare", seed=4)
    (bare / "tokenizer.json").unlink()
    sources = opened({**models, "bare": bare}, "intersect", tuned="bare")
    with pytest.raises(IncompatibleError, match=r"bare: ships no tokenizer.json"):
        sources.merge(MergeSettings(vocabulary="intersect"))


def test_added_tokens_are_aligned_too(models: dict[str, Path], tmp_path: Path) -> None:
    paths = {}
    for name, row in (("target", 18), ("tuned", 20), ("base", 22)):
        paths[name] = save_mistral(tmp_path / name, seed=row, vocab_size=24)
        file = paths[name] / "tokenizer.json"
        content = json.loads(file.read_text())
        content["model"]["vocab"] = {"<s>": 1, "</s>": 2, "<unk>": 0}
        content["added_tokens"] = [
            *content["added_tokens"][:3],
            {**content["added_tokens"][0], "id": row, "content": "<|im_start|>"},
        ]
        file.write_text(json.dumps(content))
    merge = opened(paths, "intersect").merge(MergeSettings(grouping=Grouping("uniform"), vocabulary="intersect"))
    t, u, b = (
        Checkpoint(resolve(str(paths[name]))).read("lm_head.weight").double() for name in ("target", "tuned", "base")
    )
    merged = merge.at({"uniform": 1.0}).read("lm_head.weight")
    assert torch.equal(merged[18], (t[18] + (u[20] - b[22])).bfloat16())
    assert torch.equal(merged[19], t[19].bfloat16())


def test_a_recipe_knows_the_tokens_it_aligned(models: dict[str, Path], tmp_path: Path) -> None:
    moved = {name: Path(shutil.copytree(folder, tmp_path / name)) for name, folder in models.items()}
    sources = opened(moved, "intersect")
    weights = dict.fromkeys(sources.merge(MergeSettings(vocabulary="intersect")).weight_names, 0.5)
    entries = source_entries(sources, vocabulary="intersect")
    Recipe(**entries, granularity="layer", weights=weights, vocabulary="intersect").save(tmp_path / "recipe.yaml")
    apply_recipe(tmp_path / "recipe.yaml", output=tmp_path / "out")
    save_tokenizer(moved["tuned"], CHARACTERS[::-1])
    with pytest.raises(RecipeError, match=r"tokenizer in .*tuned is not that of the recipe's tuned model"):
        apply_recipe(tmp_path / "recipe.yaml", output=tmp_path / "again")
