"""Networks and weights of other projects: read as data, never executed."""

from chaindiff.interop.edm import Published, load_edm_network, published

__all__ = ["Published", "load_edm_network", "published"]
