"""The layer gate: hands compute back in the middle of a step, at the next decoder layer.

The weight backend's constructor calls ``attach``: it is the public extension point that is given
the model inside the engine.  The hooks do nothing until a gated scheduler runs in the same
process (``use``), so warm-up and profiling are never held.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from rowen.executor.gate_state import Gate
from rowen.executor.lane_config import read_lane_config

logger = logging.getLogger("vllm.rowen.gate")  # under vllm's logger, whose handler is set up

_gate: Gate | None = None


def use(gate: Gate | None) -> None:
    """Let the hooks of this process ask this gate; None lets every layer pass."""
    global _gate
    _gate = gate


def attach(model: torch.nn.Module, vllm_config: Any) -> int:
    """Hook the decoder layers of a model so that a closed gate holds it between layers.

    Args:
        model: the loaded model; its longest list of layers is taken as the decoder.
        vllm_config: the engine's configuration.

    Returns:
        The number of hooked layers: 0 for an engine without a lane, and where hooks would not
        run (compiled models, a worker process apart from the scheduler's); the step gate then
        works alone, and a log line says so.
    """
    if read_lane_config(vllm_config) is None:
        return 0
    if not vllm_config.model_config.enforce_eager:
        logger.warning("rowen gate: no layer gate, the model is compiled; use --enforce-eager")
        return 0
    if vllm_config.parallel_config.distributed_executor_backend != "uni":
        logger.warning("rowen gate: no layer gate, the model runs in a worker process of its own")
        return 0
    layers = decoder_layers(model)
    for layer in layers:
        layer.register_forward_pre_hook(_hold)
    logger.info("rowen gate: %d layers hand back compute", len(layers))
    return len(layers)


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules of the model's longest ModuleList (the first of equals); empty without one."""
    lists = [list(module) for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    longest: list[torch.nn.Module] = max(lists, key=len, default=[])
    return longest


def _hold(_layer: torch.nn.Module, _inputs: Any) -> None:
    if _gate is not None:
        _gate.between_layers()
