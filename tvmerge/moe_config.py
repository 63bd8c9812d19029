"""The config.json of a mixture of experts, from those of its experts, and which experts go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from tvmerge.errors import CheckpointError, IncompatibleError
from tvmerge.moe import LAYOUTS, SHARED_WIDTH, Layout, check_number

__all__ = ["DenseModel", "find_layout", "moe_config"]

#: What experts must share: key of the configuration → how to call it in an error.
SHARED: Mapping[str, str] = {
    "hidden_size": "width",
    "intermediate_size": "inner width of the MLP",
    "num_hidden_layers": "depth",
    "num_attention_heads": "number of heads",
    "num_key_value_heads": "number of key-value heads",
    "head_dim": "size of a head",
    "hidden_act": "activation",
    "vocab_size": "vocabulary size",
    "rope_parameters": "rotary position embedding (rope)",
    "rms_norm_eps": "epsilon of the norms",
    "tie_word_embeddings": "tying of the head to the embedding",
    "sliding_window": "sliding window",
    "layer_types": "kinds of attention by layer",
    "attention_bias": "biases of attention",
    "mlp_bias": "biases of the MLP",
}
#: What a mixture takes over as it is, from the model that gives its attention.
KEPT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters"),
    *("attention_dropout", "dtype"),
)


@dataclass(frozen=True)
class DenseModel:
    """An expert, or the model that gives a mixture its attention, as far as its configuration tells."""

    name: str  # as errors call it: "expert models/ja"
    config: Mapping[str, Any]  # the content of its config.json
    dtype: str | None = None  # of its weights, where its configuration names none


def find_layout(model: DenseModel) -> Layout:
    """How a mixture of such models is spelled.

    Raises:
        IncompatibleError: transformers has no mixture for them, or none that is known here.
    """
    kind, classes = model.config.get("model_type"), model.config.get("architectures")
    layout = LAYOUTS.get(kind) if isinstance(kind, str) else None
    if layout is None or (classes and classes != [layout.dense]):
        known = ", ".join(layout.dense for layout in LAYOUTS.values())
        found = classes[0] if isinstance(classes, list) and classes else kind
        raise IncompatibleError(f"{model.name} is a {found}, of which no mixture is made: experts can be {known}")
    return layout


def moe_config(
    experts: Sequence[DenseModel],
    *,
    base: DenseModel | None = None,
    experts_per_token: int = 2,
    dtype: str | None = None,
    vocabulary_size: int | None = None,
) -> dict[str, Any]:
    """The content of a mixture's config.json.

    Every setting stands in it, also one that is left out of the experts' because it is their class's default: the
    class of the mixture has others, for instance of rope's theta. Routing weights of the chosen experts sum to 1.

    Args:
        experts: 2 to 8 of them.
        base: what gives attention, norms and embeddings; None for the first expert.
        experts_per_token: how many experts the router picks for a token.
        dtype: a key of DTYPES; None for that of the base.
        vocabulary_size: rows of the vocabulary that all are brought to; None if they must have as many as they are.

    Raises:
        IncompatibleError: a number of experts that cannot be, experts that differ, or that hold what the class of the
            mixture has no place for.
        CheckpointError: a configuration that transformers cannot read.
    """
    check_number(len(experts))
    if not 1 <= experts_per_token <= len(experts):
        raise IncompatibleError(
            f"experts_per_token is {experts_per_token}, of {len(experts)} experts: must be 1 to {len(experts)}"
        )
    models = [*([base] if base is not None else []), *experts]
    layout = find_layout(models[0])
    united = {} if vocabulary_size is None else {"vocab_size": vocabulary_size}
    settings = [{**_settings(model), **united} for model in models]
    for model, other in zip(models[1:], settings[1:], strict=True):
        find_layout(model)
        _check_same(models[0], settings[0], model, other)
    dense = settings[0]
    _check_biases(models[0], dense, layout)
    config = {key: dense[key] for key in KEPT if key in dense and (dense[key] is not None or key.endswith("_id"))}
    if dtype := dtype or config.get("dtype") or models[0].dtype:
        config["dtype"] = dtype
    return {
        "architectures": [layout.mixture],
        "model_type": layout.model_type,
        **config,
        **_older_rope(dense["rope_parameters"]),
        "num_experts_per_tok": experts_per_token,
        "output_router_logits": False,
        **_OWN[layout.model_type](models[0], dense, len(experts)),
    }


def _settings(model: DenseModel) -> dict[str, Any]:
    """All settings of a model, with its class's defaults where its config.json says nothing."""
    from transformers import CONFIG_MAPPING  # takes a while

    find_layout(model)
    try:  # on a copy: transformers fills in what rope leaves out
        found: dict[str, Any] = CONFIG_MAPPING[model.config["model_type"]].from_dict(deepcopy(model.config)).to_dict()
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{model.name}: transformers cannot read its config.json: {reason}") from error
    if found.get("head_dim") is None:
        found["head_dim"] = found["hidden_size"] // found["num_attention_heads"]
    # Older files say `type` for what is `rope_type` now.
    found["rope_parameters"] = {k: v for k, v in (found["rope_parameters"] or {}).items() if k != "type"}
    return found


def _check_same(model: DenseModel, ours: Mapping[str, Any], other: DenseModel, theirs: Mapping[str, Any]) -> None:
    if model.config["model_type"] != other.config["model_type"]:
        raise IncompatibleError(
            f"{model.name} is a {model.config['model_type']} and {other.name} a {other.config['model_type']}: "
            "all experts must be of one architecture"
        )
    for key, what in SHARED.items():
        if ours.get(key) != theirs.get(key):
            or_union = ", or use --vocabulary union" if key == "vocab_size" else ""
            raise IncompatibleError(
                f"{model.name} and {other.name} differ in the {what}: {key} is {ours.get(key)} in the former and "
                f"{theirs.get(key)} in the latter: all experts must have the same{or_union}"
            )


def _check_biases(model: DenseModel, dense: Mapping[str, Any], layout: Layout) -> None:
    for key in ("attention_bias", "mlp_bias"):
        if dense.get(key) and not (key == "attention_bias" and layout.model_type == "qwen3_moe"):
            raise IncompatibleError(
                f"{model.name} has biases ({key}: true), which {layout.mixture} has no place for: use experts without"
            )


def _older_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The same rope as releases before transformers 5 spell it, who would otherwise take a default and say nothing."""
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    is_scaled = scaling.get("rope_type", "default") != "default"
    return {"rope_theta": rope["rope_theta"], **({"rope_scaling": scaling} if is_scaled else {})}


def _mixtral(_: DenseModel, dense: Mapping[str, Any], n_experts: int) -> dict[str, Any]:
    # Mixtral's layers all use the window, as Mistral's do; Llama has none. Its routing weights always sum to 1.
    return {"num_local_experts": n_experts, "sliding_window": dense.get("sliding_window")}


def _qwen_moe(dense: Mapping[str, Any], n_experts: int) -> dict[str, Any]:
    return {
        "num_experts": n_experts,
        "moe_intermediate_size": dense["intermediate_size"],
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen2_moe(_: DenseModel, dense: Mapping[str, Any], n_experts: int) -> dict[str, Any]:
    windows = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
    return {
        **_qwen_moe(dense, n_experts),
        **{key: dense[key] for key in windows},
        "shared_expert_intermediate_size": SHARED_WIDTH,
        "qkv_bias": True,
    }


def _qwen3_moe(model: DenseModel, dense: Mapping[str, Any], n_experts: int) -> dict[str, Any]:
    kinds = set(dense["layer_types"])
    if len(kinds) > 1:
        raise IncompatibleError(
            f"{model.name} has a sliding window in some layers and none in others (max_window_layers is "
            f"{dense['max_window_layers']}), which Qwen3MoeForCausalLM cannot: use experts with one kind of layer"
        )
    windowed = kinds == {"sliding_attention"}
    return {
        **_qwen_moe(dense, n_experts),
        "attention_bias": dense["attention_bias"],
        "use_sliding_window": windowed,
        "sliding_window": dense["sliding_window"] if windowed else None,
    }


#: model_type of a mixture → the settings that only its class has.
_OWN = {"mixtral": _mixtral, "qwen2_moe": _qwen2_moe, "qwen3_moe": _qwen3_moe}
