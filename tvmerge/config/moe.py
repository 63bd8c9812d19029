"""How a mixture of experts is assembled, beside the YAML file that describes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tvmerge.errors import ConfigError

__all__ = ["MoeConfig"]


@dataclass(kw_only=True)
class MoeConfig:
    """Assemble a mixture of experts from dense models, without training or a search.

    Args:
        mixture: a YAML file as mergekit-moe reads it
        output_dir: folder to write the model into; it must not exist or be empty
        moe_base: what gives attention, norms and embeddings where the file names no base_model; first is the first
            expert, average the mean of all experts
        vocabulary: what to do if tokenizers differ; same refuses, union gives each token the row of a model that has it
        gate_seed: seed of the routers that are drawn at random
        device: where the base model answers prompts for gate_mode hidden; auto, cpu, cuda, ...
        cache_dir: where models of the Hub are kept; default is the Hub's own cache
    """

    mixture: str
    output_dir: str
    moe_base: Literal["first", "average"] = "first"
    vocabulary: Literal["same", "union"] = "same"
    gate_seed: int = 0
    device: str = "auto"
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without opening anything.

        Raises:
            ConfigError: a seed below 0.
        """
        if self.gate_seed < 0:
            raise ConfigError(f"--gate_seed must be at least 0, got {self.gate_seed}")
