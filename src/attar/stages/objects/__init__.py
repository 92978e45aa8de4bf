"""Objects found in images without labels: boxes, masks and kinds."""
