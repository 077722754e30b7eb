"""Speed: what `chaindiff bench` measures, beside peers, in one run, and how two runs are compared."""
