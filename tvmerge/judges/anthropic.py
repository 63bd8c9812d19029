"""Anthropic, and every server that speaks its messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvmerge.errors import JudgeError
from tvmerge.judges import Prompt
from tvmerge.judges.remote import RemoteClient, field

__all__ = ["AnthropicClient"]


class AnthropicClient(RemoteClient):
    """A model behind /v1/messages.

    Args:
        settings: of the model.

    Raises:
        ConfigError: the package `anthropic` or ANTHROPIC_API_KEY is missing, or base_url is no address.
    """

    provider = "anthropic"
    package = "anthropic"
    key_variable = "ANTHROPIC_API_KEY"
    url_variable = "ANTHROPIC_BASE_URL"
    default_url = "https://api.anthropic.com"

    def _connect(self, key: str, timeout: Any) -> Any:
        return self._sdk.AsyncAnthropic(
            api_key=key, base_url=self.base_url, timeout=timeout, max_retries=self.settings.max_retries
        )

    async def _send(self, client: Any, prompt: Prompt, without: frozenset[str]) -> Any:
        options: dict[str, Any] = {"system": prompt.system} if prompt.system else {}
        if "temperature" not in without:
            options["extra_body"] = {"temperature": self.settings.temperature}  # create() has no such argument
        return await client.messages.with_raw_response.create(
            model=self.settings.model,
            max_tokens=self.settings.max_tokens,
            messages=[{"role": "user", "content": prompt.user}],
            **options,
        )

    def _read(self, reply: Mapping[str, Any]) -> tuple[str, str | None, tuple[int | None, int | None]]:
        content = reply.get("content")
        if not isinstance(content, list):
            said = field(reply, "error", "message") or "no content in it"
            raise JudgeError(f"{self.base_url}: replied with no message, {self._in_one_line(str(said))}")
        text = "".join(
            part["text"] for part in content if field(part, "type") == "text" and isinstance(field(part, "text"), str)
        )
        reason, refusal = reply.get("stop_reason"), None
        if reason == "refusal":
            why = field(reply, "stop_details", "explanation") or text
            refusal = f"the judge refused: {why}" if why else "the judge refused"
        elif not text.strip():
            refusal = f"the judge's text is empty (stop_reason {reason})"
        return text, refusal, _tokens(reply.get("usage"))


def _tokens(usage: Any) -> tuple[int | None, int | None]:
    """Tokens in and out; those that were written to or read from the provider's cache are in too."""
    counts = [
        value if isinstance(value := field(usage, name), int) and value >= 0 else None
        for name in ("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    ]
    if counts[0] is None:
        return None, counts[1]
    return counts[0] + (counts[2] or 0) + (counts[3] or 0), counts[1]
