"""Analysis of what a network has learned: features, similarity of parts, reconstructions, figures."""
