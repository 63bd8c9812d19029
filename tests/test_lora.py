"""LoRA adapters against PEFT's own merge, and adapters that cannot be merged."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from conftest import Trio, save_mistral, save_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tvmerge.checkpoint import Checkpoint
from tvmerge.errors import CheckpointError, IncompatibleError
from tvmerge.granularity import Grouping
from tvmerge.hub import resolve
from tvmerge.lora import Adapter, LoraTaskVector
from tvmerge.sources import MergeSettings, Sources, open_sources

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, PeftModel, get_peft_model


def save_adapter(
    base: Path,
    folder: Path,
    *,
    seed: int = 5,
    dtype: torch.dtype = torch.float32,
    train: str = "lora_",
    **settings: Any,
) -> Path:
    """An adapter with random matrices on a saved model, as PEFT writes it."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**settings))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and any(part in name for part in ("lora_", "modules_to_save", train)):
                parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
        model.save_pretrained(folder)
    return folder


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        whole = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: tensor.detach() for name, tensor in whole.state_dict().items()}


def opened(target: Path, adapter: str, base: str | None = None) -> Sources:
    return open_sources(target=str(target), tuned=[adapter], base=base, vocabulary="same", cache_dir=None)


VARIANTS: dict[str, dict[str, Any]] = {
    "linear": {},
    "rank-stabilised": {"use_rslora": True},
    "ranks and alphas": {
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"down_proj": 3, r"layers\.0\.self_attn\.q_proj": 11},
    },
    "all linear": {"target_modules": "all-linear"},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "whole head": {"modules_to_save": ["lm_head"]},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_weight_one_is_what_peft_merges(name: str, tmp_path: Path) -> None:
    base = save_mistral(tmp_path / "base", seed=0)
    adapter = save_adapter(base, tmp_path / "adapter", **VARIANTS[name])
    sources = opened(base, str(adapter), str(base))
    merge = sources.merge(MergeSettings(grouping=Grouping("uniform"), dtype="float32"))
    merged, golden = merge.at({"uniform": 1.0}), merged_by_peft(base, adapter)
    assert list(merged.names) == sorted(golden)
    moved = 0
    for tensor in merged.names:
        # PEFT multiplies in the adapter's dtype, and rounds the product to it.
        tolerance = 0.03 if VARIANTS[name].get("dtype") == torch.bfloat16 else 1e-6
        torch.testing.assert_close(merged.read(tensor), golden[tensor], rtol=tolerance, atol=tolerance)
        moved += not torch.equal(merged.read(tensor), sources.target.read(tensor).float())
    assert moved == len(sources.task_vector(sources.tuned[0], MergeSettings()).names) > 0


def test_a_transposed_layer_is_what_peft_merges(tmp_path: Path) -> None:
    base = tmp_path / "base"
    build("gpt2").save_pretrained(base)
    save_tokenizer(base)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True)
    merge = opened(base, str(adapter)).merge(MergeSettings(grouping=Grouping("uniform"), omit=["lm_head.weight"]))
    merged, golden = merge.at({"uniform": 1.0}), merged_by_peft(base, adapter)
    for tensor in merged.names:
        torch.testing.assert_close(merged.read(tensor), golden[tensor], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("qwen2", {"bias": "lora_only", "target_modules": ["q_proj", "v_proj"]}),
        ("qwen2", {"bias": "all", "target_modules": ["q_proj"]}),
        ("gpt2", {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True}),
    ],
)
def test_biases_and_embeddings_are_what_peft_merges(
    architecture: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    build(architecture).save_pretrained(base)
    save_tokenizer(base)
    adapter = save_adapter(base, tmp_path / "adapter", train="bias", **settings)
    sources = opened(base, str(adapter), str(base))
    merge = sources.merge(MergeSettings(grouping=Grouping("uniform"), omit=["lm_head.weight"]))
    merged, golden = merge.at({"uniform": 1.0}), merged_by_peft(base, adapter)
    for tensor in merged.names:
        torch.testing.assert_close(merged.read(tensor), golden[tensor], rtol=1e-5, atol=1e-5)
    biases = [name for name in merge.weights_of if name.endswith("bias")]
    assert bool(biases) == (architecture == "qwen2")


def test_whole_tensors_of_another_shape_or_place_are_refused(trio: Trio, tmp_path: Path) -> None:
    adapter = save_adapter(trio.base, tmp_path / "adapter", modules_to_save=["lm_head"])
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    head = next(name for name in tensors if "lm_head" in name)
    for changed_head in (tensors[head][:3].clone(), torch.cat([tensors[head]] * 2), tensors[head].int()):
        save_file({**tensors, head: changed_head}, file)
        with pytest.raises(IncompatibleError, match=r"holds lm_head\.weight whole, .*, where the model's is"):
            opened(trio.target, f"{adapter}:{trio.base}").merge(MergeSettings())
    twice = {name.replace("model.model.layers", "model.model.vision.layers"): t.clone() for name, t in tensors.items()}
    save_file({**tensors, **twice}, file)
    with pytest.raises(IncompatibleError, match="changes two tensors that can only be"):
        opened(trio.target, f"{adapter}:{trio.base}").merge(MergeSettings())


def test_the_scale_belongs_to_an_adapters_fingerprint(trio: Trio, tmp_path: Path) -> None:
    adapter = save_adapter(trio.base, tmp_path / "adapter")
    before = Adapter(resolve(str(adapter)))
    assert Adapter(resolve(str(adapter))).fingerprint == before.fingerprint
    changed(adapter, lora_alpha=600)
    assert Adapter(resolve(str(adapter))).fingerprint != before.fingerprint
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: was changed since"):
        before.check_unchanged()


def test_only_what_an_adapter_moves_has_weights(trio: Trio, tmp_path: Path) -> None:
    adapter = save_adapter(trio.base, tmp_path / "adapter")
    sources = open_sources(
        target=str(trio.target),
        tuned=[str(adapter), str(trio.tuned)],
        base=str(trio.base),
        vocabulary="same",
        cache_dir=None,
    )
    names = sources.merge(MergeSettings()).weight_names
    assert [name for name in names if name.startswith("adapter/")] == ["adapter/layers.0", "adapter/layers.1"]
    assert next(name for name in names if name.startswith("tuned/")) == "tuned/embed_tokens"


def test_an_adapter_needs_no_base_unless_it_holds_whole_tensors(trio: Trio, tmp_path: Path) -> None:
    plain = save_adapter(trio.base, tmp_path / "plain")
    assert opened(trio.target, str(plain)).merge(MergeSettings()).weight_names
    whole = save_adapter(trio.base, tmp_path / "whole", modules_to_save=["lm_head"])
    with pytest.raises(IncompatibleError, match=r"holds lm_head\.weight whole: name the base model"):
        opened(trio.target, str(whole)).merge(MergeSettings())
    assert "lm_head" in opened(trio.target, f"{whole}:{trio.base}").merge(MergeSettings()).weight_names


def test_names_of_another_prefix_are_found(tmp_path: Path) -> None:
    from test_state_dict import InMemory

    adapter = Adapter(resolve(str(save_adapter(save_mistral(tmp_path / "base", seed=0), tmp_path / "adapter"))))
    base = Checkpoint(resolve(str(tmp_path / "base")))
    prefixed = {name.replace("model.", "language_model.model.", 1): base.read(name) for name in base.names}
    towers = [name for name in base.names if "self_attn" in name]
    prefixed |= {name.replace("model.", "vision_tower.encoder.", 1): base.read(name) for name in towers}
    vector = LoraTaskVector(adapter=adapter, reference=InMemory(prefixed), base=None)
    assert vector.names == sorted(
        f"language_model.model.layers.{i}.{module}.weight"
        for i in (0, 1)
        for module in ("mlp.down_proj", "self_attn.q_proj")
    )


def changed(adapter: Path, **settings: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "uses use_dora, which is more than"),
        ({"peft_type": "IA3"}, "of the kind IA3"),
        ({"lora_alpha": "much"}, "lora_alpha and alpha_pattern must be numbers"),
        ({"alpha_pattern": {"(": 3}}, "is no expression"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
    ],
)
def test_adapters_of_other_kinds_are_refused(
    trio: Trio, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    adapter = save_adapter(trio.base, tmp_path / "adapter")
    changed(adapter, **settings)
    with pytest.raises(IncompatibleError, match=message) as caught:
        opened(trio.target, str(adapter))
    assert "\n" not in str(caught.value)


def test_an_adapter_for_another_base_is_refused(trio: Trio, tmp_path: Path) -> None:
    wide = save_mistral(tmp_path / "wide", seed=0, hidden_size=32)
    deep = save_mistral(tmp_path / "deep", seed=0, num_hidden_layers=3)
    for other, message in (
        (wide, r"as one of shape \[32, 24\], where the model's is \[16, 24\]"),
        (deep, "does not have"),
    ):
        adapter = save_adapter(other, tmp_path / f"on {other.name}")
        changed(adapter, base_model_name_or_path=None)
        with pytest.raises(IncompatibleError, match=f"{message}: it was trained for another model"):
            opened(trio.target, str(adapter)).merge(MergeSettings())
    adapter = save_adapter(trio.tuned, tmp_path / "same shapes")
    with pytest.raises(IncompatibleError, match=f"was trained on {trio.tuned}, not on {trio.base}"):
        opened(trio.target, str(adapter), str(trio.base))
    assert opened(trio.target, str(adapter), str(trio.tuned)).tuned


def test_damaged_adapters_are_refused(trio: Trio, tmp_path: Path) -> None:
    adapter = save_adapter(trio.base, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if "0.mlp.down_proj.lora_B" not in name}, file)
    with pytest.raises(IncompatibleError, match="only one of the two matrices"):
        opened(trio.target, str(adapter)).merge(MergeSettings())
    file.rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickled adapters are not loaded"):
        opened(trio.target, str(adapter))
    file.write_bytes((adapter / "adapter_model.bin").read_bytes())
    with pytest.raises(IncompatibleError, match=r"target model .* is an adapter"):
        opened(adapter, str(trio.tuned), str(trio.base))
