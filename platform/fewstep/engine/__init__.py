"""The training loop. It knows methods.base and no particular method, and it is independent of Ray."""
