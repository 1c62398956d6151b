"""The cost of inserting methods through sites: `python -m tests.benchmarks.bench_insertion`.

Compares a training step of each seed method on BART layers with a step of the same mathematics written directly into
the same layers (`inline.py`). The two take turns, so that a machine's drift affects both; their equal losses show that
the mathematics is the same. Also a part of `make microbench`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from petlbench.api.method import adapt
from petlbench.api.registries import METHODS
from petlbench.api.sites import IMAGE, TEXT
from petlbench.api.tokens import Tokens, decoding_pass, join, plain_tokens
from petlbench.backbones.vl_bart import VLBart, VLBartConfig
from tests.benchmarks import holds, inline, sized

LIMIT = 1.10  # highest allowed ratio
PAIRS, WARMUP = sized((30, 5), (2, 1))
BATCH, IMAGE_TOKENS, ANSWER = 8, 36, 10
WIDTH, LAYERS = sized((256, 3), (32, 1))
SIZES = {
    "width": WIDTH,
    "ffn": 4 * WIDTH,
    "heads": 4,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "vocabulary": 100,
}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "m2ist": {"generation": "relaxed"},  # only beside the encoder, as in the paper; the decoder is plain
}


@dataclass(frozen=True)
class Cost:
    """Median seconds of a step through sites and inline, and the median of the pairs' ratios."""

    sites_seconds: float
    inline_seconds: float
    ratio: float


class Inputs:
    """Embedded tokens of a question, an image and an answer; no padding, but the masks that padding needs."""

    def __init__(self, host: VLBart) -> None:
        def drawn(length: int) -> Tensor:
            return torch.randn(BATCH, length, host.width)

        def real(length: int) -> Tensor:
            return torch.ones(BATCH, length, dtype=torch.bool)

        text = plain_tokens(drawn(inline.TEXT_TOKENS), real(inline.TEXT_TOKENS), TEXT)
        self.tokens: Tokens = join([text, plain_tokens(drawn(IMAGE_TOKENS), real(IMAGE_TOKENS), IMAGE)])
        self.answer, self.ids = drawn(ANSWER), torch.zeros(BATCH, ANSWER, dtype=torch.long)
        self.bias = host.encoder_bias(self.tokens)
        self.causal = host.decoder_bias(self.ids, 0, self.answer.dtype)
        self.memory_bias = host.memory_bias(self.tokens)


def adapted(name: str) -> VLBart:
    """Build a small host with a method, ready to train."""
    torch.manual_seed(0)
    host = VLBart(VLBartConfig(**SIZES, weights="none"))  # type: ignore[arg-type]
    cls = METHODS.get(name)
    found, _ = adapt(cls(cls.Config(**CONFIGS.get(name, {}))), host)
    assert isinstance(found, VLBart)
    return found.train()


def through_sites(host: VLBart, x: Inputs) -> Tensor:
    """Run the stacks as the backbone does, without table and head."""
    states, _ = host.stack("encoder").run(x.tokens.states, x.tokens.context(task="vqa", bias=x.bias))
    memory = Tokens(states, x.tokens.mask, x.tokens.types, x.tokens.positions, x.tokens.segments)
    context = decoding_pass(x.ids, memory, task="vqa", bias=x.causal, memory_bias=x.memory_bias)
    return host.stack("decoder").run(x.answer, context)[0]


def layers_as(cls: type[inline.InlineLayer]) -> Callable[[VLBart], nn.ModuleList]:
    """Return a function that takes the host apart and runs both stacks layer by layer."""
    return lambda host: nn.ModuleList(
        nn.ModuleList(cls(layer) for layer in host.stack(role)) for role in ("encoder", "decoder")
    )


def side_encoder(host: VLBart) -> nn.ModuleList:
    plain = nn.ModuleList(inline.InlineLayer(layer) for layer in host.stack("decoder"))
    return nn.ModuleList([nn.ModuleList([inline.SideEncoder(host.stack("encoder"))]), plain])


INLINE: Mapping[str, Callable[[VLBart], nn.ModuleList]] = {
    "m2ist": side_encoder,
    "vl_pet": layers_as(inline.VLPETLayer),
    "multiway_adapter": layers_as(inline.MultiWayLayer),
    "lora": layers_as(inline.LoRALayer),
    "vl_adapter": layers_as(inline.VLAdapterLayer),
}


def through_layers(stacks: nn.ModuleList, x: Inputs) -> Tensor:
    encoder, decoder = stacks
    states, y = x.tokens.states, x.answer
    for layer in encoder:  # type: ignore[attr-defined]
        states = layer(states, x.bias, None, None)
    for layer in decoder:  # type: ignore[attr-defined]
        y = layer(y, x.causal, states, x.memory_bias)
    return y


class Trained:
    """A model whose training steps are timed."""

    def __init__(self, parameters: Iterable[nn.Parameter], forward: Callable[[], Tensor]) -> None:
        self.forward = forward
        trainable = [p for p in parameters if p.requires_grad]
        self.scalars = sum(p.numel() for p in trainable)
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-3)

    def step(self, seed: int) -> tuple[float, float]:
        """Take a step; return its seconds and loss. The seed decides the dropout."""
        torch.manual_seed(seed)
        begun = perf_counter()
        loss = self.forward().square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = perf_counter() - begun
        return seconds, float(loss.detach())


def pair(name: str) -> tuple[Trained, Trained]:
    """Return the method inserted through its sites, and inline, with the same values."""
    ours, theirs = adapted(name), adapted(name)
    x = Inputs(ours)
    stacks = INLINE[name](theirs).train()
    return (
        Trained(run_parameters(ours), lambda: through_sites(ours, x)),
        Trained(stacks.parameters(), lambda: through_layers(stacks, x)),
    )


def run_parameters(host: VLBart) -> list[nn.Parameter]:
    """Return the stacks' parameters, without the embedding norms, which the timed part does not run."""
    stacks = nn.ModuleDict({role: host.stack(role) for role in ("encoder", "decoder")})
    return [p for name, p in stacks.named_parameters() if ".embedding_norm." not in name]


def measure(name: str) -> Cost:
    """Time both ways. Raises AssertionError if the two do not train alike."""
    ours, theirs = pair(name)
    assert ours.scalars == theirs.scalars, (
        f"{name}: {ours.scalars} scalars train through sites, {theirs.scalars} inline"
    )
    pairs = []
    for seed in range(WARMUP + PAIRS):
        turns = [ours, theirs] if seed % 2 else [theirs, ours]
        found = {id(one): one.step(seed) for one in turns}
        (seconds, loss), (inline_seconds, inline_loss) = found[id(ours)], found[id(theirs)]
        assert abs(loss - inline_loss) <= 1e-4 * abs(inline_loss), f"{name}: loss {loss} and {inline_loss}, step {seed}"
        pairs.append((seconds, inline_seconds))
    timed = pairs[WARMUP:]
    return Cost(
        sites_seconds=median(a for a, _ in timed),
        inline_seconds=median(b for _, b in timed),
        ratio=median(a / b for a, b in timed),
    )


@pytest.mark.parametrize("name", INLINE)
def test_a_step_through_sites_costs_no_more_than_a_tenth_above_inline(name: str) -> None:
    torch.set_num_threads(1)
    found = measure(name)
    print(f"\n{line(name, found)}")
    assert holds(LIMIT, found.ratio)


def line(name: str, cost: Cost) -> str:
    return (
        f"{name:20} sites {1e3 * cost.sites_seconds:7.2f} ms   inline {1e3 * cost.inline_seconds:7.2f} ms   "
        f"ratio {cost.ratio:.3f} (limit {LIMIT})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print medians and ratios; the exit status is 1 if a ratio is above LIMIT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(INLINE)}; default: all")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    costs = {name: measure(name) for name in args.methods or INLINE}
    for name, cost in costs.items():
        print(line(name, cost))
    return int(not holds(LIMIT, *(cost.ratio for cost in costs.values())))


if __name__ == "__main__":
    sys.exit(main())
