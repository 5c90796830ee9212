"""Traffic, measurements and reports: what the demo and the benchmarks are made of."""
