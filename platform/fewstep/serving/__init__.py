"""Serving: a generator behind HTTP, without Ray. cluster/serve.py puts it on Ray Serve."""
