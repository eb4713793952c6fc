"""Ways back: training a model from which something was removed."""
