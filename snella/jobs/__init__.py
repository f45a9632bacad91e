"""What one job of the workflow calls, and what the workflow's rules ask."""
