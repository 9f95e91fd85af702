"""What a weight's first values depend on: its operator and fan, the activation after it, its siblings, its shape ν."""
