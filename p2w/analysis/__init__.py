"""Looks at what was learned: reconstructions, similarity of parts, figures."""
