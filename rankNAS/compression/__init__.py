"""Model and space to statistics, factors and compressed networks."""
