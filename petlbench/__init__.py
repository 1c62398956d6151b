"""petlbench: parameter-efficient transfer learning on vision-language models, measured fairly."""

__version__ = "0.1.0"
