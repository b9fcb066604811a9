"""Images → shards → batches."""
