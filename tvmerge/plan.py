"""What a merge would need, and whether it can work, from headers alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from huggingface_hub.constants import HF_HUB_CACHE

from tvmerge.checkpoint import SAFETENSORS_DTYPES, Checkpoint, Header
from tvmerge.config import PlanConfig
from tvmerge.config.mixture import load_prompts
from tvmerge.errors import CheckpointError, IncompatibleError, InputError
from tvmerge.files import check_output, local_path
from tvmerge.hub import describe, resolve
from tvmerge.lora import Adapter, LoraTaskVector, is_adapter
from tvmerge.merge import Merge
from tvmerge.rebuild import mixture_config, mixture_merge, router_shape
from tvmerge.sources import Sources, open_sources
from tvmerge.state_dict import TensorSpec

if TYPE_CHECKING:
    from tvmerge.evaluators.bench import BenchQuestion
    from tvmerge.judges.prompts import JudgePrompts

__all__ = ["plan"]


def plan(config: PlanConfig) -> None:
    """Print what a merge would need: sizes, checks, number of weights, memory, disk, bytes per trial, the judge's cost.

    Raises:
        InputError: the merge cannot work; what is known of it was printed.
    """
    output = local_path(config.output_dir, flag="--output_dir")
    judged = None if config.bench_name is None and config.bench_dir is None else _judge_rows(config)
    opened: list[tuple[str, Header, int]] = []

    def open_model(name: str) -> Header:
        header, missing = open_header(name, cache_dir=config.cache_dir)
        opened.append((name, header, missing))
        return header

    try:
        check_output(output)
        sources = open_sources(**config.models, open_model=open_model)
        # Takes a second and a half: not before it is needed.
        from tvmerge.models.transformers import load_tokenizer, unread_by_all

        load_tokenizer(sources.target.model.path)
        if config.is_mixture:  # what is refused of experts is refused before what is refused of models
            mixture_config(sources, config.mixture_settings, dtype=config.merge_settings.dtype)
        omit = unread_by_all(sources.whole_models())
        made = _made(config, sources, omit)
    except InputError:
        print(_table(_model_rows(opened)))
        raise
    print(_table(_model_rows(opened)))
    print()
    rows, problems = _needs(config, sources, made, omit, missing=sum(m for _, _, m in opened), output=output)
    print(_table([("what", "figure"), *rows]))
    if judged is not None:
        print()
        print(_table([("what", "figure"), *judged]))
    if problems:
        raise IncompatibleError("; ".join(problems))


@dataclass(frozen=True)
class _Made:
    """What a search makes of the models."""

    specs: Mapping[str, TensorSpec]  # of the live model
    parts: Sequence[tuple[Merge, Sequence[str]]]  # the merges in it, and which of their tensors move
    weight_names: Sequence[str]


def _made(config: PlanConfig, sources: Sources, omit: Sequence[str]) -> _Made:
    settings = replace(config.merge_settings, omit=omit)
    if not config.is_mixture:
        merge = sources.merge(settings)
        specs = {name: merge.spec(name) for name in merge.target.names}
        return _Made(specs, [(merge, list(merge.weights_of))], merge.weight_names)
    if config.gate_prompts is not None:
        load_prompts(config.gate_prompts, config.target_models)
    shape = router_shape(sources, mixture_config(sources, config.mixture_settings, dtype=settings.dtype))
    router = np.zeros(shape, np.float32)
    mixture = mixture_merge(sources, sources.merges(settings), config.mixture_settings, router)
    names = [*mixture.weight_names, *mixture.gate_names]
    model = mixture.at(dict.fromkeys(names, 1.0))
    return _Made({name: model.spec(name) for name in model.names}, mixture.parts(), names)


def open_header(name: str, *, cache_dir: str | None) -> tuple[Header, int]:
    """Find a model and read its headers; of a Hub model nothing else is fetched but its small files.

    Returns:
        The headers, and the bytes of weights that are still to be downloaded.

    Raises:
        CheckpointError: it cannot be found or read.
    """
    described = describe(name, cache_dir=cache_dir)
    model = resolve(name, cache_dir=cache_dir) if described is None else described.model
    if is_adapter(model):  # small enough to fetch whole
        return Adapter(resolve(name, cache_dir=cache_dir)), 0
    if described is None or described.tensors is None:
        return Checkpoint(model), 0
    unknown = {dtype for dtype, _ in described.tensors.values()} - SAFETENSORS_DTYPES.keys()
    if unknown:
        raise CheckpointError(f"model {name}: holds the dtype {min(unknown)}, which cannot be merged")
    specs = {
        tensor: TensorSpec(shape=shape, dtype=SAFETENSORS_DTYPES[dtype])
        for tensor, (dtype, shape) in described.tensors.items()
    }
    return Header(model, specs), described.nbytes


def _model_rows(opened: Sequence[tuple[str, Header, int]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("model", "architecture", "tensors", "parameters", "size", "dtype", "vocabulary", "to download")
    ]
    for name, header, missing in opened:
        specs = [header.spec(tensor) for tensor in header.names]
        sizes: dict[str, int] = {}
        for spec in specs:
            dtype = spec.dtype.name
            sizes[dtype] = sizes.get(dtype, 0) + spec.nbytes
        rows.append(
            (
                name,
                _architecture(header),
                str(len(specs)),
                _count(sum(spec.size for spec in specs)),
                _size(sum(spec.nbytes for spec in specs)),
                ", ".join(sorted(sizes, key=lambda dtype: -sizes[dtype])),
                _vocabulary(header),
                _size(missing) if missing else "no",
            )
        )
    return rows


def _architecture(header: Header) -> str:
    if isinstance(header, Adapter):
        return "LoRA adapter"
    try:
        known = header.config.get("architectures") or [header.config.get("model_type", "unknown")]
    except CheckpointError:
        return "unknown"
    return str(known[0] if isinstance(known, list) else known) + (
        " (tied)" if header.config.get("tie_word_embeddings") else ""
    )


def _vocabulary(header: Header) -> str:
    if isinstance(header, Adapter):
        return "-"
    try:
        return str(header.vocabulary_size or "unknown")
    except CheckpointError:
        return "unknown"


def _needs(
    config: PlanConfig, sources: Sources, made: _Made, omit: Sequence[str], *, missing: int, output: Path
) -> tuple[list[tuple[str, str]], list[str]]:
    live = sum(spec.nbytes for spec in made.specs.values())
    largest = max(spec.nbytes for spec in made.specs.values())
    read, kept = _traffic(sources, made)
    written = sum(merge.spec(name).nbytes for merge, names in made.parts for name in names)
    moved = sum(len(names) for _, names in made.parts)
    in_memory = live + (kept if config.delta_storage == "memory" else largest)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    saved = live + sum(_stored(target, set(target.names)) for target in sources.targets) * config.save_experts
    free = _free(output)
    cache_free = _free(Path(config.cache_dir or HF_HUB_CACHE)) if missing else free
    rows = [
        *_expert_rows(config),
        ("weights to search", f"{len(made.weight_names)} ({', '.join(_few(made.weight_names))})"),
        ("tensors that move", f"{moved} of {len(made.specs)}"),
        ("tensors left out", f"{len(omit)} (duplicates of tied tensors, or not read by the model)"),
        ("checks", "architecture, names, shapes, kinds, tied tensors, vocabulary: all fit"),
        ("largest tensor", _size(largest)),
        ("memory: live model and differences", f"{_size(in_memory)} of {_size(memory)} here"),
        ("disk: saved model", f"{_size(saved)} of {_size(free)} free"),
        ("disk: downloads", f"{_size(missing)} of {_size(cache_free)} free" if missing else "none"),
        ("bytes per trial", f"{_size(read)} read, {_size(written)} written"),
    ]
    problems = []
    if saved > free:
        problems.append(f"{_size(saved)} are needed on the disk of {output}, and {_size(free)} are free")
    if missing > cache_free:
        problems.append(f"{_size(missing)} are to be downloaded, and {_size(cache_free)} are free in the Hub's cache")
    if in_memory > memory:
        problems.append(f"{_size(in_memory)} of memory are needed, and this machine has {_size(memory)}")
    return rows, problems


def _traffic(sources: Sources, made: _Made) -> tuple[int, int]:
    """Bytes that a trial reads, and bytes of differences that could be kept in memory."""
    read = 0
    kept: dict[str, int] = {}
    for merge, changed in made.parts:
        read += sum(merge.target.spec(name).nbytes for name in changed)
        for label, vector in merge.task_vectors.items():
            if label in merge.fixed_weights:  # another target, of the same shapes
                read += sum(merge.target.spec(name).nbytes for name in changed)
                continue
            entry = next(entry for entry in sources.tuned if entry.label == label)
            names = set(vector.names) & set(changed)
            tuned = _stored(entry.tuned, names)
            whole = set(vector.names) & merge.weights_of.keys()  # experts share their differences
            kept[label] = 0 if isinstance(vector, LoraTaskVector) else _stored(entry.tuned, whole)
            # Of an adapter's base only those tensors are read that the adapter holds whole.
            needed = names & set(vector.whole_names) if isinstance(vector, LoraTaskVector) else names
            read += tuned + (0 if entry.base is None else _stored(entry.base, needed))
    return read, sum(kept.values())


def _expert_rows(config: PlanConfig) -> list[tuple[str, str]]:
    if not config.is_mixture:
        return []
    shared = "shared weights" if config.share_weights else "weights of their own"
    return [
        ("experts", f"{len(config.target_models)}, {config.experts_per_token} per token, {shared}"),
        ("attention, norms, embeddings", "mean of all" if config.moe_base == "average" else "first expert's"),
        ("router", config.gate_mode + (", with a temperature per layer" if config.search_gate else "")),
    ]


def _judge_rows(config: PlanConfig) -> list[tuple[str, str]]:
    """What the judge of a search would read, write and cost.

    Raises:
        TaskError: the questions are not there, or broken.
        ConfigError: the judge prompts are.
    """
    # Takes a second and a half: not before it is needed.
    from tvmerge.benches import find_bench, find_prompts, split_bench

    bench = find_bench(config)
    split = split_bench(config, bench, judge=config.judge_model_name)
    search, heldout = ([bench.questions[index] for index in part] for part in (split.search, split.heldout))
    rows = [
        ("questions", f"{len(search)} in a trial, {len(heldout)} held out"),
        ("turns judged", f"{_turns(search)} in a trial, {_turns(heldout)} held out, {config.num_choices} of each"),
        ("judge", config.judge_model_name),
    ]
    if config.judge_model_name == "rouge_l":
        return [*rows, ("judge cost", "nothing")]
    prompts, which = find_prompts(config, bench)
    return [*rows, ("judge prompts", which), *_cost_rows(config, prompts, search, heldout)]


def _cost_rows(
    config: PlanConfig, prompts: JudgePrompts, search: Sequence[BenchQuestion], heldout: Sequence[BenchQuestion]
) -> list[tuple[str, str]]:
    from tvmerge.judges.estimate import ANSWER_TOKENS, JUDGE_TOKENS, Estimate, estimate
    from tvmerge.judging import prices_of

    # The target, weight 1, the best uniform weight, the best trial, and what is recommended, which is asked the
    # questions of the search too; each tuned model. Of a mixture each target, and the best of its experts, too.
    experts = len(config.target_models) if config.is_mixture else 0
    parents = len(config.tuned_models) + experts
    merges = 5 + bool(experts)
    parts = [(search, config.n_trials + 1 + experts), (heldout or search, parents + (merges if heldout else 0))]

    def both(answer_tokens: int, judge_tokens: int) -> Estimate:
        total = Estimate(0, 0, 0)
        for questions, times in parts:
            cases = [case for question in questions for case in question.empty_cases()]
            once = estimate(cases, prompts, answer_tokens=answer_tokens, judge_tokens=judge_tokens)
            total += once * (times * config.num_choices * config.judge_repeats)
        return total

    usual = both(min(ANSWER_TOKENS, config.max_new_token), min(JUDGE_TOKENS, config.judge_max_tokens))
    full = both(config.max_new_token, config.judge_max_tokens)
    rows = [
        ("judgments", f"{usual.judgments:,} in {config.n_trials} trials and on held-out questions"),
        ("judge reads", f"about {_tokens(usual.tokens_in)}, {_tokens(full.tokens_in)} if all answers have full length"),
        ("judge writes", f"about {_tokens(usual.tokens_out)}, {_tokens(full.tokens_out)} at most"),
    ]
    prices = prices_of(config)
    if prices is None:
        return [*rows, ("judge cost", "unknown: give --judge_price_in and --judge_price_out, or it costs nothing")]
    costs = [prices.cost(each.tokens_in, each.tokens_out) for each in (usual, full)]
    limit = "" if config.max_judge_cost is None else f"; the run stops before ${config.max_judge_cost:g}"
    return [*rows, ("judge cost", f"about ${costs[0]:.2f}, ${costs[1]:.2f} if all is of full length{limit}")]


def _turns(questions: Sequence[BenchQuestion]) -> int:
    return sum(len(question.turns) for question in questions)


def _tokens(n: int) -> str:
    return f"{n / 1e6:.1f} M tokens" if n >= 1e6 else f"{n / 1e3:.0f} k tokens" if n >= 1e4 else f"{n} tokens"


def _free(folder: Path) -> int:
    """Bytes that are free where a folder is or would be."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.is_dir())).free


def _stored(model: Header, names: set[str]) -> int:
    wanted = names if not isinstance(model, Adapter) else set(model.names)
    return sum(model.spec(name).nbytes for name in model.names if name in wanted)


def _few(names: Sequence[str]) -> list[str]:
    return list(names) if len(names) <= 4 else [*names[:3], "...", names[-1]]


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.3f} M"


def _size(n: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= unit:
            return f"{n / unit:.1f} {name}"
    return f"{n} B"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
