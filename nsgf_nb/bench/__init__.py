"""The protocol, the comparisons and the benchmarks behind the `nsgf` command."""
