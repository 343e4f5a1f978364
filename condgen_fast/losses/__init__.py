"""Training losses built from the package's ops."""
