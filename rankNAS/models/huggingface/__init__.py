"""Networks of ``transformers``: described in files, rebuilt from there, and written as folders."""
