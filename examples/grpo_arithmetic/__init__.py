"""GRPO on two-digit addition through Rowen's endpoint."""
