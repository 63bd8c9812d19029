"""The models of a merge: found, opened, checked against each other, and put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tvmerge.checkpoint import Checkpoint, Header, check_mergeable
from tvmerge.delta import all_finite
from tvmerge.errors import CheckpointError, ConfigError, IncompatibleError
from tvmerge.granularity import Grouping
from tvmerge.hub import resolve, split_name
from tvmerge.lora import Adapter, LoraTaskVector, check_adapter_base, is_adapter
from tvmerge.merge import Merge
from tvmerge.state_dict import DTYPES, MERGEABLE_DTYPES, StateDict, Without, check_same_tensors
from tvmerge.task_vector import Difference, KeptTaskVector, TaskVector
from tvmerge.union import UnitedVocabulary, unite
from tvmerge.vocabulary import Aligned, Rows, align_rows, check_same_vocabulary

__all__ = [
    "MergeSettings",
    "Sources",
    "TunedModel",
    "check_entry",
    "check_finite",
    "check_whole",
    "make_sources",
    "open_checkpoint",
    "open_sources",
]


@dataclass(frozen=True)
class MergeSettings:
    """Everything that determines a merge but its models and its weights."""

    grouping: Grouping = field(default_factory=Grouping)
    method: str = "task_arithmetic"  # a key of METHODS
    dtype: str | None = None  # a key of DTYPES; None: each tensor keeps the target's
    vocabulary: str = "same"  # one of VOCABULARIES
    omit: Sequence[str] = ()  # tensors of the models that the merged one does not hold


@dataclass(frozen=True)
class TunedModel:
    """A model or an adapter that gives a task vector."""

    label: str  # of its weights, where there are several
    tuned: Header  # an Adapter, or a whole model
    base: Header | None  # None: an adapter that needs none

    def __str__(self) -> str:
        """As errors call it."""
        return f"the {'adapter' if isinstance(self.tuned, Adapter) else 'tuned model'} {self.tuned.model.name}"


@dataclass(frozen=True)
class Sources:
    """The opened models of a merge, or of the merges that are the experts of a mixture."""

    targets: Sequence[Header]  # one, or one for each expert
    tuned: Sequence[TunedModel]
    united: UnitedVocabulary | None = None  # of the targets, where it is not that of each of them

    @property
    def target(self) -> Header:
        """The only one, or that of the first expert."""
        return self.targets[0]

    def models(self) -> list[Header]:
        """All of them, each once."""
        found: dict[int, Header] = {id(target): target for target in self.targets}
        for entry in self.tuned:
            found |= {id(model): model for model in (entry.tuned, entry.base) if model is not None}
        return list(found.values())

    def whole_models(self) -> list[Header]:
        """Those that are no adapters."""
        return [model for model in self.models() if not isinstance(model, Adapter)]

    def target_state_dicts(self, settings: MergeSettings) -> list[StateDict]:
        """The targets, with a row for every token of a united vocabulary."""
        targets: list[StateDict] = [Without(target, settings.omit) for target in self.targets]
        return targets if self.united is None else self.united.complete(targets)

    def merge(self, settings: MergeSettings, *, keep: bool = False) -> Merge:
        """That of the first target; see `merges`."""
        return self.merges(settings, keep=keep)[0]

    def merges(self, settings: MergeSettings, *, keep: bool = False) -> list[Merge]:
        """Put them together: a merge for each target, all with the same task vectors and in the dtypes of the first.

        Args:
            settings: how.
            keep: whether differences are kept in memory once they are computed.

        Raises:
            IncompatibleError: their tensors differ in name, shape or kind, or no tensor is left to merge.
        """
        vectors: dict[str, TaskVector] = {}
        for entry in self.tuned:
            vector = self.task_vector(entry, settings)
            vectors[entry.label] = KeptTaskVector(vector) if keep and isinstance(vector, Difference) else vector
        targets = self.target_state_dicts(settings)
        for model, target in zip(self.targets[1:], targets[1:], strict=True):
            names = (f"the target model {self.target.model.name}", f"the target model {model.model.name}")
            check_same_tensors(targets[0], target, reference_name=names[0], other_name=names[1])
        merges = [
            Merge(
                target=target,
                task_vectors=vectors,
                grouping=settings.grouping,
                method=settings.method,
                dtype=None if settings.dtype is None else DTYPES[settings.dtype],
                like=targets[0],
            )
            for target in targets
        ]
        if not merges[0].weight_names:
            raise IncompatibleError("no tensor is left to merge: all are frozen")
        return merges

    def task_vector(self, entry: TunedModel, settings: MergeSettings) -> TaskVector:
        """The task vector of a tuned model, over the target's names and shapes."""
        target = self.target_state_dicts(settings)[0]
        if isinstance(entry.tuned, Adapter):
            base = None if entry.base is None else Without(entry.base, settings.omit)
            vector = LoraTaskVector(adapter=entry.tuned, reference=target, base=base)
            vector.check_base()
            if vector.whole_names and entry.base is not None:  # whose rows are those of its base's tokens
                names = (f"the target model {self.target.model.name}", f"the base model {entry.base.model.name}")
                check_same_vocabulary(self.target, entry.base, reference_name=names[0], other_name=names[1])
            return vector
        assert entry.base is not None, "open_sources asked for it"
        models: dict[str, StateDict] = {}
        rows = self._rows(entry, settings)
        named = {str(entry): entry.tuned, f"the base model {entry.base.model.name}": entry.base}
        for (name, model), row in zip(named.items(), rows, strict=True):
            whole = Without(model, settings.omit)
            models[name] = whole if row is None else Aligned(whole, row)
            target_name = f"the target model {self.target.model.name}"
            check_same_tensors(target, models[name], reference_name=target_name, other_name=name)
        tuned, base_model = models.values()
        return Difference(tuned=tuned, base=base_model)

    def _rows(self, entry: TunedModel, settings: MergeSettings) -> Sequence[Rows | None]:
        if settings.vocabulary == "same" or entry.base is None or isinstance(entry.tuned, Adapter):
            return (None, None)
        whose = (str(entry), f"the base model {entry.base.model.name}")
        if self.united is not None:
            return self.united.align((entry.tuned, entry.base), whose=whose)
        return align_rows(self.target, (entry.tuned, entry.base), whose=whose)

    def tuned_state_dict(self, entry: TunedModel, settings: MergeSettings) -> StateDict | None:
        """A tuned model itself, to compare with; None if it is not of the target's shapes or needs an unknown base."""
        target = self.target_state_dicts(settings)[0]
        if entry.base is None or any(self._rows(entry, settings)):
            return None
        base = Without(entry.base, settings.omit)
        if any(name not in base.names or base.spec(name).shape != target.spec(name).shape for name in target.names):
            return None  # the base of an adapter, which need not be like the target in all
        if not isinstance(entry.tuned, Adapter):
            return Without(entry.tuned, settings.omit)
        vector = LoraTaskVector(adapter=entry.tuned, reference=base, base=base)
        whole = Merge(target=base, task_vectors={entry.label: vector}, grouping=Grouping("uniform"))
        return whole.at(dict.fromkeys(whole.weight_names, 1.0))

    def check_unchanged(self) -> None:
        """Refuse models whose files were changed since they were opened.

        Raises:
            CheckpointError: with the file.
        """
        for model in self.models():
            if isinstance(model, Checkpoint):
                model.check_unchanged()


def open_sources(
    *,
    target: str | Sequence[str],
    tuned: Sequence[str],
    base: str | None,
    vocabulary: str,
    cache_dir: str | None,
    open_model: Callable[[str], Header] | None = None,
) -> Sources:
    """Find and open the models of a merge and check what does not depend on how they are merged.

    Args:
        target: folder or Hub id; several for a mixture of experts.
        tuned: `name` or `name:base`, each a folder or Hub id; a model or an adapter.
        base: of those that name none.
        vocabulary: one of VOCABULARIES.
        cache_dir: the Hub cache; None means the default one.
        open_model: how to open a name; None for a whole download.

    Raises:
        ConfigError: a tuned model without a base.
        CheckpointError: a model cannot be found or read.
        IncompatibleError: models that cannot be merged whatever the settings.
    """
    opened: dict[str, Header] = {}

    def once(name: str) -> Header:
        if name not in opened:
            opened[name] = (open_model or (lambda n: open_checkpoint(n, cache_dir=cache_dir)))(name)
        return opened[name]

    targets = [once(name) for name in ([target] if isinstance(target, str) else target)]
    for model in targets:
        check_whole(model, role="target")
    entries: list[TunedModel] = []
    labels = unique_labels([split_name(name)[0] for name in tuned])
    for name, label in zip(tuned, labels, strict=True):
        own, own_base = split_name(name)
        model, base_name = once(own), own_base or base
        if base_name is None and not isinstance(model, Adapter):
            raise ConfigError(
                f"--tuned_model {own}: needs the model it was tuned from, as --base_model or as {own}:base"
            )
        entries.append(TunedModel(label, model, None if base_name is None else once(base_name)))
    return make_sources(targets, entries, vocabulary)


def make_sources(targets: Sequence[Header], tuned: Sequence[TunedModel], vocabulary: str) -> Sources:
    """Check opened models against each other, as far as it does not depend on how they are merged.

    Raises:
        IncompatibleError: models that cannot be merged whatever the settings.
    """
    for entry in tuned:
        check_entry(targets[0], entry, vocabulary)
    for other in targets[1:]:
        if vocabulary != "union":
            names = (f"the target model {targets[0].model.name}", f"the target model {other.model.name}")
            hint = "use experts of one tokenizer, or --vocabulary union for the tokens of all"
            check_same_vocabulary(targets[0], other, reference_name=names[0], other_name=names[1], hint=hint)
    whose = [f"the target model {target.model.name}" for target in targets]
    united = unite(targets, whose=whose) if vocabulary == "union" else None
    return Sources(targets=targets, tuned=tuned, united=united)


def check_entry(target: Header, entry: TunedModel, vocabulary: str) -> None:
    """Refuse models that cannot be merged however they are grouped.

    Raises:
        IncompatibleError: quantized weights, an adapter where none can be, another vocabulary.
    """
    if entry.base is not None:
        check_whole(entry.base, role="base")
        if isinstance(entry.tuned, Adapter):
            check_adapter_base(entry.tuned, entry.base)
    if isinstance(entry.tuned, Adapter):
        return
    check_mergeable(entry.tuned, name=str(entry))
    if vocabulary == "same":
        for other, name in ((entry.base, "the base model"), (entry.tuned, "the tuned model")):
            if other is not None:
                target_name, other_name = f"the target model {target.model.name}", f"{name} {other.model.name}"
                check_same_vocabulary(target, other, reference_name=target_name, other_name=other_name)


def check_whole(model: Header, *, role: str) -> None:
    """Refuse an adapter where a whole model is needed, and weights that cannot be merged."""
    if isinstance(model, Adapter):
        raise IncompatibleError(f"the {role} model {model.model.name} is an adapter, which can be a tuned model only")
    check_mergeable(model, name=f"the {role} model {model.model.name}")


def open_checkpoint(name: str, *, cache_dir: str | None) -> Checkpoint:
    """Find and open a model or an adapter."""
    model = resolve(name, cache_dir=cache_dir)
    return Adapter(model) if is_adapter(model) else Checkpoint(model)


def unique_labels(names: Sequence[str]) -> list[str]:
    """The last part of each name, numbered where two are the same."""
    labels: list[str] = []
    for name in names:
        last = Path(name.partition("@")[0]).name or "tuned"
        label, n = last, 2
        while label in labels:
            label, n = f"{last}#{n}", n + 1
        labels.append(label)
    return labels


def check_finite(sources: Sources, omit: Sequence[str]) -> None:
    """Read all weights once and refuse NaN and infinity.

    Raises:
        CheckpointError: with the model and the tensor.
    """
    for model in sources.models():
        for name in _floats(model):
            if name not in omit and not all_finite(model.array(name)):
                raise CheckpointError(f"model {model.model.name}: {name} holds NaN or infinity: use sound weights")


def _floats(model: Header) -> Iterator[str]:
    return (name for name in model.names if model.spec(name).dtype in MERGEABLE_DTYPES)
