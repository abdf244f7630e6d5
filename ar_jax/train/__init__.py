"""Train state, optimiser, step and loop."""
