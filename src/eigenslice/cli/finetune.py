"""`eigenslice finetune`."""

import json
import os

from eigenslice.cli.commands import Given
from eigenslice.cli.console import errors, output, progress_bar
from eigenslice.cli.options import ManifestAsJson, Private, PushToHub, Quiet, RecipeName, Revision
from eigenslice.options.finetuning import FinetuneOptions, with_recipe


def finetune(
    given: Given[FinetuneOptions],
    revision: Revision = None,
    recipe: RecipeName = None,
    push_to_hub: PushToHub = None,
    private: Private = False,
    as_json: ManifestAsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train a sliced model for a while, so that it recovers; the result is stored as before."""
    from eigenslice.checkpoint.hub import check_hub, push
    from eigenslice.finetune import finetune as run
    from eigenslice.report.stated_loss import loss_text
    from eigenslice.runtime.output import partial_path

    values = given.at(revision)
    data = values.pop("data", {})
    options = with_recipe(recipe, values, data)
    others = os.environ.get("RANK", "0") != "0"  # of several processes, one speaks
    if push_to_hub and not others:
        check_hub(push_to_hub)

    def left() -> str:
        partial = partial_path(options.output)
        if not partial.exists():
            return "nothing was written"
        return f"run the same command with --resume to go on, or remove {partial}"

    with progress_bar(quiet or others, interrupted=left) as progress:
        result = run(options, progress)
    if others:
        return
    if push_to_hub:
        errors.print(push(options.output, push_to_hub, private), markup=False, highlight=False, soft_wrap=True)
    if as_json:
        output.print_json(json.dumps(result.manifest))
    elif not quiet:
        section = result.manifest["finetune"]
        output.print(
            f"{options.output}: perplexity {result.before.perplexity:.4f} -> {result.after.perplexity:.4f} on "
            f"{result.after.tokens} held-out tokens, {section['steps']} steps, {section['trained']}",
            highlight=False,
            soft_wrap=True,
        )
        if section["teacher"]:
            output.print(loss_text(result.manifest), highlight=False, soft_wrap=True)
