"""The providers of remote judges by name."""

from __future__ import annotations

from collections.abc import Mapping

from tvmerge.errors import ConfigError
from tvmerge.judges.anthropic import AnthropicClient
from tvmerge.judges.openai import OpenAIClient
from tvmerge.judges.remote import ClientSettings, RemoteClient

__all__ = ["PROVIDERS", "make_client", "parse_judge"]

#: name → client. A new provider is a file beside this one and a line here.
PROVIDERS: Mapping[str, type[RemoteClient]] = {
    "anthropic": AnthropicClient,
    "openai": OpenAIClient,
}


def parse_judge(name: str) -> tuple[str, str]:
    """A judge's name as provider and model.

    Args:
        name: `provider:model`, or a model alone: `claude…` is Anthropic's, any other OpenAI's. A colon after what is
            no provider belongs to the model, as in `llama3:8b`.

    Raises:
        ConfigError: there is no model in it.
    """
    provider, colon, model = name.strip().partition(":")
    if not colon or provider not in PROVIDERS:
        provider, model = "anthropic" if name.strip().startswith("claude") else "openai", name.strip()
    if not model.strip():
        raise ConfigError(f"the judge {name!r} names no model; write PROVIDER:MODEL, of {', '.join(sorted(PROVIDERS))}")
    return provider, model.strip()


def make_client(provider: str, settings: ClientSettings) -> RemoteClient:
    """A provider's client.

    Args:
        provider: a key of PROVIDERS.
        settings: of the model.

    Raises:
        ConfigError: the provider is unknown, or its package or key is missing.
    """
    if provider not in PROVIDERS:
        raise ConfigError(f"unknown provider of judges {provider!r}; known are {', '.join(sorted(PROVIDERS))}")
    return PROVIDERS[provider](settings)
