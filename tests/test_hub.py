"""Models named by their Hub id, fetched from a server on this machine that speaks as much of the Hub's protocol."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from conftest import ROOT, reshard, save_mistral
from safetensors.torch import load
from torch import Tensor

from tvmerge.checkpoint import Checkpoint
from tvmerge.hub import ModelId

MAIN, TUNED, NOWHERE = (hashlib.sha1(name).hexdigest() for name in (b"main", b"tuned", b"nowhere"))
REVISIONS = {"main": MAIN, "v1": TUNED, "refs/pr/1": TUNED, MAIN: MAIN, TUNED: TUNED}
#: The repository lists these too, and a merge needs none of them.
UNWANTED = ("docs/README.md", "pytorch_model.bin", "consolidated.safetensors", "onnx/model.onnx", "original/x.json")
ROUTE = re.compile(r"/(api/models/)?(?P<repo>\w+/\w+)/(?P<verb>revision|tree|resolve)/(?P<at>[^/]+)/?(?P<file>.*)")
Answer = tuple[int, Mapping[str, str], bytes]  # status, headers, body

LOOK_UP = """
import json, sys, time
from tvmerge.hub import resolve
from tvmerge.errors import CheckpointError

for name in sys.argv[1:]:
    start = time.monotonic()
    try:
        model = resolve(name)
        answer = {"name": model.name, "revision": model.revision, "path": str(model.path)}
    except CheckpointError as error:
        answer = {"error": str(error), "seconds": time.monotonic() - start}
    print(json.dumps(answer))
"""


class Hub(ThreadingHTTPServer):
    """Has owner/model at two commits, owner/gated for nobody, and hangs up on whoever asks for owner/broken."""

    daemon_threads = True

    def __init__(self, models: Mapping[str, Mapping[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.models = models  # commit → the files of the model
        self.log: list[str] = []  # "METHOD path" of every request

    def answer(self, path: str) -> Answer | None:
        """What to send; None to hang up."""
        route = ROUTE.fullmatch(path)
        if route is None or route["repo"] not in ("owner/model", "owner/gated", "owner/broken"):
            # The Hub does not tell an anonymous user whether there is a private model of this name.
            return refusal(401, "RepoNotFound", "Invalid username or password.")
        if route["repo"] == "owner/broken":
            return None
        commit = REVISIONS.get(unquote(route["at"]))
        if commit is None:
            return refusal(404, "RevisionNotFound", "Invalid rev id.")
        if route["verb"] == "revision":
            return 200, {}, json.dumps({"id": route["repo"], "sha": commit}).encode()
        files = {**self.models[commit], **dict.fromkeys(UNWANTED, b"{}")}
        if route["verb"] == "tree":
            tree = [{"type": "file", "path": file, "size": len(data), "oid": oid(data)} for file, data in files.items()]
            return 200, {}, json.dumps(tree).encode()
        if route["repo"] == "owner/gated":
            return refusal(403, "GatedRepo", "Access to model owner/gated is restricted.")
        data = files[unquote(route["file"])]
        return 200, {"ETag": f'"{oid(data)}"', "X-Repo-Commit": commit}, data


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.log.append(f"{self.command} {path}")
        if (answer := self.server.answer(path)) is None:
            return
        status, headers, body = answer
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""


def refusal(status: int, code: str, message: str) -> Answer:
    return status, {"X-Error-Code": code, "X-Error-Message": message}, json.dumps({"error": message}).encode()


def oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def weights(files: Mapping[str, bytes]) -> dict[str, Tensor]:
    shards = [load(files[file]) for file in files if file.endswith(".safetensors")]
    return {name: tensor for shard in shards for name, tensor in shard.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    root = tmp_path_factory.mktemp("models")
    main = save_mistral(root / "main", seed=3)
    tuned = save_mistral(root / "tuned", seed=4, drift_from=main)
    reshard(tuned, shard_bytes=4000)
    for folder in (main, tuned):
        (folder / "README.md").write_text(f"---\nlicense: mit\n---\n# {folder.name}\n")
    return {MAIN: contents(main), TUNED: contents(tuned)}


@pytest.fixture
def hub(models: Mapping[str, Mapping[str, bytes]]) -> Iterator[Hub]:
    with Hub(models) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


def look_up(url: str, home: Path, *names: str, offline: bool = False) -> list[dict[str, Any]]:
    """What resolve says in a process of its own, because huggingface_hub reads its environment once."""
    foreign = re.compile(r"HF_.*|HUGGING.*|.*_PROXY", re.IGNORECASE)
    environment = {
        **{name: value for name, value in os.environ.items() if not foreign.fullmatch(name)},
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", LOOK_UP, *names]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def one_line(answer: Mapping[str, Any]) -> str:
    message: str = answer["error"]
    assert "\n" not in message
    assert answer["seconds"] < 10
    return message


def test_a_hub_id_is_the_commit_that_the_hub_gives_for_it(hub: Hub, tmp_path: Path) -> None:
    commits = {"": MAIN, "@v1": TUNED, "@refs/pr/1": TUNED, f"@{TUNED}": TUNED, f"@{MAIN}": MAIN}
    answers = look_up(hub.url, tmp_path, *(f"owner/model{revision}" for revision in commits))
    for commit, answer in zip(commits.values(), answers, strict=True):
        assert (answer["name"], answer["revision"]) == ("owner/model", commit)
        checkpoint = Checkpoint(ModelId(answer["name"], answer["revision"], Path(answer["path"])))
        expected = weights(hub.models[commit])
        assert checkpoint.names == sorted(expected)
        assert all(torch.equal(checkpoint.read(name), expected[name]) for name in expected)
    assert not torch.equal(*(weights(files)["lm_head.weight"] for files in hub.models.values()))


def test_only_the_files_of_the_model_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    answers = look_up(hub.url, tmp_path, "owner/model", "owner/model@v1")
    for answer in answers:
        assert contents(Path(answer["path"])) == hub.models[answer["revision"]]
    asked = {line.split("/resolve/")[1] for line in hub.log if "/resolve/" in line}
    assert asked == {f"{commit}/{file}" for commit, files in hub.models.items() for file in files}


def test_what_was_fetched_once_is_found_offline(hub: Hub, tmp_path: Path) -> None:
    names = ["owner/model", "owner/model@v1", f"owner/model@{TUNED}"]
    online = look_up(hub.url, tmp_path, *names)
    requests = len(hub.log)
    assert look_up(hub.url, tmp_path, *names, offline=True) == online
    assert len(hub.log) == requests


def test_what_the_hub_refuses_is_said_in_one_line(hub: Hub, tmp_path: Path) -> None:
    reasons = {
        "owner/typo": "no such model",
        "owner/model@v9": "no branch, tag or commit v9",
        f"owner/model@{NOWHERE}": f"no branch, tag or commit {NOWHERE}",
        "owner/gated": "gated",
        "owner/broken": "Hub",
    }
    for (name, reason), answer in zip(reasons.items(), look_up(hub.url, tmp_path, *reasons), strict=True):
        assert re.fullmatch(f"model {name}: .*{reason}.*", one_line(answer))


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen, so that nobody can connect
        (answer,) = look_up(f"http://127.0.0.1:{closed.getsockname()[1]}", tmp_path, "owner/model")
    assert re.fullmatch("model owner/model: .*Hub cannot be reached.*", one_line(answer))


def test_what_is_no_hub_id_is_never_asked_for(hub: Hub, tmp_path: Path) -> None:
    names = ["a/b/c", "../nope", "./nope", "/nope", "owner/model@", "owner/model@..", "owner/.."]
    for name, answer in zip(names, look_up(hub.url, tmp_path, *names), strict=True):
        assert one_line(answer).startswith(f"model {name}: no such folder")
    assert hub.log == []
