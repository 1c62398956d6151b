"""Sites: the seam between methods and backbones.

A method sees a backbone as stacks of layers of sub-layers. With x the tensor that enters a sub-layer's residual
addition and h what the frozen sub-layer gives, a value can be replaced, and read, at three places:

    post-norm   y = normed( norm( x + branch( drop( output( h ) ) ) ) ),   h = F(x)
    pre-norm    y = normed(       x + branch( drop( output( h ) ) )   ),   h = F(norm(x))

Values are changed by modules that live in the tree, never by hooks, so that what is trained is what is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Place = Literal["output", "branch", "normed"]

PLACES: tuple[Place, ...] = ("output", "branch", "normed")

Site = tuple[int, str, Place]  # (layer index, sub-layer name, place)

Taps = dict[Site, Tensor]

TEXT, IMAGE = 0, 1  # token types

Segments = tuple[tuple[int, int], ...]  # runs of tokens of one type: (type, length)


@dataclass(frozen=True)
class Pass:
    """One forward pass through a stack: values that inserted modules may read, and values for the host's cores.

    Modules may read `types` (B, N) (TEXT or IMAGE), `mask` (B, N) (True: a real token; padding can stand
    mid-sequence), `segments` (the types as runs that all rows share), `task`, `step` (tokens already decoded) and
    `mark` (B,) (where a tower's pooled token stands, if it has one). The rest belongs to the host.
    """

    types: Tensor | None = None
    mask: Tensor | None = None
    segments: Segments = ()
    task: str | None = None
    step: int = 0
    mark: Tensor | None = None
    positions: Tensor | None = None
    bias: Tensor | None = None
    memory: Tensor | None = None
    memory_mask: Tensor | None = None
    memory_bias: Tensor | None = None
    cache: Any = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make this the pass that `current_pass` returns; sub-layers do so, also when they are recomputed."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)


_CURRENT: ContextVar[Pass] = ContextVar("petlbench_pass")


def current_pass() -> Pass:
    """Return the pass that the calling module runs in. Raises LookupError outside a sub-layer."""
    return _CURRENT.get()


def by_kind(x: Tensor, segments: Segments, function: Callable[[int, Tensor], Tensor]) -> Tensor:
    """`function(kind, run)` of each run of tokens of one kind, joined again: (B, N, d) -> (B, N, e)."""
    kinds = {kind for kind, _ in segments}
    if len(kinds) == 1:
        return function(kinds.pop(), x)
    runs = x.split([length for _, length in segments], dim=1)
    return torch.cat([function(kind, run) for (kind, _), run in zip(segments, runs, strict=True)], dim=1)


def mean_of_real(x: Tensor, mask: Tensor) -> Tensor:
    """(B, N, d), mask (B, N) (True: real) -> (B, d): the mean over real tokens."""
    weight = mask.unsqueeze(-1).to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp_min(1)


class Parallel(nn.Module):
    """y = base(x) + path(x): a parallel path beside a linear projection, or beside some rows of a packed one."""

    def __init__(self, base: nn.Module, path: nn.Module, rows: slice | None = None) -> None:
        super().__init__()
        self.base, self.path, self.rows = base, path, rows

    @property
    def weight(self) -> Tensor:
        """The weight of the projection; some hosts (T5) read its dtype."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self.rows is None:
            return y + self.path(x)
        start, stop, _ = self.rows.indices(y.shape[-1])
        return torch.cat([y[..., :start], y[..., start:stop] + self.path(x), y[..., stop:]], dim=-1)


@dataclass(frozen=True)
class Projection:
    """The location of a linear projection in a core: an attribute of `owner`, whole or (packed) some of its rows."""

    owner: nn.Module
    name: str
    rows: slice | None = None

    @property
    def linear(self) -> nn.Linear:
        """The frozen projection itself, beneath any parallel paths."""
        module = getattr(self.owner, self.name)
        while isinstance(module, Parallel):
            module = module.base
        assert isinstance(module, nn.Linear)
        return module

    @property
    def in_features(self) -> int:
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        rows = range(self.linear.out_features)
        return len(rows if self.rows is None else rows[self.rows])

    def singles(self) -> tuple[Projection, ...]:
        """Return the projections behind this one: itself, or (multiway) one per modality."""
        return (self,)

    def add(self, path: nn.Module) -> None:
        """Put `path` (…, in_features) -> (…, out_features) beside the projection."""
        setattr(self.owner, self.name, Parallel(getattr(self.owner, self.name), path, self.rows))

    def remove(self, path: nn.Module) -> None:
        """Remove a path, wherever it stands in the chain. Raises ValueError if it is not there."""
        owner, name = self.owner, self.name
        module = getattr(owner, name)
        while isinstance(module, Parallel):
            if module.path is path:
                setattr(owner, name, module.base)
                return
            owner, name, module = module, "base", module.base
        raise ValueError(f"no such path beside {self.name}")

    @torch.no_grad()
    def fold(self, delta: Tensor) -> None:
        """Add `delta` (out_features, in_features) to the weight for good."""
        weight = self.linear.weight
        (weight if self.rows is None else weight[self.rows]).add_(delta)


@dataclass(frozen=True)
class ProjectionPair:
    """A projection that exists once per modality; a method goes into each of its singles."""

    text: Projection
    image: Projection

    def singles(self) -> tuple[Projection, ...]:
        return self.text, self.image


class SubLayer(nn.Module):
    """Attention, cross-attention or feed-forward network with its residual addition and its norm.

    `core(x, context)` computes F; `drop` is the host's dropout or drop-path on the branch.
    """

    # Traits; a family that differs from these defaults declares its own.
    norm_twice: bool = False  # the residual input is added, and the norm applied, once more behind it
    score_scale: float | None = None  # of attention's scores; None: 1 / sqrt(width of a head)

    def __init__(
        self,
        core: nn.Module,
        norm: nn.Module,
        drop: nn.Module,
        *,
        width: int,
        pre_norm: bool,
        projections: Mapping[str, Projection | ProjectionPair],
    ) -> None:
        super().__init__()
        self.core, self.norm, self.drop = core, norm, drop
        self.width, self.pre_norm = width, pre_norm
        self.projections = projections
        self.sites = nn.ModuleDict({place: nn.ModuleList() for place in PLACES})

    def insert(self, place: Place, module: nn.Module) -> None:
        """Let `module(x, value) -> value` replace the value at `place`, after those already there."""
        sites = self.sites[place]
        assert isinstance(sites, nn.ModuleList)
        sites.append(module)

    def forward(self, x: Tensor, context: Pass, tap: frozenset[str] = frozenset()) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, N, width) -> (B, N, width) and the values at the tapped places."""
        taps: dict[str, Tensor] = {}
        with context.active():
            h = self.core(self.norm(x) if self.pre_norm else x, context)
            h = self._at("output", x, h, tap, taps)
            h = self._at("branch", x, self.drop(h), tap, taps)
            y = x + h if self.pre_norm else self.norm(x + h)
            y = self._at("normed", x, y, tap, taps)
        return y, taps

    def _at(self, place: Place, x: Tensor, value: Tensor, tap: frozenset[str], taps: dict[str, Tensor]) -> Tensor:
        for module in self.sites[place].children():
            value = module(x, value)
        if place in tap:
            taps[place] = value
        return value


class Layer(nn.Module):
    """Sub-layers in order (`attention`, then `cross_attention` where there is one, then `ffn`), and a tail.

    Modules in `tail` are residual modules appended to the layer's output: y = module(y).
    """

    def __init__(self, **sublayers: SubLayer) -> None:
        super().__init__()
        self.sublayers = nn.ModuleDict(sublayers)
        self.tail = nn.ModuleList()

    def __getitem__(self, name: str) -> SubLayer:
        sublayer = self.sublayers[name]
        assert isinstance(sublayer, SubLayer)
        return sublayer

    def items(self) -> Iterator[tuple[str, SubLayer]]:
        for name in self.sublayers:
            yield name, self[name]

    def forward(
        self, x: Tensor, context: Pass, tap: dict[str, frozenset[str]] | None = None
    ) -> tuple[Tensor, dict[tuple[str, str], Tensor]]:
        taps: dict[tuple[str, str], Tensor] = {}
        for name, sublayer in self.items():
            x, seen = sublayer(x, context, (tap or {}).get(name, frozenset()))
            taps.update({(name, place): value for place, value in seen.items()})
        if len(self.tail):
            with context.active():
                for module in self.tail:
                    x = module(x)
        return x, taps


class Stack(nn.Module):
    """A list of layers with the norms around it. `run` re-enters at any layer; taps are returned, not collected."""

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        width: int,
        embedding_norm: nn.Module | None = None,
        final_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.embedding_norm, self.final_norm = embedding_norm, final_norm
        self.width = width
        self.checkpointing = False

    def __iter__(self) -> Iterator[Layer]:
        for layer in self.layers:
            assert isinstance(layer, Layer)
            yield layer

    def norms(self) -> Iterator[nn.Module]:
        """Every norm of the stack: of the embeddings, of each sub-layer, and the final one."""
        around = (self.embedding_norm, self.final_norm)
        yield from (norm for norm in around if norm is not None)
        for layer in self:
            yield from (sublayer.norm for _, sublayer in layer.items())

    def run(
        self, x: Tensor, context: Pass, *, start: int = 0, stop: int | None = None, taps: Iterable[Site] = ()
    ) -> tuple[Tensor, Taps]:
        """Layers `start` up to `stop` on x (B, N, width); the final norm after the last one. Gives y and the taps."""
        stop = len(self.layers) if stop is None else stop
        wanted: dict[int, dict[str, frozenset[str]]] = {}
        for index, name, place in taps:
            places = wanted.setdefault(index, {})
            places[name] = places.get(name, frozenset()) | {place}
        found: Taps = {}
        for index in range(start, stop):
            layer, tap = self.layers[index], wanted.get(index)
            if self.checkpointing and torch.is_grad_enabled():
                x, seen = checkpoint(layer, x, context, tap, use_reentrant=False)
            else:
                x, seen = layer(x, context, tap)
            found.update({(index, name, place): value for (name, place), value in seen.items()})
        if stop == len(self.layers) and self.final_norm is not None:
            with context.active():  # a norm may be one per modality
                x = self.final_norm(x)
        return x, found
