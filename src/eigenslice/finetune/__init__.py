"""Recovery fine-tuning: some training after slicing gives back part of what the cut took."""

from eigenslice.finetune.options import RECIPES, FinetuneOptions, with_recipe
from eigenslice.finetune.recovery import FinetuneResult, finetune

__all__ = ["RECIPES", "FinetuneOptions", "FinetuneResult", "finetune", "with_recipe"]
