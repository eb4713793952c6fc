"""What a neuron is, sets of neurons, and their activations as they stream by."""
