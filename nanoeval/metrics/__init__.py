"""Summaries of results: `standard` for graded answers, `agents` for rollouts that may break."""
