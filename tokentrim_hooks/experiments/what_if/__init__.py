"""What another setting would have pruned, answered from a log: a policy's own judge is asked again."""
