"""Models whose linear layers hold 4 or 8 bits per weight (bitsandbytes).

In: how they are asked for; a model that was loaded so. Out: settings for `from_pretrained`; the same model, whose
products are those of training whenever it runs.
"""

from importlib.util import find_spec
from types import MethodType
from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils.import_utils import is_torch_bf16_gpu_available

_LAYERS = ("Linear4bit", "Linear8bitLt")


def quantization(
    *, num_bits: int, quant_type: str = "nf4", is_nested: bool = True, compute_dtype: str | None = None
) -> BitsAndBytesConfig:
    """Settings for weights of 4 or 8 bits (QLoRA, arXiv:2305.14314; LLM.int8(), arXiv:2208.07339).

    Args:
        num_bits: 4 or 8; the others are of 4 bits only.
        quant_type: nf4 or fp4.
        is_nested: Whether the scales are quantized, too (double quantization).
        compute_dtype: Of the products. Default: bfloat16 where the device has it, float16 on other GPUs, float32 on
            a CPU.

    Raises:
        ValueError: If bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"load_in_{num_bits}bit needs bitsandbytes; got none. pip install 'ropo[quantized]'")
    if num_bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    on_gpu = "bfloat16" if is_torch_bf16_gpu_available() else "float16"
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=is_nested,
        bnb_4bit_compute_dtype=compute_dtype or ("float32" if PartialState().device.type == "cpu" else on_gpu),
    )


def in_words(settings: Any) -> str:
    """Settings for quantized weights, as the log says them.

    Args:
        settings: What `from_pretrained` is given, of bitsandbytes or another method.

    Examples:
        >>> in_words(BitsAndBytesConfig(load_in_8bit=True))
        '8 bits'
    """
    if getattr(settings, "load_in_8bit", False):
        return "8 bits"
    if not getattr(settings, "load_in_4bit", False):
        return f"as {type(settings).__name__} says"
    nested = ", its scales in 8" if settings.bnb_4bit_use_double_quant else ""
    dtype = str(settings.bnb_4bit_compute_dtype).removeprefix("torch.")
    return f"4 bits ({settings.bnb_4bit_quant_type}{nested}), products in {dtype}"


def compute_as_in_training(model: nn.Module) -> None:
    """Keep quantized layers from computing otherwise in evaluation, where the reference is read.

    On a CPU bitsandbytes takes other kernels then (4 bits: weights packed anew for products in bfloat16; 8 bits:
    activations in 8 bits, too), and margins would not be 0 at the first step. The layers have no other use of
    `training`.

    Args:
        model: Quantized or not.
    """
    for module in model.modules():
        if type(module).__name__ in _LAYERS:
            module.training = True
            module.train = MethodType(_stay, module)  # type: ignore[method-assign]


def _stay(module: nn.Module, _mode: bool = True) -> Any:  # noqa: FBT001, FBT002 - the signature of `Module.train`
    return module
