"""Small models, and losses of each example."""
