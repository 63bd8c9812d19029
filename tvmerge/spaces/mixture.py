"""The space of mixtures: several targets, each plus its own weights times the task vectors, as experts of one model."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from optuna.distributions import FloatDistribution
from transformers import PreTrainedTokenizerBase

from tvmerge.checkpoint import Checkpoint
from tvmerge.config import SearchConfig
from tvmerge.config.mixture import load_prompts
from tvmerge.errors import StudyError
from tvmerge.files import write_bytes
from tvmerge.gates import make_router, mixture_folder
from tvmerge.hub import ModelId
from tvmerge.mixture import MixtureMerge
from tvmerge.models.transformers import TransformersModel, load_tokenizer, unread_by_all
from tvmerge.moe import Average
from tvmerge.rebuild import (
    EXPERTS_FOLDER,
    ROUTER_FILE,
    expert_recipes,
    load_router,
    mixture_config,
    mixture_merge,
    router_shape,
    write_experts,
    write_model,
)
from tvmerge.recipe import RECIPE_FILE, MixtureRecipe, Recipe, source_entries
from tvmerge.router import PROMPTED, ExpertPrompts, drawn_gates, router_digest
from tvmerge.sources import open_sources
from tvmerge.spaces import Column, Proven, Space
from tvmerge.state_dict import Array, StateDict
from tvmerge.writer import model_files

__all__ = ["TEMPERATURES", "MixtureSpace"]

#: Least and greatest temperature of a router that is searched, on a logarithmic scale.
TEMPERATURES = (0.25, 4.0)


class MixtureSpace(Space):
    """All mixtures of several targets.

    Args:
        config: of the run.
        output: its folder, which keeps the router.

    Raises:
        InputError: its models cannot be found, or are no experts of one mixture.
    """

    noun = "mixture"

    def __init__(self, config: SearchConfig, output: Path) -> None:
        sources = open_sources(**config.models)
        self._mixture_settings = config.mixture_settings
        dtype = config.merge_settings.dtype
        self._config = mixture_config(sources, self._mixture_settings, dtype=dtype)
        self._prompts = [ExpertPrompts()] * len(sources.targets)
        if config.gate_prompts is not None:
            self._prompts = load_prompts(config.gate_prompts, config.target_models)
        omit = unread_by_all(sources.whole_models())
        super().__init__(config, sources, replace(config.merge_settings, omit=omit))
        self._merges = sources.merges(self.settings, keep=config.delta_storage == "memory")
        self._router_file = output / ROUTER_FILE
        self._mixture = self._of(np.zeros(router_shape(sources, self._config), np.float32))
        if config.gate_mode not in PROMPTED:
            self._mixture = self._of(drawn_gates(config.gate_mode, self._mixture.router.shape, seed=config.gate_seed))

    def _of(self, router: Array) -> MixtureMerge:
        return mixture_merge(self.sources, self._merges, self._mixture_settings, router)

    @property
    def ranges(self) -> Mapping[str, FloatDistribution]:
        """One for each weight of each expert, and for the temperature of each layer's router if it is searched."""
        temperatures = dict.fromkeys(self._mixture.gate_names, FloatDistribution(*TEMPERATURES, log=True))
        return {**self._weight_ranges(self._mixture.weight_names), **temperatures}

    def uniform(self, weight: float) -> dict[str, float]:
        """All weights are the same; temperatures are 1."""
        return dict.fromkeys(self._mixture.weight_names, weight) | dict.fromkeys(self._mixture.gate_names, 1.0)

    def at(self, point: Mapping[str, float]) -> StateDict:
        """The mixture."""
        return self._mixture.at(point)

    def identity(self) -> dict[str, Any]:
        """Models and prompts."""
        prompts = json.dumps([asdict(own) for own in self._prompts])
        return {**super().identity(), "gate_prompts": hashlib.sha256(prompts.encode()).hexdigest()[:16]}

    def open_model(self, *, device: str, recall: Callable[[str], Any]) -> TransformersModel:
        """The mixture of the targets; its router is made once for the whole study.

        Raises:
            StudyError: the study's router has gone, or is another one.
        """
        known = recall("router")
        if self.config.gate_mode in PROMPTED:
            self._mixture = self._of(self._make_router(device) if known is None else self._kept_router())
        if known not in (None, router_digest(self._mixture.router)):
            raise StudyError(f"{self._router_file}: is not the router of this study: restore it, or begin anew")
        with self._folder() as folder:
            first = self._mixture.at(self.uniform(0.0))
            return TransformersModel.from_config(folder, state_dict=first, device=device, dtype=self.config.dtype)

    def _folder(self) -> AbstractContextManager[Path]:
        return mixture_folder(self.sources.target.model.path, self._config, united=self.sources.united)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """That of the first target, or the united one."""
        with self._folder() as folder:
            return load_tokenizer(folder)

    def _make_router(self, device: str) -> Array:
        targets = self.sources.target_state_dicts(self.settings)
        with self._folder() as folder:
            return make_router(
                self.config.gate_mode,
                base=Average(targets) if self.config.moe_base == "average" else targets[0],
                folder=self.sources.target.model.path,
                tokenizer=folder,
                config=self._config,
                prompts=self._prompts,
                seed=self.config.gate_seed,
                device=device,
            )

    def _kept_router(self) -> Array:
        try:
            router: Array = np.load(self._router_file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise StudyError(
                f"{self._router_file}: holds the router of this study and cannot be read: restore it, or begin anew"
            ) from error
        if router.shape != self._mixture.router.shape or router.dtype != np.float32:
            raise StudyError(f"{self._router_file}: is not the router of this study: restore it, or begin anew")
        return router

    def remember(self, keep: Callable[[str, Any], None]) -> None:
        """Keep the router in the run's folder, and its digest with the study."""
        content = io.BytesIO()
        np.save(content, self._mixture.router, allow_pickle=False)
        write_bytes(self._router_file, content.getvalue())
        keep("router", router_digest(self._mixture.router))

    def singles(self, point: Mapping[str, float]) -> list[Column]:
        """Each expert of the mixture at a point, as a model of its own."""
        united = " united" if self.sources.united is not None else ""
        experts = [self._mixture.expert(n, point) for n in range(len(self._merges))]
        return [
            Column(f"best expert ({n}){united}", f"expert{n}", None, self._mixture.alone(expert))
            for n, expert in enumerate(experts, start=1)
        ]

    def columns(self, proven: Proven, single: Column | None) -> list[Column]:
        """The targets, the tuned models, the mixtures of one weight for all, the best expert, and the best mixture."""
        # With a united vocabulary a target reads text as the mixture does, which is not how it reads alone.
        united = " united" if self.sources.united is not None else ""
        models = self.sources.target_state_dicts(self.settings)
        targets = [(f"target {n}{united}", f"target/{n}", model) for n, model in enumerate(models, start=1)]
        several = len(self.sources.tuned) > 1
        tuned = [
            (entry.label if several else "tuned", f"tuned/{entry.label}" if several else "tuned", model)
            for entry in self.sources.tuned
            if (model := self.sources.tuned_state_dict(entry, self.settings)) is not None
        ]
        return [
            *(
                Column(label, model, None, self._mixture.alone(dense), is_target=True)
                for label, model, dense in targets
            ),
            *(Column(label, model, None, self._mixture.alone(dense)) for label, model, dense in tuned),
            self.trial_column("MoE at 0", proven.zero),
            self.trial_column("MoE at 1", proven.one),
            self.trial_column(f"best uniform MoE ({proven.uniform_weight:g})", proven.best_uniform),
            *([] if single is None else [single]),
            *self.best_columns(proven),
        ]

    def explanation(self) -> str:
        """The best expert is no dense search."""
        return (
            "The best expert alone has the weights that were found for the mixture: a run with one --target_model may "
            "find better ones for it."
        )

    def recipe(self, weights: Mapping[str, float], **more: Any) -> Recipe:
        """Sources, grouping and weights, and how the experts become one model."""
        entries = source_entries(self.sources, vocabulary=self.settings.vocabulary)
        mixture = MixtureRecipe(
            further_targets=entries["further_targets"],
            gate_mode=self.config.gate_mode,
            gate_seed=self.config.gate_seed,
            router=router_digest(self._mixture.router),
            **asdict(self._mixture_settings),
        )
        return self._recipe(weights, mixture=mixture, **more)

    def write(self, recipe: Recipe, folder: Path) -> None:
        """Write the mixture, and its experts if they are asked for."""
        write_model(recipe, self.sources, folder, router=self._mixture.router)
        if self.config.save_experts:
            write_experts(recipe, self.sources, folder)

    def is_whole(self, recipe: Recipe, folder: Path) -> bool:
        """As of a dense model, and its router and experts are too."""
        assert recipe.mixture is not None, "it is of this space"
        load_router(folder, recipe.mixture, self._mixture.router.shape)
        experts = expert_recipes(recipe, self.sources) if self.config.save_experts else []
        for n, (target, own) in enumerate(zip(self.sources.targets, experts, strict=bool(experts)), start=1):
            place = folder / EXPERTS_FOLDER / f"expert{n}"
            Checkpoint(ModelId(name=str(place), revision=None, path=place))
            files = [path.name for path in model_files(target.model.path)]
            if Recipe.load(place / RECIPE_FILE) != own or not all((place / name).is_file() for name in files):
                return False
        return super().is_whole(recipe, folder)

    def files(self) -> list[str]:
        """Those of the first target, and the router."""
        united, of_first = self.sources.united, model_files(self.sources.target.model.path)
        return [
            *(path.name for path in of_first if united is None or united.keeps(path)),
            ROUTER_FILE,
        ]
