"""The toy bench: a package so that its `make` is another module than that of the demo."""
