"""Keep the weights of linear layers on the CPU where they can be patched.

vLLM's CPU build packs each linear weight for oneDNN (or its AMX kernels) after loading and throws
the original away.  In-place updates need the original, and computing from it costs speed (measured
on SmolLM2-135M bf16, one core, processor time per step with 1, 8 and 16 sequences: 24.4, 30.0 and
40.6 ms packed; 39.1, 46.3 and 58.2 ms from the original; 24.5, 30.2 and 40.9 ms with this module).
So both are kept, and after an update the layers that changed are packed again: one more copy of
the linear weights in memory, and about 0.1 s of one core per update of 135 M parameters.

Called by the plugin in rollout engines only, before the model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any
from weakref import ref

import torch

Dispatch = Callable[[torch.nn.Module, bool], None]


def keep_linear_weights_live() -> None:
    """Make vLLM keep the original of each linear weight that it packs; callable again."""
    from vllm.model_executor.layers import utils

    original: Dispatch = utils.dispatch_cpu_unquantized_gemm
    if getattr(original, "keeps_weights", False):
        return

    def dispatch_and_keep(layer: torch.nn.Module, remove_weight: bool) -> None:
        """Stand in for vLLM's function: choose how a layer computes, keep its weight."""
        if layer.weight.is_meta or layer.weight.ndim != 2 or _would_change_bias(layer):
            layer.cpu_linear = torch.nn.functional.linear
        else:
            layer.cpu_linear = PackedLinear(layer, original)

    dispatch_and_keep.keeps_weights = True  # type: ignore[attr-defined] # a mark on a function
    utils.dispatch_cpu_unquantized_gemm = dispatch_and_keep


class PackedLinear:
    """How one layer computes: from a packed copy of its weight, made at the first use.

    The first use, not at once, because embeddings are dispatched like linear layers and most never
    compute as one.
    """

    def __init__(self, layer: torch.nn.Module, pack: Dispatch) -> None:
        self._layer = ref(layer)  # the layer owns this object
        self._pack = pack
        self._packed: Callable[..., torch.Tensor] | None = None

    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if self._packed is None:
            self._packed = self._packed_from_weight()
        return self._packed(x, weight, bias)

    def weight_changed(self) -> None:
        """Pack again, if the layer was ever used."""
        if self._packed is not None:
            self._packed = self._packed_from_weight()

    def _packed_from_weight(self) -> Callable[..., torch.Tensor]:
        layer: Any = self._layer()
        assert layer is not None, "a layer's way to compute outlived the layer"
        try:
            self._pack(layer, False)
            packed: Callable[..., torch.Tensor] = layer.cpu_linear
        finally:
            layer.cpu_linear = self
        return packed


def pack_again(model: torch.nn.Module, changed_storages: Set[int]) -> int:
    """Pack those layers again whose weight lies in one of these storages.

    Args:
        model: the model whose weights were patched.
        changed_storages: ``untyped_storage().data_ptr()`` of each patched parameter.

    Returns:
        The number of layers.
    """
    count = 0
    for module in model.modules():
        packed = getattr(module, "cpu_linear", None)
        if not isinstance(packed, PackedLinear):
            continue
        if module.weight.untyped_storage().data_ptr() in changed_storages:
            packed.weight_changed()
            count += 1
    return count


def _would_change_bias(layer: Any) -> bool:
    """True where vLLM's AMX kernels would turn the bias into float32 for good."""
    from vllm.model_executor.layers import utils

    rows, columns = layer.weight.size()
    has_bias = getattr(layer, "bias", None) is not None
    return has_bias and bool(utils.check_cpu_sgl_kernel(rows, columns, layer.weight.dtype))
