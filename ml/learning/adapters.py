"""Low-rank adapters (LoRA, Hu et al. 2021): a large encoder learns through a few small matrices.

Beside every linear layer of the encoder lies a product of two narrow matrices, which alone are trained; at
the end they are added to the layer, so that nothing of them is left in the checkpoint.
"""

from __future__ import annotations

from ml.learning.encoder import Classifier


def add_adapters(model: Classifier, rank: int) -> None:
    """Freeze the encoder of ``model`` and put adapters of this rank beside its linear layers, in place."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")
    model.encoder = get_peft_model(model.encoder, config)


def merge_adapters(model: Classifier) -> None:
    """Add the adapters to the layers that they lie beside, in place."""
    model.encoder = model.encoder.merge_and_unload()
    for parameter in model.encoder.parameters():
        parameter.requires_grad_(True)
