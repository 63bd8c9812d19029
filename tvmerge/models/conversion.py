"""Where each tensor of a checkpoint lies in a live model, found by asking transformers' own conversion.

transformers renames tensors on loading, and fuses or splits some: the weights of all experts become one parameter. A
fused parameter holds its parts, each in a region with a shape and strides of its own, so most parts can be written in
place. The regions are not assumed but found, from what the converter makes of marked tensors, and then verified.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from tvmerge.delta import together
from tvmerge.errors import CheckpointError, IncompatibleError
from tvmerge.state_dict import StateDict

__all__ = ["Assembly", "LiveTensors", "find_live_tensors"]

Shape = tuple[int, ...]
Write = Callable[[StateDict, Sequence[tuple[str, Tensor]]], None]


@dataclass(frozen=True)
class _Group:
    """Checkpoint tensors that are converted together."""

    key: str  # the live tensor that they become; the first one if they become several
    converter: Any  # a WeightConverter; None for one tensor that is at most renamed
    sources: list[tuple[str, str]]  # (pattern of the converter, checkpoint name), in the order of transformers

    @property
    def names(self) -> list[str]:
        return [name for _, name in self.sources]

    def convert(self, model: PreTrainedModel, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Do to tensors, one for each source, what transformers does on loading: live name → tensor."""
        converter = deepcopy(self.converter)  # it collects the tensors that it is given
        for (pattern, name), tensor in zip(self.sources, tensors, strict=True):
            converter.add_tensor(self.key, name, pattern, tensor)
        with torch.no_grad():
            made = converter.convert(self.key, model=model, config=model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}


class Assembly:
    """Live tensors that no checkpoint tensor is a region of, for instance because one is split into several.

    Args:
        model: the live model, which some conversions ask for its configuration and shapes.
        group: what is converted.
        targets: live name → live tensor, those that are filled from here.
    """

    def __init__(self, model: PreTrainedModel, group: _Group, targets: Mapping[str, Tensor]) -> None:
        self._model = model
        self._group = group
        self._targets = targets

    @property
    def names(self) -> Sequence[str]:
        """The checkpoint tensors that it needs, sorted."""
        return sorted(self._group.names)

    def fill(self, state_dict: StateDict) -> None:
        """Read what is needed, convert it and copy the results into the live tensors.

        Args:
            state_dict: holds `names`.
        """
        like = next(iter(self._targets.values()))
        # transformers keeps some conversions off the device, for tensors that would not fit on it twice.
        device = torch.device("cpu") if getattr(self._group.converter, "force_cpu", False) else like.device
        tensors = [state_dict.read(name).to(device=device, dtype=like.dtype) for name in self._group.names]
        made = self._group.convert(self._model, tensors)
        for key, target in self._targets.items():
            target.copy_(made[key])


@dataclass(frozen=True)
class LiveTensors:
    """How a live model is filled from a checkpoint; each of its tensors once.

    Attributes:
        views: checkpoint name → the live tensor, or the region of a live tensor, that is to hold it.
        assemblies: what fills the live tensors that have no views.
    """

    views: Mapping[str, Tensor]
    assemblies: Sequence[Assembly]

    @property
    def names(self) -> Sequence[str]:
        """All checkpoint tensors that the model reads, sorted."""
        return sorted([*self.views, *(name for assembly in self.assemblies for name in assembly.names)])

    def fill(
        self,
        state_dict: StateDict,
        loaded: MutableMapping[str, Hashable] | None = None,
        *,
        write: Write | None = None,
    ) -> None:
        """Fill the model in place.

        Args:
            state_dict: holds `names`.
            loaded: checkpoint name → version of what the model holds of it, which is left; kept up to date.
            write: what fills views with tensors of a state dict; None for this machine's memory.
        """
        loaded = {} if loaded is None else loaded
        versions = {name: state_dict.version(name) for name in self.views}
        changed = {name: version for name, version in versions.items() if loaded.get(name) != version}
        for name in changed:  # half of one, if reading fails
            loaded.pop(name, None)
        # The largest first, so that threads end at the same time.
        ordered = sorted(changed, key=lambda name: -self.views[name].numel())
        (write or _write)(state_dict, [(name, self.views[name]) for name in ordered])
        loaded.update(changed)
        for assembly in self.assemblies:
            versions = {name: state_dict.version(name) for name in assembly.names}
            if any(loaded.get(name) != version for name, version in versions.items()):
                for name in versions:
                    loaded.pop(name, None)
                assembly.fill(state_dict)
                loaded.update(versions)


def _write(state_dict: StateDict, views: Sequence[tuple[str, Tensor]]) -> None:
    with together():
        for name, view in views:
            state_dict.read(name, out=view)


def find_live_tensors(model: PreTrainedModel, checkpoint: StateDict) -> LiveTensors:
    """Find what each tensor of a checkpoint is in a live model.

    A tied tensor is filled from one of its names; other tensors of that name in the checkpoint are not read.

    Args:
        model: on any device. On `meta`, where there are no values to fill, no regions are looked for.
        checkpoint: only its names and specs are used.

    Returns:
        Views and assemblies that fill every parameter of the model once, and such buffers as the checkpoint holds.

    Raises:
        CheckpointError: a tensor has another shape than the model's configuration asks for.
        IncompatibleError: a parameter of the model is in no tensor of the checkpoint.
    """
    known: dict[str, Tensor] = model.state_dict(keep_vars=True)
    owned = dict(model.named_parameters())
    views: dict[str, Tensor] = {}
    assemblies: list[Assembly] = []
    filled: set[int] = set()
    find_regions = _RegionFinder(model)
    # Parameters under their first name come first: of tied tensors that is the embedding, else the head.
    for group in sorted(_group_names(model, checkpoint.names, known), key=lambda group: group.key not in owned):
        made = _converted_shapes(model, group, checkpoint)
        targets = {key: known[key] for key in made if key in known and id(known[key]) not in filled}
        for key, target in targets.items():
            _check_shape(group, key, made[key], tuple(target.shape))
        filled.update(map(id, targets.values()))
        found = find_regions(group, made, targets, checkpoint) if targets else {}
        views.update(found or {})
        if found is None:
            live = {key: target.detach() for key, target in targets.items()}
            assemblies.append(Assembly(model, group, live))
    unfilled = sorted(name for name, parameter in owned.items() if id(parameter) not in filled)
    if unfilled:
        raise IncompatibleError(
            f"{len(unfilled)} of {len(owned)} parameters of {type(model).__name__} are in no tensor of the checkpoint, "
            f"the first is {unfilled[0]}: use a checkpoint of the whole model"
        )
    return LiveTensors(views=dict(sorted(views.items())), assemblies=assemblies)


def _group_names(model: PreTrainedModel, names: Sequence[str], known: Mapping[str, Tensor]) -> list[_Group]:
    """What of a checkpoint is converted together, as convert_and_load_state_dict_in_model does it."""
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    groups: dict[str, _Group] = {}
    for name in sorted(names, key=dot_natural_key):  # some renamings depend on what came before
        key, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if key not in known and name in known:  # renamed by a pattern that was meant for another layout
            key, pattern = rename_source_key(name, [], [], prefix, known)
        if key not in known:
            continue
        if pattern is None and key in groups:  # a second tensor of one name, which transformers passes over
            continue
        group = groups.setdefault(key, _Group(key, converter_of.get(pattern), []))
        if group.converter is not None or not group.sources:
            group.sources.append((name if pattern is None else pattern, name))
    return list(groups.values())


def _converted_shapes(model: PreTrainedModel, group: _Group, checkpoint: StateDict) -> dict[str, Shape]:
    """Live name → shape of what a group becomes; reads no values."""
    shapes = [checkpoint.spec(name).shape for name in group.names]
    if group.converter is None:
        return {group.key: shapes[0]}
    try:
        made = group.convert(model, [torch.empty(shape, device="meta") for shape in shapes])
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise CheckpointError(
            f"{_few(group)} cannot become {group.key} ({' '.join(str(error).split())}): "
            "use the configuration of these weights"
        ) from error
    return {key: tuple(tensor.shape) for key, tensor in made.items()}


def _check_shape(group: _Group, key: str, shape: Shape, wanted: Shape) -> None:
    if shape != wanted:
        made = "has" if group.converter is None else f"becomes {key}, which has"
        raise CheckpointError(
            f"{_few(group)} {made} the shape {list(shape)}, where config.json asks for {list(wanted)}: "
            "use the configuration of these weights"
        )


def _few(group: _Group) -> str:
    first, *others = group.names
    return first if not others else f"{first} with {len(others)} others"


@dataclass(frozen=True)
class _Region:
    """The part of a contiguous tensor that holds another one."""

    shape: Shape
    stride: Shape
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)


class _RegionFinder:
    """Finds the regions of live tensors that checkpoint tensors become; equal layers are looked at once."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._found: dict[tuple[Any, ...], list[_Region] | None] = {}

    def __call__(
        self, group: _Group, made: Mapping[str, Shape], targets: Mapping[str, Tensor], checkpoint: StateDict
    ) -> dict[str, Tensor] | None:
        """Checkpoint name → view of the one target of a group; None if the group is not such views."""
        target = next(iter(targets.values())).detach()
        if group.converter is None:
            return {group.names[0]: target}
        if len(made) > 1 or target.is_meta or not target.is_contiguous():
            return None
        shapes = [checkpoint.spec(name).shape for name in group.names]
        patterns = tuple(pattern for pattern, _ in group.sources)
        layout = (id(group.converter), patterns, tuple(shapes), tuple(target.shape))
        if layout not in self._found:
            self._found[layout] = _find_regions(lambda tensors: group.convert(self._model, tensors), shapes)
        regions = self._found[layout]
        if regions is None:
            return None
        return {name: region.of(target) for name, region in zip(group.names, regions, strict=True)}


def _find_regions(
    convert: Callable[[Sequence[Tensor]], Mapping[str, Tensor]], shapes: Sequence[Shape]
) -> list[_Region] | None:
    """The regions of its one result that a conversion fills with its arguments; None if it does something else."""

    def fuse(tensors: Sequence[Tensor]) -> Tensor:
        (made,) = convert(tensors).values()
        return made.contiguous()

    try:
        regions = _locate(fuse, shapes)
        return regions if regions is not None and _is_exact(fuse, regions) else None
    except (RuntimeError, ValueError, TypeError):  # an operation that knows no integers, a region that cannot be
        return None


def _locate(fuse: Callable[[Sequence[Tensor]], Tensor], shapes: Sequence[Shape]) -> list[_Region] | None:
    """Follow the first element of each tensor and its neighbour in each dimension through a conversion."""
    marks = []  # for each tensor the indices of the elements that are followed
    for shape in shapes:
        steps = [tuple(int(j == i) for j in range(len(shape))) for i, size in enumerate(shape) if size > 1]
        marks.append([(0,) * len(shape), *steps])
    n_marks = sum(map(len, marks))
    dtype = torch.int16 if n_marks < 1 << 15 else torch.int32
    sources = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    numbers = iter(range(1, n_marks + 1))
    for source, indices in zip(sources, marks, strict=True):
        for index in indices:
            source[index] = next(numbers)
    fused = fuse(sources).reshape(-1)
    positions = fused.nonzero().reshape(-1)
    number, order = fused[positions].sort()
    if number.tolist() != list(range(1, n_marks + 1)):
        return None
    where = iter(positions[order].tolist())
    regions = []
    for shape in shapes:
        offset = next(where)
        stride = tuple(next(where) - offset if size > 1 else 1 for size in shape)
        regions.append(_Region(shape=tuple(shape), stride=stride, offset=offset))
    return regions


def _is_exact(fuse: Callable[[Sequence[Tensor]], Tensor], regions: Sequence[_Region]) -> bool:
    """Whether the regions are what a conversion makes of any values, and each element lies in exactly one of them."""
    random = torch.Generator().manual_seed(0)  # the global one is the user's
    shapes = [region.shape for region in regions]
    sources = [torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, generator=random) for shape in shapes]
    fused = fuse(list(sources))
    if not all(torch.equal(region.of(fused), source) for region, source in zip(regions, sources, strict=True)):
        return False
    if sum(source.numel() for source in sources) != fused.numel():
        return False
    covered = torch.zeros(fused.shape, dtype=torch.bool)
    for region in regions:
        region.of(covered).fill_(True)
    # As many elements as there are places, and no place without one: none has two.
    return bool(covered.all())
