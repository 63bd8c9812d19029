"""Vocabularies united: real small tokenizers as transformers loads them, and each row that of a model that has it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conformance_state_dict import check_state_dict
from conftest import save_mistral, save_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cli import assert_refused
from test_state_dict import InMemory
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, PreTrainedTokenizerFast

from tvmerge.checkpoint import Checkpoint, Header
from tvmerge.cli import main
from tvmerge.errors import CheckpointError, IncompatibleError
from tvmerge.hub import ModelId, resolve
from tvmerge.models.transformers import check_tokenizer
from tvmerge.moe import Average
from tvmerge.router import ExpertPrompts, GateInputs, make_gates
from tvmerge.state_dict import BFLOAT16, StateDict, TensorSpec
from tvmerge.union import UnitedVocabulary, unite
from tvmerge.vocabulary import Rows, vocabulary_digest
from tvmerge.writer import copy_model_files

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{n:02X}>" for n in range(256)]
FIRST = ["the cat sat on the mat", "a cat is a cat", "that hat is the mat of a cat", "abcdefg hijklm nopqrst uvwxyz"]
OTHER = ["東京タワーは東京の塔です", "東京の猫と東京の塔", "これは塔です", "the tower is the tall tower of the town"]
ALPHABET = "abcdefghijklmnopqrstuvwxyz "

Make = Callable[[list[str]], Tokenizer]


def word_level(corpus: list[str]) -> Tokenizer:
    characters = sorted(set("".join(corpus)))
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*SPECIAL, *characters])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def word_piece(corpus: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.train_from_iterator(
        corpus, trainers.WordPieceTrainer(vocab_size=80, special_tokens=SPECIAL, show_progress=False)
    )
    return tokenizer


def byte_level(corpus: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def byte_fallback(corpus: list[str]) -> Tokenizer:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    trained.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=70, show_progress=False))
    content = json.loads(trained.to_str())["model"]
    pieces = sorted(content["vocab"], key=lambda piece: int(content["vocab"][piece]))
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *BYTES, *pieces])}
    merges = [tuple(pair) for pair in content["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def unigram(corpus: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


KINDS: Mapping[str, Make] = {
    "word level": word_level,
    "word piece": word_piece,
    "byte level": byte_level,
    "byte fallback": byte_fallback,
    "unigram": unigram,
}
#: Classes that build themselves anew from what the file says of vocabulary and merges.
CLASSES = [("byte fallback", "llama", "LlamaTokenizer"), ("byte level", "qwen2", "Qwen2Tokenizer")]


def save(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    added: tuple[str | AddedToken, ...] = (),
    padding: int = 0,
    model_type: str = "mistral",
    name: str | None = None,
) -> Header:
    """A model's folder without weights, its vocabulary tensors with some rows of padding."""
    for token in added:
        tokenizer.add_special_tokens([token]) if isinstance(token, str) else tokenizer.add_tokens([token])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    if name is not None:
        edit(folder, "tokenizer_config.json", lambda content: content.update(tokenizer_class=name))
    size = tokenizer.get_vocab_size() + padding
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": size}))
    spec = TensorSpec((size, 4), BFLOAT16)
    return Header(ModelId(str(folder), None, folder), {"lm_head.weight": spec, "model.embed_tokens.weight": spec})


def edit(folder: Path, file: str, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / file).read_text(encoding="utf-8"))
    change(content)
    (folder / file).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def united_of(*headers: Header) -> UnitedVocabulary:
    found = unite(headers, whose=[header.model.path.name for header in headers])
    assert found is not None
    return found


def written(united: UnitedVocabulary, first: Header, folder: Path) -> Path:
    folder.mkdir()
    copy_model_files(first.model.path, folder)
    united.write_tokenizer(folder)
    return folder


def vocabulary(header: Header) -> dict[str, int]:
    found: dict[str, int] = Tokenizer.from_file(str(header.model.path / "tokenizer.json")).get_vocab()
    return found


def plain(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.fixture(scope="module", params=[*((kind, "mistral", None) for kind in KINDS), *CLASSES], ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Header, Header, Path]:
    """Two models with tokenizers of one kind, and a folder with the united one."""
    kind, model_type, name = request.param
    root = tmp_path_factory.mktemp("pair")
    first, other = (
        save(root / called, KINDS[kind](corpus), added=added, padding=2, model_type=model_type, name=name)
        for called, corpus, added in (
            ("first", FIRST, ("<|first|>",)),
            ("other", OTHER, ("<|other|>", AddedToken("<|tool|>", normalized=False))),
        )
    )
    return first, other, written(united_of(first, other), first, root / "united")


def test_every_token_has_its_united_id(pair: tuple[Header, Header, Path]) -> None:
    first, other, folder = pair
    united = united_of(first, other)
    loaded = AutoTokenizer.from_pretrained(folder)
    ours, theirs = vocabulary(first), vocabulary(other)
    assert {token: united.vocabulary[token] for token in ours} == ours
    new = [token for token in sorted(theirs, key=lambda token: theirs[token]) if token not in ours]
    assert new
    assert [united.vocabulary[token] for token in new] == list(range(len(ours), len(ours) + len(new)))
    assert loaded.get_vocab() == united.vocabulary
    assert united.size == len(united.vocabulary) > first.config["vocab_size"]
    assert loaded.convert_ids_to_tokens(list(range(united.size))) == sorted(
        united.vocabulary, key=lambda token: united.vocabulary[token]
    )
    flags = {str(token): token for token in loaded.added_tokens_decoder.values()}
    assert flags["<|other|>"].special
    assert flags["<|first|>"].special
    assert not flags["<|tool|>"].special
    both = plain(loaded, "a<|other|>a<|tool|>a<|first|>a")
    assert [id_ for id_ in both if loaded.convert_ids_to_tokens(id_).startswith("<|")] == [
        united.vocabulary[token] for token in ("<|other|>", "<|tool|>", "<|first|>")
    ]
    header = Header(ModelId(str(folder), None, folder), {})
    assert vocabulary_digest(header) == united.digest
    check_tokenizer(folder, united.vocabulary)


def test_text_is_read_by_the_tokens_of_both(pair: tuple[Header, Header, Path]) -> None:
    first, other, folder = pair
    own, united, theirs = (AutoTokenizer.from_pretrained(path) for path in (first.model.path, folder, other.model.path))
    texts = st.text(ALPHABET, max_size=30).map(lambda text: " ".join(text.split()))

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(texts)
    def round_trip(text: str) -> None:
        ids = plain(own, text)
        if own.unk_token_id not in ids and own.decode(ids) == text:
            assert united.unk_token_id not in plain(united, text)
            assert united.decode(plain(united, text)) == text

    round_trip()
    for text in OTHER:
        assert theirs.unk_token_id not in plain(theirs, text)
        found = plain(united, text)
        assert united.unk_token_id not in found
        assert united.decode(found) == theirs.decode(plain(theirs, text))
        new = {united.convert_ids_to_tokens(id_) for id_ in found} - vocabulary(first).keys()
        assert new or text.isascii(), "no token that only the other has was used"


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_merges_of_others_join_only_what_the_firsts_leave(kind: str, tmp_path: Path) -> None:
    first, other = (save(tmp_path / str(n), KINDS[kind](corpus)) for n, corpus in enumerate((FIRST, OTHER)))
    own = AutoTokenizer.from_pretrained(first.model.path)
    united = AutoTokenizer.from_pretrained(written(united_of(first, other), first, tmp_path / "united"))
    merges = [
        [tuple(pair) for pair in json.loads((path / "tokenizer.json").read_text())["model"]["merges"]]
        for path in (first.model.path, other.model.path, tmp_path / "united")
    ]
    assert merges[2][: len(merges[0])] == merges[0]
    appended = set(merges[2]) - set(merges[0])
    assert appended == set(merges[1]) - set(merges[0]) != set()
    seen = {False: 0, True: 0}

    @settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.sampled_from(" ".join([*FIRST, OTHER[-1]]).split()), min_size=1, max_size=3).map(" ".join))
    def same_tokens(text: str) -> None:
        ids = plain(own, text)
        tokens = own.convert_ids_to_tokens(ids)
        joined = any(each in appended for each in pairwise(tokens))
        seen[joined] += 1
        assert (plain(united, text) == ids) is not joined

    same_tokens()
    assert all(seen.values())


def test_merges_are_text_or_pairs_as_the_firsts(tmp_path: Path) -> None:
    first, other = (save(tmp_path / str(n), byte_level(corpus)) for n, corpus in enumerate((FIRST, OTHER)))
    as_pairs = json.loads(united_of(first, other).tokenizer or "")["model"]["merges"]
    edit(
        first.model.path,
        "tokenizer.json",
        lambda c: c["model"].update(merges=list(map(" ".join, c["model"]["merges"]))),
    )
    assert json.loads(united_of(first, other).tokenizer or "")["model"]["merges"] == list(map(" ".join, as_pairs))


def test_unigram_tokens_lie_where_their_ids_say(tmp_path: Path) -> None:
    first, other = (save(tmp_path / str(n), unigram(corpus), padding=9) for n, corpus in enumerate((FIRST, OTHER)))
    end = len(vocabulary(first))
    (first.model.path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end + 2]}))
    united = united_of(first, other)
    assert all(
        index > end + 2
        for token, index in united.vocabulary.items()
        if token in vocabulary(other).keys() - vocabulary(first).keys()
    )
    assert united.vocabulary[f"<|unused_{end}|>"] == end
    loaded = AutoTokenizer.from_pretrained(written(united, first, tmp_path / "united"))
    assert loaded.get_vocab() == united.vocabulary
    assert united.rows[0].source[end : end + 3] == (end, end + 1, end + 2)
    assert united.rows[1].source[end : end + 3] == (-1, -1, -1)
    scores = [
        dict(json.loads((path / "tokenizer.json").read_text())["model"]["vocab"])
        for path in (first.model.path, other.model.path, tmp_path / "united")
    ]
    assert all(scores[2][piece] == scores[0].get(piece, scores[1].get(piece)) for piece in scores[0] | scores[1])


def test_rows_of_padding_are_taken_first_and_stay_where_they_are_not(tmp_path: Path) -> None:
    first = save(tmp_path / "first", word_level(["ab"]), padding=3)
    other = save(tmp_path / "other", word_level(["bxy"]))
    united = united_of(first, other)
    assert (united.size, united.vocabulary) == (8, {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "x": 5, "y": 6})
    assert [rows.source for rows in united.rows] == [(0, 1, 2, 3, 4, -1, -1, 7), (0, 1, 2, -1, 3, 4, 5, -1)]
    edit(tmp_path / "first", "config.json", lambda content: content.update(pad_token_id=5))
    again = united_of(Header(first.model, {name: first.spec(name) for name in first.names}), other)
    assert (again.size, again.vocabulary["x"], again.vocabulary["y"]) == (8, 6, 7)


def test_the_same_tokens_are_not_united(tmp_path: Path) -> None:
    first, other = (save(tmp_path / name, word_level(["ab"])) for name in ("first", "other"))
    assert unite([first, other], whose=["first", "other"]) is None
    wider = save(tmp_path / "wider", word_level(["ab"]), padding=2)
    united = united_of(first, wider)
    assert (united.size, united.tokenizer) == (5, None)
    before = (first.model.path / "tokenizer.json").read_bytes()
    assert (written(united, first, tmp_path / "united") / "tokenizer.json").read_bytes() == before
    assert united_of(wider, first).rows[1].source == (0, 1, 2, 3, 4, -1, -1)


def test_three_models_and_other_files_of_the_first(tmp_path: Path) -> None:
    corpora = {"first": ["ab"], "second": ["bcx"], "third": ["xyc"]}
    headers = [save(tmp_path / name, word_level(corpus)) for name, corpus in corpora.items()]
    for name in ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"):
        (headers[0].model.path / name).write_text("{}")
    decoder = {"0": {"content": "<unk>", "special": True}}
    edit(headers[0].model.path, "tokenizer_config.json", lambda content: content.update(added_tokens_decoder=decoder))
    tokenizer = Tokenizer.from_file(str(headers[2].model.path / "tokenizer.json"))
    headers[2] = save(tmp_path / "third", tokenizer, added=("<|x|>",))
    united = united_of(*headers)
    assert [token for token in united.vocabulary if len(token) == 1] == ["a", "b", "c", "x", "y"]
    assert united.rows[2].source == (0, 1, 2, -1, -1, 3, 4, 5, 6)
    folder = written(united, headers[0], tmp_path / "united")
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["added_tokens_decoder"]["8"]["content"] == "<|x|>"
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == united.vocabulary


def test_the_tokenizer_is_the_same_bytes_in_every_process(pair: tuple[Header, Header, Path]) -> None:
    first, other, folder = pair
    if first.config["model_type"] != "mistral":
        return
    code = (
        "import sys; from pathlib import Path; from tvmerge.checkpoint import Header; from tvmerge.hub import ModelId\n"
        "from tvmerge.state_dict import BFLOAT16, TensorSpec; from tvmerge.union import unite\n"
        "def model(path, size):\n"
        "    spec = TensorSpec((int(size), 4), BFLOAT16)\n"
        "    return Header(ModelId(path, None, Path(path)), {'lm_head.weight': spec})\n"
        "found = unite([model(*sys.argv[1:3]), model(*sys.argv[3:])], whose=['a', 'b'])\n"
        "sys.stdout.buffer.write(found.tokenizer.encode())\n"
    )
    arguments = [str(each) for h in (first, other) for each in (h.model.path, h.config["vocab_size"])]
    made = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    ).stdout
    assert made == (folder / "tokenizer.json").read_bytes()


def _other_kind(folder: Path) -> None:
    save(folder, unigram(OTHER))


def _bytes(folder: Path) -> None:
    save(folder, byte_level(OTHER))


def _no_fallback(folder: Path) -> None:
    edit(folder, "tokenizer.json", lambda content: content["model"].update(byte_fallback=False))


def _suffix(folder: Path) -> None:
    edit(folder, "tokenizer.json", lambda content: content["model"].update(end_of_word_suffix="</w>"))


def _lowercase(folder: Path) -> None:
    edit(folder, "tokenizer.json", lambda content: content.update(normalizer={"type": "Lowercase"}))


def _splits(folder: Path) -> None:
    parts = [{"type": "WhitespaceSplit"}, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}]
    change = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": parts}}
    edit(folder, "tokenizer.json", lambda content: content.update(change))


def _none(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"")


def _special(folder: Path) -> None:
    entry = {**dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False), "special": True}
    edit(
        folder, "tokenizer.json", lambda content: content["added_tokens"].append({"id": 259, "content": "▁a", **entry})
    )
    edit(folder, "tokenizer.json", lambda content: content["model"]["vocab"].update({"▁a": 259}))


def _no_ids(folder: Path) -> None:
    edit(folder, "tokenizer.json", lambda content: content["model"].update(vocab={"a": "0"}))


def _far_ids(folder: Path) -> None:
    edit(folder, "tokenizer.json", lambda content: content["model"]["vocab"].update({"far": 10**12}))


def _no_merges(folder: Path) -> None:
    edit(folder, "tokenizer.json", lambda content: content["model"].pop("merges"))
    edit(folder, "tokenizer.json", lambda content: content["model"].update(type="BPE"))


def _no_size(folder: Path) -> None:
    edit(folder, "config.json", lambda content: content.pop("vocab_size"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_kind, r"the kind of their models: BPE in the former and Unigram in the latter: use models of one kind"),
        (_bytes, r"what they spell: text with '▁' for a space in the former and bytes in the latter"),
        (_no_fallback, r"byte_fallback: True in the former and False in the latter"),
        (_suffix, r"end_of_word_suffix: none in the former and </w> in the latter"),
        (_lowercase, r'the normalizer: \[\] in the former and \[\{"type": "Lowercase"\}\] in the latter'),
        (_splits, r'the pre-tokenizer: \[\] in the former and \[\{"type": "WhitespaceSplit"\}\] in the latter'),
        (_none, r"other: ships no tokenizer.json, which vocabularies are united by: save its tokenizer"),
        (_special, r"'▁a' is a special token of other and plain text to first: make it special"),
        (_no_ids, r"other: its tokenizer.json tells no vocabulary that can be united"),
        (_far_ids, r"other: its tokenizer.json tells no vocabulary that can be united"),
        (_no_merges, r"a tokenizer.json of first, other is damaged, fetch it again: KeyError: 'merges'"),
        (_no_size, r"other: its config.json has no vocab_size"),
    ],
)
def test_tokenizers_that_cannot_be_united(change: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    first = save(tmp_path / "first", byte_fallback(FIRST))
    other = save(tmp_path / "other", byte_fallback(OTHER))
    change(tmp_path / "other")
    size = json.loads((tmp_path / "other" / "config.json").read_text()).get("vocab_size", 1)
    tensors = {name: TensorSpec((size, 4), BFLOAT16) for name in other.names}
    with pytest.raises(IncompatibleError, match=message) as refusal:
        unite([first, Header(other.model, tensors)], whose=["first", "other"])
    assert "\n" not in str(refusal.value)


def test_older_files_spell_a_space_otherwise_and_are_united(tmp_path: Path) -> None:
    first, other = (save(tmp_path / str(n), byte_fallback(corpus)) for n, corpus in enumerate((FIRST, OTHER)))
    tokenizer = Tokenizer.from_file(str(other.model.path / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")  # of which none is left
    tokenizer.save(str(other.model.path / "tokenizer.json"))
    loaded = AutoTokenizer.from_pretrained(written(united_of(first, other), first, tmp_path / "united"))
    assert all(loaded.decode(plain(loaded, text)) == text for text in (*FIRST, *OTHER))


def test_two_tokens_of_one_id_are_refused(tmp_path: Path) -> None:
    first, other = (save(tmp_path / name, word_level([name])) for name in ("first", "other"))
    edit(first.model.path, "tokenizer.json", lambda content: content["model"]["vocab"].update(again=4))
    with pytest.raises(
        IncompatibleError, match=r"first: its tokenizer.json has two tokens for the id 4, one is 'again'"
    ):
        unite([first, other], whose=["first", "other"])


def test_a_token_that_is_plain_in_the_first_stays_plain(tmp_path: Path) -> None:
    first = save(tmp_path / "first", word_level(["ab"]))
    other = save(tmp_path / "other", word_level(["bc"]), added=(AddedToken("a", special=False),))
    united = united_of(first, other)
    assert (united.added, united.rows[1].source) == ({}, (0, 1, 2, 5, 3, 4))


def test_what_transformers_reads_otherwise_is_refused(tmp_path: Path) -> None:
    first = save(tmp_path / "first", word_level(["ab"]))
    with pytest.raises(CheckpointError, match=r"of transformers gives the token 'b' the id 4, not 5"):
        check_tokenizer(first.model.path, {"a": 3, "b": 5})


def test_a_token_that_only_transformers_adds_keeps_its_row_or_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, other = expert(tmp_path / "first", "abc", seed=1, padding=1), expert(tmp_path / "other", "abd", seed=2)
    edit(first, "tokenizer_config.json", lambda content: content.update(pad_token="<pad>"))
    assert AutoTokenizer.from_pretrained(first).pad_token_id == 6
    arguments = moe(tmp_path, [first, other], "--vocabulary", "union")
    capsys.readouterr()
    message = "gives the token '<pad>' the id 7, not 6: save the tokenizers of all models with transformers"
    assert_refused(arguments, message, tmp_path / "out", capsys)
    AutoTokenizer.from_pretrained(first).save_pretrained(first)
    assert main(arguments) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token_id == 6


ROWS = [
    Rows((0, 1, -1, -1, 4, -1), frozenset({"embed", "head.bias"})),
    Rows((1, -1, 0, -1, -1, -1), frozenset({"embed", "head.bias"})),
    Rows((-1, 0, 1, 2, -1, -1), frozenset({"embed", "head.bias"})),
]
#: For each row of each model, whose and which it is; the last is nobody's.
LENT = [
    [(0, 0), (0, 1), (1, 0), (2, 2), (0, 4), None],
    [(1, 1), (0, 1), (1, 0), (2, 2), (0, 4), None],
    [(0, 0), (2, 0), (2, 1), (2, 2), (0, 4), None],
]


def three() -> list[StateDict]:
    draw = torch.Generator().manual_seed(0)
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    found: list[StateDict] = []
    for size, dtype in zip((5, 2, 3), dtypes, strict=True):
        shapes = {"embed": (size, 3), "head.bias": (size,), "norm": (3,)}
        found.append(InMemory({name: torch.randn(*shape, generator=draw).to(dtype) for name, shape in shapes.items()}))
    return found


def test_rows_are_those_of_the_first_that_has_the_token() -> None:
    models = three()
    completed = UnitedVocabulary({}, 6, ROWS, None, {}).complete(models)
    for n, model in enumerate(completed):
        check_state_dict(model)
        assert np.array_equal(model.array("norm"), models[n].array("norm"))
        for name in ("embed", "head.bias"):
            assert model.spec(name) == TensorSpec((6, *models[n].spec(name).shape[1:]), models[n].spec(name).dtype)
            for row, lent in zip(model.array(name), LENT[n], strict=True):
                expected = (
                    np.zeros_like(row) if lent is None else models[lent[0]].array(name)[lent[1]].astype(row.dtype)
                )
                assert row.tobytes() == expected.tobytes()


def test_versions_are_those_of_all_that_lend_rows() -> None:
    models = three()
    united = UnitedVocabulary({}, 6, ROWS, None, {})
    before, again = united.complete(models), united.complete(models)
    after = united.complete([models[0], three()[1], models[2]])
    for n in range(3):
        assert before[n].version("embed") == again[n].version("embed")
        borrows = n < 2  # the third has the second's only token
        assert (before[n].version("embed") != after[n].version("embed")) is borrows
        assert (before[n].version("norm") == after[n].version("norm")) is (n != 1)
    assert len({each.version("embed") for each in before}) == 3


def test_the_mean_of_completed_models() -> None:
    completed = UnitedVocabulary({}, 6, ROWS, None, {}).complete(three())
    mean = Average(completed)
    check_state_dict(mean)
    values = np.stack([each.array("embed").astype(np.float64) for each in completed])
    assert np.array_equal(mean.array("embed"), values.mean(0).astype(BFLOAT16))


def test_a_task_vector_moves_the_rows_that_its_models_share(tmp_path: Path) -> None:
    first, other = save(tmp_path / "first", word_level(["ab"])), save(tmp_path / "other", word_level(["bc"]))
    united = united_of(first, other)
    tuned, base = save(tmp_path / "tuned", word_level(["cba"])), save(tmp_path / "base", word_level(["xcb"]), padding=1)
    rows = united.align([tuned, base], whose=["tuned", "base"])
    assert [each.source for each in rows] == [(0, 1, 2, -1, 4, 5), (0, 1, 2, -1, 3, 4)]
    assert rows[0].names == {"lm_head.weight", "model.embed_tokens.weight"}
    odd = Header(base.model, {"lm_head.weight": TensorSpec((4, 4), BFLOAT16)})
    with pytest.raises(IncompatibleError, match=r"base: has no lm_head.weight with one row for each of the 7 tokens"):
        united.align([tuned, odd], whose=["tuned", "base"])


# The command.


def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(resolve(str(folder)))


def expert(folder: Path, characters: str, *, seed: int, padding: int = 0, **changes: Any) -> Path:
    save_mistral(folder, seed=seed, vocab_size=3 + len(characters) + padding, **changes)
    save_tokenizer(folder, characters)
    return folder


def moe(
    folder: Path, experts: list[Path], *more: str, mode: str = "random", prompts: str = "a b", **changes: Any
) -> list[str]:
    entries = [
        {"source_model": str(path), "positive_prompts": [text]}
        for path, text in zip(experts, prompts.split(), strict=True)
    ]
    path = folder / "moe.yaml"
    path.write_text(yaml.safe_dump({"gate_mode": mode, "experts": entries, **changes}, allow_unicode=True), "utf-8")
    return ["moe", str(path), "--output_dir", str(folder / "out"), *more]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("base", ["first", "average"])
@pytest.mark.parametrize("mode", ["cheap_embed", "hidden"])
def test_experts_of_other_tokenizers_make_a_mixture(mode: str, base: str, tied: bool, tmp_path: Path) -> None:
    settings = {"tie_word_embeddings": tied}
    first = expert(tmp_path / "first", "abcdef", seed=1, padding=1, **settings)
    other = expert(tmp_path / "other", "東f京bxy", seed=2, **settings)
    arguments = moe(tmp_path, [first, other], "--vocabulary", "union", "--moe_base", base, mode=mode)
    assert main(arguments) == 0
    out = tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.config.vocab_size == 13
    assert tokenizer.get_vocab() == {t: i for i, t in enumerate([*SPECIAL, *"abcdef", *"東京xy"])}
    ours, theirs, made = checkpoint(first), checkpoint(other), checkpoint(out)
    names = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert names == {name for name in made.names if made.spec(name).shape[0] == 13}
    for name in names:
        rows = made.read(name)
        for i, character in enumerate("abcdef東京xy", start=3):
            found = [
                m.read(name)[3 + cs.index(character)]
                for m, cs in ((ours, "abcdef"), (theirs, "東f京bxy"))
                if character in cs
            ]
            # A token that one lacks is the other's; so is their mean.
            expected = torch.stack(found).float().mean(0).bfloat16() if base == "average" else found[0]
            assert torch.equal(rows[i], expected), character
    ids = tokenizer("東京a", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [[9, 10, 3]]
    assert torch.isfinite(model(ids).logits.float()).all()
    assert "--vocabulary union" in (out / "README.md").read_text(encoding="utf-8")
    router = made.array("model.layers.0.block_sparse_moe.gate.weight")
    assert np.ptp(router.astype(np.float32)) > 0


@pytest.mark.parametrize("mode", ["hidden", "cheap_embed"])
@pytest.mark.parametrize("base", ["first", "average"])
def test_prompts_are_read_by_the_base_as_it_is_in_the_mixture(base: str, mode: str, tmp_path: Path) -> None:
    experts = [expert(tmp_path / str(n), cs, seed=n) for n, cs in enumerate(("abc", "東京b"))]
    more = ("--vocabulary", "union", "--moe_base", base)
    assert main(moe(tmp_path, experts, *more, mode=mode, prompts="ab 東京", dtype="float32")) == 0
    made, headers = checkpoint(tmp_path / "out"), [checkpoint(folder) for folder in experts]
    completed = united_of(*headers).complete(headers)
    dense = Average(completed) if base == "average" else completed[0]
    config = MistralConfig.from_pretrained(experts[0], vocab_size=8)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            dense.read(name, out=parameter.data)
    inputs = GateInputs(
        layers=2,
        hidden=16,
        prompts=[ExpertPrompts([prompt]) for prompt in ("ab", "東京")],
        seed=0,
        tokenizer=lambda: AutoTokenizer.from_pretrained(tmp_path / "out"),
        embeddings=lambda: dense.array("model.embed_tokens.weight"),
        model=lambda: model,
    )
    for layer, expected in enumerate(make_gates(mode, inputs)):
        gate = made.array(f"model.layers.{layer}.block_sparse_moe.gate.weight")
        np.testing.assert_allclose(gate, expected, rtol=1e-4, atol=1e-5)


def permuted(folder: Path, source: Path, characters: str) -> Path:
    """The same model with its tokens in reverse order."""
    shutil.copytree(source, folder)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    order = [0, 1, 2, *range(2 + len(characters), 2, -1)]
    with torch.no_grad():
        for tensor in (model.model.embed_tokens.weight, model.lm_head.weight):
            tensor.copy_(tensor[order].clone())
    model.save_pretrained(folder)
    save_tokenizer(folder, characters[::-1])
    return folder


def test_permuted_vocabularies_change_no_logits(tmp_path: Path) -> None:
    first = expert(tmp_path / "first", "abcdef", seed=1)
    second = permuted(tmp_path / "second", first, "abcdef")
    mixtures = []
    for name, experts in (("straight", [first, second]), ("turned", [second, first])):
        (tmp_path / name).mkdir()
        assert main(moe(tmp_path / name, experts, "--vocabulary", "union", mode="hidden")) == 0
        mixtures.append(tmp_path / name / "out")
    logits, alone = [], AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32)
    for folder in (first, *mixtures):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer("fadcabbe", return_tensors="pt")["input_ids"]
        model = alone if folder == first else AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        order = tokenizer.convert_tokens_to_ids([*SPECIAL, *"abcdef"])
        logits.append(model(ids).logits[..., order])
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[2], logits[0], rtol=1e-5, atol=1e-5)


def test_a_named_base_gives_ids_and_may_lack_tokens(tmp_path: Path) -> None:
    base = expert(tmp_path / "base", "ab", seed=0)
    experts = [expert(tmp_path / name, cs, seed=n) for n, (name, cs) in enumerate({"x": "xb", "y": "yb"}.items())]
    assert main(moe(tmp_path, experts, "--vocabulary", "union", base_model=str(base), dtype="float32")) == 0
    made = checkpoint(tmp_path / "out").read("lm_head.weight")
    heads = [checkpoint(folder).read("lm_head.weight").float() for folder in (base, *experts)]
    assert torch.equal(made, torch.stack([*heads[0], heads[1][3], heads[2][3]]))


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, other = expert(tmp_path / "first", "abc", seed=1), expert(tmp_path / "other", "abd", seed=2)
    wider = expert(tmp_path / "wider", "abcd", seed=2)
    deep = expert(tmp_path / "deep", "abd", seed=2, num_hidden_layers=1)
    capsys.readouterr()
    out = tmp_path / "out"
    assert_refused(moe(tmp_path, [first, other]), "or --vocabulary union for the tokens of all", out, capsys)
    assert_refused(moe(tmp_path, [first, wider]), "must have the same, or use --vocabulary union", out, capsys)
    edit(other, "tokenizer.json", lambda content: content.update(normalizer={"type": "Lowercase"}))
    union = moe(tmp_path, [first, other], "--vocabulary", "union")
    assert_refused(union, "cannot be united: the normalizer: [] in the former and", out, capsys)
    (other / "tokenizer.json").unlink()
    assert_refused(union, "other: ships no tokenizer.json, which vocabularies are united by", out, capsys)
    deeper = moe(tmp_path, [first, deep], "--vocabulary", "union")
    assert_refused(deeper, "num_hidden_layers is 2 in the former and 1 in the latter", out, capsys)
