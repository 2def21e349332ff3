"""What a user asks of a model: the budget, the multiples of its sizes, and plans with given sizes."""

import math
from dataclasses import dataclass, field

from eigenslice.model.anatomy import Anatomy
from eigenslice.options.slicing import SliceOptions
from eigenslice.plan.forms import choose_form
from eigenslice.plan.layout import stored_parameters
from eigenslice.plan.plan import Plan, Sizes


@dataclass(frozen=True)
class Request:
    """The user's options for a model.

    Attributes:
        anatomy: The dense model.
        options: The options of the command.
        tied: True if embedding and head are to stay one matrix.
        plans: The plans that were asked for so far. Each took transformers' model of its config.
    """

    anatomy: Anatomy
    options: SliceOptions
    tied: bool
    plans: dict[Sizes, Plan] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def budget(self) -> int:
        """Largest number of parameters that a plan for --keep may store."""
        assert self.options.keep is not None
        return int(self.options.keep * self.anatomy.parameters)

    def plan(self, sizes: Sizes) -> Plan:
        """Return the plan with these sizes, in the form that was asked for.

        Raises:
            OptionsError: a stock result was asked for and none fits.
        """
        if sizes not in self.plans:
            basis, form = self.options.basis, self.options.form
            self.plans[sizes] = choose_form(self.anatomy, sizes, basis=basis, tied=self.tied, choice=form)
        return self.plans[sizes]

    def fits(self, plan: Plan) -> bool:
        """Return whether a plan stores no more than the budget."""
        return stored_parameters(self.anatomy, plan) <= self.budget

    def step(self, sizes: Sizes | None = None) -> int:
        """Return the number that chosen widths are multiples of: with --portable, of the query heads' number, too."""
        if not self.options.portable:
            return self.options.multiple
        kept, dense = self.anatomy.config.num_attention_heads, self.anatomy.head_counts
        if sizes is not None and dense is not None:
            kept = sizes.query_heads or dense.group * (sizes.kv_heads or dense.kv)
        return math.lcm(self.options.multiple, kept)


def request_of(anatomy: Anatomy, options: SliceOptions) -> Request:
    """Return the request of a command's options; embedding and head stay tied where they can."""
    tied = anatomy.can_stay_tied and options.basis == "global" and not options.untie
    return Request(anatomy, options, tied)
