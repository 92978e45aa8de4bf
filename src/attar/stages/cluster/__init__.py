"""Groups of alike items."""
