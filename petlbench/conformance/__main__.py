"""Run the new process of the check `reload`."""

from petlbench.conformance.process import main

main()
