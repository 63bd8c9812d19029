"""OpenAI, and every server that speaks its chat completions: vLLM, llama.cpp, Ollama and others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvmerge.errors import JudgeError
from tvmerge.judges import Prompt
from tvmerge.judges.remote import RemoteClient, field

__all__ = ["OpenAIClient"]


class OpenAIClient(RemoteClient):
    """A model behind /chat/completions.

    Args:
        settings: of the model.

    Raises:
        ConfigError: the package `openai` or OPENAI_API_KEY is missing, or base_url is no address.
    """

    provider = "openai"
    package = "openai"
    key_variable = "OPENAI_API_KEY"
    url_variable = "OPENAI_BASE_URL"
    default_url = "https://api.openai.com/v1"

    def _connect(self, key: str, timeout: Any) -> Any:
        return self._sdk.AsyncOpenAI(
            api_key=key, base_url=self.base_url, timeout=timeout, max_retries=self.settings.max_retries
        )

    def _optional(self) -> Mapping[str, str]:
        # Older servers know only max_tokens, which reasoning models refuse.
        return {**super()._optional(), "max_completion_tokens": "max_tokens is sent instead"}

    async def _send(self, client: Any, prompt: Prompt, without: frozenset[str]) -> Any:
        system = [{"role": "system", "content": prompt.system}] if prompt.system else []
        limit = "max_tokens" if "max_completion_tokens" in without else "max_completion_tokens"
        options: dict[str, Any] = {limit: self.settings.max_tokens}
        if "temperature" not in without:
            options["temperature"] = self.settings.temperature
        return await client.chat.completions.with_raw_response.create(
            model=self.settings.model, messages=[*system, {"role": "user", "content": prompt.user}], **options
        )

    def _read(self, reply: Mapping[str, Any]) -> tuple[str, str | None, tuple[int | None, int | None]]:
        choices = reply.get("choices")
        if not isinstance(choices, list):
            said = field(reply, "error", "message") or "no choices in it"
            raise JudgeError(f"{self.base_url}: replied with no completion, {self._in_one_line(str(said))}")
        content = field(choices, 0, "message", "content")
        if isinstance(content, list):  # some servers send parts, as requests may have them
            content = "".join(text for part in content if isinstance(text := field(part, "text"), str))
        text = content if isinstance(content, str) else ""
        usage = reply.get("usage")
        tokens = (_count(field(usage, "prompt_tokens")), _count(field(usage, "completion_tokens")))
        return text, _refusal(choices, text), tokens


def _refusal(choices: list[Any], text: str) -> str | None:
    refusal, reason = field(choices, 0, "message", "refusal"), field(choices, 0, "finish_reason")
    if refusal:
        return f"the judge refused: {refusal}"
    if reason == "content_filter":
        return "the provider's content filter cut the judge off"
    if not choices:
        return "the judge's reply has no choices"
    return None if text.strip() else f"the judge's text is empty (finish_reason {reason})"


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None
