"""Low-rank adapters of PEFT on a frozen language model (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from textgym.packages import require


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether a model carries adapters."""
    return getattr(model, "_hf_peft_config_loaded", False)


def add_lora(model: PreTrainedModel, path: str | os.PathLike, options: Mapping[str, Any]) -> None:
    """Freeze a model and add trainable adapters, always the same ones, which initially change nothing.

    Args:
        model: The model.
        path: Hub id or folder that it was loaded from, and will be loaded from again.
        options: Arguments of `peft.LoraConfig`, such as ``{"r": 8, "lora_alpha": 64}``.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: The model carries adapters already, or an option that PEFT refuses.
    """
    require("peft", "lora", "peft")
    from peft import LoraConfig

    if has_adapters(model):
        raise ValueError(f"lora must be None for a model that has adapters already: {str(path)!r}")
    model.name_or_path = str(Path(path).resolve()) if Path(path).is_dir() else str(path)
    kind = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    transposed = any(isinstance(layer, Conv1D) for layer in model.modules())
    try:
        config = LoraConfig(**{"task_type": kind, "fan_in_fan_out": transposed, **options})
    except TypeError as error:
        raise ValueError(f"lora must hold arguments of peft.LoraConfig, got {dict(options)}: {error}") from error
    with torch.random.fork_rng(devices=[] if model.device.type == "cpu" else None):
        torch.manual_seed(0)
        model.add_adapter(config)
    train_adapters(model)


def train_adapters(model: PreTrainedModel, file: str | os.PathLike | None = None) -> None:
    """Make a model's adapters trainable, in float32 if the model has a half precision.

    Those of a `file` are read from it again, without rounding.
    """
    from peft import set_peft_model_state_dict

    model.set_adapter(model.active_adapters())
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(torch.promote_types(weight.dtype, torch.float32))
    if file is not None:
        weights = {name.removeprefix("base_model.model."): weight for name, weight in load_file(file).items()}
        set_peft_model_state_dict(model, weights)


def unwrapped(model: Any) -> PreTrainedModel:
    """The model of transformers in a `peft.PeftModel`, with its adapters; anything else as it is.

    Raises:
        ValueError: The adapters are not in the model's layers (prompt learning).
    """
    if isinstance(model, PreTrainedModel) or not hasattr(model, "get_base_model"):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"model must have adapters in its layers, such as LoRA's, got {type(model.active_peft_config).__name__}"
        )
    base = model.get_base_model()
    base._hf_peft_config_loaded = True
    return base


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model with its adapters added to its weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    twin = copy.deepcopy(model)
    for name, layer in list(twin.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)
            twin.set_submodule(name, layer.get_base_layer())
    del twin.peft_config
    twin._hf_peft_config_loaded = False
    return twin.requires_grad_(True)
