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
    """Return each pair's layer of the L = `layers` in a stack, from 0: the first, the last, or the ceil(k L / P)-th."""
    if pairing == "spread":
        return [-(-k * layers // pairs) - 1 for k in range(1, pairs + 1)]
    start = layers - pairs if pairing == "last" else 0
    return list(range(start, start + pairs))


class InterAdapter(nn.Module):
    """IEA(z) = [U u] and [S u] joined, with u = relu(D z + b): (…, width) -> (…, width).

    All layers of a pair share S; U fills the rest of the width, and is missing if S fills it all.
    """

    def __init__(self, width: int, rank: int, shared: nn.Linear) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank)
        unique_width = width - shared.out_features
        self.unique = nn.Linear(rank, unique_width) if unique_width else None
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
    """The adapters of one kind of token beside one layer: `inter` reads the attention's tap, `intra` the FFN's."""

    def __init__(self, width: int, rank: int, shared: nn.Linear, scale: float) -> None:
        super().__init__()
        self.inter, self.intra = InterAdapter(width, rank, shared), IntraAdapter(width, rank, scale)

    def linears(self) -> tuple[list[nn.Linear], list[nn.Linear]]:
        """Return the down-projections, and the up-projections without the shared one."""
        inter, intra = self.inter, self.intra.bottleneck
        return [inter.down, intra.down], [up for up in (inter.unique, intra.up) if up is not None]


@dataclass(frozen=True)
class SideSizes:
    """The sizes of every adapter, and how a side network reads from and adds to its host."""

    rank: int
    scale: float
    start: str  # embedding, gated or zero
    tap: Place = "output"  # the place in attention that a side reads
    norms: bool = False  # terms pass through the host's norms


class Rung(nn.ModuleDict):
    """The adapters of one pair beside one stack, by the kind of token."""

    def __init__(self, width: int, kinds: Sequence[Kind], shared: nn.Linear, sizes: SideSizes) -> None:
        super().__init__({kind: Adapters(width, sizes.rank, shared, sizes.scale) for kind in kinds})

    def of(self, kind: int) -> Adapters:
        return cast(Adapters, self[KINDS[kind]])

    def inter(self, kind: int, z: Tensor) -> Tensor:
        term: Tensor = self.of(kind).inter(z)
        return term

    def intra(self, kind: int, z: Tensor) -> Tensor:
        term: Tensor = self.of(kind).intra(z)
        return term


class Side(nn.Module):
    """The side network of one stack: a rung for each pair, and the gate before its first state.

    `unused` holds modules that only the released code instantiates.
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
            yield from (cast(Adapters, adapters) for adapters in rung.children())


@dataclass(frozen=True)
class Climb:
    """One pass through a stack; all tensors are (B, N, width), or (B, 1, width) for the pooled token alone.

    `entered` is the stack's input, with its gradient. `frozen` and `last` are the frozen stack's output after and
    before its final norm, without gradient. `terms` is the sum of the side's terms.
    """

    entered: Tensor
    frozen: Tensor
    last: Tensor
    terms: Tensor
    segments: Segments
    rows: tuple[Tensor, Tensor] | None = None  # the positions of the pooled tokens

    @property
    def side(self) -> Tensor:
        """s^P from s^0 = f^0."""
        return self.entered + self.terms


class SideStack(Stack):
    """A frozen stack with a side network: y = N(f^L + s^P), N its final norm if it has one.

    The frozen layers run without gradients on the detached input, so memory holds only their taps; modules that train
    below them feed s^0 alone. `asleep`: the frozen layers stay in evaluation mode whatever the model's mode. `pooled`:
    only the token that the pass marks has side features.
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
        """Run like any stack; a run of only some layers runs the frozen ones without the side."""
        taps = tuple(taps)
        if start or stop not in (None, len(self.layers)):
            with torch.no_grad():
                return super().run(x.detach(), context, start=start, stop=stop, taps=taps)
        climb, found = self.climb(x, context, taps)
        return self.read(climb), {site: found[site] for site in taps}

    def climb(self, x: Tensor, context: Pass, taps: Iterable[Site] = ()) -> tuple[Climb, Taps]:
        """Pass x (B, N, width) through the frozen layers and the side; return the pass and all taps."""
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
        """Yield each pair's IEA, and its VEA or LEA, (B, N, width) each."""
        for k, (rung, (attention, ffn)) in enumerate(zip(self.side.rungs, self.tapped, strict=True)):
            assert isinstance(rung, Rung)
            inter, intra = by_kind(taps[attention], segments, rung.inter), by_kind(taps[ffn], segments, rung.intra)
            if self._norms is not None:
                after_attention, after_ffn = self._norms[k]
                inter, intra = through(after_attention, inter, segments), through(after_ffn, intra, segments)
            yield inter, intra

    def read(self, climb: Climb) -> Tensor:
        """Return the stack's output (B, N, width), with the side's sum added before the final norm."""
        y = climb.last + climb.terms
        if self.side.sizes.start == "embedding":
            y = y + climb.entered
        elif self.side.gate is not None:
            y = y + self.side.gate * climb.entered
        if self.final_norm is not None:
            y = through(self.final_norm, y, climb.segments)
        return y if climb.rows is None else climb.frozen.index_put(climb.rows, y[:, 0])


def through(norm: nn.Module, x: Tensor, segments: Segments) -> Tensor:
    """Apply a frozen norm of the host to x as a function: the gradient reaches x, and no hook of the host runs."""
    of = getattr(norm, "of", None)  # one norm per modality
    return by_kind(x, segments, lambda kind, run: (norm if of is None else of(kind)).forward(run))


def _marked(context: Pass) -> tuple[Tensor, Tensor]:
    """Return row indices (B,), and each row's position (B,) of the token that represents the input."""
    mark = context.mark
    if mark is None:
        raise ValueError("this pass marks no pooled token")
    return torch.arange(len(mark), device=mark.device), mark


def _at(x: Tensor, rows: tuple[Tensor, Tensor]) -> Tensor:
    """Pick tokens, (B, N, d) -> (B, 1, d), as a copy: a view would keep the whole layer's activation."""
    return x[rows].unsqueeze(1)


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
