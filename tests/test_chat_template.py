"""Chats as text: what the template's makers would write, and one token of beginning."""

from __future__ import annotations

import builtins
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import save_tokenizer
from fastchat.conversation import conv_templates, get_conv_template
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tvmerge.errors import ConfigError
from tvmerge.models.chat_template import open_template

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} "
    "[/INST]{% elif message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SYSTEM = {"role": "system", "content": "Be kind."}
ONE = [{"role": "user", "content": "Who?"}]
TWO = [*ONE, {"role": "assistant", "content": "Me {{ 7 * 7 }} {x}"}, {"role": "user", "content": "Why {% if %}?"}]


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    """One that puts a token of beginning before each text."""
    save_tokenizer(tmp_path, "abcdefghijklmnopqrstuvwxyz ABCINSTMW?.[]/\n")
    made = AutoTokenizer.from_pretrained(tmp_path)
    post = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    spec = json.loads(made.backend_tokenizer.to_str())
    made._tokenizer = Tokenizer.from_str(json.dumps({**spec, "post_processor": post}))
    assert made.encode("a")[0] == made.bos_token_id == 1
    return made


def test_the_tokenizers_own_template_writes_its_own_beginning(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = MISTRAL
    template = open_template(None, tokenizer)
    assert not template.adds_special_tokens
    assert not template.takes_system
    assert template.stop == ()
    text = template.render([SYSTEM, *TWO])
    assert text == "<s>[INST] Who? [/INST]Me {{ 7 * 7 }} {x}</s>[INST] Why {% if %}? [/INST]"
    assert text == tokenizer.apply_chat_template(TWO, tokenize=False, add_generation_prompt=True)
    assert template.encode(tokenizer, text) == tokenizer.apply_chat_template(TWO, return_dict=False)
    assert template.encode(tokenizer, text).count(1) == 1


def test_a_template_that_takes_a_system_message_gets_it(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = CHATML
    template = open_template(None, tokenizer)
    assert template.takes_system
    assert template.render([SYSTEM, *ONE]) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_that_leaves_a_system_message_out_takes_none(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = MISTRAL.replace("{% else %}{{ raise_exception", "{% else %}{{ '' if true else raise")
    assert not open_template(None, tokenizer).takes_system


def test_a_file_is_a_template_of_the_tokenizers(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.chat_template = CHATML
    path = tmp_path / "mistral.jinja"
    path.write_text(MISTRAL)
    template = open_template(str(path), tokenizer)
    assert template.render(TWO).startswith("<s>[INST] Who? [/INST]Me {{ 7 * 7 }}")
    assert not template.adds_special_tokens
    tokenizer.chat_template = MISTRAL
    own = open_template(None, tokenizer)
    assert template.digest == own.digest
    path.write_text(CHATML)
    assert open_template(str(path), tokenizer).digest != own.digest


@pytest.mark.parametrize(
    "text",
    [
        "{% if %}",
        "{{ messages[0].role.no.such }}",
        "{{ raise_exception('never') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_that_cannot_write_a_chat_is_refused(
    text: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "bad.jinja").write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.jinja\): .") as caught:
        open_template(str(tmp_path / "bad.jinja"), tokenizer)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_is_said_in_one_line(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no chat template: name one with --chat_template"):
        open_template(None, tokenizer)
    with pytest.raises(ConfigError, match=r"none\.jinja: .*No such file"):
        open_template(str(tmp_path / "none.jinja"), tokenizer)
    with pytest.raises(ConfigError, match=r"--chat_template vicuna: .* which has .*vicuna_v1\.1"):
        open_template("vicuna", tokenizer)


def test_without_fastchat_it_is_said_how_to_get_it(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("fastchat"):
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert open_template("none", tokenizer).name == "none"
    with pytest.raises(ConfigError, match=r"pip install 'tvmerge\[fastchat\]'"):
        open_template("vicuna_v1.1", tokenizer)


@pytest.mark.parametrize(
    "name", ["llama-2", "vicuna_v1.1", "zephyr", "aquila-chat", "mistral", "one_shot", "zero_shot", "qwen-7b-chat"]
)
@pytest.mark.parametrize("system", [False, True])
def test_fastchats_prompts_are_fastchats(name: str, system: bool, tokenizer: PreTrainedTokenizerBase) -> None:
    expected = get_conv_template(name)
    if system:
        expected.set_system_message("Be kind.")
    for message in TWO:
        expected.append_message(expected.roles[message["role"] == "assistant"], message["content"])
    expected.append_message(expected.roles[1], None)
    template = open_template(name, tokenizer)
    assert template.render([SYSTEM, *TWO] if system else TWO) == expected.get_prompt()
    assert template.adds_special_tokens
    stop = expected.stop_str
    assert template.stop == ((stop,) if isinstance(stop, str) else tuple(stop or ()))
    assert template.stop_token_ids == frozenset(expected.stop_token_ids or ())
    assert "Me {{ 7 * 7 }} {x}" in template.render(TWO)


def test_all_of_fastchats_templates_open_and_leave_its_own_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    before = {name: dataclasses.replace(template) for name, template in conv_templates.items()}
    digests = set()
    for name in conv_templates:
        if conv_templates[name].sep_style is None:  # of a model that is asked by its provider's client
            with pytest.raises(ConfigError, match=f"chat template {name} .*Invalid style"):
                open_template(name, tokenizer)
            continue
        template = open_template(name, tokenizer)
        template.render([SYSTEM, *TWO])
        assert template.encode(tokenizer, template.render(TWO))[:2] != [1, 1]
        digests.add(template.digest)
    assert len(digests) > 20
    assert conv_templates == before
    assert open_template("internlm-chat", tokenizer).render(ONE).count("<s>") == 1, "begins with it itself"


def test_no_template_adds_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    template = open_template("none", tokenizer)
    assert template.render(ONE) == "Who?"
    assert template.render(TWO) == "Who?Me {{ 7 * 7 }} {x}\nWhy {% if %}?"
    assert template.render([SYSTEM, *ONE]) == "Be kind.\nWho?"
    assert template.encode(tokenizer, "ab") == tokenizer.encode("ab")


def test_no_prompt_holds_the_date(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = (
        "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}|{{ strftime_now('%Y-%m-%d') }}{% endif %} "
        "{% for message in messages %}{{ message.content }}{% endfor %}"
    )
    template = open_template(None, tokenizer)
    assert template.render(ONE) == "26 Jul 2024|2024-07-26 Who?"


@pytest.mark.parametrize("text", ["hello", "", "{{ messages[-1].content }}", "{{ messages[0].content }}"])
def test_a_template_that_leaves_turns_out_is_refused(
    tokenizer: PreTrainedTokenizerBase, text: str, tmp_path: Path
) -> None:
    (tmp_path / "short.jinja").write_text(text)
    with pytest.raises(ConfigError, match="it leaves turns out"):
        open_template(str(tmp_path / "short.jinja"), tokenizer)
