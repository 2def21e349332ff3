"""The search for the plan that loses least."""
