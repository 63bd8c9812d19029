"""The YAML file of a mixture of experts, as mergekit-moe reads it too."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tvmerge.errors import ConfigError
from tvmerge.files import local_path
from tvmerge.router import GATE_MODES, PROMPTED, ExpertPrompts
from tvmerge.state_dict import DTYPES

__all__ = ["Mixture", "MixtureExpert", "load_prompts"]

_KEYS = ("base_model", "gate_mode", "dtype", "experts_per_token", "experts")
_EXPERT_KEYS = ("source_model", "positive_prompts", "negative_prompts")


@dataclass(frozen=True)
class MixtureExpert:
    """A model whose MLPs become an expert, and the prompts that it is for."""

    source_model: str  # folder or Hub id
    prompts: ExpertPrompts


@dataclass(frozen=True)
class Mixture:
    """A mixture as mergekit-moe's YAML describes it."""

    experts: Sequence[MixtureExpert]
    base_model: str | None = None  # what gives attention, norms and embeddings; None: it is not named
    gate_mode: str = "hidden"  # a key of GATE_MODES
    dtype: str | None = None  # a key of DTYPES; None: that of the base
    experts_per_token: int = 2
    text: str = ""  # the file as it was read

    @classmethod
    def load(cls, path: Path) -> Mixture:
        """Read and check a file.

        Raises:
            ConfigError: no such file, not YAML, a key that is missing or unknown, a value that cannot be.
        """
        text, content = _read(path)
        _check_keys(content, where=str(path), known=_KEYS, needed="experts")
        entries = content["experts"]
        if not isinstance(entries, list) or not entries:
            raise ConfigError(f"{path}: experts must be a list of source_model and prompts")
        experts = [_expert(entry, where=f"{path}: expert {n}") for n, entry in enumerate(entries, start=1)]
        values = {key: content[key] for key in _KEYS[:-1] if content.get(key) is not None}
        mixture = cls(experts=experts, text=text, **values)
        mixture._check(path)
        return mixture

    def _check(self, path: Path) -> None:
        if self.base_model is not None and not _is_text(self.base_model):
            raise ConfigError(f"{path}: base_model must be a folder or a Hub id, got {self.base_model!r}")
        for key, value, known in (("gate_mode", self.gate_mode, GATE_MODES), ("dtype", self.dtype, (None, *DTYPES))):
            if not isinstance(value, (str, type(None))) or value not in known:
                raise ConfigError(f"{path}: unknown {key} {value!r}, known are {', '.join(filter(None, known))}")
        if isinstance(self.experts_per_token, bool) or not isinstance(self.experts_per_token, int):
            raise ConfigError(f"{path}: experts_per_token must be a whole number, got {self.experts_per_token!r}")
        if self.gate_mode in PROMPTED:
            for n, expert in enumerate(self.experts, start=1):
                if not expert.prompts.positive:
                    raise ConfigError(
                        f"{path}: expert {n} has no positive_prompts, which gate_mode {self.gate_mode} is made from: "
                        f"give some, or use gate_mode {', '.join(mode for mode in GATE_MODES if mode not in PROMPTED)}"
                    )


def load_prompts(file: str, experts: Sequence[str]) -> list[ExpertPrompts]:
    """Read the prompts of experts from a file: mergekit-moe's, of which all else is left, or `experts` alone.

    Args:
        file: as --gate_prompts names it, YAML; `source_model` may be left out.
        experts: the names of the models, in the order of the file.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, another number of experts, an expert of another name or
            without positive prompts.
    """
    path = local_path(file, flag="--gate_prompts")
    _, content = _read(path)
    _check_keys(content, where=str(path), known=_KEYS, needed="experts")
    entries = content["experts"]
    if not isinstance(entries, list) or len(entries) != len(experts):
        found = len(entries) if isinstance(entries, list) else "none"
        raise ConfigError(f"{path}: experts must be a list of the prompts of {len(experts)} experts, got {found}")
    prompts = []
    for n, (entry, name) in enumerate(zip(entries, experts, strict=True), start=1):
        where = f"{path}: expert {n}"
        _check_keys(entry, where=where, known=_EXPERT_KEYS, needed="positive_prompts")
        if entry.get("source_model") is not None and _folder(entry["source_model"]) != _folder(name):
            raise ConfigError(
                f"{where}: source_model is {entry['source_model']}, where --target_model has {name}: give both in the "
                "same order, or leave it out"
            )
        prompts.append(_prompts(entry, where=where))
        if not prompts[-1].positive:
            raise ConfigError(f"{where}: positive_prompts is empty, write what the expert is for")
    return prompts


def _folder(name: Any) -> str:
    """A model's name, in one spelling of the same path."""
    return str(Path(str(name)))


def _read(path: Path) -> tuple[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        return text, yaml.safe_load(text)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file, name a YAML file as mergekit-moe reads it") from None
    except (OSError, yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from error


def _expert(entry: Any, *, where: str) -> MixtureExpert:
    _check_keys(entry, where=where, known=_EXPERT_KEYS, needed="source_model")
    if not _is_text(entry["source_model"]):
        raise ConfigError(f"{where}: source_model must be a folder or a Hub id, got {entry['source_model']!r}")
    return MixtureExpert(entry["source_model"], _prompts(entry, where=where))


def _prompts(entry: Mapping[str, Any], *, where: str) -> ExpertPrompts:
    prompts = {}
    for key in ("positive_prompts", "negative_prompts"):
        texts = entry.get(key) or []
        if not isinstance(texts, list) or not all(_is_text(text) for text in texts):
            raise ConfigError(f"{where}: {key} must be a list of text that is not empty")
        prompts[key.removesuffix("_prompts")] = tuple(texts)
    return ExpertPrompts(**prompts)


def _check_keys(content: Any, *, where: str, known: Collection[str], needed: str) -> None:
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where}: must be a mapping of keys to values, which are {', '.join(known)}")
    unknown = sorted(str(key) for key in content if key not in known)
    if unknown:
        raise ConfigError(f"{where}: unknown keys: {', '.join(unknown)}; known are {', '.join(known)}")
    if needed not in content:
        raise ConfigError(f"{where}: the key {needed} is missing")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
