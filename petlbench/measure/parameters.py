"""How many scalars train, and whose they are."""

from __future__ import annotations

from collections.abc import Set

from torch import nn

from petlbench.spec import Parameters


def count(
    backbone: nn.Module, head: nn.Module | None, host_names: Set[str], head_names: Set[str] = frozenset()
) -> Parameters:
    """Trainable scalars of `backbone` and `head` by owner: head first, then host, then method.

    A parameter under several names, or in both modules, counts once. `host_names` and `head_names` (of parts lent for
    the task) are names in the adapted backbone. `stored_bytes` stays None until the adapter is saved. Raises
    ValueError for a name that the backbone does not have, for its scalars would pass for the method's.
    """
    named = list(backbone.named_parameters(remove_duplicate=False))
    if unknown := (set(host_names) | head_names) - {name for name, _ in named}:
        raise ValueError(f"host parameters that the backbone does not have: {', '.join(sorted(unknown))}")
    owner = {id(p): "method" for _, p in named}
    owner |= {id(p): "host" for name, p in named if name in host_names}
    owner |= {id(p): "head" for name, p in named if name in head_names}
    unique = {id(p): p for _, p in named}
    if head is not None:
        owner |= {id(p): "head" for p in head.parameters()}
        unique |= {id(p): p for p in head.parameters()}

    trainable = dict.fromkeys(("method", "head", "host"), 0)
    for key, p in unique.items():
        if p.requires_grad:
            trainable[owner[key]] += p.numel()
    total = sum(p.numel() for p in unique.values())
    trained = sum(trainable.values())
    return Parameters(**trainable, trainable=trained, total=total, percent=100 * trained / total if total else 0.0)


def inference_extra(merged_backbone: nn.Module, untouched_parameters: int, head_names: Set[str] = frozenset()) -> int:
    """Scalars of `merged_backbone`, shared ones once, beyond the `untouched_parameters` of the original and its heads.

    Call it after merging where the method can merge; 0 then means that inference costs nothing more.
    """
    own = (p.numel() for name, p in merged_backbone.named_parameters() if name not in head_names)
    return sum(own) - untouched_parameters
