"""Recipes: everything that determines a merged model, as YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from tvmerge import __version__
from tvmerge.checkpoint import Checkpoint, Header
from tvmerge.errors import ConfigError, RecipeError
from tvmerge.files import local_path, write_text
from tvmerge.granularity import Grouping
from tvmerge.lora import Adapter
from tvmerge.methods import METHODS
from tvmerge.mixture import BASES, MixtureSettings
from tvmerge.moe import MAX_EXPERTS, MIN_EXPERTS
from tvmerge.router import GATE_MODES
from tvmerge.sources import (
    MergeSettings,
    Sources,
    TunedModel,
    check_whole,
    make_sources,
    open_checkpoint,
)
from tvmerge.state_dict import DTYPES
from tvmerge.vocabulary import VOCABULARIES, vocabulary_digest

__all__ = ["RECIPE_FILE", "MixtureRecipe", "Recipe", "Source", "source_entries"]

RECIPE_FILE = "recipe.yaml"
#: Weights are float32 numbers.
LARGEST_WEIGHT = 3e38
BOTH = (True, False)

#: {model: folder or Hub id, revision: commit or null, fingerprint, tokens: of models aligned by token}
Source = Mapping[str, str | None]


@dataclass(frozen=True)
class MixtureRecipe:
    """What makes the merges of a recipe the experts of one model. The router's values lie beside the recipe."""

    further_targets: Sequence[Source]  # of all experts but the first, whose target is the recipe's
    gate_mode: str  # a key of GATE_MODES
    gate_seed: int
    router: str  # router_digest of its values, without temperatures
    base: str = "first"
    experts_per_token: int = 2
    share_weights: bool = False
    search_gate: bool = False

    def settings(self) -> MixtureSettings:
        """How the merges become one model."""
        return MixtureSettings(**{f.name: getattr(self, f.name) for f in fields(MixtureSettings)})

    def check(self, path: Path) -> None:
        """Refuse values that cannot be; the sources are looked at with the recipe's others.

        Raises:
            RecipeError: with the key.
        """
        if (
            not isinstance(self.further_targets, list)
            or not MIN_EXPERTS <= 1 + len(self.further_targets) <= MAX_EXPERTS
        ):
            raise RecipeError(
                f"{path}: further_targets must list the {MIN_EXPERTS - 1} to {MAX_EXPERTS - 1} other experts"
            )
        for key, known in (("gate_mode", GATE_MODES), ("base", BASES), ("share_weights", BOTH), ("search_gate", BOTH)):
            value = getattr(self, key)
            if not isinstance(value, (str, bool)) or value not in known:
                raise RecipeError(f"{path}: unknown {key} {value!r}, known are {', '.join(map(str, known))}")
        for key in ("experts_per_token", "gate_seed"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
                raise RecipeError(f"{path}: {key} must be a whole number, got {str(value)[:40]}")
        if not isinstance(self.router, str):
            raise RecipeError(f"{path}: router must be text: the digest of its values")


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a merged model, and what was measured on it."""

    target: Source
    task_vectors: Sequence[Mapping[str, Any]]  # {label, tuned: a source, base: a source or null}
    granularity: str
    weights: Mapping[str, float]  # weight name → w
    weight_groups: Mapping[str, str] = field(default_factory=dict)
    freeze: Sequence[str] = ()
    method: str = "task_arithmetic"
    dtype: str | None = None
    vocabulary: str = "same"
    omit: Sequence[str] = ()  # tensors of the sources that the merged model does not hold
    mixture: MixtureRecipe | None = None  # None: one dense model
    score: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read and check a recipe.

        Raises:
            RecipeError: no such file, not YAML, a key that is missing or unknown, a value that cannot be.
        """
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RecipeError(f"{path}: no such recipe") from None
        except (OSError, yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
            raise RecipeError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from error
        if not isinstance(content, dict):
            raise RecipeError(f"{path}: not a recipe, which is a mapping of keys to values")
        content.pop("tvmerge", None)
        if "task_vectors" not in content and {"tuned", "base"} <= content.keys():  # as version 0.1.0 wrote it
            content["task_vectors"] = [{"label": "tuned", "tuned": content.pop("tuned"), "base": content.pop("base")}]
        known = {f.name for f in fields(cls)}
        needed = {"target", "task_vectors", "granularity", "weights"}
        for problem, keys in (("unknown", content.keys() - known), ("missing", needed - content.keys())):
            if keys:
                raise RecipeError(f"{path}: {problem} keys: {', '.join(sorted(map(str, keys)))}")
        if content.get("mixture") is not None:
            content["mixture"] = _mixture(content["mixture"], path)
        recipe = cls(**content)
        recipe._check(path)
        return recipe

    def _check(self, path: Path) -> None:
        if self.mixture is not None:
            self.mixture.check(path)
        self._check_sources(path)
        if not isinstance(self.granularity, str) or not isinstance(self.weight_groups, dict):
            raise RecipeError(f"{path}: granularity must be text, and weight_groups map names to regular expressions")
        for key, texts in (("omit", self.omit), ("freeze", self.freeze)):
            if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
                raise RecipeError(f"{path}: {key} must be a list of text")
        if not all(isinstance(text, str) for pair in self.weight_groups.items() for text in pair):
            raise RecipeError(f"{path}: weight_groups must hold text only")
        try:
            self.settings()
        except ConfigError as error:
            raise RecipeError(f"{path}: {error}") from error
        for key, value, known in (
            ("method", self.method, METHODS),
            ("dtype", self.dtype, (None, *DTYPES)),
            ("vocabulary", self.vocabulary, VOCABULARIES[: 2 if self.mixture is None else 3]),
        ):
            if not isinstance(value, (str, type(None))) or value not in known:
                raise RecipeError(f"{path}: unknown {key} {value!r}, known are {', '.join(filter(None, known))}")
        for key in ("score", "versions"):
            if not isinstance(getattr(self, key), dict):
                raise RecipeError(f"{path}: {key} must be a mapping")
        if not isinstance(self.weights, dict):
            raise RecipeError(f"{path}: weights must map weight names to numbers")
        for name, weight in self.weights.items():
            if not isinstance(name, str):
                raise RecipeError(f"{path}: {name!r} is no name of a weight")
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not abs(weight) < LARGEST_WEIGHT:
                raise RecipeError(
                    f"{path}: the weight of {name} is {str(weight)[:40]}, not a number that float32 can hold"
                )

    def _check_sources(self, path: Path) -> None:
        if not isinstance(self.task_vectors, list) or not self.task_vectors:
            raise RecipeError(f"{path}: task_vectors must be a list of label, tuned and base")
        for entry in self.task_vectors:
            if not isinstance(entry, dict) or entry.keys() != {"label", "tuned", "base"}:
                raise RecipeError(f"{path}: each of task_vectors must have a label, tuned and base, and nothing else")
            if not isinstance(entry["label"], str):
                raise RecipeError(f"{path}: the label {entry['label']!r} of a task vector is not text")
        if len({entry["label"] for entry in self.task_vectors}) != len(self.task_vectors):
            raise RecipeError(f"{path}: two task vectors have the same label")
        for role, source in self._by_role():
            if not isinstance(source, dict) or not isinstance(source.get("model"), str):
                raise RecipeError(f"{path}: {role} must hold a model: a folder or a Hub id")
            if not all(isinstance(value, (str, type(None))) for value in source.values()):
                raise RecipeError(f"{path}: {role} must hold text only: model, revision, fingerprint")

    def _by_role(self) -> list[tuple[str, Any]]:
        """What a source is called, and the source; an adapter may have no base."""
        roles = [(role, entry[role]) for entry in self.task_vectors for role in ("tuned", "base")]
        further = [] if self.mixture is None else self.mixture.further_targets
        targets = [("target", target) for target in (self.target, *further)]
        return [*targets, *((role, source) for role, source in roles if role == "tuned" or source)]

    def settings(self) -> MergeSettings:
        """How the sources are put together.

        Raises:
            ConfigError: a granularity or an expression that cannot be.
        """
        grouping = Grouping(self.granularity, self.weight_groups, self.freeze)
        return MergeSettings(
            grouping=grouping, method=self.method, dtype=self.dtype, vocabulary=self.vocabulary, omit=self.omit
        )

    def save(self, path: Path) -> None:
        """Write the recipe as YAML."""
        content = {"tvmerge": __version__, **asdict(self), "omit": list(self.omit), "freeze": list(self.freeze)}
        if self.mixture is None:
            del content["mixture"]
        write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120))

    def open_sources(self, *, cache_dir: str | None = None) -> Sources:
        """Find and open the models, at the recorded commits.

        Raises:
            CheckpointError: one of them cannot be found or read.
            RecipeError: a local folder has gone, or holds other weights than when the recipe was written.
        """
        opened: dict[str, Checkpoint] = {}
        for role, source in self._by_role():
            key = str(source)
            if key not in opened:
                opened[key] = _open(role, source, cache_dir=cache_dir)
        entries = [
            TunedModel(
                label=entry["label"],
                tuned=opened[str(entry["tuned"])],
                base=None if not entry["base"] else opened[str(entry["base"])],
            )
            for entry in self.task_vectors
        ]
        targets = [opened[str(source)] for role, source in self._by_role() if role == "target"]
        for target in targets:
            check_whole(target, role="target")
        for entry in entries:
            if entry.base is None and not isinstance(entry.tuned, Adapter):
                raise RecipeError(f"the recipe names no base for {entry}, which is no adapter")
        return make_sources(targets, entries, self.vocabulary)


def _mixture(content: Any, path: Path) -> MixtureRecipe:
    known = {f.name for f in fields(MixtureRecipe)}
    needed = {f.name for f in fields(MixtureRecipe)[:4]}
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: mixture must map keys to values: {', '.join(sorted(known))}")
    for problem, keys in (("unknown", content.keys() - known), ("missing", needed - content.keys())):
        if keys:
            raise RecipeError(f"{path}: {problem} keys of mixture: {', '.join(sorted(map(str, keys)))}")
    return MixtureRecipe(**content)


def _open(role: str, source: Source, *, cache_dir: str | None) -> Checkpoint:
    name, revision = str(source["model"]), source.get("revision")
    if not revision and not local_path(name, flag=f"the recipe's {role} model").is_dir():
        raise RecipeError(
            f"the {role} model was the local folder {name}, which is not here: run from the folder that "
            "it is relative to, or mend the recipe"
        )
    found = open_checkpoint(name + (f"@{revision}" if revision else ""), cache_dir=cache_dir)
    if source.get("fingerprint") not in (None, found.fingerprint):
        raise RecipeError(f"the weights in {name} are not those of the recipe's {role} model: they were changed")
    if source.get("tokens") not in (None, vocabulary_digest(found)):
        raise RecipeError(f"the tokenizer in {name} is not that of the recipe's {role} model: it was changed")
    return found


def source_entries(sources: Sources, *, vocabulary: str) -> dict[str, Any]:
    """All models as a recipe holds them: its fields `target` and `task_vectors`, and `further_targets` of its mixture.

    Args:
        sources: the opened models.
        vocabulary: one of VOCABULARIES; of models that are aligned by token, the tokens' ids are kept too.
    """

    def entry(checkpoint: Header) -> dict[str, str | None]:
        assert isinstance(checkpoint, Checkpoint), "a recipe is of models whose weights are here"
        model = checkpoint.model
        found = {"model": model.name, "revision": model.revision, "fingerprint": checkpoint.fingerprint}
        return found if vocabulary == "same" else {**found, "tokens": vocabulary_digest(checkpoint)}

    entries = [
        {"label": each.label, "tuned": entry(each.tuned), "base": None if each.base is None else entry(each.base)}
        for each in sources.tuned
    ]
    targets = [entry(target) for target in sources.targets]
    further = {"further_targets": targets[1:]} if len(targets) > 1 else {}
    return {"target": targets[0], "task_vectors": entries, **further}
