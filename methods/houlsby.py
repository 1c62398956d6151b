"""Houlsby's adapters (Houlsby et al., ICML 2019)."""

from __future__ import annotations

from typing import Any, ClassVar

from petlbench.api.method import About, SizeOption

from .bottlenecks import InAttention, Phi
from .serial import SerialAdapter, SerialConfig


class HoulsbyConfig(SerialConfig):
    """Sizes, initial values and order; the defaults are the adapters library's `double_seq_bn`."""

    activation: Phi = "silu"
    attention: InAttention = True


class Houlsby(SerialAdapter[HoulsbyConfig]):
    """After self-attention and feed-forward network, z = drop(h): u = z + U phi(D z + b_D) + b_U; then x + u, norm.

    Houlsby et al., "Parameter-Efficient Transfer Learning for NLP" (ICML 2019). `hub`, the default, is what the
    adapters library calls by this name: phi = SiLU, rank d/16, weights N(0, 0.02^2), nothing else trains. `paper` is
    the authors' code: phi = GELU (tanh form), rank 64 at width 768, weights normal with std 1e-3 cut at two of them
    (their paper says 1e-2), and all norms train, that of the embeddings included.

    Host dropout comes before the adapter; VL-Adapter has it after. Neither starts at the pre-trained function. Here:
    no adapter at cross-attention, as in the library, unless asked for; the gate's mean leaves padding out. There are
    no vision-language settings of the authors': rates are VL-Adapter's, and TransVG's where it is the host.
    """

    Config = HoulsbyConfig
    about = About(
        paper="Houlsby et al., ICML 2019",
        trains="bottlenecks after self-attention and FFN; paper: norms too",
        verified="adapters library: layers, gradients, counts",
    )
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "hub": {},
        "paper": {
            "activation": "gelu_tanh",
            "reduction": 12,
            "init": "truncated",
            "init_std": 0.001,
            "train_norms": True,
        },
    }
    size_option = SizeOption("reduction", (48, 24, 16, 8, 4, 2))
