"""Opening models: what is wrong with a folder is said in one line, before any weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Trio, save_tokenizer
from safetensors.torch import load_file, save_file

from tvmerge.checkpoint import Checkpoint, check_mergeable
from tvmerge.errors import CheckpointError, IncompatibleError
from tvmerge.hub import resolve
from tvmerge.vocabulary import check_same_vocabulary
from tvmerge.writer import copy_model_files, write_weights


def opened(folder: Path) -> Checkpoint:
    return Checkpoint(resolve(str(folder)))


@pytest.fixture
def sharded(trio: Trio, tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    folder.mkdir()
    write_weights(opened(trio.target), folder, shard_bytes=4000)
    copy_model_files(trio.target, folder)
    return folder


def test_shards_hold_the_same_tensors_as_one_file(trio: Trio, sharded: Path) -> None:
    one, many = opened(trio.target), opened(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert one.names == many.names
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.names)


def test_one_file_goes_before_an_index_as_in_transformers(trio: Trio, sharded: Path) -> None:
    shutil.copy(trio.base / "model.safetensors", sharded)
    name = opened(sharded).names[0]
    assert torch.equal(opened(sharded).read(name), opened(trio.base).read(name))


def test_the_fingerprint_follows_the_weights_and_not_the_path(trio: Trio, tmp_path: Path) -> None:
    shutil.copytree(trio.target, tmp_path / "copy")
    assert opened(tmp_path / "copy").fingerprint == opened(trio.target).fingerprint
    assert opened(trio.base).fingerprint != opened(trio.target).fingerprint


def test_the_fingerprint_sees_one_small_tensor_change(tmp_path: Path) -> None:
    tensors = {"large.weight": torch.zeros(300, 300), "norm.weight": torch.ones(8)}
    for name, value in (("one", 1.0), ("two", 7.0)):
        (tmp_path / name).mkdir()
        save_file({**tensors, "norm.weight": torch.full((8,), value)}, tmp_path / name / "model.safetensors")
    assert opened(tmp_path / "one").fingerprint != opened(tmp_path / "two").fingerprint


def test_reading_maps_the_file_and_copies_nothing(trio: Trio) -> None:
    checkpoint = opened(trio.target)
    name = checkpoint.names[0]
    assert checkpoint.array(name).ctypes.data == checkpoint.array(name).ctypes.data
    with pytest.raises(ValueError, match="read-only"):
        checkpoint.array(name)[0] = 0
    checkpoint.read(name).zero_()  # torch knows no read-only tensors, and gets a copy
    assert checkpoint.array(name).any()


def _remove_shard(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def _truncate_shard(folder: Path) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-7])


def _write_rubbish(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[0].write_bytes(b"<html>404</html>")


def _misplace_tensor(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["no.such.weight"] = sorted(folder.glob("model-*.safetensors"))[0].name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _leave_the_folder(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../target/model.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _break_the_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")


def _empty_the_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')


def _only_pickles(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")


def _only_adapter(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    save_file({"a": torch.ones(1)}, folder / "adapter_model.safetensors")


def _nothing(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove_shard, "1 of .* shards missing, the first is model-00002"),
        (_truncate_shard, "model-00002-of-.*not a whole safetensors file"),
        (_write_rubbish, "model-00001-of-.*not a whole safetensors file"),
        (_misplace_tensor, "lacks no.such.weight"),
        (_leave_the_folder, "not a file beside it"),
        (_break_the_index, "not readable as JSON"),
        (_empty_the_index, "has no weight_map"),
        (_only_pickles, "pickled weights only"),
        (_only_adapter, "LoRA adapter"),
        (_nothing, "holds neither model.safetensors nor"),
    ],
)
def test_a_damaged_folder_is_refused(sharded: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(sharded)
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(sharded)
    assert str(sharded) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["no/such/folder", "./here", "~/nowhere/at/all", "a b", "owner/model@", "~nobody.here/x", "x" * 300]
)
def test_a_name_that_is_neither_folder_nor_id_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve(name)


def test_a_file_is_no_model(trio: Trio) -> None:
    with pytest.raises(CheckpointError, match="is a file"):
        resolve(str(trio.target / "config.json"))


def test_fp8_is_refused(trio: Trio, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="F8_E4M3"):
        opened(tmp_path)


def test_quantized_and_weightless_models_are_refused(trio: Trio, tmp_path: Path) -> None:
    folder = tmp_path / "quantized"
    shutil.copytree(trio.target, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(IncompatibleError, match=r"quantized \(gptq\)"):
        check_mergeable(opened(folder), name="the target")
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.ones(2, dtype=torch.int8)}, folder / "model.safetensors")
    with pytest.raises(IncompatibleError, match="no floating-point tensor"):
        check_mergeable(opened(folder), name="the target")


def test_vocabularies_of_one_size_and_other_tokens_are_refused(trio: Trio, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(trio.target, folder)
    save_tokenizer(folder, characters="jihgfedcba 東京タワ！。\n")
    with pytest.raises(IncompatibleError, match="1 tokens only in the former, 1 only in the latter, 10 with another"):
        check_same_vocabulary(opened(trio.target), opened(folder), reference_name="a", other_name="b")
    check_same_vocabulary(opened(trio.target), opened(trio.tuned), reference_name="a", other_name="b")


def test_a_missing_config_is_said(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        _ = opened(tmp_path).config


def test_written_files_load_anywhere(trio: Trio, tmp_path: Path) -> None:
    write_weights(opened(trio.target), tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    expected = load_file(trio.target / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_no_weights_and_no_index_are_copied(sharded: Path, tmp_path: Path) -> None:
    (sharded / "README.md").write_text("of another model")
    (tmp_path / "copy").mkdir()
    copy_model_files(sharded, tmp_path / "copy")
    copied = {path.name for path in (tmp_path / "copy").iterdir()}
    assert copied == {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
