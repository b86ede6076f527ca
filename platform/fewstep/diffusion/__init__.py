"""Diffusion algebra: noise levels, schedules, draws, losses, samplers. Imports torch only; no weights, no state."""
