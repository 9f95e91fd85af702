"""ggpass: a compiler for neural networks with generalized-Gaussian priors."""
