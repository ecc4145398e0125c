"""Stores in buckets: settings, bytes, retries, and a local cache of shards."""
