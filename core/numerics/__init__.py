"""Number formats: matrix products, rounding to few bits, promotion to fp32, exact state, seeds from names."""
