"""Reference training scripts, each read top to bottom; they import the package, nothing imports them but the command."""
