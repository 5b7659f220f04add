"""When to prune, and which tokens: tensors in, answers out. Knows no model."""
