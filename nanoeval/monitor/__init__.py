"""The monitor: a Streamlit app that shows run sets while they run and afterwards.

`app.py` is the program that Streamlit runs; `python -m nanoeval.bin.mon` starts it. It reads
columns through `nanoeval._inspect` and `nanoeval._inspect_run`, and unpickles nothing.
"""
