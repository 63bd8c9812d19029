"""A mixture of experts from a YAML file: its models opened and checked, its router made, the model written."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tvmerge.checkpoint import Checkpoint
from tvmerge.config.mixture import Mixture
from tvmerge.config.moe import MoeConfig
from tvmerge.delta import all_finite
from tvmerge.errors import CheckpointError, ConfigError, RunError
from tvmerge.files import check_new, local_path, staged_directory, write_text
from tvmerge.gates import make_router, mixture_folder
from tvmerge.hub import ModelId
from tvmerge.models.device import choose_device
from tvmerge.models.transformers import unread_by_all, unread_tensors
from tvmerge.moe import Average, MixtureOfExperts
from tvmerge.moe_config import DenseModel, find_layout, moe_config
from tvmerge.rebuild import write_mixture_files
from tvmerge.sources import check_whole, open_checkpoint
from tvmerge.state_dict import DTYPES, Array, StateDict, Without
from tvmerge.union import UnitedVocabulary, unite
from tvmerge.vocabulary import check_same_vocabulary
from tvmerge.writer import NotFiniteError, write_weights

__all__ = ["Members", "assemble"]

_ONE_TOKENIZER = "use experts of one tokenizer, or --vocabulary union for the tokens of all"


@dataclass(frozen=True)
class Members:
    """The opened models of a mixture."""

    experts: Sequence[Checkpoint]
    base: Checkpoint | None  # what gives attention, norms and embeddings, if it is named

    @classmethod
    def open(cls, mixture: Mixture, *, cache_dir: str | None) -> Members:
        """Find and open them, each once, and check those that need no look at the others.

        Raises:
            CheckpointError: a model cannot be found or read.
            IncompatibleError: an adapter, or quantized weights.
        """
        opened: dict[str, Checkpoint] = {}
        named = [("expert", expert.source_model) for expert in mixture.experts]
        for role, name in [*named, *([("base", mixture.base_model)] if mixture.base_model else [])]:
            if name not in opened:
                opened[name] = open_checkpoint(name, cache_dir=cache_dir)
                check_whole(opened[name], role=role)
        base = opened[mixture.base_model] if mixture.base_model else None
        return cls([opened[name] for _, name in named], base)

    @property
    def dense(self) -> Checkpoint:
        """Whose configuration and tokenizer the mixture gets."""
        return self.base or self.experts[0]

    def models(self) -> list[Checkpoint]:
        """All of them, each once, `dense` first."""
        return list({id(model): model for model in (self.dense, *self.experts)}.values())

    def describe(self, model: Checkpoint, *, role: str = "expert") -> DenseModel:
        """A model as its configuration tells."""
        return DenseModel(f"the {role} {model.model.name}", model.config, model.dtype)

    def unite(self) -> UnitedVocabulary | None:
        """The vocabulary of all of them, under the ids of `dense`; None where they share one.

        Raises:
            IncompatibleError: tokenizers that cannot be united.
        """
        return unite(self.models(), whose=[f"the model {model.model.name}" for model in self.models()])

    def config(self, mixture: Mixture, united: UnitedVocabulary | None = None) -> dict[str, Any]:
        """The content of the mixture's config.json.

        Args:
            mixture: the YAML file.
            united: their vocabulary, if none of them has it; without, all must have the same.

        Raises:
            IncompatibleError: models that do not go together, or not into a mixture.
            CheckpointError: a configuration that transformers cannot read.
        """
        config = moe_config(
            [self.describe(model) for model in self.experts],
            base=None if self.base is None else self.describe(self.base, role="base model"),
            experts_per_token=mixture.experts_per_token,
            dtype=mixture.dtype,
            vocabulary_size=None if united is None else united.size,
        )
        names = [f"the model {model.model.name}" for model in self.models()]
        for model, name in zip(self.models(), names, strict=True):
            if united is None:
                check_same_vocabulary(self.dense, model, reference_name=names[0], other_name=name, hint=_ONE_TOKENIZER)
        return config

    def state_dicts(self, united: UnitedVocabulary | None) -> dict[Checkpoint, StateDict]:
        """Each of them as a mixture reads it: less what no model reads, with a row for each of its tokens.

        Raises:
            CheckpointError: transformers does not know a model.
            IncompatibleError: a tensor that one model reads and another does not.
        """
        omit = unread_by_all(self.models())
        read: list[StateDict] = [Without(model, omit) for model in self.models()]
        return dict(zip(self.models(), read if united is None else united.complete(read), strict=True))


def assemble(config: MoeConfig) -> None:
    """Write the mixture that a YAML file describes.

    Raises:
        InputError: something that the user gave cannot work; nothing was written.
        RunError: the prompts do not fit on the device, or the disk is full; nothing was kept.
    """
    output = local_path(config.output_dir, flag="--output_dir").resolve()
    check_new(output)
    mixture = Mixture.load(local_path(config.mixture, flag="mixture"))
    if config.moe_base == "average" and mixture.base_model is not None:
        raise ConfigError(
            f"--moe_base average: {config.mixture} names the base_model {mixture.base_model}: leave one of both out"
        )
    device = choose_device(config.device)
    members = Members.open(mixture, cache_dir=config.cache_dir)
    united = members.unite() if config.vocabulary == "union" else None
    settings = members.config(mixture, united)
    read = members.state_dicts(united)
    experts = [read[model] for model in members.experts]
    base = Average(experts) if config.moe_base == "average" else read[members.dense]
    with mixture_folder(members.dense.model.path, settings, united=united) as tokenizer:
        router = _router(mixture, members, base, settings, tokenizer, seed=config.gate_seed, device=device)
    state_dict = MixtureOfExperts(
        experts=experts,
        router=router,
        layout=find_layout(members.describe(members.dense)),
        base=base,
        dtype=None if mixture.dtype is None else DTYPES[mixture.dtype],
        labels=[f"the expert {model.model.name}" for model in members.experts],
    )
    with staged_directory(output) as staging:
        _write(state_dict, settings, members, united, staging)
        write_text(staging / "README.md", _card(config, mixture, members))


def _router(
    mixture: Mixture,
    members: Members,
    base: StateDict,
    settings: dict[str, Any],
    tokenizer: Path,
    *,
    seed: int,
    device: str,
) -> Array:
    if mixture.gate_mode == "uniform" and mixture.experts_per_token < len(mixture.experts):
        print(
            f"gate_mode uniform: the scores of all {len(mixture.experts)} experts tie, so that every token goes to the "
            f"same {mixture.experts_per_token}: set experts_per_token to {len(mixture.experts)} for their mean",
            file=sys.stderr,
        )

    return make_router(
        mixture.gate_mode,
        base=base,
        folder=members.dense.model.path,
        tokenizer=tokenizer,
        config=settings,
        prompts=[expert.prompts for expert in mixture.experts],
        seed=seed,
        device=device,
    )


def _write(
    state_dict: MixtureOfExperts,
    settings: dict[str, Any],
    members: Members,
    united: UnitedVocabulary | None,
    folder: Path,
) -> None:
    """Write weights, configuration and tokenizer, and see that transformers finds a place for every tensor.

    Raises:
        CheckpointError: a model holds NaN or infinity, or was changed meanwhile.
        RunError: values are too large for the dtype, or the disk is full.
    """
    try:
        write_weights(state_dict, folder)
        for model in members.models():
            model.check_unchanged()
        write_mixture_files(members.dense.model.path, settings, folder, united=united)
        unread = unread_tensors(Checkpoint(ModelId(name=str(folder), revision=None, path=folder)))
        assert not unread, f"{unread[0]} has no place in the mixture's class"
    except NotFiniteError as error:
        for model in members.models():
            for name in model.names:
                if not all_finite(model.array(name)):
                    raise CheckpointError(
                        f"model {model.model.name}: {name} holds NaN or infinity: use sound weights"
                    ) from error
        raise RunError(f"{error}: values are too large for the dtype: use dtype: bfloat16 or float32") from error
    except OSError as error:
        raise RunError(f"{folder.parent}: cannot be written, nothing was kept: {error.strerror or error}") from error


def _card(config: MoeConfig, mixture: Mixture, members: Members) -> str:
    """README.md of a mixture, as the Hub reads it."""
    metadata: dict[str, object] = {"library_name": "transformers", "tags": ["merge", "moe", "tvmerge"]}
    # The Hub takes ids only, and refuses a folder of somebody's machine.
    if of_hub := [model.model.name for model in members.models() if model.model.revision]:
        metadata["base_model"] = of_hub
    revisions = "\n".join(
        f"- `{model.model.name}{f'@{model.model.revision}' if model.model.revision else ''}`"
        for model in members.models()
    )
    base = "the mean of all experts" if config.moe_base == "average" else f"`{members.dense.model.name}`"
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---

# A mixture of experts assembled by tvmerge

{len(members.experts)} experts, {mixture.experts_per_token} per token. Attention, norms and embeddings are those of
{base}. Nothing was trained; the router was made by `gate_mode: {mixture.gate_mode}` (seed {config.gate_seed}).

{revisions}

```yaml
{mixture.text.strip()}
```

`tvmerge moe` makes this model of them, with `--moe_base {config.moe_base} --vocabulary {config.vocabulary}
--gate_seed {config.gate_seed}`.
"""
