"""The co-serving executor: runs a rollout engine beside production, and holds it back."""
