"""What vLLM calls in each of its processes (entry point group ``vllm.general_plugins``).

It adds a name to vLLM's registry of weight-transfer backends and, where the processor has AMX,
asks the kernel for it.  Nothing of vLLM is changed in an engine that was not started by Rowen as
a rollout engine.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

logger = logging.getLogger("vllm.rowen.plugin")  # under vllm's logger, whose handler is set up

WEIGHT_BACKEND = "rowen"
ROLE_VARIABLE = "ROWEN_ENGINE_ROLE"
"""Set by the launcher: a general plugin is called without vLLM's configuration."""


def register() -> None:
    """Make Rowen's extensions known to this vLLM process; may be called any number of times.

    Raises:
        ImportError: in a rollout engine only, when a part of Rowen is missing; it must not start
            with weights that cannot be updated.
    """
    from vllm.platforms import current_platform

    _register_weight_backend()
    if current_platform.is_cpu():
        _permit_amx()
        if os.environ.get(ROLE_VARIABLE) == "rollout":
            from rowen.executor.cpu_linear import keep_linear_weights_live

            keep_linear_weights_live()


def _register_weight_backend() -> None:
    from vllm.distributed.weight_transfer import factory

    engines = factory.WeightTransferEngineFactory
    try:
        engines.register_engine(
            WEIGHT_BACKEND, "rowen.executor.weight_backend", "RowenWeightTransferEngine"
        )
    except ValueError as error:  # the only one: the name is registered, by an earlier call
        logger.debug("rowen plugin: %s", error)


def _permit_amx() -> None:
    """Ask for the AMX tile permission; without it the first small bf16 prefill ends in SIGILL."""
    if not _has_amx(Path("/proc/cpuinfo")):
        return
    import torch

    if not torch.cpu._init_amx():
        logger.warning("rowen plugin: the kernel refuses AMX; serve with --dtype float32 instead")


def _has_amx(cpuinfo: Path) -> bool:
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return False
    return any("amx_tile" in line.split() for line in lines if line.startswith("flags"))
