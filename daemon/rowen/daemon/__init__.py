"""The per-node daemon: observe, decide, act, every 100 ms."""
