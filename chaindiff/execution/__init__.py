"""How networks are executed: eager or compiled, in which precision and layout; compiled work kept on disk."""
