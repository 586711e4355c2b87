"""Evals that the programs in the repository's `examples` folder run."""
