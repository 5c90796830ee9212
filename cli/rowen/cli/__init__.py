"""The one command ``rowen``."""
