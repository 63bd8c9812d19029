"""Trains the tiny models of the demo: a character tokenizer, and plain next-character training on CPU."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
IGNORED = -100
Pair = tuple[str, str]


def make_tokenizer(characters: Sequence[str]) -> PreTrainedTokenizerFast:
    """Makes a tokenizer with one token per character, which decodes to exactly the text it read."""
    vocabulary = {token: index for index, token in enumerate((PAD, BOS, EOS, UNKNOWN, *characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> MistralForCausalLM:
    """Makes an untrained model of four layers from a seed."""
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=128,
        sliding_window=None,
        initializer_range=0.06,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return MistralForCausalLM(config)


def encode_batch(tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes prompts and answers as padded input ids and labels; only answers are learned."""
    rows = []
    for prompt, answer in pairs:
        head = tokenizer.encode(prompt, add_special_tokens=False) if prompt else []
        tail = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
        rows.append((head + tail, [IGNORED] * len(head) + tail))
    width = max(len(ids) for ids, _ in rows)
    inputs = [ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in rows]
    labels = [wanted + [IGNORED] * (width - len(wanted)) for _, wanted in rows]
    return torch.tensor(inputs), torch.tensor(labels)


def set_trainable(model: MistralForCausalLM, groups: Sequence[str] | None) -> list[torch.nn.Parameter]:
    """Freezes all parameters but those of the groups named, such as `layers.2`, and returns the trainable ones."""
    for name, parameter in model.named_parameters():
        short = name.removeprefix("model.")
        parameter.requires_grad_(groups is None or any(short.startswith(f"{group}.") for group in groups))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Trainer:
    """Trains models in float32 on texts that it draws from one generator.

    Attributes:
        tokenizer: The tokenizer.
        rng: The generator of all texts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> None:
        self.tokenizer = tokenizer
        self.rng = rng

    def train(
        self,
        model: MistralForCausalLM,
        draw: Callable[[random.Random], Pair],
        steps: int,
        rate: float,
        groups: Sequence[str] | None = None,
        batch_size: int = 48,
    ) -> None:
        """Trains a model in place, with a linear warm-up and decay of the learning rate.

        Args:
            model: The model.
            draw: Draws a prompt and what is to follow it.
            steps: How many steps.
            rate: The highest learning rate.
            groups: The groups of parameters to train; None trains all.
            batch_size: How many texts a step reads.
        """
        parameters = set_trainable(model, groups)
        optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
        warm_up = max(1, steps // 20)
        model.train()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))
            loss = self.loss(model, [draw(self.rng) for _ in range(batch_size)])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        model.eval()

    def loss(self, model: MistralForCausalLM, pairs: Sequence[Pair]) -> torch.Tensor:
        """Returns the mean cross-entropy of the answers."""
        inputs, labels = encode_batch(self.tokenizer, pairs)
        logits = model(input_ids=inputs).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def save_model(model: MistralForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Saves a model in bfloat16 with its tokenizer."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
