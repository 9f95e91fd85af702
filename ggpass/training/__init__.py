"""Training with generalized-Gaussian priors: what needs a weight, its gradient and its optimizer, and no target."""
