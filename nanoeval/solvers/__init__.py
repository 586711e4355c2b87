"""Solvers: what answers a question. `mcq` and `short_answer` bring the evals that use them."""
