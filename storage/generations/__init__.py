"""Text that a teacher wrote: responses to prompts, in shards of their own under the same commit log as logits."""
