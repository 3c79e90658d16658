"""A rank's partition of the model at any ZeRO stage: its fp32 master weights, their gradients, and where they belong.

DeepSpeed keeps each of them in flat buffers of its own making. This file is the only one that looks into its optimizers
(read in deepspeed 0.19): EMA, the gradient norm, the checkpoint of the EMA and the export see `Partition`s.

| stage | precision | DeepSpeed's optimizer             | partition                                       |
|-------|-----------|-----------------------------------|-------------------------------------------------|
| 0     | fp32      | none: torch's                     | every parameter whole, the same on every rank   |
| 0     | bf16      | `FP16_UnfusedOptimizer`           | its fp32 copy, the same on every rank           |
| 1, 2  | any       | `DeepSpeedZeroOptimizer`          | a range of the flattened group, cut anywhere    |
| 1     | bf16      | `BF16_Optimizer`                  | the same, by other names                        |
| 3     | any       | `DeepSpeedZeroOptimizer_Stage3`   | an equal piece of every parameter               |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slice:
    """A slice of a parameter in a rank's partition."""

    name: str
    """Name of the parameter, as in `state_dict()`."""
    start: int
    """Its first element in the flattened parameter."""
    offset: int
    """Its first element in the partition."""
    numel: int
    """Number of elements."""


@dataclass(frozen=True)
class Partition:
    """A flat buffer of fp32 master weights that this rank owns, padding included."""

    master: Tensor
    """(N,) or, at stage 0, the shape of the parameter."""
    slices: tuple[Slice, ...]
    """Pieces of parameters in it; the rest is padding."""


def partitions_of(engine: Any) -> list[Partition]:
    """This rank's master weights, in the order of DeepSpeed's buffers. They are its own tensors, not copies."""
    optimizer, names = engine.optimizer, engine.param_names
    kind = _kind(engine)
    if kind == "stage3":
        return [
            Partition(flat, _equal_pieces(group, names, _rank(optimizer)))
            for flat, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups)
        ]
    if kind in ("stage1_2", "bf16"):
        groups = optimizer.bit16_groups if kind == "stage1_2" else optimizer.bf16_groups
        return [
            Partition(flat, tuple(_range(param, names[param]) for param in group if param._hp_mapping is not None))
            for flat, group in zip(_masters(optimizer, kind), groups)
        ]
    pairs = _whole(engine, kind)
    return [Partition(master.data, (Slice(names[param], 0, 0, param.numel()),)) for param, master in pairs]


def gradients_of(engine: Any) -> list[Tensor]:
    """The gradients of those partitions, averaged over all ranks: after the backward pass of the last microbatch of a step.

    At stage 0 they are those of the whole model, on every rank.
    """
    optimizer, kind = engine.optimizer, _kind(engine)
    if kind == "bf16":
        return list(optimizer.fp32_groups_gradient_flat_partition)
    if kind in ("stage0", "unfused"):
        return [param.grad for param, _ in _whole(engine, kind) if param.grad is not None]
    if _offloaded(optimizer):
        return [master.grad for master in _masters(optimizer, kind) if master.grad is not None]
    return [gradient for group in optimizer.averaged_gradients.values() for gradient in group or ()]


def squared_norm(engine: Any) -> Tensor:
    """This rank's part of the squared gradient norm, a float32 scalar on its device; their sum over ranks is the whole.

    One pass over the partition: NaN or Inf anywhere makes it so.
    """
    gradients = gradients_of(engine)
    norms = torch._foreach_norm([gradient.detach() for gradient in gradients], 2, dtype=torch.float32)
    total = torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float32)
    if engine.zero_optimization_stage() == 0:
        total = total / engine.dp_world_size  # every rank has them all
    return total.to(engine.device)


@torch.no_grad()
def discard_gradients(engine: Any) -> None:
    """Ends a step without taking it, as DeepSpeed does after an fp16 overflow: gradients go, weights and moments stay."""
    optimizer, kind = engine.optimizer, _kind(engine)
    if kind == "stage3":
        optimizer._pre_step()
        optimizer._partition_all_parameters()
        optimizer._overflow_clean_up(optimizer.loss_scale)
        _gather_persistent(optimizer)
    elif kind == "stage1_2":
        from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

        optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
        optimizer.zero_grad(set_to_none=True)
        optimizer._release_preflattened_grad_buffers()
        if optimizer.cpu_offload:
            optimizer._offload_accumulated_param_ids = set()
            optimizer.reset_cpu_buffers()
        else:
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None
    elif kind == "stage0":
        engine.zero_grad()
    else:
        optimizer.zero_grad()
    engine.micro_steps += 1  # else DeepSpeed would take the next microbatch for the last of its step


@torch.no_grad()
def write_weights(engine: Any, sources: list[Tensor]) -> None:
    """Sets the model's weights, on all ranks, from fp32 buffers laid out as the partitions. Masters are not touched.

    At stage 0 in fp32 the model's weights *are* the masters: the caller keeps a copy.
    """
    optimizer, kind = engine.optimizer, _kind(engine)
    if kind in ("stage0", "unfused"):
        for (param, _), source in zip(_whole(engine, kind), sources):
            param.data.copy_(source)
        return
    name = {"stage3": "fp32_partitioned_groups_flat", "stage1_2": "single_partition_of_fp32_groups"}.get(kind)
    name = name or "fp32_groups_flat_partition"
    masters = getattr(optimizer, name)
    setattr(optimizer, name, sources)  # DeepSpeed's own copying, reading from elsewhere
    try:
        if kind == "stage3":
            optimizer._partition_all_parameters()
            for number in range(len(sources)):
                optimizer._reassign_or_swap_out_partitioned_parameters(number)
            _gather_persistent(optimizer)
            optimizer.invalidate_secondary_tensor()
        else:
            optimizer.update_lp_params()
    finally:
        setattr(optimizer, name, masters)


def masters_are_weights(engine: Any) -> bool:
    """Whether the model computes with the very tensors that the optimizer updates (stage 0 in fp32)."""
    return _kind(engine) == "stage0"


# -- DeepSpeed's optimizers -------------------------------------------------------------------------------------------


def _kind(engine: Any) -> str:
    name = type(engine.optimizer).__name__
    kinds = {
        "DeepSpeedZeroOptimizer_Stage3": "stage3",
        "DeepSpeedZeroOptimizer": "stage1_2",
        "BF16_Optimizer": "bf16",
        "FP16_UnfusedOptimizer": "unfused",
    }
    if name in kinds:
        return kinds[name]
    assert isinstance(engine.optimizer, torch.optim.Optimizer), f"an optimizer that partitions.py does not know: {name}"
    return "stage0"


def _masters(optimizer: Any, kind: str) -> list[Tensor]:
    if kind == "stage3":
        return optimizer.fp32_partitioned_groups_flat
    return optimizer.single_partition_of_fp32_groups if kind == "stage1_2" else optimizer.fp32_groups_flat_partition


def _whole(engine: Any, kind: str) -> list[tuple[Any, Tensor]]:
    """Yields (parameter, its fp32 master) of every parameter, where none is sharded."""
    optimizer = engine.optimizer
    if kind == "stage0":
        return [(param, param) for group in optimizer.param_groups for param in group["params"]]
    return [pair for pairs in zip(optimizer.fp16_groups, optimizer.fp32_groups) for pair in zip(*pairs)]


def _offloaded(optimizer: Any) -> bool:
    return bool(getattr(optimizer, "offload_optimizer", False) or getattr(optimizer, "cpu_offload", False))


def _rank(optimizer: Any) -> int:
    return torch.distributed.get_rank(group=optimizer.dp_process_group)


def _equal_pieces(group: list[Any], names: dict[Any, str], rank: int) -> tuple[Slice, ...]:
    """Stage 3: returns the rank's equal slice of each parameter; the last ranks' slices may end in padding."""
    slices, offset = [], 0
    for param in group:
        piece = param.partition_numel()
        start = rank * piece
        numel = min(piece, max(0, param.ds_numel - start))
        if numel:
            slices.append(Slice(names[param], start, offset, numel))
        offset += piece
    return tuple(slices)


def _range(param: Any, name: str) -> Slice:
    """Stages 1 and 2: returns the slice that DeepSpeed's own mapping gives."""
    mapping = param._hp_mapping
    in_model, in_master = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Slice(name, int(in_model.start), int(in_master.start), int(in_master.numel))


def _gather_persistent(optimizer: Any) -> None:
    """Stage 3: gathers the parameters that stay whole on every rank again, after their masters were changed."""
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
