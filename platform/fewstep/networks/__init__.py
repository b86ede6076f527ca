"""Anything with weights: denoisers over diffusers models, heads, averages, and the folders they are kept in."""
