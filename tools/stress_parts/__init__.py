"""The backend under stress: each part is a function of sizes that returns what it measured; tests call them small."""
