"""How a model is loaded, and which adapter is trained: the options, and what they mean.

In: what the user wrote. Out: options for `from_pretrained`, the configuration of a new adapter; or one sentence.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from peft import LoraConfig, PeftConfig

from ropo.models.adapters import read_peft_config
from ropo.models.quantized import quantization
from ropo.options import Rule, check_options, option

DTYPES = ("float32", "bfloat16", "float16", "auto")
_OF_4BIT = ("bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "use_bnb_nested_quant")


@dataclass
class ModelOptions:
    """The model that is trained; names are those of TRL where it has the option.

    Raises:
        ValueError: If an option is out of range, or ignored without another one.
    """

    model_name_or_path: str | None = option(
        None, "Folder or hub id of the model to align, or of an adapter to train further; it is also the reference."
    )
    dtype: Annotated[str, Rule(choices=DTYPES)] = option(
        "float32",
        "Of the weights: float32 trains best (--bf16 computes fast); auto, bfloat16, float16. With --use_peft and "
        "--bf16, bfloat16 halves what the frozen weights take.",
    )
    attn_implementation: str | None = option(
        None,
        "Attention. Default: what transformers takes for the model, mostly sdpa, which can encode each prompt once per "
        "pair, as eager can.",
    )
    model_revision: str | None = option(None, "Branch, tag or commit of a hub model.")
    trust_remote_code: bool = option(default=False, text="Run code that a hub model brings. Read it first.")
    load_in_4bit: bool = option(
        default=False,
        text="Load the linear layers in 4 bits (QLoRA); needs bitsandbytes, implies use_peft.",
    )
    load_in_8bit: bool = option(default=False, text="Load the linear layers in 8 bits; likewise.")
    bnb_4bit_quant_type: Annotated[str, Rule(choices=("nf4", "fp4"))] = option("nf4", "Kind of 4-bit numbers.")
    bnb_4bit_compute_dtype: Annotated[str | None, Rule(choices=DTYPES[:3])] = option(
        None, "Of products with 4-bit weights. Default: bfloat16 where a GPU has it, float32 on a CPU."
    )
    use_bnb_nested_quant: bool = option(default=True, text="Quantize the scales of 4-bit weights, too.")
    use_peft: bool = option(default=False, text="Train a LoRA adapter instead of the whole model.")
    peft_config: str | None = option(
        None,
        "JSON or YAML file with the configuration of an adapter, read by PEFT: any kind that it has. Implies use_peft.",
    )
    lora_r: Annotated[int, Rule(low=1)] = option(16, "Rank of the adapter.")
    lora_alpha: int = option(32, "Scale of the adapter.")
    lora_dropout: Annotated[float, Rule(low=0, below=1)] = option(0.0, "Dropout of the adapter.")
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that get an adapter. Default: all linear layers but the head."}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained whole and saved with the adapter."}
    )
    use_rslora: bool = option(default=False, text="Scale the adapter by lora_alpha/√r (rsLoRA).")
    use_dora: bool = option(default=False, text="Train lengths and directions of the weights apart (DoRA).")

    def check(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            ValueError: If it does.
        """
        check_options(self)
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit needs load_in_8bit left out; got both. Leave one out.")
        given = self._given()
        for name in _OF_4BIT:
            if name in given and not self.load_in_4bit:
                raise ValueError(f"{name} needs load_in_4bit; got it alone. Add --load_in_4bit.")
        if self.peft_config is not None and (lora := self._lora(given)):
            raise ValueError(f"{lora[0]} needs peft_config left out, which says it all; got both. Write it there.")
        if (lora := self._lora(given)) and not self.trains_adapter:
            raise ValueError(f"{lora[0]} needs use_peft, without which the whole model is trained. Add --use_peft.")

    @property
    def trains_adapter(self) -> bool:
        """Whether a new adapter is asked for, or implied: quantized weights and `peft_config` do."""
        return self.use_peft or self.load_in_4bit or self.load_in_8bit or self.peft_config is not None

    def of_new_adapter(self) -> list[str]:
        """The options given that say what a new adapter is like."""
        return [*self._lora(self._given()), *(["peft_config"] if self.peft_config is not None else [])]

    def _given(self) -> list[str]:
        return [one.name for one in dataclasses.fields(self) if getattr(self, one.name) != one.default]

    @staticmethod
    def _lora(given: list[str]) -> list[str]:
        return [name for name in given if name.startswith(("lora_", "use_rslora", "use_dora"))]

    def load_options(self) -> dict[str, Any]:
        """What `from_pretrained` is given.

        Raises:
            ValueError: If bitsandbytes is needed and not installed.
        """
        options: dict[str, Any] = {
            "dtype": self.dtype,
            **({} if self.attn_implementation is None else {"attn_implementation": self.attn_implementation}),
            "revision": self.model_revision,
            "trust_remote_code": self.trust_remote_code,
        }
        if self.load_in_4bit or self.load_in_8bit:
            options["quantization_config"] = quantization(
                num_bits=4 if self.load_in_4bit else 8,
                quant_type=self.bnb_4bit_quant_type,
                is_nested=self.use_bnb_nested_quant,
                compute_dtype=self.bnb_4bit_compute_dtype,
            )
        return options

    def new_adapter(self) -> PeftConfig | None:
        """The configuration of the adapter to train; None to train the whole model."""
        if self.peft_config is not None:
            return read_peft_config(Path(self.peft_config))
        if not self.trains_adapter:
            return None
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_target_modules or "all-linear",
            modules_to_save=self.lora_modules_to_save,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            task_type="CAUSAL_LM",
        )
