"""Tasks that an agent does on a computer, step by step, until a grader looks at what it left."""
