"""Models by name: a local folder, or an id of the Hugging Face Hub, which is downloaded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tvmerge.errors import CheckpointError, ConfigError

__all__ = ["CARD", "MODEL_FILES", "Description", "ModelId", "describe", "resolve", "split_name"]

#: Files of a model folder that go into a merged one: configuration, tokenizer, licence; never weights or a README.
MODEL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*", "LICENCE*", "NOTICE*")
#: What a model says of itself, as its licence; fetched with it, and never part of a merged one.
CARD = "README.md"
_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*(/[\w.-]+)?)(@(?P<revision>(?!.*\.\.)\w[\w./-]*))?")


@dataclass(frozen=True)
class ModelId:
    """A model as the user named it, and where it lies."""

    name: str  # a folder or a Hub id, without the revision
    revision: str | None  # the resolved commit of a Hub model; None for a local folder
    path: Path  # the local folder


def resolve(name: str, *, cache_dir: str | None = None) -> ModelId:
    """Find a model: a local folder, else a Hub id that is downloaded (or found in the cache).

    Args:
        name: a folder, or `owner/model`, or `owner/model@revision` where the revision is a branch, a tag or a commit.
        cache_dir: the Hub cache; None means the default one.

    Raises:
        CheckpointError: neither a folder nor a model of the Hub.
    """
    try:
        path = Path(name).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, or of a user who is not here
        raise CheckpointError(f"model {name}: no such folder ({error})") from error
    if is_folder:
        return ModelId(name=name, revision=None, path=path)
    if is_file:
        raise CheckpointError(f"model {name}: is a file, name the folder it lies in")
    match = _HUB_ID.fullmatch(name)
    if match is None:
        raise CheckpointError(f"model {name}: no such folder, and not of the form owner/model or owner/model@revision")
    return _download(name, repo=match["repo"], revision=match["revision"], cache_dir=cache_dir)


def _download(name: str, *, repo: str, revision: str | None, cache_dir: str | None, weights: bool = True) -> ModelId:
    from huggingface_hub import snapshot_download

    # HTTPError is that of the HTTP library, which differs between versions of huggingface_hub.
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

    patterns = [*MODEL_FILES, CARD, *(["*.safetensors"] if weights else [])]
    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=patterns,
            ignore_patterns=["*/*", "consolidated*"],  # the same weights again, in another format
        )
    except (HTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(f"model {name}: {_why_not(error, repo=repo, revision=revision)}") from error
    # huggingface_hub lays a snapshot out as .../snapshots/<commit>.
    return ModelId(name=repo, revision=Path(folder).name, path=Path(folder))


@dataclass(frozen=True)
class Description:
    """What the Hub says of a model before its weights are downloaded."""

    model: ModelId  # where its small files lie
    tensors: Mapping[str, tuple[str, tuple[int, ...]]] | None  # name → dtype and shape; None: the weights are here
    nbytes: int  # of weights still to be downloaded


def describe(name: str, *, cache_dir: str | None = None) -> Description | None:
    """Fetch what describes a model of the Hub: its small files, and the headers of its weights.

    Returns:
        None for what is no Hub id, a local folder first of all.

    Raises:
        CheckpointError: there is no such model, it has no safetensors weights, or the Hub cannot be reached.
    """
    match = _HUB_ID.fullmatch(name)
    if match is None or Path(name).exists():
        return None
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import HTTPError, NotASafetensorsRepoError, SafetensorsParsingError  # type: ignore[attr-defined]

    model = _download(name, repo=match["repo"], revision=match["revision"], cache_dir=cache_dir, weights=False)
    is_adapter = (model.path / "adapter_config.json").is_file() and not (model.path / "config.json").is_file()
    if is_adapter or _has_weights(model.path):
        return Description(model, None, 0)
    try:
        found = get_safetensors_metadata(match["repo"], revision=model.revision)
    except NotASafetensorsRepoError as error:
        raise CheckpointError(f"model {name}: has no safetensors weights, and pickled ones are not loaded") from error
    except SafetensorsParsingError as error:
        raise CheckpointError(
            f"model {name}: its weights have no whole header: {' '.join(str(error).split())}"
        ) from error
    except (HTTPError, OSError) as error:
        raise CheckpointError(
            f"model {name}: {_why_not(error, repo=match['repo'], revision=model.revision)}"
        ) from error
    tensors, nbytes = {}, 0
    for file, metadata in found.files_metadata.items():
        is_here = (model.path / file).is_file()
        for tensor, entry in metadata.tensors.items():
            tensors[tensor] = entry.dtype, tuple(entry.shape)
            nbytes += 0 if is_here else entry.data_offsets[1] - entry.data_offsets[0]
    return Description(model, tensors, nbytes)


def _has_weights(folder: Path) -> bool:
    """Whether a snapshot holds all files of the weights; a download that was interrupted leaves some of them."""
    here = {path.name for path in folder.glob("*.safetensors")}
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        return "model.safetensors" in here or {*index["weight_map"].values()} <= here
    except (OSError, ValueError, KeyError, AttributeError, TypeError):  # no index, or a bad one, which others refuse
        return bool(here)


def _why_not(error: Exception, *, repo: str, revision: str | None) -> str:
    """One line for what huggingface_hub says in many, or says wrongly: a missing model is a bad password to it."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            "no such folder, and the Hub cannot be reached to look for it there: "
            "mend the path, or try again with a network"
        )
    if isinstance(error, errors.GatedRepoError):  # is a RepositoryNotFoundError too
        return f"is gated on the Hub: ask for access on the page of {repo} there, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such folder, and no such model on the Hub: mend the name, or run `hf auth login` if it is private"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} on the Hub has no branch, tag or commit {revision or 'main'}"
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, errors.HFValidationError):
        return f"no such folder, and no Hub id: {reason}"
    return f"no such folder, and fetching it from the Hub failed, try again: {reason}"


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, of a user who is not here, or no path at all
        return False


def split_name(text: str) -> tuple[str, str | None]:
    """Split `name:base` at the first colon that is not part of an existing folder's name."""
    if ":" not in text or _exists(text):
        return text, None
    places = [i for i, character in enumerate(text) if character == ":"]
    place = next((i for i in places if _exists(text[:i])), places[0])
    name, base = text[:place], text[place + 1 :]
    if not name or not base:
        raise ConfigError(f"--tuned_model {text}: must be name or name:base")
    return name, base
