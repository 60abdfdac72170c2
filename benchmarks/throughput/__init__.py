"""How fast passes are, beside the ways that people run them today."""
