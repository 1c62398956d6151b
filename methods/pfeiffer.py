"""Pfeiffer's adapters (Pfeiffer et al., EACL 2021), and Adapter+ (Steitz and Roth, CVPR 2024)."""

from __future__ import annotations

from typing import Any, ClassVar

from petlbench.api.method import About, SizeOption

from .serial import NormBefore, SerialAdapter, SerialConfig


class PfeifferConfig(SerialConfig):
    """Sizes, initial values and order; the defaults are the adapters library's `seq_bn`."""

    norm_before: NormBefore = True


class Pfeiffer(SerialAdapter[PfeifferConfig]):
    """After the feed-forward network, z = drop(h): u = z + U relu(D q + b_D) + b_U, q = norm(x + z); then x + u, norm.

    Pfeiffer et al., "AdapterFusion" (EACL 2021), as the adapters library builds it: the host's norm applies twice, and
    a pre-norm host, which has no norm in that place, gives q = x + z, the raw stream. `plus` is Adapter+ (Steitz and
    Roth, CVPR 2024): y = q + s bn(q) after the norm, s one number for each channel, GELU, rank 8 at width 768, weights
    normal with std 0.01, cut at two standard deviations, drop-path 0.1 on the branch. Neither variant starts at the
    pre-trained function.

    Here residual `post_add` also works in a pre-norm host, where the library fails; as in every host, x counts twice.
    Rates are those of `houlsby`.
    """

    Config = PfeifferConfig
    about = About(
        paper="Pfeiffer et al., EACL 2021",
        trains="bottlenecks after FFN, behind the host's norm",
        verified="adapters library: layers, gradients, counts",
    )
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "seq": {},
        "plus": {
            "norm_after": False,
            "residual": "after",
            "activation": "gelu",
            "reduction": 96,
            "scale": "learned_vector",
            "drop_path": 0.1,
            "init": "truncated",
            "init_std": 0.01,
        },
    }
    size_option = SizeOption("reduction", (96, 48, 24, 16, 8, 4, 2))
