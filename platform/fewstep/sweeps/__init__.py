"""Sweeps without a cluster: search spaces, proposals, the record of trials, verdict and report."""
