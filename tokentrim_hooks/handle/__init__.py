"""What `patch` returns, and what a user should hear of a patch that does nothing."""
