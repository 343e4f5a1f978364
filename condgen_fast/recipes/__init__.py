"""Reference training scripts, each read top to bottom; they import the package, only the command imports them."""
