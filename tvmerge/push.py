"""A model folder, uploaded to the Hugging Face Hub as one commit."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tvmerge.checkpoint import INDEX, SINGLE, Checkpoint, read_json
from tvmerge.errors import ConfigError, RunError, TvmergeError
from tvmerge.files import local_path
from tvmerge.hub import ModelId
from tvmerge.rebuild import EXPERTS_FOLDER, ROUTER_FILE
from tvmerge.recipe import RECIPE_FILE, Recipe
from tvmerge.writer import model_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from tvmerge.config import PushConfig

__all__ = ["push", "uploaded_files"]

#: What an earlier push may have left of a model with other shards, which would be read in place of this one.
_WEIGHTS = re.compile(
    rf"({EXPERTS_FOLDER}/expert\d+/)?(model\.safetensors(\.index\.json)?|model-\d+-of-\d+\.safetensors|{ROUTER_FILE})"
)


def push(config: PushConfig) -> None:
    """Upload a model, or say what would be uploaded.

    Raises:
        InputError: the folder holds no whole model, or the Hub does not let its files in; nothing was committed.
        RunError: the Hub failed; nothing was committed, and what was sent before is not sent again.
    """
    folder = _model_folder(local_path(config.output_dir, flag="--output_dir"))
    files = uploaded_files(folder)
    nbytes = sum(path.stat().st_size for path in files.values())
    branch = config.revision or "main"
    if config.dry_run:
        for name, path in files.items():
            print(f"{path.stat().st_size:>15,}  {name}")
        visibility = "private" if config.private else "public"
        print(
            f"{len(files)} files, {nbytes:,} bytes of {folder} would be one commit to {config.repo_id}, branch "
            f"{branch}; a new repository would be {visibility}. Weights of an earlier push that are not among these "
            "files would be deleted."
        )
        return
    url = _upload(config, files, branch=branch)
    print(f"{url}: {len(files)} files, {nbytes:,} bytes of {folder}, branch {branch}")


def _model_folder(output: Path) -> Path:
    """The folder that is uploaded: `best` of a run, or the model itself."""
    for folder in (output / "best", output):
        if (folder / RECIPE_FILE).is_file():
            return folder
    if (output / "best").is_dir():
        raise ConfigError(
            f"--output_dir {output}: {output / 'best'} holds no {RECIPE_FILE}: no run of tvmerge wrote it"
        )
    what = "has no best/ yet: let the run end" if output.is_dir() else "no such folder"
    raise ConfigError(f"--output_dir {output}: {what}, or name the folder of a model that apply wrote")


def uploaded_files(folder: Path) -> dict[str, Path]:
    """The files of a model that are uploaded: path in the repository → file. Nothing else in the folder is.

    Raises:
        InputError: a file is missing or broken.
    """
    recipe = Recipe.load(folder / RECIPE_FILE)
    read_json(folder / "config.json")
    checkpoint = Checkpoint(ModelId(name=str(folder), revision=None, path=folder))
    # transformers reads the one file if it is there, and no index.
    single = (folder / SINGLE).is_file()
    weights = {SINGLE} if single else {INDEX, *read_json(folder / INDEX)["weight_map"].values()}
    names = {path.name for path in model_files(folder)} | weights | {RECIPE_FILE}
    names |= {path.name for path in folder.glob("*.png")} | {"README.md"} & {path.name for path in folder.iterdir()}
    if recipe.mixture is not None:
        if not (folder / ROUTER_FILE).is_file():
            raise ConfigError(f"{folder / ROUTER_FILE}: no such file, which holds the mixture's router: restore it")
        names.add(ROUTER_FILE)
    checkpoint.check_unchanged()
    found = {name: folder / name for name in sorted(names) if not name.startswith(".")}
    for expert in sorted(folder.glob(f"{EXPERTS_FOLDER}/expert[0-9]*")):
        found |= {f"{EXPERTS_FOLDER}/{expert.name}/{name}": path for name, path in uploaded_files(expert).items()}
    return found


def _upload(config: PushConfig, files: Mapping[str, Path], *, branch: str) -> str:
    """Send the files and commit them; the page of the repository."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise ConfigError("HF_HUB_OFFLINE is set, so that nothing can be uploaded: unset it, or give --dry_run")
    token = get_token()
    if not token:
        raise ConfigError("no token of the Hub is here: run `hf auth login`, or set HF_TOKEN")
    api = HfApi(token=token)
    with _one_line(config.repo_id, token):
        url = api.create_repo(config.repo_id, private=config.private, exist_ok=True)
        earlier = _earlier_files(api, config, branch)
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
        stale = [name for name in earlier if _WEIGHTS.fullmatch(name) and name not in files]
        # upload_folder may make several commits of an upload, the first of which is half a model.
        api.create_commit(
            config.repo_id,
            [*operations, *(CommitOperationDelete(path_in_repo=name) for name in stale)],
            commit_message="Upload a merge found by tvmerge",
            revision=branch,
        )
    return str(url)


def _earlier_files(api: HfApi, config: PushConfig, branch: str) -> list[str]:
    """What a repository holds.

    Raises:
        ConfigError: it is public, and the user has not said that it may be.
    """
    if api.model_info(config.repo_id).private is False and config.private:
        raise ConfigError(
            f"{config.repo_id} is there and public: give --private false to publish the model, or another --repo_id"
        )
    if branch != "main" and not branch.startswith("refs/"):
        api.create_branch(config.repo_id, branch=branch, exist_ok=True)
    return [file.rfilename for file in api.model_info(config.repo_id, revision=branch).siblings or []]


@contextmanager
def _one_line(repo_id: str, token: str) -> Iterator[None]:
    """Say in one line what went wrong, and nothing else on stderr; never the token, nor a link that is signed.

    Raises:
        ConfigError: the Hub refuses it.
        RunError: all else.
    """
    from huggingface_hub import utils

    # HTTPError is that of the HTTP library, which differs between versions of huggingface_hub.
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    logger = logging.getLogger("huggingface_hub")
    level, bars = logger.level, utils.are_progress_bars_disabled()  # type: ignore[attr-defined]
    logger.setLevel(logging.ERROR)  # it says each try
    if not sys.stderr.isatty():
        utils.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            yield
        for warning in said:
            if issubclass(warning.category, UserWarning):  # of the card; others are not for users
                print(_clean(f"note: {warning.message}", token), file=sys.stderr)
    except TvmergeError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise _reworded(error, repo_id, token) from None  # its text may hold what must not be shown
    finally:
        logger.setLevel(level)
        if not bars:
            utils.enable_progress_bars()  # type: ignore[attr-defined]


def _reworded(error: BaseException, repo_id: str, token: str) -> TvmergeError:
    """What the Hub's client says in many lines."""
    while error.__cause__ is not None and not hasattr(error, "response"):
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = getattr(error, "server_message", None) or str(error) or type(error).__name__
    text = _clean(reason, token)[:300]
    hints = {
        401: "the token is not valid, or has no right to this repository: run `hf auth login`",
        403: "the token has no right to write there: make one with write access, or name a repository of your own",
        404: "no such repository or branch, or the token may not see it: mend the name, or run `hf auth login`",
    }
    if status in hints:
        return ConfigError(f"the Hub refuses {repo_id} ({status}: {text}): {hints[status]}")
    kind = f"{status}: " if status else ""
    return RunError(f"uploading to {repo_id} failed ({kind}{text}): nothing was committed, run the same command again")


def _clean(text: str, token: str) -> str:
    """One line without the token and without what follows the path of a link: a signature is a key too."""
    without = re.sub(r"(https?://[^\s?'\"]*)\?[^\s'\"]*", r"\1", text.replace(token, "***"))
    return " ".join(without.split())
