"""Sweeps without a cluster: spaces, proposals, the record of trials, and what may be concluded from them."""
