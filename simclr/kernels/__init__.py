"""Hand-written device kernels, each beside the plain-torch function that defines it."""
