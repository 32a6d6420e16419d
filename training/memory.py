"""How a model's layers are run so that a step fits into a device: checkpointed, compiled.

Neither changes what is computed. Both are set on each transformer layer, before the model is spread
over workers: what is gathered, computed again and compiled is then one layer. Knows nothing of
workers, losses or optimizers.
"""

from __future__ import annotations

from collections.abc import Iterator

from flow.attention import TransformerLayer
from flow.flow import FlowModel
from training.sections import MemoryConfig


def transformer_layers(model: FlowModel) -> Iterator[TransformerLayer]:
    """Every layer of flow and denoiser."""
    for module in model.modules():
        if isinstance(module, TransformerLayer):
            yield module


def set_memory(model: FlowModel, config: MemoryConfig) -> None:
    """Have every layer run as the settings say."""
    for layer in transformer_layers(model):
        layer.recompute = config.checkpointing
        if config.compile:
            layer.compile(dynamic=False)
