"""Stop strings: seen at the token that completes them, whatever tokens they are spelled with."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.models.utils import postprocess_generated_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tvmerge.models.stop_strings import StopStrings, cut_at_stop

JAPANESE = ["東京タワーは東京都港区にある。\n", "問:どこ?\n答:港区。\n\n", "駅で緑の石を拾った。\n問題です。\n"]


@pytest.fixture(scope="session")
def bytes_tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE whose tokens are parts of characters, characters and words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(JAPANESE * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens=["<|end|>"],
    )


def first_end(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop: Sequence[str]) -> int:
    """The slow reference: how many tokens there are when the whole text first holds a stop string, or all."""
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[:n]))
        if any(term in text for term in stop):
            return n
    return len(ids)


def our_end(stops: StopStrings, ids: Sequence[int]) -> int:
    return next((n for n in range(1, len(ids) + 1) if stops.end(ids[:n])), len(ids))


STOPS = [("\n",), ("。",), ("問題",), ("\n\n", "答:"), ("京タ", "</s>"), ("区に", "ワー"), ("<|end|>",), ("",), ()]


@settings(max_examples=150, deadline=None)
@given(data=st.data(), stop=st.sampled_from(STOPS))
def test_a_stop_string_is_seen_at_the_token_that_completes_it(
    bytes_tokenizer: PreTrainedTokenizerBase, data: st.DataObject, stop: tuple[str, ...]
) -> None:
    pieces = [
        bytes_tokenizer.encode(text, add_special_tokens=False) for text in [*JAPANESE, "問", "題", "\n", "<|end|>"]
    ]
    # One token for each byte too, as a model may spell a word that has tokens of its own.
    pieces += [bytes_tokenizer.convert_tokens_to_ids(list(piece)) for piece in ("åķıé¡Į", "ãĢĤ", "ĊĊ")]
    vocabulary = st.integers(0, len(bytes_tokenizer) + 2).map(lambda token: [token])
    parts = data.draw(st.lists(st.one_of(st.sampled_from(pieces), vocabulary), min_size=1, max_size=12))
    ids = [token for part in parts for token in part]
    assert our_end(StopStrings(bytes_tokenizer, stop), ids) == first_end(bytes_tokenizer, ids, stop)


def test_a_stop_string_over_the_borders_of_tokens_is_seen(bytes_tokenizer: PreTrainedTokenizerBase) -> None:
    spelled = bytes_tokenizer.convert_tokens_to_ids(list("åķıé¡Į"))
    assert len(spelled) == 6
    assert bytes_tokenizer.decode(spelled) == "問題"
    spelled += bytes_tokenizer.convert_tokens_to_ids(list("ãģ§ãģĻ"))
    stops = StopStrings(bytes_tokenizer, ("問題です",))
    ids = [*bytes_tokenizer.encode("駅で", add_special_tokens=False), *spelled]
    assert our_end(stops, [*ids, 9]) == len(ids)


def test_a_token_whose_leading_space_is_dropped_alone_may_complete_a_stop_string() -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "▁a": 1, "a": 2, "▁": 3, "▁b": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    spaced = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert spaced.decode([4]) == "b"
    assert our_end(StopStrings(spaced, ("a ",)), [1, 4, 4]) == 2


def test_few_tokens_are_decoded(bytes_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    stops = StopStrings(bytes_tokenizer, ("\n",))
    ids = bytes_tokenizer.encode(JAPANESE[0] * 20, add_special_tokens=False)
    our_end(stops, ids)
    ids = [token for token in ids if "\n" not in bytes_tokenizer.decode([token])]
    monkeypatch.setattr(type(bytes_tokenizer), "decode", lambda *_, **__: pytest.fail("decoded for nothing"))
    assert our_end(stops, ids) == len(ids)


@given(text=st.text(alphabet="ab\n。", max_size=20), stop=st.lists(st.text(alphabet="ab\n。", max_size=3), max_size=3))
def test_a_text_is_cut_as_lm_eval_cuts(text: str, stop: list[str]) -> None:
    assert cut_at_stop(text, stop) == postprocess_generated_text(text, stop, None)
