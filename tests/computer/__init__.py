"""Parts that the tests of computer tasks share."""
