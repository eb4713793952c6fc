"""What carries a concept: one number per neuron, with kind and unit."""
