"""Recovery fine-tuning: some training after slicing gives back a part of the loss."""

from eigenslice.finetune.recovery import FinetuneResult, finetune
from eigenslice.options.finetuning import RECIPES, FinetuneOptions, with_recipe

__all__ = ["RECIPES", "FinetuneOptions", "FinetuneResult", "finetune", "with_recipe"]
