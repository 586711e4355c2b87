"""Conveniences around the library, used by evals in the field."""
