"""What `plan` prints against the files themselves, and what it refuses; of Hub models it reads headers alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from conftest import CHARACTERS, ROOT, Trio, last_target, reshard, save_mistral, save_tokenizer
from safetensors.torch import load_file, save_file
from test_hub import MAIN, TUNED, Answer, Hub, HubHandler, contents, look_up
from test_hub import refusal as refused
from test_lora import save_adapter

from tvmerge.cli import main

Table = list[dict[str, str]]


def tables(text: str) -> list[Table]:
    """All tables of a text, each row by the heads of its columns."""
    found = []
    for block in text.strip().split("\n\n"):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        head, rule, *body = rows
        assert all(set(cell) == {"-"} for cell in rule), block
        found.append([dict(zip(head, row, strict=True)) for row in body])
    return found


def figures(text: str) -> dict[str, str]:
    models, needs = tables(text)
    assert models
    return {row["what"]: row["figure"] for row in needs}


def size(n: int) -> str:
    return f"{n / 1e6:.1f} MB" if n >= 1e6 else f"{n / 1e3:.1f} kB" if n >= 1e3 else f"{n} B"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def nbytes(folder: Path, name: str = "") -> int:
    """Bytes of the tensors whose names hold an expression."""
    return sum(t.numel() * t.element_size() for key, t in tensors(folder).items() if re.search(name, key))


def refusal(flags: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[Table, str]:
    """The table of the models, and the reason."""
    assert main(["plan", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("tvmerge plan: error: ")
    (models, *_) = tables(captured.out)
    return models, captured.err


@pytest.fixture(autouse=True)
def nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield
    assert list((tmp_path / "here").iterdir()) == []


def test_every_figure_is_that_of_the_files(trio: Trio, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *trio.flags()]) == 0
    captured = capsys.readouterr()
    models, _ = tables(captured.out)
    assert [row["model"] for row in models] == [str(trio.target), str(trio.tuned), str(trio.base)]
    for row, folder in zip(models, (trio.target, trio.tuned, trio.base), strict=True):
        held = tensors(folder)
        assert row["architecture"] == "MistralForCausalLM"
        assert row["tensors"] == str(len(held))
        assert row["parameters"] == f"{sum(t.numel() for t in held.values()) / 1e6:.3f} M"
        assert (row["size"], row["dtype"]) == (size(nbytes(folder)), "bfloat16")
        assert (row["vocabulary"], row["to download"]) == (str(len(CHARACTERS) + 3), "no")
    needs = figures(captured.out)
    whole, largest = nbytes(trio.target), max(t.numel() * 2 for t in tensors(trio.target).values())
    assert needs["weights to search"] == "5 (embed_tokens, layers.0, layers.1, ..., norm)"
    assert needs["tensors that move"] == "21 of 21"
    assert needs["tensors left out"].startswith("0 ")
    assert needs["largest tensor"] == size(largest)
    assert needs["memory: live model and differences"].startswith(f"{size(whole + largest)} of ")
    assert needs["disk: saved model"].startswith(f"{size(whole)} of ")
    assert needs["disk: downloads"] == "none"
    assert needs["bytes per trial"] == f"{size(3 * whole)} read, {size(whole)} written"
    assert captured.err == ""


def test_another_dtype_and_kept_differences_count(trio: Trio, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *trio.flags(), "--dtype", "float32", "--delta_storage", "memory"]) == 0
    needs, whole = figures(capsys.readouterr().out), nbytes(trio.target)
    assert needs["memory: live model and differences"].startswith(f"{size(2 * whole + whole)} of ")
    assert needs["disk: saved model"].startswith(f"{size(2 * whole)} of ")
    assert needs["bytes per trial"] == f"{size(3 * whole)} read, {size(2 * whole)} written"


def test_several_tuned_models_and_an_adapter(trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = save_mistral(tmp_path / "other", seed=9)
    adapter = save_adapter(trio.base, tmp_path / "adapter")
    tuned = [f"{other}:{trio.base}", str(trio.tuned), str(adapter)]
    flags = ["--target_model", str(trio.target), "--base_model", str(trio.base), "--tuned_model", *tuned]
    assert main(["plan", *flags]) == 0
    out = capsys.readouterr().out
    models, _ = tables(out)
    assert [Path(row["model"]).name for row in models] == ["target", "other", "base", "tuned", "adapter"]
    held = load_file(adapter / "adapter_model.safetensors")
    in_adapter = sum(t.numel() * t.element_size() for t in held.values())
    assert models[-1]["architecture"] == "LoRA adapter"
    assert (models[-1]["dtype"], models[-1]["size"]) == ("float32", size(in_adapter))
    assert models[-1]["parameters"] == f"{sum(t.numel() for t in held.values()) / 1e6:.3f} M"
    assert figures(out)["weights to search"].startswith("12 (other/embed_tokens, other/layers.0, ")
    # The target, two differences and the matrices; an adapter's base is checked and not read.
    assert figures(out)["bytes per trial"].startswith(f"{size(nbytes(trio.target) * 5 + in_adapter)} read")


@pytest.mark.parametrize(
    ("more", "weights", "frozen"),
    [
        (["--optimize_mode", "block:1"], "5 (", "^$"),
        (["--optimize_mode", "block:2"], "4 (embed_tokens, layers.0-1, lm_head, norm)", "^$"),
        (["--optimize_mode", "uniform"], "1 (uniform)", "^$"),
        (["--optimize_mode", "parameter"], "12 (", "^$"),
        (["--optimize_mode", "all"], "21 (", "^$"),
        (["--weight_groups", "attention=self_attn", "mlp=mlp"], "9 (", "^$"),
        (["--optimize_mode", "uniform", "--weight_groups", "attention=self_attn"], "2 (attention, uniform)", "^$"),
        (["--freeze", "norm"], "4 (embed_tokens, layers.0, layers.1, lm_head)", "norm"),
        (["--freeze", "embed", "lm_head"], "3 (layers.0, layers.1, norm)", "embed|lm_head"),
    ],
)
def test_weights_are_counted_as_they_will_be_searched(
    trio: Trio, capsys: pytest.CaptureFixture[str], more: list[str], weights: str, frozen: str
) -> None:
    assert main(["plan", *trio.flags(), *more]) == 0
    needs = figures(capsys.readouterr().out)
    assert needs["weights to search"].startswith(weights)
    n_frozen = sum(re.search(frozen, name) is not None for name in tensors(trio.target))
    assert needs["tensors that move"] == f"{21 - n_frozen} of 21"
    moved = nbytes(trio.target) - nbytes(trio.target, frozen)
    assert needs["bytes per trial"] == f"{size(3 * moved)} read, {size(moved)} written"


def _other_tokens(folder: Path) -> None:
    save_mistral(folder, seed=3)
    save_tokenizer(folder, CHARACTERS[::-1])


def _tied(folder: Path) -> None:
    save_mistral(folder, seed=3, tie_word_embeddings=True)


def _tied_and_stored_twice(folder: Path) -> None:
    save_mistral(folder, seed=3, tie_word_embeddings=True)
    held = load_file(folder / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def _quantized(folder: Path) -> None:
    config = json.loads((save_mistral(folder, seed=3) / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("role", ["target", "tuned", "base"])
@pytest.mark.parametrize(
    ("save", "reason"),
    [
        (lambda folder: save_mistral(folder, seed=3, num_hidden_layers=3), "layers.2"),
        (lambda folder: save_mistral(folder, seed=3, hidden_size=32), "has the shape"),
        (_other_tokens, "--vocabulary intersect"),
        (_tied, "lm_head.weight"),
        (_tied_and_stored_twice, "lm_head.weight"),
        (_quantized, "is quantized (gptq)"),
    ],
)
def test_models_that_do_not_fit_are_refused_below_their_table(
    trio: Trio,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    role: str,
    save: Callable[[Path], None],
    reason: str,
) -> None:
    save(tmp_path / "other")
    models, error = refusal(last_target([*trio.flags(), f"--{role}_model", str(tmp_path / "other")]), capsys)
    assert reason in error
    (row,) = (row for row in models if row["model"] == str(tmp_path / "other"))
    assert row["size"] == size(nbytes(tmp_path / "other"))
    assert row["architecture"].endswith("(tied)") == ("lm_head" in reason)


def test_other_vocabularies_can_be_intersected(trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = save_mistral(tmp_path / "wide", seed=3, vocab_size=len(CHARACTERS) + 5)
    save_tokenizer(wide, CHARACTERS + "終")
    flags = last_target([*trio.flags(), "--target_model", str(wide)])
    assert "--vocabulary intersect" in refusal(flags, capsys)[1]
    assert main(["plan", *flags, "--vocabulary", "intersect"]) == 0
    out = capsys.readouterr().out
    models, _ = tables(out)
    assert [row["vocabulary"] for row in models] == [str(len(CHARACTERS) + n) for n in (5, 3, 3)]
    assert figures(out)["disk: saved model"].startswith(f"{size(nbytes(wide))} of ")


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--freeze", "."], "all are frozen"),
        (["--freeze", "nowhere"], "'nowhere' is found in no tensor name"),
        (["--weight_groups", "experts=experts"], "'experts' is found in no tensor name"),
    ],
)
def test_groups_that_cannot_be_are_refused_below_the_table(
    trio: Trio, capsys: pytest.CaptureFixture[str], more: list[str], reason: str
) -> None:
    models, error = refusal([*trio.flags(), *more], capsys)
    assert reason in error
    assert len(models) == 3


def test_a_tuned_model_without_a_base_is_refused(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--target_model", str(trio.target), "--tuned_model", str(trio.tuned)]
    models, error = refusal(flags, capsys)
    assert f"--tuned_model {trio.tuned}: needs the model it was tuned from" in error
    assert [row["model"] for row in models] == [str(trio.target), str(trio.tuned)]
    adapter = save_adapter(trio.base, tmp_path / "adapter")
    assert main(["plan", *flags[:2], "--tuned_model", str(adapter)]) == 0, "an adapter needs none"


def test_too_little_disk_is_refused_with_both_sizes(
    trio: Trio, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = nbytes(trio.target)
    for free, status in ((whole, 0), (whole - 1, 2)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: shutil._ntuple_diskusage(10**9, 0, free))
        assert main(["plan", *trio.flags()]) == status
    captured = capsys.readouterr()
    assert re.search(f"{re.escape(size(whole))} are needed on the disk of output, and .* are free", captured.err)
    assert captured.err.count("\n") == 1


def test_too_little_memory_is_refused_with_both_sizes(
    trio: Trio, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 5000}.__getitem__)
    reason = refusal(trio.flags(), capsys)[1]
    assert re.search(r"[\d.]+ kB of memory are needed, and this machine has 5.0 kB", reason)


class HeadersHub(Hub):
    """A Hub that is also asked for files that a model may have, and does not."""

    def answer(self, path: str) -> Answer | None:
        try:
            return super().answer(path)
        except KeyError:
            return refused(404, "EntryNotFound", "Entry not found.")


class RangeHandler(HubHandler):
    """Sends the part of a file that was asked for, as the Hub does, and notes how much of it."""

    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = self.path.partition("?")[0]
        answer: Answer | None = self.server.answer(path)
        if asked is None or answer is None or answer[0] != 200:
            return super().do_GET()
        start, stop = int(asked[1]), min(int(asked[2]) + 1, len(answer[2]))
        self.server.log.append(f"RANGE {path} {start} {stop} {len(answer[2])}")
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(answer[2])}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        self.wfile.write(answer[2][start:stop])

    do_HEAD = HubHandler.do_GET


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """One file, and three shards, of weights that are larger than what is asked for to find a header."""
    root = tmp_path_factory.mktemp("large")
    main = save_mistral(root / "main", seed=3, hidden_size=192, intermediate_size=256)
    tuned = save_mistral(root / "tuned", seed=4, hidden_size=192, intermediate_size=256)
    reshard(tuned, shard_bytes=400_000)
    assert len(list(tuned.glob("*.safetensors"))) >= 3
    assert all(file.stat().st_size > 110_000 for folder in (main, tuned) for file in folder.glob("*.safetensors"))
    return {MAIN: contents(main), TUNED: contents(tuned)}


@pytest.fixture
def hub(large: Mapping[str, Mapping[str, bytes]]) -> Iterator[Hub]:
    with HeadersHub(large) as hub:
        hub.RequestHandlerClass = RangeHandler
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


def plan_at(url: str, home: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """`plan` in a process of its own, because huggingface_hub reads its environment once."""
    foreign = re.compile(r"HF_.*|HUGGING.*|.*_PROXY", re.IGNORECASE)
    environment = {
        **{name: value for name, value in os.environ.items() if not foreign.fullmatch(name)},
        **{"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"},
        **{"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tvmerge", "plan", *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def weight_bytes(files: Mapping[str, bytes], *, without: str = "") -> int:
    """Bytes of tensors in safetensors files: all but the header and its length."""
    weights = [data for name, data in files.items() if name.endswith(".safetensors") and name != without]
    return sum(len(data) - 8 - int.from_bytes(data[:8], "little") for data in weights)


def assert_only_headers_were_fetched(hub: Hub) -> None:
    weights = [line for line in hub.log if ".safetensors" in line and ".index.json" not in line]
    assert not [line for line in weights if line.startswith("GET ")]
    ranges = [line.split() for line in weights if line.startswith("RANGE ")]
    assert ranges
    assert all(int(stop) < int(whole) for _, _, _, stop, whole in ranges)


FLAGS = ("--target_model", "owner/model", "--tuned_model", "owner/model@v1", "--base_model", "owner/model")


def test_of_hub_models_only_headers_are_fetched(hub: Hub, tmp_path: Path) -> None:
    done = plan_at(hub.url, tmp_path, *FLAGS)
    assert (done.returncode, done.stderr) == (0, "")
    assert_only_headers_were_fetched(hub)
    single, sharded = weight_bytes(hub.models[MAIN]), weight_bytes(hub.models[TUNED])
    models, _ = tables(done.stdout)
    assert [(row["model"], row["size"], row["to download"]) for row in models] == [
        ("owner/model", size(single), size(single)),
        ("owner/model@v1", size(sharded), size(sharded)),
    ]
    assert all(row["architecture"] == "MistralForCausalLM" and row["dtype"] == "bfloat16" for row in models)
    assert figures(done.stdout)["disk: downloads"].partition(" of ")[0] == size(single + sharded)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_is_here_is_not_downloaded_again(hub: Hub, tmp_path: Path) -> None:
    before = plan_at(hub.url, tmp_path, *FLAGS)
    paths = [Path(answer["path"]) for answer in look_up(hub.url, tmp_path, "owner/model", "owner/model@v1")]
    hub.log.clear()
    done = plan_at(hub.url, tmp_path, *FLAGS)
    models, _ = tables(done.stdout)
    assert [row["to download"] for row in models] == ["no", "no"]
    assert figures(done.stdout)["disk: downloads"] == "none"
    assert not [line for line in hub.log if line.startswith(("GET", "RANGE")) and line.endswith(".safetensors")]
    for what in ("weights to search", "bytes per trial", "largest tensor"):
        assert figures(done.stdout)[what] == figures(before.stdout)[what]
    shard = sorted(path.name for path in paths[1].glob("*.safetensors"))[1]
    (paths[1] / shard).unlink()
    done = plan_at(hub.url, tmp_path, *FLAGS)
    assert (done.returncode, done.stderr) == (0, "")
    missing = weight_bytes(hub.models[TUNED]) - weight_bytes(hub.models[TUNED], without=shard)
    assert [row["to download"] for row in tables(done.stdout)[0]] == ["no", size(missing)]


def test_an_adapter_on_the_hub_is_one_unless_a_whole_model_is_there(hub: Hub, trio: Trio, tmp_path: Path) -> None:
    adapter = contents(save_adapter(trio.base, tmp_path / "adapter"))
    beside = {**hub.models[MAIN], "adapter_config.json": adapter["adapter_config.json"]}
    hub.models = {MAIN: beside, TUNED: adapter}
    done = plan_at(hub.url, tmp_path, "--target_model", "owner/model", "--tuned_model", "owner/model@v1")
    models, *_ = tables(done.stdout)
    assert [row["architecture"] for row in models] == ["MistralForCausalLM", "LoRA adapter"]
    assert models[0]["to download"] == size(weight_bytes(beside))
    assert done.returncode == 2
    assert "was trained for another model" in done.stderr


@pytest.mark.parametrize(
    ("name", "reason"),
    [("owner/gated", "gated"), ("owner/typo", "no such model"), ("owner/model@v9", "no branch, tag or commit v9")],
)
def test_what_the_hub_refuses_is_refused_in_one_line(hub: Hub, tmp_path: Path, name: str, reason: str) -> None:
    done = plan_at(hub.url, tmp_path, "--target_model", "owner/model", "--tuned_model", name, "--base_model", name)
    assert done.returncode == 2
    assert re.fullmatch(f"tvmerge plan: error: model {name}: .*{reason}.*\n", done.stderr)
    assert [row["model"] for row in tables(done.stdout)[0]] == ["owner/model"]


def test_the_judge_is_estimated_before_it_is_asked(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    turns = [["abcdefgh", "東京"], ["abcdefgh"]]
    rows = [{"question_id": n, "category": "ab"[n % 2], "turns": turns[n % 2]} for n in range(20)]
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = {"prompt_template": "{question}{answer}"}, {"prompt_template": "{question_1}{question_2}{answer_2}"}
    templates = {"single-v1": first, "single-math-v1": first} | {
        f"single{math}-v1-multi-turn": second for math in ("", "-math")
    }
    lines = [json.dumps({"name": name, "system_prompt": "s" * 400, **entry}) for name, entry in templates.items()]
    (tmp_path / "judge.jsonl").write_text("\n".join(lines))
    flags = ["--bench_dir", str(tmp_path), "--judge_file", str(tmp_path / "judge.jsonl"), "--n_trials", "10"]
    flags += [
        "--judge_price_in",
        "1000",
        "--judge_price_out",
        "0",
        "--max_new_token",
        "40",
        "--judge_model",
        "openai:m",
    ]
    assert main(["plan", *trio.flags(), *flags]) == 0
    *_, judge = tables(capsys.readouterr().out)
    found = {row["what"]: row["figure"] for row in judge}
    # 14 questions in each of 10 trials and of what they recommend, 6 held out for 6 models; half of them of two turns.
    n = [7 * 11 + 3 * 6, 7 * 11 + 3 * 6]
    assert found["questions"] == "14 in a trial, 6 held out"
    assert found["turns judged"] == "21 in a trial, 9 held out, 1 of each"
    assert found["judgments"].startswith(f"{2 * n[0] + n[1]} ")
    # A token is four letters of Latin script or one character of Japanese; answers have forty.
    tokens = (n[0] + n[1]) * (408 // 4 + 40) + n[0] * (2 + 408 // 4 + 2 * 40)
    assert found["judge reads"].startswith(f"about {tokens / 1000:.0f} k tokens")
    assert found["judge cost"].startswith(f"about ${tokens / 1000:.2f}")
    # Of a mixture each target and the best expert are proven too; the latter is sought among all.
    experts = ["--target_model", str(trio.target), str(trio.tuned)]
    assert main(last_target(["plan", *trio.flags(), *experts, *flags])) == 0
    *_, judge = tables(capsys.readouterr().out)
    found = {row["what"]: row["figure"] for row in judge}
    assert found["judgments"].startswith(f"{21 * (10 + 1 + 2) + 9 * (2 + 1 + 6)} ")
    assert main(["plan", *trio.flags(), *flags, "--judge_price_in", "1", "--judge_price_out", "2"]) == 0
    assert main(["plan", *trio.flags(), *flags[:6], "--judge_model", "openai:m"]) == 0
    assert "unknown: give --judge_price_in" in capsys.readouterr().out
    broken = ["--bench_dir", str(tmp_path), "--judge_file", "nowhere", "--judge_model", "gpt-4o"]
    assert main(["plan", *trio.flags(), *broken]) == 2
    assert "--judge_file nowhere: cannot be read" in capsys.readouterr().err
