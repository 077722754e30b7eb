"""How good samples are: features, metrics between sets, memorisation, and what a chain's stages and links cost."""
