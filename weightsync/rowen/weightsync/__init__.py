"""The cross-cluster weight-transfer engine: codec, version chain, publisher and receiver."""
