"""The training loop. It knows methods.base and no particular method, and it has never heard of Ray."""
