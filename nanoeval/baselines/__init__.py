"""Benchmarks from one YAML file: MMLU, HellaSwag, MMMU-Pro, TextVQA, MME, and suites of them."""
