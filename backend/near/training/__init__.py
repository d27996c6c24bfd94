"""Training of the compact pack: data, precomputed caches, the renderer's and the flows' trainers."""
