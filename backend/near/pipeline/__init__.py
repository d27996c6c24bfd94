"""Photo or mesh -> asset, asset -> frame."""
