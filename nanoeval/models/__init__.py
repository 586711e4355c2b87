"""Models that evals can ask. `protocol` says what a model is."""

from nanoeval.models.protocol import Completion, ContinuationScore, Model, Prompt, Usage

__all__ = ["Completion", "ContinuationScore", "Model", "Prompt", "Usage"]
