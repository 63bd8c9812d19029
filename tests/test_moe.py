"""Mixtures of experts against transformers' own classes: equal experts are the dense model, a mean is a mean."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import pytest
import torch
from conformance_state_dict import check_state_dict
from conftest import save_tokenizer
from test_conversion import InMemory
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from tvmerge.checkpoint import Checkpoint
from tvmerge.errors import CheckpointError, IncompatibleError
from tvmerge.granularity import Grouping
from tvmerge.hub import ModelId
from tvmerge.merge import Merge
from tvmerge.models.conversion import find_live_tensors
from tvmerge.models.transformers import unread_tensors
from tvmerge.moe import LAYOUTS, Average, MixtureOfExperts
from tvmerge.moe_config import DenseModel, find_layout, moe_config
from tvmerge.router import ExpertPrompts, GateInputs, make_gates
from tvmerge.state_dict import DTYPES, Array, StateDict
from tvmerge.task_vector import Difference
from tvmerge.writer import write_weights

SIZES: Mapping[str, Any] = {**architectures.SIZES, "num_hidden_layers": 3}
CONFIGS: Mapping[str, Any] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 32,
}
#: Settings that the class of a mixture has too, and some under another name or with another default.
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    **{name: (name, {}) for name in CONFIGS},
    "llama with llama3's rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama, tied, of another theta": ("llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 77.0}}),
    "mistral with a window": ("mistral", {"sliding_window": 4}),
    "mistral with gelu and wide heads": ("mistral", {"hidden_act": "gelu", "head_dim": 12, "rms_norm_eps": 1e-2}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 with a window in some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3 with a window in all layers": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
    ),
    "qwen3 with biases": ("qwen3", {"attention_bias": True}),
}
SOME_WINDOWS = ["full_attention", "sliding_attention", "full_attention"]
IDS = torch.tensor([[1, 5, 9, 30, 7, 12, 3, 3, 8, 21], [4, 4, 6, 31, 2, 17, 11, 38, 5, 1]])


def dense_model(kind: str, *, seed: int, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[kind](**{**SIZES, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def save(
    folder: Path, kind: str = "mistral", *, seed: int, dtype: torch.dtype = torch.float32, **changes: Any
) -> Checkpoint:
    dense_model(kind, seed=seed, **changes).to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return opened(folder)


def opened(folder: Path) -> Checkpoint:
    return Checkpoint(ModelId(name=folder.name, revision=None, path=folder))


def described(checkpoint: Checkpoint, **changes: Any) -> DenseModel:
    return DenseModel(f"expert {checkpoint.model.name}", {**checkpoint.config, **changes})


def random_router(checkpoint: Checkpoint, n: int, seed: int = 0) -> Array:
    shape = (checkpoint.config["num_hidden_layers"], n, checkpoint.config["hidden_size"])
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def mixture(experts: Sequence[Checkpoint], router: Array | None = None, **more: Any) -> MixtureOfExperts:
    router = random_router(experts[0], len(experts)) if router is None else router
    return MixtureOfExperts(experts=experts, router=router, layout=find_layout(described(experts[0])), **more)


def written(state_dict: StateDict, config: Mapping[str, Any], folder: Path) -> PreTrainedModel:
    """A mixture as transformers alone loads it, every tensor from its file."""
    folder.mkdir()
    write_weights(state_dict, folder)
    (folder / "config.json").write_text(json.dumps(config))
    assert unread_tensors(opened(folder)) == []
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    loaded: PreTrainedModel = model.eval()
    return loaded


def assembled(experts: Sequence[Checkpoint], folder: Path, *, per_token: int = 2, **more: Any) -> PreTrainedModel:
    config = moe_config([described(expert) for expert in experts], experts_per_token=per_token)
    return written(mixture(experts, **more), config, folder)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        made: Tensor = model(IDS).logits
    return made


def dense_of(checkpoint: Checkpoint) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint.model.path, dtype="auto")
    return model.eval()


def experts_of(kind: str, folder: Path, n: int, **more: Any) -> list[Checkpoint]:
    return [save(folder / f"e{i}", kind, seed=i, **more) for i in range(n)]


@pytest.mark.parametrize("kind", CONFIGS)
def test_conformance(kind: str, tmp_path: Path) -> None:
    experts = experts_of(kind, tmp_path, 2, dtype=torch.bfloat16)
    check_state_dict(mixture(experts))
    check_state_dict(mixture(experts, base="average"))
    check_state_dict(mixture(experts, base=save(tmp_path / "base", kind, seed=7), dtype=DTYPES["float16"]))
    check_state_dict(Average(experts))


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_experts_are_the_dense_model_whatever_the_router(variant: str, tmp_path: Path) -> None:
    kind, changes = VARIANTS[variant]
    expert = save(tmp_path / "e", kind, seed=0, **changes)
    expected = logits(dense_of(expert))
    for n, per_token in ((2, 2), (3, 1), (4, 3)):
        model = assembled([expert] * n, tmp_path / f"m{n}", per_token=per_token)
        assert type(model).__name__ == LAYOUTS[kind].mixture
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    alone = logits(model)
    with torch.no_grad():  # nearly all weight on one expert, and on another one than before
        for name, parameter in model.named_parameters():
            if name.endswith(".gate.weight"):
                parameter.mul_(-30)
    torch.testing.assert_close(logits(model), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_window_or_theta_that_got_lost_would_be_seen(kind: str, tmp_path: Path) -> None:
    lost: Mapping[str, Any] = {
        "rope_parameters": {"rope_theta": 7.0},
        **({} if kind == "llama" else {"sliding_window": 4}),
    }
    lost = lost if kind in {"llama", "mistral"} else {**lost, "use_sliding_window": True, "max_window_layers": 0}
    plain, other = (logits(dense_model(kind, seed=0, **changes)) for changes in ({}, lost))
    assert (plain - other).abs().max() > 1e-2


@pytest.mark.parametrize("kind", CONFIGS)
def test_equal_experts_in_bfloat16_are_the_dense_model_within_its_noise(kind: str, tmp_path: Path) -> None:
    expert = save(tmp_path / "e", kind, seed=0, dtype=torch.bfloat16)
    exact = logits(dense_of(expert).float())
    dense = (logits(dense_of(expert)).float() - exact).abs()
    model = assembled([expert] * 3, tmp_path / "m", per_token=2)
    assert model.dtype == torch.bfloat16
    mixed = (logits(model).float() - exact).abs()
    assert mixed.mean() < 2 * dense.mean()


@pytest.mark.parametrize("kind", CONFIGS)
def test_all_experts_and_a_uniform_router_average_outputs(kind: str, tmp_path: Path) -> None:
    experts = experts_of(kind, tmp_path, 3)
    router = np.zeros((3, 3, 16), np.float32)
    model = assembled(experts, tmp_path / "m", per_token=3, router=router)
    hidden = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    dense = [dense_of(expert) for expert in experts]
    with torch.no_grad():
        for n in range(3):
            expected = torch.stack([each.model.layers[n].mlp(hidden) for each in dense]).mean(dim=0)
            torch.testing.assert_close(model.model.layers[n].mlp(hidden), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_router_sends_a_token_to_the_expert_it_names(kind: str, tmp_path: Path) -> None:
    experts = experts_of(kind, tmp_path, 3)
    router = random_router(experts[0], 3)
    model = assembled(experts, tmp_path / "m", per_token=1, router=router)
    hidden = torch.randn(1, 40, 16, generator=torch.Generator().manual_seed(0))
    chosen = (hidden[0] @ torch.from_numpy(router[1]).T).argmax(dim=1)
    assert set(chosen.tolist()) == {0, 1, 2}
    with torch.no_grad():
        outputs = torch.stack([dense_of(expert).model.layers[1].mlp(hidden)[0] for expert in experts])
        made = model.model.layers[1].mlp(hidden)[0]
    torch.testing.assert_close(made, outputs[chosen, torch.arange(40)], rtol=1e-5, atol=1e-6)


def test_the_shared_expert_of_qwen2_adds_exactly_nothing(tmp_path: Path) -> None:
    model = assembled(experts_of("qwen2", tmp_path, 2), tmp_path / "m")
    block = model.model.layers[0].mlp
    hidden = torch.randn(1, 5, 16)
    with torch.no_grad():
        assert not block.shared_expert(hidden).any()
        _, weights, index = block.gate(hidden[0])
        assert torch.equal(block(hidden)[0], block.experts(hidden[0], index, weights))


@pytest.mark.parametrize("kind", CONFIGS)
def test_names_and_shapes_are_those_that_the_class_writes(kind: str, tmp_path: Path) -> None:
    experts = experts_of(kind, tmp_path, 3)
    state_dict = mixture(experts)
    assembled(experts, tmp_path / "m")
    config = AutoConfig.from_pretrained(tmp_path / "m")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "theirs")
    theirs = opened(tmp_path / "theirs")
    assert {name: theirs.spec(name).shape for name in theirs.names} == {
        name: state_dict.spec(name).shape for name in state_dict.names
    }
    assert config.num_experts_per_tok == 2
    assert config.num_experts == 3
    assert not config.output_router_logits


@pytest.mark.parametrize("kind", CONFIGS)
def test_tensors_are_the_experts_byte_for_byte(kind: str, tmp_path: Path) -> None:
    experts = experts_of(kind, tmp_path, 3, dtype=torch.bfloat16)
    layout, state_dict = LAYOUTS[kind], mixture(experts)
    for layer in range(3):
        for dense, own in layout.projections.items():
            for n, expert in enumerate(experts):
                made = state_dict.array(f"model.layers.{layer}.{layout.block}.experts.{n}.{own}.weight")
                assert made.tobytes() == expert.array(f"model.layers.{layer}.mlp.{dense}.weight").tobytes()
        gate = state_dict.read(f"model.layers.{layer}.{layout.block}.gate.weight")
        assert torch.equal(gate, torch.from_numpy(random_router(experts[0], 3)[layer]).bfloat16())
    kept = [name for name in experts[0].names if ".mlp." not in name]
    assert len(kept) == 3 * {"qwen2": 9, "qwen3": 8}.get(kind, 6) + 3
    assert all(state_dict.array(name).tobytes() == experts[0].array(name).tobytes() for name in kept)


def test_a_base_gives_what_is_in_no_mlp(tmp_path: Path) -> None:
    experts, base = experts_of("llama", tmp_path, 2), save(tmp_path / "base", "llama", seed=9)
    state_dict = mixture(experts, base=base)
    for name in base.names:
        if ".mlp." not in name:
            assert torch.equal(state_dict.read(name), base.read(name))
    own = state_dict.read("model.layers.1.block_sparse_moe.experts.1.w3.weight")
    assert torch.equal(own, experts[1].read("model.layers.1.mlp.up_proj.weight"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_average_base_is_the_mean_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    experts = experts_of("mistral", tmp_path, 3, dtype=dtype)
    state_dict = mixture(experts, base="average")
    for name in experts[0].names:
        if ".mlp." not in name:
            mean = torch.stack([expert.read(name).double() for expert in experts]).mean(dim=0)
            made = state_dict.read(name)
            assert made.dtype == dtype
            # Nearest, but where the exact mean is so near a tie that the accumulator's own rounding decides.
            error = (made.double() - mean).abs()
            nearest = (mean.to(dtype).double() - mean).abs()
            assert (error <= nearest + mean.abs() * 2.0**-22).all()
    same = mixture([experts[0]] * 7, base="average")
    assert all(torch.equal(same.read(name), experts[0].read(name)) for name in experts[0].names if ".mlp." not in name)


def test_a_dtype_is_rounded_to_once_and_integers_are_kept(tmp_path: Path) -> None:
    experts = experts_of("mistral", tmp_path, 2)
    state_dict = mixture(experts, dtype=DTYPES["bfloat16"])
    assert {state_dict.spec(name).dtype for name in state_dict.names} == {DTYPES["bfloat16"]}
    made = state_dict.read("model.layers.0.block_sparse_moe.experts.1.w2.weight")
    assert torch.equal(made, experts[1].read("model.layers.0.mlp.down_proj.weight").bfloat16())
    numbered = {"some.count": torch.arange(3), **{name: experts[0].read(name) for name in experts[0].names}}
    counted = [InMemory(numbered), InMemory(numbered)]
    state = MixtureOfExperts(
        experts=counted,
        router=random_router(experts[0], 2),
        layout=LAYOUTS["llama"],
        base="average",
        dtype=DTYPES["float16"],
    )
    assert torch.equal(state.read("some.count"), torch.arange(3))


def test_reading_a_tensor_reads_that_of_one_expert(tmp_path: Path) -> None:
    experts = experts_of("mistral", tmp_path, 2)
    readers = [InMemory({name: expert.read(name) for name in expert.names}) for expert in experts]
    state_dict = MixtureOfExperts(
        experts=readers, router=random_router(experts[0], 2), layout=LAYOUTS["mistral"], base="average"
    )
    state_dict.array("model.layers.2.block_sparse_moe.experts.1.w1.weight")
    state_dict.array("model.layers.2.block_sparse_moe.gate.weight")
    assert [reader.had_read for reader in readers] == [[], ["model.layers.2.mlp.gate_proj.weight"]]
    state_dict.array("lm_head.weight")
    assert [reader.had_read[-1] for reader in readers] == ["lm_head.weight"] * 2


def merges(folder: Path) -> list[Merge]:
    base = save(folder / "base", seed=0)
    return [
        Merge(
            target=save(folder / f"target{n}", seed=10 + n),
            task_vectors={"tuned": Difference(tuned=save(folder / f"tuned{n}", seed=20 + n), base=base)},
            grouping=Grouping("layer"),
        )
        for n in range(2)
    ]


def test_experts_can_be_merges_and_only_what_moved_is_written_again(tmp_path: Path) -> None:
    both = merges(tmp_path)
    at = [dict.fromkeys(merge.weight_names, 0.5) for merge in both]
    target = both[0].target
    assert isinstance(target, Checkpoint)
    router = random_router(target, 2)

    def mixed(*weights: Mapping[str, float]) -> MixtureOfExperts:
        experts = [merge.at(w) for merge, w in zip(both, weights, strict=True)]
        return MixtureOfExperts(experts=experts, router=router, layout=LAYOUTS["mistral"])

    first = mixed(*at)
    config = moe_config([described(target)] * 2)
    model = written(first, config, tmp_path / "m")
    merged = both[1].at(at[1]).array("model.layers.0.mlp.gate_proj.weight")
    assert np.array_equal(first.array("model.layers.0.block_sparse_moe.experts.1.w1.weight"), merged)
    live = find_live_tensors(model, first)
    loaded: dict[str, Hashable] = {}
    assert not live.assemblies
    live.fill(first, loaded)
    second = mixed(at[0], {**at[1], "layers.1": 0.9, "lm_head": 3.0})
    moved = {name for name in first.names if first.version(name) != second.version(name)}
    # The second expert gives no head.
    assert moved == {name for name in first.names if "layers.1.block_sparse_moe.experts.1." in name}
    with torch.no_grad():
        live.fill(second, loaded)
    again = written(mixed(at[0], {**at[1], "layers.1": 0.9}), config, tmp_path / "again")
    assert torch.equal(logits(model), logits(again))
    other = MixtureOfExperts(
        experts=[both[0].at(at[0]), both[1].at(at[1])], router=router + 1, layout=LAYOUTS["mistral"]
    )
    changed = {name for name in first.names if first.version(name) != other.version(name)}
    assert changed == {f"model.layers.{n}.block_sparse_moe.gate.weight" for n in range(3)}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_mixture_generates(kind: str, tmp_path: Path) -> None:
    model = assembled(experts_of(kind, tmp_path, 4, dtype=torch.bfloat16), tmp_path / "m", base="average")
    made = model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert made.shape == (2, 14)


@pytest.mark.parametrize(
    "rope",
    [
        {},  # left to the class's default, which is another one for Mixtral
        {"rope_theta": 123.0},
        {"rope_theta": 123.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 123.0, "factor": 2.0}},
    ],
)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_rope_is_kept_however_it_is_spelled(kind: str, rope: Mapping[str, Any], tmp_path: Path) -> None:
    expert = save(tmp_path / "e", kind, seed=0)
    config = {**{k: v for k, v in expert.config.items() if not k.startswith("rope")}, **rope}
    (tmp_path / "e" / "config.json").write_text(json.dumps(config))
    expert = opened(tmp_path / "e")
    model = assembled([expert] * 2, tmp_path / "m")
    assert expert.config == config, "was changed on the way"
    torch.testing.assert_close(logits(model), logits(dense_of(expert)), rtol=1e-5, atol=1e-5)
    # What reads only the spelling of before transformers 5, or only that of today, sees the same.
    found = json.loads((tmp_path / "m" / "config.json").read_text())
    for unread in ({"rope_parameters"}, {"rope_theta", "rope_scaling"}):
        part = {key: value for key, value in found.items() if key not in unread}
        (tmp_path / "m" / "config.json").write_text(json.dumps(part))
        assert AutoConfig.from_pretrained(tmp_path / "m").rope_parameters == model.config.rope_parameters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, "differ in the width: hidden_size is 16 in the former and 32 in the latter"),
        ({"intermediate_size": 8}, "inner width of the MLP: intermediate_size is 24 in the former and 8"),
        ({"num_hidden_layers": 2}, "depth: num_hidden_layers is 3 in the former and 2"),
        ({"num_attention_heads": 4}, "number of heads: num_attention_heads is 2 in the former and 4"),
        ({"num_key_value_heads": 2}, "number of key-value heads: num_key_value_heads is 1 in the former and 2"),
        ({"head_dim": 4}, "size of a head: head_dim is 8 in the former and 4"),
        ({"hidden_act": "gelu"}, "activation: hidden_act is silu in the former and gelu"),
        ({"vocab_size": 41}, "vocabulary size: vocab_size is 40 in the former and 41"),
        ({"rope_parameters": {"rope_theta": 9.0}}, "rotary position embedding"),
        ({"sliding_window": 3}, "sliding window: sliding_window is 4096 in the former and 3"),
        ({"tie_word_embeddings": True}, "tying of the head"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "is a mistral and expert e1 a llama"),
    ],
)
def test_experts_that_differ_are_named_side_by_side(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    one, other = experts_of("mistral", tmp_path, 2)
    with pytest.raises(IncompatibleError, match=message) as raised:
        moe_config([described(one), described(other, **changes)])
    assert "expert e0" in str(raised.value)
    assert "expert e1" in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(IncompatibleError, match=message):  # also of the model that gives the rest
        moe_config([described(other, **changes)] * 2, base=replace(described(one), name="expert e0"))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"attention_bias": True}, "has biases.*MixtralForCausalLM has no place for"),
        ("llama", {"mlp_bias": True}, "has biases.*MixtralForCausalLM has no place for"),
        ("qwen3", {"use_sliding_window": True, "layer_types": SOME_WINDOWS}, "in some layers and none in others"),
        ("llama", {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "is a GPT2LMHeadModel, of which no"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "experts can be MistralForCausalLM, Llama"),
        ("llama", {"model_type": None}, "of which no mixture is made"),
    ],
)
def test_what_has_no_place_in_a_mixture_is_refused(
    kind: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    expert = described(save(tmp_path / "e", kind, seed=0), **changes)
    with pytest.raises(IncompatibleError, match=message):
        moe_config([expert, expert])


def test_a_configuration_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    expert = described(save(tmp_path / "e", seed=0), hidden_size="wide")
    with pytest.raises(CheckpointError, match=r"expert e: transformers cannot read its config\.json"):
        moe_config([expert, expert])


@pytest.mark.parametrize("n", [0, 1, 9])
def test_too_few_and_too_many_experts_are_refused(n: int, tmp_path: Path) -> None:
    expert = save(tmp_path / "e", seed=0)
    for make in (
        lambda: moe_config([described(expert)] * n),
        lambda: MixtureOfExperts(experts=[expert] * n, router=np.zeros((3, n, 16)), layout=LAYOUTS["llama"]),
    ):
        with pytest.raises(IncompatibleError, match=f"needs 2 to 8 experts, got {n}"):
            make()


@pytest.mark.parametrize("per_token", [-1, 0, 3])
def test_experts_per_token_are_some_of_the_experts(per_token: int, tmp_path: Path) -> None:
    expert = described(save(tmp_path / "e", seed=0))
    with pytest.raises(IncompatibleError, match=f"experts_per_token is {per_token}, of 2 experts: must be 1 to 2"):
        moe_config([expert] * 2, experts_per_token=per_token)


def test_tensors_that_do_not_fit_are_refused_whatever_the_configuration_says(tmp_path: Path) -> None:
    one, other = save(tmp_path / "e0", seed=0), save(tmp_path / "e1", seed=1, intermediate_size=8)
    with pytest.raises(IncompatibleError, match=r"mlp.down_proj.weight has the shape \[16, 24\] in one and \[16, 8\]"):
        mixture([one, other], labels=["one", "other"])
    with pytest.raises(IncompatibleError, match="in the base model and"):
        mixture([one, one], base=other)
    with pytest.raises(IncompatibleError, match=r"router has the shape \[3, 3, 16\].*ask for \[3, 2, 16\]"):
        mixture([one, one], random_router(one, 3))
    biased = InMemory(
        {"model.layers.0.mlp.up_proj.bias": torch.ones(24), **{name: one.read(name) for name in one.names}}
    )
    with pytest.raises(IncompatibleError, match=r"up_proj\.bias of expert 1 has no place in MixtralForCausalLM"):
        MixtureOfExperts(experts=[biased] * 2, router=random_router(one, 2), layout=LAYOUTS["mistral"])


def test_layers_are_those_of_the_router_by_number(tmp_path: Path) -> None:
    deep = save(tmp_path / "e", seed=0, num_hidden_layers=11)
    router = random_router(deep, 2)
    state_dict = mixture([deep, deep], router)
    router[:] = 0  # a copy was made
    for n in range(11):
        assert np.array_equal(
            state_dict.array(f"model.layers.{n}.block_sparse_moe.gate.weight"), random_router(deep, 2)[n]
        )


def test_a_router_that_was_made_for_the_experts_fits(tmp_path: Path) -> None:
    expert = save(tmp_path / "e", seed=0)

    def nothing() -> Any:
        raise AssertionError("opened for nothing")

    inputs = GateInputs(
        *(3, 16, [ExpertPrompts()] * 4, 5, nothing, nothing),
        model=nothing,
    )
    mixture([expert] * 4, make_gates("random", inputs))
