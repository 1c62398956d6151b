"""M2IST's side network: adapters beside a frozen stack that read its taps and never feed it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petlbench.api.sites import IMAGE, TEXT, Pass, Place, Segments, Site, Stack, Taps, by_kind

from ..layers import Bottleneck

Kind = Literal["text", "image"]
KINDS: dict[int, Kind] = {TEXT: "text", IMAGE: "image"}
Pairing = Literal["first", "last", "spread"]


def paired_layers(pairing: Pairing, pairs: int, layers: int) -> list[int]:
    """Which of a stack's `layers` stands in each pair, from 0: the first, the last, or ceil(k L / P) of the k-th."""
    if pairing == "spread":
        return [-(-k * layers // pairs) - 1 for k in range(1, pairs + 1)]
    start = layers - pairs if pairing == "last" else 0
    return list(range(start, start + pairs))


class InterAdapter(nn.Module):
    """IEA(z) = [U u] + [S u], joined, with u = relu(D z + b): (…, width) -> (…, width).

    S belongs to the pair, and is the same for all that it pairs; U is as wide as S leaves it, and may be missing.
    """

    def __init__(self, width: int, rank: int, shared: nn.Linear) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank)
        own = width - shared.out_features
        self.unique = nn.Linear(rank, own) if own else None
        self.shared = shared

    def forward(self, z: Tensor) -> Tensor:
        u = F.relu(self.down(z))
        common: Tensor = self.shared(u)
        return common if self.unique is None else torch.cat([self.unique(u), common], dim=-1)


class IntraAdapter(nn.Module):
    """VEA and LEA: E(z) = scale (U relu(D LN(z) + b) + b'), (…, width) -> (…, width), without a residual."""

    def __init__(self, width: int, rank: int, scale: float) -> None:
        super().__init__()
        self.norm, self.bottleneck, self.scale = nn.LayerNorm(width), Bottleneck(width, rank, F.relu), scale

    def forward(self, z: Tensor) -> Tensor:
        return self.scale * self.bottleneck(self.norm(z))


class Adapters(nn.Module):
    """What one kind of token has beside one layer: `inter` for the attention's tap, `intra` for the FFN's."""

    def __init__(self, width: int, rank: int, shared: nn.Linear, scale: float) -> None:
        super().__init__()
        self.inter, self.intra = InterAdapter(width, rank, shared), IntraAdapter(width, rank, scale)

    def linears(self) -> tuple[list[nn.Linear], list[nn.Linear]]:
        """Down-projections, and up-projections without the shared one."""
        inter, intra = self.inter, self.intra.bottleneck
        return [inter.down, intra.down], [up for up in (inter.unique, intra.up) if up is not None]


@dataclass(frozen=True)
class SideSizes:
    """Of every adapter, and what of its host's a side network reads and adds."""

    rank: int
    scale: float
    start: str  # embedding, gated or zero
    tap: Place = "output"  # of attention
    norms: bool = False  # terms pass through the host's norms


class Rung(nn.ModuleDict):
    """The adapters of one pair beside one stack, by the kind of token."""

    def __init__(self, width: int, kinds: Sequence[Kind], shared: nn.Linear, sizes: SideSizes) -> None:
        super().__init__({kind: Adapters(width, sizes.rank, shared, sizes.scale) for kind in kinds})

    def of(self, kind: int) -> Adapters:
        return cast(Adapters, self[KINDS[kind]])

    def inter(self, kind: int, z: Tensor) -> Tensor:
        found: Tensor = self.of(kind).inter(z)
        return found

    def intra(self, kind: int, z: Tensor) -> Tensor:
        found: Tensor = self.of(kind).intra(z)
        return found


class Side(nn.Module):
    """The side network of one stack: a rung for each pair, and the gate before its first state.

    `unused` is what only the released code instantiates.
    """

    is_side_module = True

    def __init__(self, width: int, kinds: Sequence[Kind], shared: Sequence[nn.Linear], sizes: SideSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.rungs = nn.ModuleList([Rung(width, kinds, s, sizes) for s in shared])
        self.gate = nn.Parameter(torch.zeros(())) if sizes.start == "gated" else None
        self.unused = nn.ModuleList()

    def adapters(self) -> Iterator[Adapters]:
        for rung in self.rungs:
            yield from (cast(Adapters, one) for one in rung.children())


@dataclass(frozen=True)
class Climb:
    """One pass: what `entered` a stack (with its gradient), what the frozen stack gives after its final norm and
    `last` before it (without), and the sum of the side's terms; all (B, N, width), or (B, 1, width) of the pooled one.
    """

    entered: Tensor
    frozen: Tensor
    last: Tensor
    terms: Tensor
    segments: Segments
    rows: tuple[Tensor, Tensor] | None = None  # where the pooled tokens stand

    @property
    def side(self) -> Tensor:
        """s^P from s^0 = f^0."""
        return self.entered + self.terms


class SideStack(Stack):
    """A frozen stack with a side network: y = N(f^L + s^P), N its final norm if it has one.

    The frozen layers run without gradients on the detached input, so nothing but the taps is kept of them; what trains
    below them feeds s^0 alone. `asleep`: they stay in evaluation mode whatever the model's mode is. `pooled`: only the
    token that the pass marks has side features.
    """

    def __init__(self, stack: Stack, side: Side, layers: Sequence[int], *, asleep: bool, pooled: bool = False) -> None:
        super().__init__(
            list(stack), width=stack.width, embedding_norm=stack.embedding_norm, final_norm=stack.final_norm
        )
        self.training = stack.training  # adapting changes no mode
        self.layers.training = stack.layers.training
        self.side, self.asleep, self.pooled = side, asleep, pooled
        self.tapped: list[tuple[Site, Site]] = [
            ((index, "attention", side.sizes.tap), (index, "ffn", "output")) for index in layers
        ]
        final = list(stack)[-1]
        self._last: Site = (len(stack.layers) - 1, list(final.sublayers)[-1], "normed")
        paired = [list(stack)[index] for index in layers]
        self._norms = [(layer["attention"].norm, layer["ffn"].norm) for layer in paired] if side.sizes.norms else None

    def train(self, mode: bool = True) -> SideStack:
        super().train(mode)
        if self.asleep:
            self.layers.train(False)
        return self

    def run(
        self, x: Tensor, context: Pass, *, start: int = 0, stop: int | None = None, taps: Iterable[Site] = ()
    ) -> tuple[Tensor, Taps]:
        """As of any stack; of a part of its layers, the frozen ones alone."""
        taps = tuple(taps)
        if start or stop not in (None, len(self.layers)):
            with torch.no_grad():
                return super().run(x.detach(), context, start=start, stop=stop, taps=taps)
        climb, found = self.climb(x, context, taps)
        return self.read(climb), {site: found[site] for site in taps}

    def climb(self, x: Tensor, context: Pass, taps: Iterable[Site] = ()) -> tuple[Climb, Taps]:
        """x (B, N, width) through the frozen layers and up the side; and the taps, wanted ones among them."""
        wanted = {self._last, *taps, *(site for pair in self.tapped for site in pair)}
        with torch.no_grad():
            frozen, found = super().run(x.detach(), context, taps=wanted)
        segments, rows, chosen = context.segments, None, found
        if self.pooled:
            rows, segments = _marked(context), context.segments[:1]
            x = _at(x, rows)
            chosen = {site: _at(value, rows) for site, value in found.items()}
        terms = [term for pair in self.terms(chosen, segments) for term in pair]
        return Climb(x, frozen, chosen[self._last], _sum(terms), segments, rows), found

    def terms(self, taps: Mapping[Site, Tensor], segments: Segments) -> Iterator[tuple[Tensor, Tensor]]:
        """IEA and VEA or LEA of each pair, (B, N, width) each."""
        for k, (rung, (attention, ffn)) in enumerate(zip(self.side.rungs, self.tapped, strict=True)):
            assert isinstance(rung, Rung)
            inter, intra = by_kind(taps[attention], segments, rung.inter), by_kind(taps[ffn], segments, rung.intra)
            if self._norms is not None:
                after_attention, after_ffn = self._norms[k]
                inter, intra = through(after_attention, inter, segments), through(after_ffn, intra, segments)
            yield inter, intra

    def read(self, climb: Climb) -> Tensor:
        """(B, N, width): the frozen stack's output with the side's added before the final norm."""
        y = climb.last + climb.terms
        if self.side.sizes.start == "embedding":
            y = y + climb.entered
        elif self.side.gate is not None:
            y = y + self.side.gate * climb.entered
        if self.final_norm is not None:
            y = through(self.final_norm, y, climb.segments)
        return y if climb.rows is None else climb.frozen.index_put(climb.rows, y[:, 0])


def through(norm: nn.Module, x: Tensor, segments: Segments) -> Tensor:
    """x through a frozen norm of the host as a function: the gradient passes to x, and the host's module is not run."""
    of = getattr(norm, "of", None)  # one norm per modality
    return by_kind(x, segments, lambda kind, run: (norm if of is None else of(kind)).forward(run))


def _marked(context: Pass) -> tuple[Tensor, Tensor]:
    """(B,), (B,): rows, and the place in each of the token that stands for all."""
    mark = context.mark
    if mark is None:
        raise ValueError("this pass marks no pooled token")
    return torch.arange(len(mark), device=mark.device), mark


def _at(x: Tensor, rows: tuple[Tensor, Tensor]) -> Tensor:
    """(B, N, d) -> (B, 1, d), copied: a view would keep the whole layer's activation."""
    return x[rows].unsqueeze(1)


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
