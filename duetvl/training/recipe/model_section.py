"""The section `model` of a recipe: which model is trained, in which dtype, and which of its parts."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, Field, model_validator

from duetvl.models.qwen_vl.parameters import PARTS
from duetvl.training.recipe.section import Place, Section, contradiction, one_or_more

FROZEN: Final = ("vision", "projector")  # what is not trained by default


class ModelSection(Section):
    """The model, and which parts of it are trained."""

    path: Place = Field(
        min_length=1,
        description="Directory of the model in the Hugging Face layout, or an id to download: "
        "`Qwen/Qwen2.5-VL-7B-Instruct` from Hugging Face, `modelscope:Qwen/Qwen2.5-VL-7B-Instruct` from ModelScope. Or "
        "a run (`runs/x`, `runs/x@1200`), an adapter (merged while it is read), or a MindSpeed-MM directory.",
    )
    base: Place | None = Field(
        default=None,
        min_length=1,
        description="Directory in the Hugging Face layout with the configuration and tokenizer, if `path` is a "
        "MindSpeed-MM directory. If `path` is a run or an adapter: its base model, if that has moved.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Storage dtype of the weights. `auto` is the one that `config.json` names (bfloat16 for the "
        "published models); on a CPU, where PyTorch's float16 products are slow and MindSpore computes bfloat16 in "
        "float32, and on a device that does not have it, `auto` is float32. With bfloat16 and float16 the optimizer "
        "keeps float32 master weights; float16 is trained with a scaled loss (`optim.loss_scale`).",
    )
    freeze: Annotated[tuple[str, ...], BeforeValidator(one_or_more)] = Field(
        default=FROZEN,
        description="What is not trained: vision (the tower), projector (its merger), language, or patterns of names "
        "such as `model.layers.0-7`, `visual.blocks.*.attn` or `*norm*`; `[]` trains all. By default vision and "
        "projector, as in MindSpeed-MM's guides, LLaMA-Factory and ms-swift: both were trained on far more pictures "
        "than a fine-tuning set has, and a frozen tower keeps no activations and has no backward pass. (TRL trains "
        "all.) With `lora`, nothing by default, because `lora.targets` selects what is trained.",
    )

    @model_validator(mode="after")
    def _trainable(self) -> ModelSection:
        if set(self.freeze) >= set(PARTS):
            raise contradiction(f"model.freeze names every part ({', '.join(PARTS)}): nothing would be trained")
        return self
