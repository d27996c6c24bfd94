"""The backend as a service: a broker that never touches a model, and a worker that may die (DESIGN sections 3, 6, 7)."""
