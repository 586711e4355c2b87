"""Tests, one module per area; parts that several of them share are in packages beside them."""
