"""Parquet shards in, batches of tensors out, in an order that is a function of (seed, epoch)."""
