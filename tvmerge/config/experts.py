"""The settings of a search whose model is a mixture of experts: how several targets become one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from tvmerge.config.merge import MergeConfig
from tvmerge.errors import ConfigError
from tvmerge.moe import MAX_EXPERTS
from tvmerge.router import PROMPTED

if TYPE_CHECKING:
    from tvmerge.mixture import MixtureSettings

__all__ = ["ExpertsConfig"]


@dataclass(kw_only=True)
class ExpertsConfig(MergeConfig):
    """How several target models become the experts of one mixture; without meaning for a single one.

    Args:
        share_weights: all experts share one set of weights, where each has its own otherwise
        moe_base: what gives a mixture its attention, norms and embeddings; first is the first expert, average the mean
            of all experts
        experts_per_token: how many experts the router picks for a token
        gate_mode: what the router is made from; random and uniform_random (smaller values, so more even shares) draw it
            by gate_seed, hidden (hidden_last) takes what the model makes of the last token of gate_prompts, hidden_avg
            of all their tokens, cheap_embed their embeddings alone, uniform gives all experts the same share
        gate_seed: seed of a router that is drawn at random
        gate_prompts: YAML file that gives each expert positive_prompts and perhaps negative_prompts, as mergekit-moe's,
            of which nothing else is read
        search_gate: search a temperature of the router in each layer too
        save_experts: save each expert of the best mixture as a model of its own beside it
    """

    #: Settings that only a mixture has, with their values for a single target.
    ONLY_MIXTURES: ClassVar[dict[str, Any]] = {
        "share_weights": False,
        "moe_base": "first",
        "experts_per_token": 2,
        "gate_mode": "random",
        "gate_seed": 0,
        "gate_prompts": None,
        "search_gate": False,
        "save_experts": False,
    }

    share_weights: bool = False
    moe_base: Literal["first", "average"] = "first"
    experts_per_token: int = 2
    gate_mode: Literal["random", "hidden", "hidden_last", "hidden_avg", "cheap_embed", "uniform_random", "uniform"] = (
        "random"
    )
    gate_seed: int = 0
    gate_prompts: str | None = None
    search_gate: bool = False
    save_experts: bool = False

    @property
    def is_mixture(self) -> bool:
        """Whether there are several targets."""
        return len(self.target_models) > 1

    @property
    def mixture_settings(self) -> MixtureSettings:
        """How merges become one model."""
        from tvmerge.mixture import MixtureSettings  # not before a command runs: --help must be fast

        return MixtureSettings(
            base=self.moe_base,
            experts_per_token=self.experts_per_token,
            share_weights=self.share_weights,
            search_gate=self.search_gate,
        )

    def check_experts(self) -> None:
        """Check every setting of the mixture that can be checked without opening anything.

        Raises:
            ConfigError: the first value that cannot work.
        """
        n = len(self.target_models)
        if n > MAX_EXPERTS:
            raise ConfigError(f"--target_model: a mixture has 2 to {MAX_EXPERTS} experts, got {n}: name fewer")
        if not self.is_mixture:
            set_here = [name for name, usual in self.ONLY_MIXTURES.items() if getattr(self, name) != usual]
            if set_here:
                raise ConfigError(
                    f"--{set_here[0]} is for a mixture of experts: name 2 to {MAX_EXPERTS} models as --target_model"
                )
            if self.vocabulary == "union":
                raise ConfigError(
                    "--vocabulary union is for a mixture of experts: intersect merges the rows of shared tokens"
                )
            return
        if not 1 <= self.experts_per_token <= n:
            raise ConfigError(f"--experts_per_token must be 1 to {n} of {n} experts, got {self.experts_per_token}")
        if not 0 <= self.gate_seed < 1 << 63:
            raise ConfigError(f"--gate_seed must be at least 0 and less than 2^63, got {self.gate_seed}")
        if self.gate_mode in PROMPTED and self.gate_prompts is None:
            raise ConfigError(
                f"--gate_mode {self.gate_mode} needs --gate_prompts: a YAML file with the prompts of each expert"
            )
        if self.gate_mode not in PROMPTED and self.gate_prompts is not None:
            raise ConfigError(
                f"--gate_prompts needs --gate_mode hidden or cheap_embed, and it is {self.gate_mode}: "
                "name one, or leave the prompts out (--gate_prompts null, where a file of settings names them)"
            )
        self._check_gate()

    def _check_gate(self) -> None:
        """Refuse a search for temperatures that change nothing, and experts that no token would ever reach."""
        if self.search_gate and self.experts_per_token == 1:
            raise ConfigError("--search_gate: with --experts_per_token 1 an expert has the weight 1 at any temperature")
        if self.gate_mode == "uniform":
            n = len(self.target_models)
            if self.search_gate:
                raise ConfigError("--search_gate: --gate_mode uniform has no scores that a temperature could change")
            if self.experts_per_token < n:
                raise ConfigError(
                    f"--gate_mode uniform: the scores of all experts tie, so that every token would go to the same "
                    f"{self.experts_per_token}: use --experts_per_token {n}, or --gate_mode random"
                )
