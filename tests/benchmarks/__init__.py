"""Microbenchmarks; `make microbench` runs them."""
