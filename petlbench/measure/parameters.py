"""Count trainable scalars by owner, and those that a loss can reach."""

from __future__ import annotations

from collections.abc import Iterable, Set

from torch import Tensor, nn

from petlbench.core.record import Parameters


def count(
    backbone: nn.Module, head: nn.Module | None, host_names: Set[str], head_names: Set[str] = frozenset()
) -> Parameters:
    """Trainable scalars of `backbone` and `head` by owner: head first, then host, then method.

    A parameter under several names, or in both modules, counts once. `host_names` and `head_names` (of supplied
    parts) are names in the adapted backbone. `stored_bytes` stays None until the adapter is saved. Raises
    ValueError for a name that the backbone does not have, because its scalars would count as the method's.
    """
    owner, unique = _owners(backbone, head, host_names, head_names)
    trainable = dict.fromkeys(("method", "head", "host"), 0)
    for key, p in unique.items():
        if p.requires_grad:
            trainable[owner[key]] += p.numel()
    total = sum(p.numel() for p in unique.values())
    trained = sum(trainable.values())
    return Parameters(**trainable, trainable=trained, total=total, percent=100 * trained / total if total else 0.0)


def _owners(
    backbone: nn.Module, head: nn.Module | None, host_names: Set[str], head_names: Set[str]
) -> tuple[dict[int, str], dict[int, nn.Parameter]]:
    """Owner and parameter by id, see `count`."""
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
    return owner, unique


def of_method(
    backbone: nn.Module, head: nn.Module | None, host_names: Set[str], head_names: Set[str] = frozenset()
) -> list[nn.Parameter]:
    """The trainable parameters that `count` counts as the method's own."""
    owner, unique = _owners(backbone, head, host_names, head_names)
    return [p for key, p in unique.items() if p.requires_grad and owner[key] == "method"]


def reached(loss: Tensor) -> set[int]:
    """Ids of the leaf tensors that `loss` would send a gradient to, read off its graph: no backward pass is needed.

    Non-reentrant checkpointing and custom functions keep their inputs in the graph, so both are seen through. A leaf
    counts even where its gradient happens to be zero, as below an up-projection that starts at zero.
    """
    if loss.grad_fn is None:
        return {id(loss)} if loss.requires_grad else set()
    found: set[int] = set()
    seen, waiting = {loss.grad_fn}, [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        leaf = getattr(node, "variable", None)  # only of nodes that accumulate gradients
        if isinstance(leaf, Tensor) and not node.next_functions:
            found.add(id(leaf))
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return found


def effective(loss: Tensor, parameters: Iterable[Tensor]) -> int:
    """Scalars of those of `parameters` that train and that `loss` can send a gradient to; shared ones count once.

    Modules of other tasks, and modules whose output nothing reads, are not among them.
    """
    ids = reached(loss)
    return sum(p.numel() for p in {id(p): p for p in parameters}.values() if p.requires_grad and id(p) in ids)


def inference_extra(merged_backbone: nn.Module, untouched_parameters: int, head_names: Set[str] = frozenset()) -> int:
    """Scalars of `merged_backbone`, shared ones once, beyond the `untouched_parameters` of the original and its heads.

    Call it after merging where the method can merge; 0 then means that inference costs nothing more.
    """
    own = (p.numel() for name, p in merged_backbone.named_parameters() if name not in head_names)
    return sum(own) - untouched_parameters
