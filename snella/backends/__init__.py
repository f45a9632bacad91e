"""How one layer's update is computed: what it is, who computes it, and the fast implementations."""
