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

    Houlsby et al., "Parameter-Efficient Transfer Learning for NLP" (ICML 2019). `hub`, the default, is the adapters
    library's method of this name: phi = SiLU, rank d/16, weights N(0, 0.02^2), nothing else trains. `paper` follows
    the authors' code: phi = GELU (tanh form), rank 64 at width 768, weights normal with std 1e-3, cut at two standard
    deviations (their paper says 1e-2), and all norms train, the embeddings' norm included.

    Host dropout comes before the adapter; in VL-Adapter it comes after. Neither variant starts at the pre-trained
    function. As in the library, cross-attention gets no adapter unless `cross_attention` is set; unlike there, the
    gate's mean leaves padding out. The authors have no vision-language settings: rates are VL-Adapter's, and TransVG's
    on that host.
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
