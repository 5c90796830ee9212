"""The elastic rollout endpoint: one URL over engines that come and go, without losing a token."""
