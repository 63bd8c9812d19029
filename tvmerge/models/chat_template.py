"""How a chat becomes the text that a model goes on from: the tokenizer's own template, a file, FastChat's, or none."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tvmerge.errors import ConfigError

__all__ = ["ChatTemplate", "Messages", "open_template"]

#: Turns of a chat, the last one a user's: `role` (system, user, assistant) and `content`.
Messages = Sequence[Mapping[str, str]]

#: Some templates write today's date into every prompt. A score must not depend on the day: theirs is that of Llama 3.1,
#: whose template falls back to this one. Macros go before what the environment has.
_FIXED_DATE = """\
{%- macro strftime_now(format) -%}
{{- format.replace('%Y', '2024').replace('%y', '24').replace('%m', '07').replace('%B', 'July').replace('%b', 'Jul') \
.replace('%d', '26').replace('%A', 'Friday').replace('%a', 'Fri').replace('%H', '00').replace('%M', '00') \
.replace('%S', '00') -}}
{%- endmacro -%}
"""
#: What a template is tried out with, and known by.
_TURNS: Messages = (
    {"role": "user", "content": "first question"},
    {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "second question"},
)
_SYSTEM = {"role": "system", "content": "tried instruction"}


@dataclass(frozen=True)
class ChatTemplate:
    """What makes one text of the turns of a chat, up to where the answer begins."""

    name: str  # as errors and reports name it
    adds_special_tokens: bool  # whether the tokenizer must still put its own around the text, such as one of beginning
    stop: tuple[str, ...]  # an answer ends before the first of these
    stop_token_ids: frozenset[int]  # tokens that end an answer, beside the model's and the tokenizer's own
    takes_system: bool  # whether a message of the system is written; else it is left out
    write: Callable[[Messages], str] = field(repr=False, compare=False)

    def render(self, messages: Messages) -> str:
        """The text of a chat; what the messages hold is never taken for a part of the template.

        Args:
            messages: the last one is the user's.
        """
        if not self.takes_system:
            messages = [message for message in messages if message["role"] != "system"]
        return self.write(messages)

    def encode(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        """The token ids of a rendered text, with one token of beginning at most."""
        ids: list[int] = tokenizer.encode(text, add_special_tokens=self.adds_special_tokens)
        # Some of FastChat's texts begin with it, and the tokenizer puts its own before.
        while ids[:2] == [tokenizer.bos_token_id] * 2:
            del ids[0]
        return ids

    @property
    def digest(self) -> str:
        """What tells templates apart, by what they do: the same on every machine and every day."""
        texts = [self.render(_TURNS[:1]), self.render(_TURNS), self.render([_SYSTEM, *_TURNS])]
        does = [texts, self.adds_special_tokens, self.stop, sorted(self.stop_token_ids), self.takes_system]
        return hashlib.sha256(json.dumps(does).encode()).hexdigest()[:16]


def open_template(name: str | None, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """Find a template.

    Args:
        name: None: the tokenizer's own; `none`: turns and answers as they are; a path that ends in .jinja; else one of
            FastChat's conversations.
        tokenizer: of the model that answers.

    Raises:
        ConfigError: there is no such template, or it cannot write a chat of two turns.
    """
    if name == "none":
        return ChatTemplate("none", True, (), frozenset(), True, _plain)
    if name is None:
        if tokenizer.chat_template is None:
            raise ConfigError("the target's tokenizer has no chat template: name one with --chat_template")
        return _of_jinja("the tokenizer's own", None, tokenizer)
    if name.endswith(".jinja"):
        try:
            text = Path(name).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError, RuntimeError) as error:
            raise ConfigError(f"--chat_template {name}: {_one_line(error)}") from error
        return _of_jinja(name, text, tokenizer)
    return _of_fastchat(name)


def _plain(messages: Messages) -> str:
    """A turn, its answer right behind it where the model had put it, and each further turn on a line of its own."""
    text = ""
    for message in messages:
        text += message["content"] if message["role"] == "assistant" or not text else "\n" + message["content"]
    return text


def _of_jinja(name: str, text: str | None, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """A template that transformers renders, in its sandbox.

    Args:
        name: as errors name it.
        text: the template; None: the tokenizer's own.
        tokenizer: whose special tokens the template may write.
    """
    try:
        text = tokenizer.get_chat_template() if text is None else text
        template = f"{_FIXED_DATE}{text}" if "strftime_now" in text else text

        def write(messages: Messages) -> str:
            chat = [dict(message) for message in messages]
            # Not tokenised: transformers 5 would give a BatchEncoding.
            return str(
                tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, add_generation_prompt=True)
            )

        written = write(_TURNS)
        if missing := [turn["content"] for turn in _TURNS if turn["content"] not in written]:
            raise ValueError(f"it leaves turns out, of a chat with the turn {missing[0]!r} it wrote {written!r:.80}")
    except Exception as error:
        raise ConfigError(f"chat template ({name}): {_one_line(error)}") from error
    return ChatTemplate(name, False, (), frozenset(), _writes_system(write), write)


def _writes_system(write: Callable[[Messages], str]) -> bool:
    """Whether a template takes a message of the system: some refuse one, some leave it out without a word."""
    try:
        return _SYSTEM["content"] in write([_SYSTEM, *_TURNS])
    except Exception:  # noqa: BLE001  # a template may fail in any way at what it does not know
        return False


def _of_fastchat(name: str) -> ChatTemplate:
    try:
        from fastchat.conversation import conv_templates, get_conv_template
    except ImportError as error:
        raise ConfigError(
            f"--chat_template {name}: neither none nor a path that ends in .jinja; for a conversation of FastChat's "
            "run: pip install 'tvmerge[fastchat]'"
        ) from error
    if name not in conv_templates:
        close = difflib.get_close_matches(name, conv_templates, n=4, cutoff=0.4) or sorted(conv_templates)
        raise ConfigError(
            f"--chat_template {name}: neither none, nor a path that ends in .jinja, nor a conversation of FastChat's, "
            f"which has {', '.join(close)}"
        )

    def write(messages: Messages) -> str:
        conversation = get_conv_template(name)  # a copy
        for message in messages:
            if message["role"] == "system":
                conversation.set_system_message(message["content"])
            else:
                role = conversation.roles[message["role"] == "assistant"]
                conversation.append_message(role, message["content"])
        conversation.append_message(conversation.roles[1], None)
        return str(conversation.get_prompt())

    try:
        write(_TURNS)
    except Exception as error:
        raise ConfigError(f"chat template {name} of FastChat's cannot write a chat: {_one_line(error)}") from error
    found: Any = get_conv_template(name)
    stop = [found.stop_str] if isinstance(found.stop_str, str) else found.stop_str or []
    ids = frozenset(map(int, found.stop_token_ids or ()))
    return ChatTemplate(name, True, tuple(filter(None, stop)), ids, _writes_system(write), write)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
