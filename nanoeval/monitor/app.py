"""The program that Streamlit runs; see `navigation`."""

from nanoeval.monitor.navigation import show_app

show_app()
