"""What the training examples share: real data out of Debian packages, the tasks, and the training loop."""
