"""What the command line prints, and how. Imports nothing heavy: that waits until it is needed."""
