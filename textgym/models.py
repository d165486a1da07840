"""Loading language models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.utils import is_bitsandbytes_available, is_gguf_available, is_peft_available

from textgym.checks import check
from textgym.hub import base_of, file_beside, load_pretrained
from textgym.storage import readable


def load_model(
    path: str | os.PathLike,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.float32,
    quantization: Literal["4bit"] | None = None,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a language model for use without dropout, a causal or a sequence-to-sequence one as its config says.

    Args:
        path: Hub id or folder with safetensors weights, or with PEFT adapters, which are put on the model that they
            name.
        device: "auto" is CUDA where there is one, else CPU.
        dtype: Type of the weights; with `quantization`, of computations with them.
        quantization: "4bit" keeps the weights of linear layers in 4 bits (NF4, Dettmers et al. 2023, arXiv 2305.14314),
            by bitsandbytes.
        gguf_file: A GGUF file in that folder, to be read instead; its weights are unpacked.
        trust_remote_code: Whether Python code of the model's folder or repository may run.

    Raises:
        ImportError: A package for adapters, quantised weights or GGUF files is not installed.
        ValueError: There is no such model, or it has no safetensors weights.
    """
    target = resolve_device(device)
    adapters = file_beside(path, "adapter_config.json")
    if adapters is not None and not is_peft_available():
        raise ImportError(f'the adapters in {str(path)!r} need peft: pip install "textgym[peft]"')
    if gguf_file is not None and not is_gguf_available():
        raise ImportError('gguf_file needs gguf: pip install "textgym[gguf]"')
    arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if gguf_file is not None:
        arguments["gguf_file"] = gguf_file
    try:
        config = load_pretrained(AutoConfig, base_of(path), **arguments)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        if gguf_file is not None:
            arguments["config"] = config  # to read a large vocabulary from such a file again takes many seconds
        if quantization is not None:
            arguments |= {"quantization_config": _quantization(quantization, dtype), "device_map": {"": target}}
        model = load_pretrained(kind, path, dtype=dtype, **arguments)
    except SafetensorError:
        for file in sorted(Path(path).glob("*.safetensors")):
            with readable(file), safe_open(file, "pt"):
                pass
        raise
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {str(path)!r} must be a hub id or a folder of a causal or sequence-to-sequence language model with "
            f"safetensors weights: {error}"
        ) from error
    fuse_activations(model)
    if gguf_file is not None:  # its weights are unpacked: an ordinary model, that can be saved as one
        model.__dict__.pop("hf_quantizer", None)
        model.config.__dict__.pop("quantization_config", None)
    if quantization is not None:
        for layer in model.modules():
            if hasattr(layer, "support_avx512bf16_for_cpu"):  # a layout of weights without gradients
                layer.support_avx512bf16_for_cpu = False
        return model.eval()
    if target.type == "cpu":
        # Weights mapped from a file lie at odd addresses, where matrix products can round differently: a policy that
        # was saved and loaded would not be the same to the last bit.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    module: Any = model.eval()  # transformers wraps `to` in a way that type checkers misread
    return module.to(target)


def _quantization(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    check("quantization", quantization, quantization == "4bit", 'None or "4bit"')
    if not is_bitsandbytes_available():
        raise ImportError('quantization needs bitsandbytes: pip install "textgym[quantization]"')
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def resolve_device(device: str | torch.device) -> torch.device:
    """Read a device argument; "auto" is CUDA where there is one, else CPU.

    Raises:
        ValueError: It is no device of torch, or one that this machine does not have.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and (rank := os.environ.get("LOCAL_RANK")):  # each process of a machine has its own
            device = f"cuda:{int(rank) % torch.cuda.device_count()}"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'device must be "auto" or a device of torch, got {device!r}: {error}') from None
    if chosen.type == "cuda":
        count = torch.cuda.device_count()
        allowed = f"one of {count} CUDA devices" if count else '"auto" or "cpu", since there is no CUDA device here'
        check("device", str(device), (chosen.index or 0) < count, allowed)
    return chosen


def fuse_activations(model: nn.Module) -> None:
    """Replace GELUs that transformers writes out in eight elementwise steps by the one kernel of the same function."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, GELUTanh())
