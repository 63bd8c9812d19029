"""`tvmerge push` to a server on this machine that speaks as much of the Hub's protocol as an upload needs."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, Trio, reshard

from tvmerge.cli import main

TOKEN = "hf_SecretOfThisTest0123456789"
COMMIT = hashlib.sha1(b"commit").hexdigest()


class Hub(ThreadingHTTPServer):
    """Keeps what is committed to it; large files go through LFS, as the real one has it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.private: bool | None = None  # None: no such repository
        self.files: dict[str, dict[str, bytes]] = {}  # branch → path → content
        self.stored: dict[str, bytes] = {}  # sha256 → content
        self.log: list[str] = []
        self.commits = 0
        self.refuse: dict[str, tuple[int, dict[str, str]]] = {}  # part of "METHOD path" → status and headers
        self.lock = threading.Lock()

    def refusal(self, request: str) -> tuple[int, dict[str, str]] | None:
        return next((answer for part, answer in self.refuse.items() if part in request), None)


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def handle_any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self.chunks()
        path, _, query = self.path.partition("?")
        request = f"{self.command} {path}"
        with self.server.lock:
            self.server.log.append(request)
            if (answer := self.server.refusal(request)) is not None:
                self.send(*answer, json.dumps({"error": f"refused for {TOKEN}"}).encode())
            elif "/lfs/objects/" not in path and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.send(401, {"X-Error-Message": "Invalid credentials"}, b"{}")
            else:
                status, content = self.route(path, query, body)
                self.send(status, {}, json.dumps(content).encode())

    do_GET = do_POST = do_PUT = handle_any

    def chunks(self) -> bytes:
        found = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return found

    def send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body)), "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def route(self, path: str, query: str, body: bytes) -> tuple[int, Any]:
        hub = self.server
        if path == "/api/repos/create":
            wanted = json.loads(body)
            if hub.private is not None:
                return 409, {"error": "You already created this model repo", "url": f"{hub.url}/me/merged"}
            assert (wanted["organization"], wanted["name"]) == ("me", "merged")
            hub.private = wanted["visibility"] == "private"
            hub.files["main"] = {".gitattributes": b"*.safetensors filter=lfs\n"}
            return 200, {"url": f"{hub.url}/me/merged"}
        if path.startswith("/api/models/") and hub.private is None:
            return 404, {"error": "Repository not found"}
        if path == "/api/validate-yaml":
            card = json.loads(body)["content"]
            header = re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)
            good = header is not None and isinstance(yaml.safe_load(header[1]), dict)
            return (200, {}) if good else (400, {"errors": [{"message": "bad\nmetadata"}]})
        if found := re.fullmatch(r"/api/models/me/merged/branch/(\w+)", path):
            hub.files.setdefault(found[1], dict(hub.files["main"]))
            return 200, {}
        if found := re.fullmatch(r"/api/models/me/merged(?:/revision/(\w+))?", path):
            siblings = [{"rfilename": name} for name in hub.files[found[1] or "main"]]
            return 200, {"id": "me/merged", "private": hub.private, "sha": COMMIT, "siblings": siblings}
        if re.fullmatch(r"/api/models/me/merged/preupload/\w+", path):
            modes = [
                {"path": f["path"], "uploadMode": self.mode(f["path"]), "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return 200, {"files": modes}
        if path == "/me/merged.git/info/lfs/objects/batch":
            objects = []
            for wanted in json.loads(body)["objects"]:
                upload = {"upload": {"href": f"{hub.url}/lfs/objects/{wanted['oid']}?X-Signature=top-secret"}}
                objects.append({**wanted, **({} if wanted["oid"] in hub.stored else {"actions": upload})})
            return 200, {"transfer": "basic", "objects": objects}
        if found := re.fullmatch(r"/lfs/objects/(\w+)", path):
            assert query == "X-Signature=top-secret"
            assert hashlib.sha256(body).hexdigest() == found[1]
            hub.stored[found[1]] = body
            return 200, {}
        if found := re.fullmatch(r"/api/models/me/merged/commit/(\w+)", path):
            return self.commit(found[1], body)
        return 404, {"error": f"{path} is not known here"}

    @staticmethod
    def mode(path: str) -> str:
        return "lfs" if path.endswith((".safetensors", ".png", ".npy")) else "regular"

    def commit(self, branch: str, body: bytes) -> tuple[int, Any]:
        hub = self.server
        files = hub.files[branch]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = hub.stored[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        hub.commits += 1
        return 200, {"commitUrl": f"{hub.url}/me/merged/commit/{COMMIT}", "commitOid": COMMIT}

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


@pytest.fixture
def run_folder(trio: Trio, tmp_path: Path) -> Path:
    """A run's folder, whose best/ is as `apply` writes it, with a card, and with what must not be uploaded."""
    vector = {"label": "tuned", "tuned": {"model": str(trio.tuned)}, "base": {"model": str(trio.base)}}
    recipe = {
        "target": {"model": str(trio.target)},
        "task_vectors": [vector],
        "granularity": "uniform",
        "weights": {"uniform": 0.5},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = tmp_path / "run"
    best = run / "best"
    assert main(["apply", str(tmp_path / "recipe.yaml"), "--output_dir", str(best)]) == 0
    (best / "README.md").write_text("---\ntags: [merge]\n---\n# A merge\n")
    (best / "weights.png").write_bytes(b"\x89PNG" + bytes(range(256)))
    for name in (".lock", ".config.json.77.tmp", ".hidden.json", "notes.md", "model.bin", "old.safetensors"):
        (best / name).write_text("not for the Hub")
    for folder in (".cache", ".git", ".staging.tmp", "checkpoints"):
        (best / folder).mkdir()
        (best / folder / "config.json").write_text("not for the Hub")
    (run / "study.db").write_text("not for the Hub")
    return run


NAMES = {
    *("config.json", "generation_config.json", "model.safetensors", "recipe.yaml", "README.md", "weights.png"),
    *("tokenizer.json", "tokenizer_config.json"),
}


def push(run: Path, home: Path, url: str, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, because huggingface_hub reads its environment once."""
    foreign = re.compile(r"HF_.*|HUGGING.*|TRANSFORMERS_OFFLINE|.*_PROXY", re.IGNORECASE)
    settings = {
        **{name: value for name, value in os.environ.items() if not foreign.fullmatch(name)},
        **{"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_TOKEN": TOKEN},
        **{"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT), **environment},
    }
    command = [sys.executable, "-m", "tvmerge", "push", "--output_dir", str(run), "--repo_id", "me/merged", *more]
    done = subprocess.run(command, env=settings, cwd=home, capture_output=True, text=True, timeout=120, check=False)
    for secret in (TOKEN, "top-secret"):
        assert secret not in done.stdout + done.stderr
    return done


def refusal(done: subprocess.CompletedProcess[str], status: int) -> str:
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert done.stderr.startswith("tvmerge push: error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_the_files_of_the_model_arrive_and_no_others(hub: Hub, run_folder: Path, tmp_path: Path) -> None:
    done = push(run_folder, tmp_path, hub.url)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith(f"{hub.url}/me/merged: 8 files, ")
    assert hub.private is True
    assert hub.commits == 1
    expected = {name: (run_folder / "best" / name).read_bytes() for name in NAMES}
    assert {name: data for name, data in hub.files["main"].items() if name != ".gitattributes"} == expected

    uploads = sum(line.startswith("PUT") for line in hub.log)
    assert uploads == 2  # the weights and the picture
    assert push(run_folder, tmp_path, hub.url).returncode == 0
    assert sum(line.startswith("PUT") for line in hub.log) == uploads  # what is there is not sent again


def test_weights_of_an_earlier_push_do_not_stay(hub: Hub, run_folder: Path, tmp_path: Path) -> None:
    """A model.safetensors beside shards would be read in their place."""
    assert push(run_folder, tmp_path, hub.url).returncode == 0
    hub.files["main"]["mine.safetensors"] = b"of somebody else"
    reshard(run_folder / "best", shard_bytes=4000)
    (run_folder / "best" / "weights.png").unlink()
    assert push(run_folder, tmp_path, hub.url).returncode == 0
    shards = {path.name for path in (run_folder / "best").glob("model-*.safetensors")}
    assert len(shards) > 1
    kept = {".gitattributes", "mine.safetensors", "weights.png"}
    wanted = NAMES - {"model.safetensors"} | shards | {"model.safetensors.index.json"} | kept
    assert hub.files["main"].keys() == wanted


def test_another_branch_is_made_and_committed_to(hub: Hub, run_folder: Path, tmp_path: Path) -> None:
    assert push(run_folder, tmp_path, hub.url, "--revision", "second", "--private", "false").returncode == 0
    assert hub.private is False
    assert hub.files["main"].keys() == {".gitattributes"}
    assert hub.files["second"].keys() == {".gitattributes", *NAMES}


def test_a_public_repository_is_not_taken_for_a_private_one(hub: Hub, run_folder: Path, tmp_path: Path) -> None:
    hub.private, hub.files["main"] = False, {}
    assert "me/merged is there and public" in refusal(push(run_folder, tmp_path, hub.url), 2)
    assert not hub.files["main"]
    assert push(run_folder, tmp_path, hub.url, "--private", "false").returncode == 0


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_dry_run_asks_nobody(hub: Hub, run_folder: Path, tmp_path: Path, offline: str) -> None:
    done = push(run_folder, tmp_path, hub.url, "--dry_run", HF_HUB_OFFLINE=offline, HF_TOKEN="")
    assert (done.returncode, done.stderr) == (0, "")
    *lines, last = done.stdout.splitlines()
    sizes = {name: int(size.replace(",", "")) for size, name in (line.split() for line in lines)}
    assert sizes == {name: (run_folder / "best" / name).stat().st_size for name in NAMES}
    assert "one commit to me/merged, branch main; a new repository would be private" in last
    assert hub.log == []


def test_what_the_hub_refuses_is_one_line(hub: Hub, run_folder: Path, tmp_path: Path) -> None:
    message = {"X-Error-Message": "no rights"}
    cases: list[tuple[str, int, dict[str, str], int, str]] = [
        ("POST /api/repos/create", 401, message, 2, "token is not valid"),
        ("/me/merged", 403, message, 2, "has no right to write there"),
        ("POST /api/models/me/merged/preupload", 404, {"X-Error-Code": "RepoNotFound"}, 2, "no such repository"),
        ("POST /api/models/me/merged/commit", 500, {}, 1, "nothing was committed"),
        ("PUT /lfs", 403, {}, 2, "has no right to write there"),
    ]
    for request, status, headers, code, reason in cases:
        hub.refuse = {request: (status, headers)}
        hub.stored.clear()
        error = refusal(push(run_folder, tmp_path, hub.url), code)
        assert reason in error
        assert str(status) in error
        assert "me/merged" in error
    assert hub.commits == 0
    hub.refuse = {}
    assert "token is not valid" in refusal(push(run_folder, tmp_path, hub.url, HF_TOKEN="hf_other"), 2)
    (run_folder / "best" / "README.md").write_text("---\ntags\n---\n")
    assert "bad metadata" in refusal(push(run_folder, tmp_path, hub.url), 1)
    assert hub.commits == 0
    assert push(run_folder, tmp_path, hub.url, "--dry_run").returncode == 0


def test_no_token_and_no_network_are_said_at_once(run_folder: Path, tmp_path: Path, hub: Hub) -> None:
    assert "no token of the Hub is here" in refusal(push(run_folder, tmp_path, hub.url, HF_TOKEN=""), 2)
    assert "HF_HUB_OFFLINE is set" in refusal(push(run_folder, tmp_path, hub.url, HF_HUB_OFFLINE="1"), 2)
    assert hub.log == []
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen, so that nobody can connect
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
        assert "nothing was committed" in refusal(push(run_folder, tmp_path, nobody), 1)


def test_what_is_no_whole_model_is_refused_before_anybody_is_asked(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        capsys.readouterr()
        assert main(["push", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        return err

    repo = ("--repo_id", "me/merged", "--dry_run")
    best = run_folder / "best"
    for bad in ("merged", "me/me/merged", "me/..", "me/a--b", "me/x.git", "me/" + 100 * "x", "-me/x", "", "me/x\ny"):
        assert "--repo_id" in refused("--output_dir", str(run_folder), "--repo_id", bad)
    assert "no name of a branch" in refused("--output_dir", str(run_folder), *repo, "--revision", "a..b")
    assert "no such folder" in refused("--output_dir", str(tmp_path / "nowhere"), *repo)
    assert "has no best/ yet" in refused("--output_dir", str(tmp_path / "run" / "best" / ".git"), *repo)
    assert main(["push", "--output_dir", str(best), *repo]) == 0  # the model itself
    weights = (best / "model.safetensors").read_bytes()
    (best / "model.safetensors").write_bytes(weights[:-1])
    assert "not a whole safetensors file" in refused("--output_dir", str(run_folder), *repo)
    (best / "model.safetensors").write_bytes(weights)
    config = (best / "config.json").read_bytes()
    (best / "config.json").unlink()
    assert "config.json: no such file" in refused("--output_dir", str(run_folder), *repo)
    (best / "config.json").write_bytes(config)
    (best / "recipe.yaml").write_text("weights: 1")
    assert "recipe.yaml" in refused("--output_dir", str(run_folder), *repo)
    (best / "recipe.yaml").unlink()
    assert "holds no recipe.yaml" in refused("--output_dir", str(run_folder), *repo)


def test_a_store_of_chunks_that_fails_is_one_line(hub: Hub, run_folder: Path, tmp_path: Path) -> None:
    """The real client sends large files in chunks to a store of its own, which this server does not have."""
    pytest.importorskip("hf_xet")
    error = refusal(push(run_folder, tmp_path, hub.url, HF_HUB_DISABLE_XET="0"), 1)
    assert "404" in error
    assert "nothing was committed" in error
    assert hub.commits == 0
